"""Several blocks at once."""

from __future__ import annotations

from math import inf, nan
from typing import Any

import pytest
import torch

import dllm
from contract_rig import LEARNED
from dllm.samplers import FreeDave, LocalLeap, MultiBlock, Threshold, Vanilla
from models import random_dream, random_llada, random_sdar
from revising_rig import Watched, recorded_alike

MODELS = pytest.mark.parametrize("make", [random_llada, random_dream, random_sdar])
PROMPTS = [[5, 9, 3], [7], [1, 2, 3, 4, 5, 6, 7, 8, 9]]
OPTIONS: dict[str, Any] = {"gen_length": 22, "block_length": 4, "stop_at_eos": False}


def by_hand(lm: dllm.LanguageModel, prompt: list[int], sampler: MultiBlock, base: float) -> tuple[list[int], int]:
    """The tokens of one row under a threshold, and its forwards."""
    backbone, pattern = lm.backbone, lm.backbone.pattern_of(4)
    mask, start = backbone.mask_token_id, len(prompt)
    row, forwards = [*prompt, *[mask] * 22], 0
    origin = 0 if pattern is not None else start
    positions = torch.arange(len(row))[None]
    sees = None if pattern is None else pattern(positions, positions)
    while mask in row:
        with torch.no_grad():
            logits = backbone(torch.tensor([row]), sees, positions).logits[0]
        forwards += 1
        logits = logits[(torch.arange(len(row)) - backbone.logits_shift).clamp(min=0)]
        best = logits.index_fill(-1, torch.tensor([mask]), -inf).argmax(-1)
        sure = logits.double().softmax(-1).gather(1, best[:, None])[:, 0]
        low, before, new = origin + (row.index(mask) - origin) // 4 * 4, 1.0, list(row)
        for _ in range(sampler.blocks):
            block = range(max(low, start), min(low + 4, len(row)))
            masks = [k for k in block if row[k] == mask]
            if before < sampler.add or not block:
                break
            surest = max(masks, key=lambda k: (float(sure[k]), -k), default=None)
            for k in masks:
                if (sure[k] >= base or k == surest) and (before >= sampler.activate or sure[k] > sampler.threshold):
                    new[k] = int(best[k])
            before, low = 1 - len(masks) / len(block), low + 4
        row = new
    return row, forwards


@MODELS
@pytest.mark.parametrize("sampler", [(3, 0.1, 0.95, 0.5), (9, 0.0, 0.5, 0.9), (2, 0.5, 0.5, 0.1)], ids=str)
def test_rows_are_decoded_as_by_hand(make: Any, sampler: tuple[int, float, float, float]) -> None:
    lm, several = make(), MultiBlock(Threshold(0.4), *sampler)
    found = dllm.generate(lm, PROMPTS, several, **OPTIONS)
    for row, prompt in enumerate(PROMPTS):
        tokens, forwards = by_hand(lm, prompt, several, 0.4)
        assert found.sequences[row, -len(tokens) :].tolist() == tokens
        assert int(found.nfe[row]) == forwards


@MODELS
@pytest.mark.parametrize(
    "base", [Threshold(0.4), Vanilla(), Vanilla(steps=9), LocalLeap(0.5, 0.2, 2), LEARNED], ids=repr
)
def test_one_block_is_the_base_and_so_are_blocks_that_never_open(make: Any, base: Any) -> None:
    lm = make()
    plain = dllm.generate(lm, PROMPTS, base, **OPTIONS)
    for same in (MultiBlock(base, 1), MultiBlock(base, 3, 0.1, 1.0, 2.0)):
        result = dllm.generate(lm, PROMPTS, same, **OPTIONS)
        assert torch.equal(plain.sequences, result.sequences)
        assert torch.equal(plain.commit_step, result.commit_step)


