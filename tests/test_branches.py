"""Positions that a policy adds to a forward: shadows look at the canvas, each without what stands in its place."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

import dllm
from dllm.decoding.window import Edit, Window
from dllm.samplers.base import Denoise, Policy
from models import random_dream, random_llada, random_sdar
from toys import Leftmost, Spying

PROMPTS = [[5, 9, 3], [7], [1, 2, 3, 4, 5, 6, 7, 8, 9]]
OPTIONS: dict[str, Any] = {"gen_length": 10, "block_length": 4, "stop_at_eos": False, "seed": 3}
MODELS = pytest.mark.parametrize("make", [random_llada, random_dream, random_sdar])


@dataclass(frozen=True)
class Shadowing(Policy):
    """Leftmost, after a look at what the model would say of each decided position of the block without it."""

    needs = frozenset({"shadows"})
    seen: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)

    def step(self, window: Window, denoise: Denoise, state: None) -> Edit:
        decided = window.inside & ~window.masked
        hidden = Edit(window.columns, torch.full_like(window.columns, 63), window.inside).on(window.tokens)
        both = torch.stack((window.tokens, hidden), dim=1)
        asked = torch.stack((window.masked, decided), dim=1)
        prediction = denoise(asked, tokens=both, attention="shadow")
        self.seen.append((window.tokens.clone(), decided, prediction.confidence))
        chosen = prediction.arranged(lambda values: values[:, 0])
        first = window.masked & (window.masked.cumsum(-1) <= 2)
        return Edit(window.columns, chosen.tokens, first)


def left_out(lm: dllm.LanguageModel, tokens: list[int], start: int, place: int) -> Tensor:
    """Logits for a position of a canvas, of a mask beside it that nothing attends to."""
    backbone, length = lm.backbone, len(tokens)
    # Where predictions are read one to the left, the shadow of that position looks.
    at = max(place - backbone.logits_shift, 0)
    positions = torch.tensor([[*range(length), at]])
    mask = torch.ones(length + 1, length + 1, dtype=torch.bool)
    mask[:length, length], mask[length, at], mask[length, place] = False, False, False
    if backbone.pattern is not None:
        mask &= backbone.pattern(positions, positions)[0, 0]
    looking = 63 if at >= start else tokens[at]
    with torch.no_grad():
        logits: Tensor = backbone(torch.tensor([[*tokens, looking]]), mask[None, None], positions).logits
    return logits[0, -1]


@MODELS
def test_a_shadow_is_a_mask_that_looks_at_everything_but_its_own_place(make: Any) -> None:
    lm = make()
    policy = Shadowing()
    dllm.generate(lm, [PROMPTS[2]], policy, **OPTIONS)
    compared = 0
    for tokens, decided, confidence in policy.seen:
        row = tokens[0].tolist()
        for k in decided[0].nonzero().flatten().tolist():
            start = _start(lm, row, tokens, decided)
            logits = left_out(lm, row, start, start + k)
            best = logits.softmax(-1)[:63].max()
            torch.testing.assert_close(confidence[0, 1, k].to(best.dtype), best)
            compared += 1
    assert compared >= 4


def _start(lm: dllm.LanguageModel, row: list[int], tokens: Tensor, decided: Tensor) -> int:
    """The first column of the block: masks begin after its decided positions."""
    first_mask = row.index(63)
    given = decided[0].nonzero().flatten().tolist()
    return first_mask - 1 - given[-1]


@MODELS
def test_the_canvas_does_not_see_them(make: Any) -> None:
    lm = make()
    plain, shadowed = (dllm.generate(lm, PROMPTS, each, **OPTIONS) for each in (Leftmost(2), Shadowing()))
    assert torch.equal(plain.sequences, shadowed.sequences)
    assert torch.equal(plain.nfe, shadowed.nfe)
    assert shadowed.stats.computed_columns > plain.stats.computed_columns
    assert shadowed.stats.computed_columns < 1.5 * plain.stats.computed_columns


@MODELS
@pytest.mark.parametrize("cache", ["none", "prefix", "dual", "freecache", "dkv"])
def test_a_row_ignores_its_batchmates(make: Any, cache: str) -> None:
    lm = make()
    batch = dllm.generate(lm, PROMPTS, Shadowing(), cache, **OPTIONS)
    for row, prompt in enumerate(PROMPTS):
        alone = dllm.generate(lm, [prompt], Shadowing(), cache, **OPTIONS)
        assert batch.completions[row].tolist() == alone.completions[0].tolist()


@MODELS
@pytest.mark.parametrize("cache", ["prefix", "dual", "freecache", "dkv"])
def test_over_keys_and_values_that_are_fresh_they_see_the_same(make: Any, cache: str) -> None:
    lm, policies = make(), [Shadowing(), Shadowing()]
    resolved = dllm.resolve.resolve("cache", cache, object)
    for policy, each in zip(policies, ("none", Spying(resolved, expiring=True)), strict=True):
        dllm.generate(lm, PROMPTS[:1], policy, each, **OPTIONS)
    for (*_, exact), (*_, cached) in zip(policies[0].seen, policies[1].seen, strict=True):
        torch.testing.assert_close(exact, cached)


@pytest.mark.parametrize("cache", ["d2cache", "dllm_cache"])
def test_caches_that_choose_within_a_layer_refuse_them(cache: str) -> None:
    with pytest.raises(ValueError, match="positions that only attend to the canvas"):
        dllm.generate(random_llada(), PROMPTS, Shadowing(), cache, **OPTIONS)
