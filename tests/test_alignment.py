"""Guides with another tokenizer: what a verdict about their tokens says about ours."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

import dllm
from dllm.guide import Guide, load_guide
from dllm.guide.alignment import NEVER, Aligned, ByText, SameVocabulary, align
from dllm.samplers import ARGuided
from dllm.tasks import word_problems
from models import random_guide, random_llada

EOS, MASK = "<|endoftext|>", "<|mdm_mask|>"


def bpe(merges: list[tuple[str, str]], **special: Any) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with the given merges."""
    pieces = [*pre_tokenizers.ByteLevel.alphabet()]
    vocab = {piece: i for i, piece in enumerate(sorted(pieces))}
    for left, right in merges:
        vocab.setdefault(left + right, len(vocab))
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **special)


def plain(**special: Any) -> PreTrainedTokenizerFast:
    """One token a byte, end-of-text and [MASK]."""
    return bpe([], **{"eos_token": EOS, "mask_token": MASK} | special)


def aligned(aligner: ByText, decided: str | list[int], drafts: str | list[int], given: int = 0) -> Aligned:
    """One row: what is decided, and the drafts behind it, of which the last `given` are decided too."""
    encode = lambda text: aligner.ours(text).input_ids if isinstance(text, str) else text  # noqa: E731
    row = torch.tensor([[*encode(decided), *encode(drafts)]])
    columns = torch.arange(len(encode(decided)), row.shape[1])[None]
    masked = columns < row.shape[1] - given
    return aligner(row, torch.tensor([0]), columns, masked, ends_of(aligner.ours))


def ends_of(tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    return torch.tensor([[tokenizer.eos_token_id]])


def by_text(theirs: PreTrainedTokenizerBase, ours: PreTrainedTokenizerBase | None = None) -> ByText:
    ours = ours or plain()
    found = align(Guide(random_guide(len(theirs)), theirs), ours, len(ours))
    assert isinstance(found, ByText)
    return found


class TestMapping:
    AB = bpe([("a", "b")], eos_token=EOS)

    def test_tokens_within_one_of_theirs_stand_and_fall_with_it(self) -> None:
        found = aligned(by_text(self.AB), "", "abc")
        assert self.AB.convert_ids_to_tokens(found.ids[0]) == ["ab", "c"]
        assert found.upto.tolist() == [[1, 1, 2]]
        assert found.start.tolist() == [0]

    def test_a_token_of_theirs_that_begins_in_decided_text_is_judged_whole(self) -> None:
        found = aligned(by_text(self.AB), "ca", "bd")
        assert self.AB.convert_ids_to_tokens(found.ids[0]) == ["c", "ab", "d"]
        assert found.start.tolist() == [1]
        assert found.upto.tolist() == [[2, 3]]

    def test_several_of_theirs_within_one_of_ours_are_all_needed(self) -> None:
        ours = bpe([("a", "b"), ("ab", "c")], eos_token=EOS, mask_token=MASK)
        found = aligned(by_text(plain(), ours), "d", "abcd")
        assert found.upto.tolist() == [[4, 5]]

    def test_overlaps_reach_to_the_next_common_border(self) -> None:
        # ours: a|bc|d, theirs: ab|cd
        ours = bpe([("b", "c")], eos_token=EOS, mask_token=MASK)
        theirs = bpe([("a", "b"), ("c", "d")], eos_token=EOS)
        assert aligned(by_text(theirs, ours), "", "abcd").upto.tolist() == [[2, 2, 2]]

    def test_parts_of_a_character_are_taken_or_left_together(self) -> None:
        found = aligned(by_text(self.AB), "", "aéb")  # é is two tokens of ours and two of theirs
        assert found.upto.tolist() == [[1, 3, 3, 4]]

    def test_their_end_of_text_stands_for_ours(self) -> None:
        theirs = bpe([("a", "b")], eos_token="</s>")
        aligner = by_text(theirs)
        eos = aligner.ours.eos_token_id
        found = aligned(aligner, "", [*aligner.ours("ab").input_ids, eos, eos])
        assert theirs.convert_ids_to_tokens(found.ids[0, : found.lengths[0]]) == ["ab", "</s>"]
        assert found.upto.tolist() == [[1, 1, 2, NEVER]]

    def test_special_tokens_of_the_prompt_become_those_of_the_guide(self) -> None:
        ours = plain(additional_special_tokens=["<|im_start|>"])
        theirs = bpe([("a", "b")], eos_token="</s>", bos_token="<s>")
        theirs.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
        prompt = [ours.convert_tokens_to_ids("<|im_start|>"), *ours("ab").input_ids, ours.eos_token_id]
        found = aligned(by_text(theirs, ours), prompt, "ab")
        assert theirs.convert_ids_to_tokens(found.ids[0]) == ["<|im_start|>", "ab", "</s>", "ab"]
        assert found.start.tolist() == [3]

    def test_a_guide_that_opens_texts_gets_its_opening(self) -> None:
        theirs = bpe([], eos_token="</s>", bos_token="<s>")
        theirs.backend_tokenizer.post_processor = __import__("tokenizers").processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", theirs.bos_token_id)]
        )
        found = aligned(by_text(theirs), "a", "b")
        assert theirs.convert_ids_to_tokens(found.ids[0]) == ["<s>", "a", "b"]
        assert (found.start.tolist(), found.upto.tolist()) == ([2], [[3]])

    def test_a_character_of_which_a_part_is_decided_is_judged(self) -> None:
        ours = plain()
        first, second = ours("é").input_ids
        found = aligned(
            by_text(plain(eos_token="</s>"), ours), [*ours("a").input_ids, first], [second, *ours("b").input_ids]
        )
        assert (found.start.tolist(), found.upto.tolist()) == ([1], [[3, 4]])

    def test_what_is_given_needs_no_judgement(self) -> None:
        found = aligned(by_text(self.AB), "c", "dcab", given=2)
        assert found.free.tolist() == [[False, False, False]]  # the row is read up to the last draft only
        ours = plain()
        row = torch.tensor([ours("cdabc").input_ids])
        masked = torch.tensor([[True, False, False, True]])
        found = by_text(self.AB, ours)(row, torch.tensor([0]), torch.arange(1, 5)[None], masked, ends_of(ours))
        assert self.AB.convert_ids_to_tokens(found.ids[0]) == ["c", "d", "ab", "c"]
        assert found.free.tolist() == [[False, False, True, False]]


