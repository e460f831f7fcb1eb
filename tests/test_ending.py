"""Where texts end: at end-of-text tokens of any kind, and at stop strings, which end decoding as well."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

import dllm
from byte_words import byte_tokenizer
from contract_rig import BY_NAME, GUIDED, LEARNED
from dllm.cache import NoCache
from dllm.decoding import ending
from dllm.decoding.ending import StopStrings, cut
from dllm.decoding.options import Options
from dllm.evaluation.journal import Journal
from dllm.evaluation.records import Query
from dllm.evaluation.run_folder import trace
from dllm.evaluation.runner import Runner, Setting
from dllm.models.tokenizers import text_of
from dllm.resolve import names
from dllm.samplers import ARGuided, Learn2PD, Vanilla
from engine_rig import waiting_engine
from models import random_dream, random_filter, random_guide, random_llada
from test_reads import waiting

LM = random_llada(tokenizer=True, seed=3)
WORDS = LM.tokenizer
PROMPTS = [[5, 9, 3], [7], [11, 12, 13, 14, 15, 16]]
SHORT: dict[str, Any] = {"gen_length": 18, "block_length": 8, "batch_size": 2, "seed": 0}
SAMPLERS = BY_NAME | {
    "ar_guided": ARGuided(random_guide(len(WORDS)), accept="topk", top_k=9),
    **{
        f"eotp={eotp}": Learn2PD(random_filter(), threshold=0.8, allow_mismatch=True, eotp=eotp)  # type: ignore[arg-type]
        for eotp in ("published", "accepted", "safe")
    },
}
assert all(each in BY_NAME.values() for each in (LEARNED, GUIDED))


BYTES = byte_tokenizer()


def ids(text: str) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.array(BYTES(text).input_ids)


class TestText:
    def test_it_ends_before_a_token_that_is_not_special(self) -> None:
        turn = BYTES.convert_tokens_to_ids("<|turn|>")
        tokens = ids("Yes.<|turn|>No.")
        assert cut(BYTES, tokens, (), (turn,)) == ("Yes.", 5)
        assert cut(BYTES, tokens, ("o",), (turn,)) == ("Yes.", 5)
        assert cut(BYTES, tokens, ("<|turn|>", "s"), (turn,)) == ("Ye", 3)
        assert cut(BYTES, tokens, ("turn",), (turn,)) == ("Yes.", 5)
        assert cut(BYTES, tokens)[0] == "Yes.<|turn|>No."

    @pytest.mark.parametrize("make", [random_llada, random_dream])
    def test_an_ordinary_word_that_ends_texts_is_in_no_text(self, make: Any) -> None:
        lm = make(tokenizer=True, seed=3)
        free = dllm.generate(lm, PROMPTS, stop_at_eos=False, **SHORT)
        word = int(free.completions[0, 5])
        for stop in (True, False):
            options = {"eos_token_id": [WORDS.eos_token_id, word], "stop_at_eos": stop, **SHORT}
            result = dllm.generate(lm, PROMPTS, **options)
            ends = [row.tolist().index(word) if word in row else len(row) for row in result.completions]
            expected = [
                WORDS.decode(row[:end], skip_special_tokens=True)
                for row, end in zip(result.completions.tolist(), ends, strict=True)
            ]
            assert ends[0] <= 5
            assert result.texts == expected
            assert [answer.text for answer in sorted(dllm.as_completed(lm, PROMPTS, **options), key=_index)] == expected
            assert result.stats.tokens == sum(min(end + 1, 18) for end in ends)

    def test_infilling_is_ended_by_nothing(self) -> None:
        word, mask = 20, LM.backbone.mask_token_id
        result = dllm.infill(LM, [[word, mask, word, mask, 21]], eos_token_id=word)
        assert result.texts == [WORDS.decode(result.sequences[0], skip_special_tokens=True)]
        assert result.stats.tokens == 2

    def test_the_stop_string_that_is_complete_first_ends_it(self) -> None:
        assert cut(BYTES, ids("xabcd"), ("abcd", "b")) == ("xa", 3)
        assert cut(BYTES, ids("xabcd"), ("c", "abc")) == ("x", 4)

    def test_special_tokens_before_a_stop_string_are_left_out(self) -> None:
        assert cut(BYTES, ids("a<|special|>b###c"), ("###",)) == ("ab", 6)
        assert cut(BYTES, ids("a<|special|>b"), ("<|special|>",)) == ("a", 2)
        assert cut(BYTES, ids("größer 😀 x"), ("😀",)) == ("größer ", 13)

    def test_text_that_reads_like_a_special_token_stays(self) -> None:
        tokens = np.concatenate([ids("a<"), ids("|special|>b<|special|>c###")])
        assert BYTES.decode(tokens) == "a<|special|>b<|special|>c###"
        assert cut(BYTES, tokens, ("###",))[0] == "a<|special|>bc"


def byte_fallback() -> PreTrainedTokenizerFast:
    """Bytes that are no character replace those around them: a newline is gone where half a character follows."""
    words = ["a", "b", "<0x0A>", "<0xE2>", "<0xF0>", "<0x9F>", "<unk>"]
    made = Tokenizer(models.BPE({word: n for n, word in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True))
    made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=made)


class TestSearch:
    @pytest.mark.parametrize("seed", range(6))
    def test_growing_texts_are_searched_as_whole_ones(self, seed: int) -> None:
        draw = random.Random(seed)
        pieces = ["a", "b", "ß", "😀", "<|special|>", "\n", "###", "aab", "\n\n"]
        stops = draw.sample(["###a", "ß😀", "\n\n", "<|special|>a", "aabaab", "ba😀ß"], 2)
        text = ids("".join(draw.choice(pieces) for _ in range(60)))
        whole, search, at = cut(BYTES, text, stops)[1], StopStrings(BYTES, stops, ()), 0
        found = None
        while found is None and at < len(text):
            at = min(len(text), at + draw.choice([1, 1, 2, 3, 9]))
            found = search.find(text[:at])
        if found is None:
            assert not any(stop in BYTES.decode(text) for stop in stops)
        assert whole == (found or len(text))

    @pytest.mark.parametrize("seed", range(3))
    def test_texts_that_become_shorter_end_alike_however_many_tokens_a_step_commits(self, seed: int) -> None:
        tokenizer = byte_fallback()
        draw = random.Random(seed)
        shrunk = 0
        for _ in range(200):
            tokens = np.array([draw.randrange(len(tokenizer)) for _ in range(8)])
            stops = [draw.choice(["\n", "b", "\nb", "a"])]
            found = []
            for size in (1, 3, 8):
                search, counts = StopStrings(tokenizer, stops, ()), range(size, 8 + size, size)
                found.append(next((n for at in counts if (n := search.find(tokens[:at])) is not None), None))
            assert len(set(found)) == 1
            assert cut(tokenizer, tokens, stops)[1] == (found[0] or 8)
            shrunk += found[0] is not None and stops[0] not in tokenizer.decode(tokens.tolist())
        assert shrunk

    def test_a_long_text_is_decoded_about_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        read, decode = [], type(BYTES).decode
        monkeypatch.setattr(
            type(BYTES), "decode", lambda self, tokens, **rest: read.append(len(tokens)) or decode(self, tokens, **rest)
        )
        search, text = StopStrings(BYTES, ("\n\nQ:",), ()), ids("x" * 4000)
        for at in range(1, len(text) + 1):
            assert search.find(text[:at]) is None
        assert max(read) < 60
        assert sum(read) < 50 * len(text)


def _index(answer: dllm.Answer) -> int:
    return answer.index


def stops_of(texts: list[str | None]) -> list[str]:
    """Strings out of the middle of texts, across tokens."""
    return [text[len(text) // 3 : len(text) // 3 + 9] for text in texts if text is not None and len(text) > 30][:2]


def held(lm: dllm.LanguageModel, sampler: Any, cache: Any, **more: Any) -> None:
    """Stopping gives the text that cutting gives, in no more forwards."""
    options = SHORT | more
    free = dllm.generate(lm, PROMPTS, sampler, cache, **options)
    stops = stops_of(free.texts)
    assert stops
    result = dllm.generate(lm, PROMPTS, sampler, cache, stop=stops, **options)
    eos, tokens = lm.backbone.eos_token_ids, 0
    for row, (before, after) in enumerate(zip(free.completions.numpy(), result.completions.numpy(), strict=True)):
        text, count = cut(lm.tokenizer, before, stops, eos)
        assert result.texts[row] == text
        assert before[:count].tolist() == after[:count].tolist()
        if count < cut(lm.tokenizer, before, (), eos)[1]:
            assert set(after[count:].tolist()) <= {eos[0]}
            assert set(result.commit_step[row, count:].tolist()) <= {-1}
        assert result.nfe[row] <= free.nfe[row]
        tokens += count
    assert result.stats.tokens == tokens
    assert result.texts != free.texts


class TestStopping:
    @pytest.mark.parametrize("name", SAMPLERS)
    def test_text_is_that_of_the_whole_run_whatever_the_sampler(self, name: str) -> None:
        held(LM, SAMPLERS[name], "none", stop_at_eos=not name.startswith("eotp"))

    @pytest.mark.parametrize("name", [name for name in names("cache") if name != "none"])
    def test_text_is_that_of_the_whole_run_whatever_the_cache(self, name: str) -> None:
        held(LM, "threshold", name)

    @pytest.mark.parametrize("sampler", ["vanilla", "freedave", "oracle"])
    def test_other_backbones_and_drawing_make_no_difference(self, sampler: str) -> None:
        held(random_dream(tokenizer=True, seed=4), sampler, "dual", temperature=0.5 if sampler != "freedave" else 0.0)

    def test_it_means_the_same_however_rows_are_asked_for(self) -> None:
        options = SHORT | {"stop": stops_of(dllm.generate(LM, PROMPTS, **SHORT).texts), "batch_size": 3}
        result = dllm.generate(LM, PROMPTS, "threshold", **options)
        answers = sorted(dllm.as_completed(LM, PROMPTS, "threshold", **options), key=_index)
        assert [answer.text for answer in answers] == result.texts
        assert [answer.nfe for answer in answers] == result.nfe.tolist()
        assert sum(answer.tokens for answer in answers) == result.stats.tokens
        alone = dllm.generate(LM, PROMPTS[1:2], "threshold", **options | {"seed": 1})
        assert alone.completions[0].tolist() == result.completions[1].tolist()
        options.pop("batch_size")
        *_, last = dllm.stream(LM, PROMPTS, "threshold", **options)
        assert torch.equal(last.tokens, result.sequences)

    def test_policies_that_reproduce_another_reproduce_what_it_gives(self) -> None:
        free = dllm.generate(LM, PROMPTS, "vanilla", **SHORT)
        options = SHORT | {"stop": stops_of(free.texts)}
        results = [dllm.generate(LM, PROMPTS, name, **options) for name in ("vanilla", "oracle", "freedave")]
        assert results[0].sequences.tolist() == results[1].sequences.tolist() == results[2].sequences.tolist()

    def test_forwards_are_saved(self) -> None:
        free = dllm.generate(LM, PROMPTS, "vanilla", **SHORT | {"stop_at_eos": False, "block_length": 4})
        stop = stops_of(free.texts)[0]
        result = dllm.generate(LM, PROMPTS, "vanilla", stop=stop, **SHORT | {"stop_at_eos": False, "block_length": 4})
        assert int(result.nfe.sum()) < int(free.nfe.sum()) == 18 * len(PROMPTS)

    def test_rows_whose_text_did_not_grow_are_not_decoded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        calls: list[int] = []
        find = StopStrings.find
        monkeypatch.setattr(StopStrings, "find", lambda self, text: calls.append(0) or find(self, text))
        grown, seen = 0, 0

        def callback(step: Any) -> None:
            nonlocal grown, seen
            tokens = step.tokens[0, -18:]
            upto = int((np.append(tokens, step.mask_token_id) == step.mask_token_id).argmax())
            grown, seen = grown + (upto > seen), max(seen, upto)

        dllm.generate(
            LM, PROMPTS[:1], "vanilla", stop="never in it", callback=callback, **SHORT | {"stop_at_eos": False}
        )
        assert len(calls) == grown + 1 < 19  # and once for the answer

    def test_a_special_token_stops_that_ends_no_text(self) -> None:
        special = WORDS.convert_tokens_to_ids("<|unk|>")
        free = dllm.generate(LM, PROMPTS, stop_at_eos=False, **SHORT)
        swapped = int(free.completions[0, 4])
        lm = random_llada(tokenizer=True, seed=3)
        weight = lm.backbone.get_output_embeddings().weight
        weight.data[[special, swapped]] = weight.data[[swapped, special]]
        weight = lm.backbone.get_input_embeddings().weight
        weight.data[[special, swapped]] = weight.data[[swapped, special]]
        result = dllm.generate(lm, PROMPTS, stop="<|unk|>", stop_at_eos=False, **SHORT)
        end = free.completions[0].tolist().index(swapped)
        assert result.texts[0] == WORDS.decode(free.completions[0, :end], skip_special_tokens=True)

    @pytest.mark.parametrize("stop", [None, "never in it"])
    def test_a_row_whose_text_cannot_be_decoded_fails_alone(self, stop: str | None, monkeypatch: Any) -> None:
        options = SHORT | {"stop_at_eos": False, "stop": stop}
        free = dllm.generate(LM, PROMPTS, **options)
        odd = set(free.completions[0].tolist()) - set(free.completions[1:].flatten().tolist())

        def text(tokenizer: Any, tokens: list[int], **options: Any) -> str:
            if odd.intersection(tokens):
                raise ValueError("no text")
            return text_of(tokenizer, tokens, **options)

        monkeypatch.setattr(ending, "text_of", text)
        result = dllm.generate(LM, PROMPTS, **options)
        assert odd
        assert result.errors == ("no text", None, None)
        assert result.texts == [None, *free.texts[1:]]

    def test_the_device_is_read_no_more_often(self, monkeypatch: pytest.MonkeyPatch) -> None:
        running, found = waiting_engine(LM, PROMPTS, "vanilla", "none", **SHORT, stop="e").steps(), []
        next(running)
        while True:
            with waiting(monkeypatch) as seen:
                if next(running, None) is None:
                    break
            found.append(tuple(seen))
        assert set(found) == {("cpu",)}

    def test_answers_of_an_evaluation_end_there_too(self) -> None:
        free = dllm.generate(LM, PROMPTS[:1], **SHORT).texts
        (stop,), options = stops_of(free), {"gen_length": 18, "block_length": 8}
        settings = [Setting(LM, Vanilla(), NoCache(), options | more) for more in ({}, {"stop": stop})]
        until = Runner(settings[0], Journal(None)).answer([Query("a", PROMPTS[0], (stop,))])[0]
        stopped = Runner(settings[1], Journal(None)).answer([Query("a", PROMPTS[0])])[0]
        assert stopped.text == until.text != free[0]
        assert stopped.tokens == until.tokens
        assert stopped.nfe <= until.nfe

    def test_what_is_kept_of_an_evaluation_knows_what_ended_its_texts(self) -> None:
        options = {"gen_length": 6, "eos_token_id": [20, 21]}
        runner = Runner(Setting(LM, Vanilla(), NoCache(), options), Journal(None))
        assert trace(runner, runner.answer([Query("a", PROMPTS[0])])).eos_token_ids == (20, 21)


class TestRefusals:
    @pytest.mark.parametrize("stop", ["", ["a", ""], 5, [5], b"x", {"a": 1}])
    def test_what_is_no_stop_string(self, stop: Any) -> None:
        with pytest.raises(ValueError, match=r"^stop=.*(empty string|wrong type)"):
            Options(stop=stop)

    def test_it_needs_a_tokenizer_and_something_to_stop(self) -> None:
        with pytest.raises(ValueError, match=r"stop='x' needs a tokenizer"):
            dllm.generate(random_llada(), [[4]], stop="x")
        with pytest.raises(ValueError, match=r"stop has no effect on infill"):
            dllm.infill(LM, [[4, LM.backbone.mask_token_id]], stop="x")


def test_no_ids_that_end_a_text_are_refused() -> None:
    with pytest.raises(ValueError, match=r"eos_token_id=\[\] is empty; use ids from 0 to"):
        dllm.generate(LM, PROMPTS[:1], eos_token_id=[])
