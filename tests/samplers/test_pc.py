"""PC-Sampler: the order it decodes in, and the tables of token frequencies it needs."""

from __future__ import annotations

from math import exp, log, nan
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import dllm
from commands import command
from dllm.files import BUNDLED
from dllm.frequencies import Frequencies, bundled_frequencies, count_tokens, load_frequencies
from dllm.samplers import PC, Vanilla
from dllm.tasks import word_problems
from models import random_dream, random_frequencies, random_llada
from sampler_rig import best_at, chosen, confidences, logits_at

MAKERS = pytest.mark.parametrize("make", [random_llada, random_dream])
PROMPTS = [[3, 4], [5], [7, 8, 9, 10, 11]]
OPTIONS: dict[str, Any] = {"gen_length": 24, "block_length": 8, "stop_at_eos": False}
TABLE = random_frequencies()
EVEN = Frequencies({str(k): 1 for k in range(64)})


def spelt_out(lm: Any, prompt: list[int], sampler: PC, length: int = 24, block: int = 8) -> list[int]:
    """Tokens of one prompt; the steps are a multiple of the blocks."""
    mask, start, total = lm.backbone.mask_token_id, len(prompt), sum(TABLE.counts.values())
    canvas, each = [*prompt, *[mask] * length], (sampler.steps or length) * block // length
    for first in range(start, start + length, block):
        for step in range(each):
            tokens, confidence = best_at(lm, logits_at(lm, canvas))

            def score(place: int, first: int = first, tokens: Any = tokens, confidence: Any = confidence) -> float:
                share = TABLE.counts.get(str(int(tokens[place])), 1) / total
                known = min(-float(confidence[place]) * log(share + 1e-9), sampler.clip)
                return exp(-sampler.position_weight * (place - first)) * known

            left = [place for place in range(first, first + block) if canvas[place] == mask]
            for place in sorted(left, key=score, reverse=True)[: block // each + (step < block % each)]:
                canvas[place] = int(tokens[place])
    return canvas[start:]


@MAKERS
@pytest.mark.parametrize(
    "sampler", [PC(TABLE), PC(TABLE, 0.05, 2.0, 12), PC(TABLE, 0.0, 99.0, 9), PC(TABLE, 1.5, 0.5)], ids=range(4)
)
def test_decodes_as_spelt_out(make: Any, sampler: PC) -> None:
    lm = make()
    out = dllm.generate(lm, PROMPTS, sampler, batch_size=2, **OPTIONS)
    for row, prompt in enumerate(PROMPTS):
        assert out.completions[row].tolist() == spelt_out(lm, prompt, sampler)
        assert out.nfe[row] == (sampler.steps or 24)


@MAKERS
def test_the_ends_are_the_order_of_the_confidence_and_left_to_right(make: Any) -> None:
    lm = make()
    for steps in (None, 6):
        even, plain = (
            dllm.generate(lm, PROMPTS, sampler, **OPTIONS)
            for sampler in (PC(EVEN, 0.0, steps=steps), Vanilla(steps=steps))
        )
        assert torch.equal(even.sequences, plain.sequences)
        assert torch.equal(even.commit_step, plain.commit_step)
    ordered = dllm.generate(lm, PROMPTS, PC(TABLE, 50.0), **OPTIONS)
    assert ordered.commit_step.tolist() == [list(range(24))] * len(PROMPTS)


def test_frequent_tokens_wait() -> None:
    # The rig's prediction is token 0 everywhere.
    frequent, rare = (Frequencies({"0": many, "1": 100 - many}) for many in (99, 1))
    assert chosen(PC(rare, 0.25), [0.5, 0.9, 0.2]) == [1]
    assert chosen(PC(rare, 0.25, clip=0.1), [0.5, 0.9, 0.2]) == [0]  # both are clipped
    assert chosen(PC(frequent, 0.0), [0.5, 0.9, 0.2]) == [1]


@given(confidences, st.floats(0, 3), st.floats(0, 3))
def test_a_larger_weight_commits_no_later_position(values: list[float], one: float, other: float) -> None:
    low, high = sorted((one, other))
    rare = Frequencies({"0": 1, "1": 99})
    assert chosen(PC(rare, high), values) <= chosen(PC(rare, low), values)


class TestTables:
    def test_counts_texts_and_ids(self) -> None:
        lm = random_llada(tokenizer=True)
        texts = ["Tom has 12 pens.", "Tom finds 2."]
        table = count_tokens(iter(texts), lm.tokenizer)
        ids = [id for text in texts for id in lm.tokenizer(text)["input_ids"]]
        assert {int(id): count for id, count in table.counts.items()} == {id: ids.count(id) for id in ids}
        assert count_tokens([torch.tensor(ids).tolist()], lm.tokenizer) == table
        assert count_tokens([ids]).vocabulary is None

    def test_a_token_that_does_not_occur_counts_as_one_that_does_once(self) -> None:
        shares = Frequencies({"1": 3, "2": 1}).shares(4)
        assert shares.tolist() == [0.25, 0.75, 0.25, 0.25]

    def test_equal_tables_are_one_key(self) -> None:
        one, same, other = (PC(Frequencies({"1": count, "2": 1})) for count in (3, 3, 4))
        assert {one: "found"}[same] == "found"
        assert other not in {one}

    def test_a_text_that_is_none_is_named(self) -> None:
        with pytest.raises(ValueError, match="a text contains lone surrogates"):
            count_tokens(["Tom", "\ud800"], random_llada(tokenizer=True).tokenizer)

    def test_is_read_as_it_was_written(self, tmp_path: Path) -> None:
        lm = random_llada(tokenizer=True)
        table = count_tokens(["Tom has 12 pens."], lm.tokenizer)
        table.save(tmp_path / "deep" / "table.json")
        assert load_frequencies(tmp_path / "deep" / "table.json") == table
        from_file = PC(tmp_path / "deep" / "table.json")
        assert list(from_file.files()) == [tmp_path / "deep" / "table.json"]
        by_file, by_object = (dllm.generate(lm, ["Tom has"], each, gen_length=8) for each in (from_file, PC(table)))
        assert torch.equal(by_file.sequences, by_object.sequences)

    def test_the_bundled_one_is_that_of_the_bundled_task(self) -> None:
        [path] = bundled_frequencies()
        tokenizer = dllm.load("tiny-dream", device="cpu").tokenizer
        # Answers as in training: filled with end-of-text.
        answers = (tokenizer(problem.solution)["input_ids"] for problem in word_problems.problems(3000, 3_000_001))
        filled = ((answer + [tokenizer.eos_token_id] * 64)[:64] for answer in answers)
        assert load_frequencies(path) == count_tokens(filled, tokenizer)
        assert list(PC().files()) == [BUNDLED / "tiny-llada" / "frequencies.json"]

    @pytest.mark.parametrize("name", ["tiny-llada", "tiny-dream"])
    def test_the_bundled_models_need_no_file(self, name: str) -> None:
        lm = dllm.load(name, device="cpu")
        problems = word_problems.problems(4, 1_000_001)
        out = dllm.generate(lm, [problem.question for problem in problems], "pc", gen_length=64)
        assert sum(word_problems.grade(text, p).final for text, p in zip(out.texts, problems, strict=True)) >= 3


class TestRefusals:
    def refused(self, sampler: PC, why: str, lm: Any) -> None:
        lm.backbone.register_forward_pre_hook(lambda *_: pytest.fail("a forward was run"))
        with pytest.raises(ValueError, match=why) as caught:
            dllm.generate(lm, [[5]], sampler, gen_length=4)
        assert len(str(caught.value).splitlines()) == 1

    def test_a_table_of_another_tokenizer(self, tmp_path: Path) -> None:
        other = Frequencies({"5": 3}, "0123456789abcdef")
        other.save(tmp_path / "other.json")
        lm = random_llada(tokenizer=True)
        self.refused(PC(other), "table=of token frequencies was counted with another tokenizer; count ", lm)
        self.refused(PC(tmp_path / "other.json"), r"table='.*other.json' was counted with another tokenizer;", lm)

    def test_tokens_beyond_the_vocabulary(self) -> None:
        self.refused(PC(Frequencies({"64": 3})), "another tokenizer", random_llada())

    def test_no_bundled_table_of_the_tokenizer(self) -> None:
        self.refused(
            PC(), "table=null: there is no bundled table for the tokenizer of this model; count ", random_llada()
        )

    @pytest.mark.parametrize(
        "content",
        ["", "[]", "{}", '{"counts": {}}', '{"counts": {"1": 2}}', '{"counts": {"x": 1}}',
         '{"counts": {"1": 0}}', '{"counts": {"1": "2"}}',
         '{"counts": {"1": 2}, "vocabulary": 3}', '{"counts": {"1": 2}, "vocabulary": null, "more": 3}',
         '{"counts": {"-1": 2}}'],
    )  # fmt: skip
    def test_a_file_that_is_no_table(self, tmp_path: Path, content: str) -> None:
        file = tmp_path / "table.json"
        file.write_text(content)
        with pytest.raises(ValueError, match=r"table='.*' is not a table of token frequencies \(.*\); count "):
            load_frequencies(file)

    def test_the_command_says_so_in_a_line(self, tmp_path: Path) -> None:
        Frequencies({"5": 3}, "0123456789abcdef").save(tmp_path / "other.json")
        for path, why in (
            (tmp_path / "other.json", "was counted with another tokenizer; count a corpus with "),
            (tmp_path / "none.json", "cannot be read (No such file or directory); give another file"),
            (tmp_path, "is not a table of token frequencies ("),
        ):
            result = command("generate", "prompt=Tom", "sampler=pc", f"sampler.table={path}", "gen_length=4")
            assert result.code == 2
            (line,) = result.err.splitlines()
            assert line.startswith(f"dllm generate: error: sampler.table='{path}' {why}")

    def test_text_without_a_tokenizer(self) -> None:
        with pytest.raises(ValueError, match="tokenizer=None cannot read texts; give "):
            count_tokens(["text"])

    def test_an_empty_corpus(self) -> None:
        with pytest.raises(ValueError, match="no token is counted"):
            count_tokens([])

    @pytest.mark.parametrize(
        ("name", "value"),
        [("table", 5), ("position_weight", -0.1), ("position_weight", nan), ("clip", 0), ("steps", 0)],
    )
    def test_values_out_of_range_are_named(self, name: str, value: Any) -> None:
        with pytest.raises(ValueError, match=rf"{name}=.*(use|give) "):
            PC(**{name: value})