class TestRefusals:
    def test_a_special_token_the_guide_does_not_have(self) -> None:
        ours = plain(additional_special_tokens=["<|im_start|>"])
        prompt = [ours.convert_tokens_to_ids("<|im_start|>"), *ours("ab").input_ids]
        aligner = by_text(TestMapping.AB, ours)
        with pytest.raises(ValueError, match=r"guide='Qwen2.*' has no token '<\|im_start\|>', which the prompt"):
            aligner.check(prompt, (ours.eos_token_id,))
        aligner.check(prompt[1:], (ours.eos_token_id,))
        # Decided on the way it ends no run: the row asks nothing any more.
        found = aligned(aligner, prompt, "ab")
        assert found.lengths.tolist() == found.start.tolist()

    def lower(self) -> PreTrainedTokenizerFast:
        theirs = bpe([("a", "b")], eos_token=EOS)
        theirs.backend_tokenizer.normalizer = normalizers.Lowercase()
        return theirs

    def test_decided_text_that_the_guide_would_read_otherwise(self) -> None:
        aligner, ids = by_text(self.lower()), plain()("AB").input_ids
        with pytest.raises(ValueError, match=r"guide='Qwen2.*' has a tokenizer that changes the text 'AB'; use "):
            aligner.check(ids, ())
        found = aligned(aligner, "AB", "c")
        assert found.lengths.tolist() == found.start.tolist()

    def test_a_draft_that_the_guide_would_read_otherwise_is_not_accepted_on_a_guess(self) -> None:
        found = aligned(by_text(self.lower()), "ab", "cAb")
        assert found.upto.tolist() == [[2, NEVER, NEVER]]

    def test_a_tokenizer_without_offsets(self) -> None:
        class Slow:
            """A tokenizer that is not fast."""

            is_fast = False
            get_vocab = staticmethod(lambda: {"a": 0})

        with pytest.raises(ValueError, match="tokenizer without offsets; use a guide with a fast tokenizer"):
            align(Guide(random_guide(), Slow()), plain(), 300)  # type: ignore[arg-type]