@MODELS
def test_more_blocks_and_earlier_ones_take_no_more_forwards(make: Any) -> None:
    lm = make()
    taken = [
        int(dllm.generate(lm, PROMPTS, MultiBlock(Vanilla(), *options), **OPTIONS).nfe.sum())
        for options in ((1,), (2, 0.5, 0.5), (2, 0.0, 0.0), (6, 0.0, 0.0))
    ]
    assert taken == sorted(taken, reverse=True)
    assert taken[0] == 66
    assert taken[-1] <= 3 * 6


@MODELS
@pytest.mark.parametrize(
    "cache", ["none", "prefix", "dual", "freecache", "dkv", "dllm_cache", "d2cache", "sparse", "elastic"]
)
def test_rows_ignore_their_batchmates(make: Any, cache: str) -> None:
    lm, sampler = make(), MultiBlock(Threshold(0.4), 3, 0.1, 0.5, 0.3)
    batch = dllm.generate(lm, PROMPTS, sampler, cache, batch_size=2, temperature=0.6, seed=3, **OPTIONS)
    assert not (batch.completions == 63).any()
    for row, prompt in enumerate(PROMPTS):
        alone = dllm.generate(lm, [prompt], sampler, cache, temperature=0.6, seed=3 + row, **OPTIONS)
        assert batch.completions[row].tolist() == alone.completions[0].tolist()
        assert batch.nfe[row] == alone.nfe[0]


def test_rows_of_unequal_blocks_share_a_batch() -> None:
    lm, sampler = random_llada(), MultiBlock(Threshold(0.4), 3, 0.0, 0.0)
    engine = dllm.Engine(lm, sampler, batch_size=3, max_length=40)
    for prompt, length in zip(PROMPTS, (2, 7, None), strict=True):
        engine.add(prompt, **OPTIONS | {"block_length": length})
    answers = {event.answer.index: event.answer for step in engine.steps() for event in step if event.answer}
    for number, (prompt, length) in enumerate(zip(PROMPTS, (2, 7, None), strict=True)):
        alone = dllm.generate(lm, [prompt], sampler, **OPTIONS | {"block_length": length})
        assert answers[number].completion == alone.completions[0].tolist()


@MODELS
def test_texts_with_gaps_are_filled(make: Any) -> None:
    lm, sampler = make(), MultiBlock(Threshold(0.4), 3, 0.0, 0.0)
    mask = lm.backbone.mask_token_id
    rows = [[mask, 5, mask, mask, 8, 9, mask], [1, 2, mask, 4, *[mask] * 12, 9], [8, mask]]
    options = {} if make is random_sdar else {"block_length": 3}
    batch = dllm.infill(lm, rows, sampler, **options)
    for number, row in enumerate(rows):
        alone = dllm.infill(lm, [row], sampler, **options)
        filled = alone.sequences[0].tolist()
        assert filled == batch.sequences[number, -len(row) :].tolist()
        assert all(given in (mask, now) for given, now in zip(row, filled, strict=True))


@MODELS
def test_what_is_recorded_is_what_was_done(make: Any) -> None:
    watched = Watched()
    sampler = MultiBlock(Threshold(0.4), 3, 0.0, 0.0)
    assert recorded_alike(make(), PROMPTS[0], sampler, **OPTIONS) == 0
    dllm.generate(make(), PROMPTS[:1], sampler, callback=watched, **OPTIONS)
    assert max(int(step.change.gained[0]) for step in watched.steps) > 4


@pytest.mark.parametrize(
    ("name", "value"),
    [("blocks", 0), ("add", -0.1), ("activate", 1.1), ("threshold", nan), ("base", FreeDave(2)), ("base", "wino")],
    ids=str,
)
def test_values_out_of_range_are_named(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"{name}=.*use "):
        MultiBlock(**{name: value})


def test_blocks_beyond_the_end_have_no_schedule() -> None:
    mask = random_llada().backbone.mask_token_id
    text = [[5, mask, 53, mask, mask, mask, 14, mask, mask, 50, mask, 2]]
    policy = MultiBlock(base=Vanilla(steps=8), activate=0.5, threshold=0.2)
    assert mask not in dllm.infill(random_llada(), text, policy).completions
