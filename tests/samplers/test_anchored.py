"""The first mask of the block is always committed, beside what another policy commits."""

from __future__ import annotations

from math import inf
from typing import Any

import pytest
import torch

import dllm
from contract_rig import LEARNED
from dllm.samplers import KLASS, Anchored, FreeDave, LocalLeap, Threshold, Vanilla
from models import random_dream, random_llada, random_sdar

MODELS = pytest.mark.parametrize("make", [random_llada, random_dream, random_sdar])
PROMPTS = [[5, 9, 3], [7], [1, 2, 3, 4, 5, 6, 7, 8, 9]]
OPTIONS: dict[str, Any] = {"gen_length": 22, "block_length": 8, "stop_at_eos": False}


def by_hand(lm: dllm.LanguageModel, prompt: list[int], threshold: float) -> tuple[list[int], int]:
    """The tokens of one row and its forwards: per forward of the block, confident masks, the best and the first one."""
    backbone, pattern = lm.backbone, lm.backbone.pattern_of(8)
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
        first = row.index(mask)
        low = origin + (first - origin) // 8 * 8
        masks = [k for k in range(low, min(low + 8, len(row))) if row[k] == mask]
        surest = max(masks, key=lambda k: (float(sure[k]), -k))
        for k in masks:
            if sure[k] >= threshold or k in (first, surest):
                row[k] = int(best[k])
    return row, forwards


@MODELS
@pytest.mark.parametrize("threshold", [0.2, 0.4, 2.0])
def test_rows_are_decoded_as_by_hand(make: Any, threshold: float) -> None:
    lm = make()
    found = dllm.generate(lm, PROMPTS, Anchored(Threshold(threshold)), **OPTIONS)
    for row, prompt in enumerate(PROMPTS):
        tokens, forwards = by_hand(lm, prompt, threshold)
        assert found.sequences[row, -len(tokens) :].tolist() == tokens
        assert int(found.nfe[row]) == forwards


@pytest.mark.parametrize("make", [random_llada, random_dream])
@pytest.mark.parametrize("base", [Vanilla(), Threshold(0.3), LocalLeap(0.4, 0.2), LEARNED], ids=repr)
@pytest.mark.parametrize("cache", ["none", "prefix"])
def test_no_mask_is_left_of_what_a_step_commits_first(make: Any, base: Any, cache: str) -> None:
    found = dllm.generate(make(), PROMPTS, Anchored(base), cache, batch_size=2, seed=4, temperature=0.8, **OPTIONS)
    for steps in found.commit_step.tolist():
        for low in range(0, len(steps), 8):
            block = steps[low : low + 8]
            for step in sorted(set(block)):
                left = block[: block.index(step)]
                assert all(earlier < step for earlier in left)


def test_a_base_that_commits_the_first_mask_is_unchanged() -> None:
    lm, base = random_llada(), Vanilla(order="left_to_right")
    plain, anchored = (dllm.generate(lm, PROMPTS, each, **OPTIONS) for each in (base, Anchored(base)))
    assert torch.equal(plain.sequences, anchored.sequences)
    assert torch.equal(plain.nfe, anchored.nfe)


def test_its_drafts_are_lossless() -> None:
    lm, base = random_dream(), Anchored(Threshold(0.3))
    plain, drafted = (dllm.generate(lm, PROMPTS, each, **OPTIONS) for each in (base, FreeDave(3, base)))
    assert torch.equal(plain.sequences, drafted.sequences)
    assert (drafted.nfe <= plain.nfe).all()


@pytest.mark.parametrize("base", [FreeDave(), KLASS()], ids=repr)
def test_a_base_of_several_forwards_or_with_memory_is_refused(base: Any) -> None:
    with pytest.raises(ValueError, match="cannot be a base"):
        Anchored(base)
    with pytest.raises(ValueError, match="base='nothing'"):
        Anchored("nothing")