@given(st.data())
def test_accepting_up_to_a_column_covers_its_text_and_nothing_in_between_is_missing(data: Any) -> None:
    pairs = [("a", "b"), ("b", "c"), ("c", "d"), ("a", "bc"), ("ab", "c"), ("d", "a"), ("Ã", "©"), ("a", "Ã")]

    def tokenizer(**special: Any) -> PreTrainedTokenizerFast:
        chosen = data.draw(st.lists(st.sampled_from(pairs), unique=True, max_size=5))
        have = {left + right for left, right in chosen}
        return bpe([p for p in chosen if all(len(part) == 1 or part in have for part in p)], **special)

    ours, theirs = tokenizer(eos_token=EOS, mask_token=MASK), tokenizer(eos_token="</s>")
    decided, drafts = data.draw(st.text("abcdé", max_size=6)), data.draw(st.text("abcdé", min_size=1, max_size=8))
    if ours.get_vocab() == theirs.get_vocab():
        return
    aligner = ByText("guide", ours, theirs)
    found = aligned(aligner, decided, drafts)
    before, columns = ours(decided).input_ids, ours(drafts).input_ids
    read, text = found.ids[0, : found.lengths[0]].tolist(), ours.decode(before)
    assert theirs.decode(read[: found.start[0]]) == text[: len(theirs.decode(read[: found.start[0]]))]
    last = int(found.start[0])
    for k, upto in enumerate(found.upto[0].tolist()):
        assert last <= upto <= len(read)  # all of this text is exact
        last = upto
        whole = ours.decode([*before, *columns[: k + 1]])
        if not whole.endswith("\ufffd"):
            covered = theirs.decode(read[:upto])
            assert covered.startswith(whole)
            # The shortest such stretch: with one token less, something of the column is missing or cut through.
            fewer = theirs.decode(read[: upto - 1])
            borders = {ours.decode([*before, *columns[:n]]) for n in range(k + 1, len(columns) + 1)}
            common = fewer in borders and not fewer.endswith("\ufffd")  # within a character there is none
            assert not (fewer.startswith(whole) and common and upto - 1 > int(found.start[0]))


def permuted() -> Guide:
    """tiny-guide with its tokens numbered otherwise: the same model over another vocabulary."""
    known = load_guide("tiny-guide", torch.device("cpu"))
    tokenizer = known.tokenizer
    assert tokenizer is not None
    size = known.vocab_size
    order = torch.randperm(size, generator=torch.Generator().manual_seed(0))  # old number of each new one
    place = order.argsort()
    vocab = {token: int(place[number]) for token, number in tokenizer.get_vocab().items()}
    inner = Tokenizer(models.WordLevel(vocab, unk_token=tokenizer.unk_token))
    inner.pre_tokenizer = tokenizer.backend_tokenizer.pre_tokenizer
    inner.decoder = tokenizer.backend_tokenizer.decoder
    theirs = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token=tokenizer.eos_token, pad_token=tokenizer.eos_token,
        unk_token=tokenizer.unk_token, clean_up_tokenization_spaces=False,
    )  # fmt: skip
    model = type(known.model)(known.model.config)
    weights = {name: tensor.clone() for name, tensor in known.model.state_dict().items()}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = weights[name][order]
    model.load_state_dict(weights)
    return Guide(model.eval(), theirs)


@pytest.mark.parametrize("accept", ["argmax", "topk", "ratio"])
def test_a_guide_whose_tokens_are_only_numbered_otherwise_says_the_same(accept: Any) -> None:
    lm = dllm.load("tiny-llada", device="cpu")
    questions = [problem.question for problem in word_problems.problems(12, 3_000_001)]
    options = {"gen_length": 64, "block_length": 32, "batch_size": 12}
    top_k = None if accept == "argmax" else 2
    same = dllm.generate(lm, questions, ARGuided(accept=accept, top_k=top_k), **options)
    other = dllm.generate(lm, questions, ARGuided(permuted(), accept, top_k), **options)
    assert same.texts == other.texts
    # Behind an end-of-text there is no text to judge; up to it the steps are the same.
    assert torch.equal(same.nfe, other.nfe)


