"""AdaBlock's choice of where a block ends."""

from __future__ import annotations

from math import inf, nan
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import dllm
from dllm.decoding.prediction import Prediction, Sampling
from dllm.samplers import AdaBlock, Threshold
from dllm.samplers.base import Sampler
from models import random_dream, random_llada, random_sdar
from revising_rig import two_way
from sampler_rig import GUESSES, MASK, facts, request, window
from toys import Spying

MODELS = pytest.mark.parametrize("make", [random_llada, random_dream, random_sdar])
PROMPTS = [[5, 9, 3], [7], [1, 2, 3, 4, 5, 6, 7, 8, 9]]
OPTIONS: dict[str, Any] = {"gen_length": 22, "block_length": 8, "stop_at_eos": False}
ENDS = tuple(range(0, 63, 4))  # tokens that random models write now and then


def blocks_of(lm: dllm.LanguageModel, prompt: list[int], sampler: AdaBlock, **options: Any) -> list[tuple[int, int]]:
    """First column and length of the blocks of one row, as its engine saw them."""
    engine = dllm.Engine(lm, sampler, batch_size=1, max_length=64, block_length=options.pop("attention", None))
    engine.add(prompt, **OPTIONS | options)
    canvas, found = engine._canvas, []
    for _ in engine.steps():
        pair = int(canvas.low[0] - canvas.padding[0]), int(canvas.high[0] - canvas.low[0])
        found += [pair] if not found or found[-1] != pair else []
    return found