def test_a_guide_with_another_kind_of_tokenizer_guides() -> None:
    lm = dllm.load("tiny-llada", device="cpu")
    problems = word_problems.problems(6, 3_000_001)
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=[EOS], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    inner.train_from_iterator([problem.question for problem in word_problems.problems(200, 5)], trainer)
    theirs = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=EOS, clean_up_tokenization_spaces=False)
    policy = ARGuided(Guide(random_guide(len(theirs), dtype=torch.float32), theirs), "topk", top_k=40)
    questions = [problem.question for problem in problems]
    batch = dllm.generate(lm, questions, policy, gen_length=24, block_length=12, batch_size=6)
    assert (batch.nfe <= 24).all()
    assert batch.guide_nfe.sum() > 0
    assert not (batch.sequences == lm.backbone.mask_token_id).any()
    for row, question in enumerate(questions):
        alone = dllm.generate(lm, question, policy, gen_length=24, block_length=12)
        assert alone.completions[0].tolist() == batch.completions[row].tolist()
        assert alone.guide_nfe[0] == batch.guide_nfe[row]
    with pytest.raises(ValueError, match="on_reject=guide needs a guide with the model's own vocabulary"):
        dllm.generate(lm, questions[0], ARGuided(policy.guide, on_reject="guide"), gen_length=8)


def test_the_same_vocabulary_is_passed_on() -> None:
    guide = load_guide("tiny-guide", torch.device("cpu"))
    lm = dllm.load("tiny-llada", device="cpu")
    assert isinstance(align(guide, lm.tokenizer, lm.backbone.config.vocab_size), SameVocabulary)
    assert isinstance(align(Guide(random_guide(), None), None, 64), SameVocabulary)
    assert random_llada().tokenizer is None


def sentencepiece() -> PreTrainedTokenizerFast:
    """Words that begin with a space, which the first loses, and bytes for everything else."""
    pieces = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁a", "▁ab", "a", "b", "▁▁", "好"]
    inner = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, [], byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    inner.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="</s>")


def words(decoder: Any = None) -> PreTrainedTokenizerFast:
    """Whole words, between which the decoder writes spaces."""
    pieces = ["<unk>", "</s>", "a", "##b", "don't", "n't", "'", ".", "", "好"]
    inner = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token="<unk>"))
    if decoder is not None:
        inner.decoder = decoder
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="</s>")


TOKENIZERS = {
    "bytes": plain(), "sentencepiece": sentencepiece(), "words": words(), "word pieces": words(decoders.WordPiece()),
}  # fmt: skip


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(data=st.data())
def test_borders_are_those_of_the_whole_text(kind: str, data: Any) -> None:
    tokenizer = TOKENIZERS[kind]
    byte = st.sampled_from("aé好 😀").flatmap(lambda character: st.just(list(character.encode())))
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=40))
    if kind == "sentencepiece":  # runs of bytes, most of them whole characters
        ids += [2 + each for character in data.draw(st.lists(byte, max_size=12)) for each in character]
    first = data.draw(st.integers(0, len(ids)))
    whole = tokenizer.decode(ids)
    expected = []
    for count in range(first, len(ids) + 1):
        part = tokenizer.decode(ids[:count])
        expected.append(len(part) if whole.startswith(part) and not part.endswith("\ufffd") else None)
    assert by_text(plain(eos_token="</s>"), tokenizer)._borders(ids, first, whole) == expected


def test_a_border_costs_no_more_behind_a_long_text(monkeypatch: pytest.MonkeyPatch) -> None:
    aligner, decoded = by_text(TestMapping.AB), []
    text = ByText._text
    monkeypatch.setattr(ByText, "_text", lambda self, ids: decoded.append(len(ids)) or text(self, ids))
    aligned(aligner, "c" * 1000, "abcd" * 8)
    assert sum(count > 100 for count in decoded) <= 5