def by_hand(lm: dllm.LanguageModel, prompt: list[int], sampler: AdaBlock) -> tuple[list[int], int, list[int]]:
    """The tokens of one row, its forwards and the lengths of its blocks, from whole forwards."""
    backbone, pattern, span, ends = lm.backbone, lm.backbone.pattern_of(8), 22, torch.tensor(sampler.delimiters)
    mask = backbone.mask_token_id
    row = torch.tensor([*prompt, *[mask] * span])
    positions = torch.arange(len(row))[None]
    sees = None if pattern is None else pattern(positions, positions)
    forwards, lengths = 0, []

    def predicted() -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            logits = backbone(row[None], sees, positions).logits[0]
        logits = logits[(torch.arange(len(row)) - backbone.logits_shift).clamp(min=0)]
        best = logits.index_fill(-1, torch.tensor([mask]), -inf).argmax(-1)
        return best, logits.softmax(-1).gather(1, best[:, None])[:, 0]

    while (row == mask).any():
        low = int((row == mask).int().argmax())
        most = len(row) if pattern is None else min((low // 8 + 1) * 8, len(row))
        best, sure = predicted()
        forwards += 1
        near = range(low, min(low + int(sampler.share * span), most))
        found = [k for k in near if best[k] in ends]
        last = max(found, key=lambda k: (float(sure[k]), -k), default=None)
        nominal = min(low + 8, most)
        high = nominal if last is None or sure[last] < sampler.delimiter_threshold else last + 1
        lengths.append(high - low)
        while True:
            open_ = [k for k in range(low, high) if row[k] == mask]
            surest = max(float(sure[k]) for k in open_)
            for k in open_:
                if sure[k] >= sampler.threshold or sure[k] == surest:
                    row[k] = best[k]
            if not (row[low:high] == mask).any():
                break
            best, sure = predicted()
            forwards += 1
    return row.tolist(), forwards, lengths


@MODELS
@pytest.mark.parametrize("sampler", [AdaBlock(0.5, ENDS, 0.2, 0.6), AdaBlock(0.9, ENDS, 0.1), AdaBlock(0.3, ENDS, 0.0)])
def test_rows_are_decoded_as_by_hand(make: Any, sampler: AdaBlock) -> None:
    lm = make()
    found = dllm.generate(lm, PROMPTS, sampler, **OPTIONS)
    for row, prompt in enumerate(PROMPTS):
        tokens, forwards, lengths = by_hand(lm, prompt, sampler)
        assert found.sequences[row, -len(tokens) :].tolist() == tokens
        assert int(found.nfe[row]) == forwards
        assert len(set(lengths)) > 1


@MODELS
@pytest.mark.parametrize(
    "same", [AdaBlock(0.4, ()), AdaBlock(0.4, ENDS, 1.1), AdaBlock(0.4, ENDS, 0.0, 0.0), AdaBlock(0.4)], ids=repr
)
def test_without_delimiters_it_is_the_threshold(make: Any, same: AdaBlock) -> None:
    lm = make()
    plain, own = (dllm.generate(lm, PROMPTS, each, **OPTIONS) for each in (Threshold(0.4), same))
    assert torch.equal(plain.sequences, own.sequences)
    assert torch.equal(plain.commit_step, own.commit_step)


def end(sampler: AdaBlock, tokens: list[int], probability: list[float], length: int = 4, step: int = 0) -> int:
    """The length of a block that begins, given the predictions of its window and the length of the request's blocks."""
    view = window(torch.ones(len(tokens), dtype=torch.bool), step=step, span=len(tokens))
    logits = two_way(torch.tensor(probability, dtype=torch.float64), torch.tensor(tokens), GUESSES + 2)
    state = sampler.start(facts())
    sampler.enter(state, 0, request(length, len(tokens)))
    edit = sampler.step(
        view,
        lambda *_, **__: Prediction(logits, view.masked, view.masked.flatten().nonzero()[:, 0], MASK, Sampling()),
        state,
    )
    assert edit.block_length is not None
    assert edit.write[0, int(edit.block_length) :].sum() == 0
    return int(edit.block_length)


def test_a_block_ends_with_the_most_probable_delimiter() -> None:
    tokens, probability = [1, 7, 1, 7, 1, 8, 1, 1], [0.9, 0.3, 0.9, 0.6, 0.9, 0.8, 0.9, 0.9]
    assert end(AdaBlock(0.9, [7, 8], 0.5, 1.0), tokens, probability) == 6
    assert end(AdaBlock(0.9, [7], 0.5, 1.0), tokens, probability) == 4
    assert end(AdaBlock(0.9, [7], 0.7, 1.0), tokens, probability, 3) == 3
    assert end(AdaBlock(0.9, [7, 8], 0.0, 0.5), tokens, probability) == 4
    assert end(AdaBlock(0.9, [7, 8], 0.0, 0.3), tokens, probability) == 2
    assert end(AdaBlock(0.9, [7, 8], 0.0, 0.3), tokens, probability, step=1) == 8  # it was chosen before


@given(
    st.lists(st.tuples(st.integers(5, 8), st.floats(0.02, 0.98)), min_size=4, max_size=10), st.floats(0, 1),
    st.floats(0, 1), st.floats(0, 1),
)  # fmt: skip
def test_a_higher_bound_changes_no_end_but_to_the_usual_one(
    guesses: list[tuple[int, float]], share: float, one: float, other: float
) -> None:
    tokens, probability = zip(*guesses, strict=True)
    low, high = (end(AdaBlock(0.9, [7, 8], each, share), tokens, probability) for each in sorted((one, other)))
    assert high in (low, 4)


def test_blocks_lie_side_by_side_and_within_those_of_attention() -> None:
    for make in (random_llada, random_dream, random_sdar):
        sampler = AdaBlock(2.0, ENDS, 0.0, 0.6)
        attention = {"attention": 8} if make is random_sdar else {}
        blocks = blocks_of(make(), PROMPTS[2], sampler, **attention)
        # The first step of a block shows its end in the next one.
        ends = {low: low + length for low, length in blocks}
        assert sorted(ends)[0] == 9
        assert all(end in ends or end >= 31 for end in ends.values())
        if make is random_sdar:
            assert all(low // 8 == (end - 1) // 8 for low, end in ends.items())


@MODELS
@pytest.mark.parametrize(
    "cache", ["none", "prefix", "dual", "freecache", "dkv", "dllm_cache", "d2cache", "sparse", "elastic"]
)
def test_rows_ignore_their_batchmates(make: Any, cache: str) -> None:
    lm, sampler = make(), AdaBlock(0.5, ENDS, 0.1, 0.6)
    batch = dllm.generate(lm, PROMPTS, sampler, cache, temperature=0.5, seed=3, **OPTIONS)
    for row, prompt in enumerate(PROMPTS):
        alone = dllm.generate(lm, [prompt], sampler, cache, temperature=0.5, seed=3 + row, **OPTIONS)
        assert batch.completions[row].tolist() == alone.completions[0].tolist()
        assert batch.nfe[row] == alone.nfe[0]


def test_a_cache_computes_the_block_that_was_chosen() -> None:
    lm, sampler = random_llada(), AdaBlock(2.0, ENDS, 0.1, 0.6)
    spy = Spying(dllm.resolve.resolve("cache", "dual", object))
    dllm.generate(lm, PROMPTS[:1], sampler, spy, **OPTIONS)
    _, _, lengths = by_hand(lm, PROMPTS[0], AdaBlock(2.0, ENDS, 0.1, 0.6))
    whole = len(PROMPTS[0]) + 22
    widths = [len(columns) for (columns,) in (forward.values() for forward in spy.log)]
    assert widths.count(whole) >= len({*lengths}) - 1
    first = next(number for number, width in enumerate(widths) if width < whole)
    assert len(np.unique(widths)) > 2
    assert widths[first] == lengths[0]


@MODELS
def test_texts_with_gaps_are_filled(make: Any) -> None:
    lm = make()
    mask = lm.backbone.mask_token_id
    rows = [[mask, 5, mask, mask, 8, 9, mask], [1, 2, mask, 4, *[mask] * 12, 9], [8, mask]]
    batch = dllm.infill(lm, rows, AdaBlock(0.5, ENDS, 0.1, 0.6), block_length=4)
    for number, row in enumerate(rows):
        filled = batch.sequences[number, -len(row) :].tolist()
        assert all(given in (mask, now) for given, now in zip(row, filled, strict=True))
        assert mask not in filled
        alone = dllm.infill(lm, [row], AdaBlock(0.5, ENDS, 0.1, 0.6), block_length=4)
        assert alone.sequences[0].tolist() == filled


def test_delimiters_are_texts_of_one_token_or_ids() -> None:
    lm = random_llada(tokenizer=True, sharpness=3.0)
    (dot,) = lm.tokenizer(".", add_special_tokens=False).input_ids
    by_text, by_id = (dllm.generate(lm, [[5, 9]], AdaBlock(0.5, [each], 0.0), **OPTIONS) for each in (".", dot))
    assert torch.equal(by_text.sequences, by_id.sequences)
    for wrong, why in (("Tom has", "is 2 tokens"), ("\n", "tokens of this model")):
        with pytest.raises(ValueError, match=rf"delimiters=.*{why}"):
            dllm.generate(lm, [[5]], AdaBlock(delimiters=[wrong]), **OPTIONS)
    with pytest.raises(ValueError, match="has no tokenizer; give ids"):
        dllm.generate(random_llada(), [[5]], AdaBlock(delimiters=["."]), **OPTIONS)
    with pytest.raises(ValueError, match="delimiters=64 is out of range; use ids from 0 to 63"):
        dllm.generate(random_llada(), [[5]], AdaBlock(delimiters=[64]), **OPTIONS)


def test_a_sampler_from_a_configuration_takes_a_list() -> None:
    sampler = dllm.resolve.build("sampler", {"_target_": "dllm.samplers.AdaBlock", "delimiters": [3, 4]}, Sampler)
    assert sampler.delimiters == (3, 4)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("name", "value"),
    [("threshold", -0.1), ("delimiters", "."), ("delimiters", [-1]), ("delimiter_threshold", nan), ("share", 1.5)],
)
def test_values_out_of_range_are_named(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"{name}=.*use "):
        AdaBlock(**{name: value})
