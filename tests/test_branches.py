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


def left_out(lm: dllm.LanguageModel, tokens: list[int], start: int, places: list[int]) -> Tensor:
    """Logits for some positions of a canvas, of masks beside them that the canvas does not attend to."""
    backbone, length = lm.backbone, len(tokens)
    # Where predictions are read one to the left, the shadow of that position looks.
    at = [max(place - backbone.logits_shift, 0) for place in places]
    positions = torch.tensor([[*range(length), *at]])
    mask = torch.ones(length + len(at), length + len(at), dtype=torch.bool)
    mask[:length, length:] = False
    for shadow, (own, place) in enumerate(zip(at, places, strict=True)):
        mask[length + shadow, [own, place]] = False
    if backbone.pattern is not None:
        mask &= backbone.pattern(positions, positions)[0, 0]
    looking = [63 if own >= start else tokens[own] for own in at]
    with torch.no_grad():
        logits: Tensor = backbone(torch.tensor([[*tokens, *looking]]), mask[None, None], positions).logits
    return logits[0, length:]


@MODELS
def test_a_shadow_is_a_mask_that_looks_at_everything_but_its_own_place_and_at_other_shadows(make: Any) -> None:
    lm = make()
    policy = Shadowing()
    dllm.generate(lm, [PROMPTS[2]], policy, **OPTIONS)
    compared = 0
    for tokens, decided, confidence in policy.seen:
        row = tokens[0].tolist()
        if not decided.any():
            continue
        start = _start(lm, row, tokens, decided)
        at = decided[0].nonzero().flatten()
        best = left_out(lm, row, start, (start + at).tolist()).softmax(-1)[:, :63].amax(-1)
        torch.testing.assert_close(confidence[0, 1, at].to(best.dtype), best)
        compared += len(at)
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


@dataclass(frozen=True)
class Asking(Policy):
    """Leftmost, after asking for shadows with words of its own and without."""

    def step(self, window: Window, denoise: Denoise, state: None) -> Edit:
        decided = (window.inside & ~window.masked).any(-1, keepdim=True)
        hidden = Edit(window.columns, torch.full_like(window.columns, 63), window.inside).on(window.tokens)
        asked = torch.stack((window.masked, window.inside & decided), dim=1)
        said = denoise(asked, tokens=torch.stack((window.tokens, hidden), dim=1), attention="shadow")
        own = denoise(attention="shadow")
        assert torch.equal(own.asked, asked)
        torch.testing.assert_close(own.confidence, said.confidence)
        written = torch.where(window.masked, own.tokens[:, 0], window.tokens.gather(1, window.columns))
        torch.testing.assert_close(own.probability(own.tokens), own.confidence)
        given = own.probability(torch.stack((written, written), dim=1))
        assert ((given[:, 1] <= own.confidence[:, 1]) | ~asked[:, 1]).all()
        first = window.masked & (window.masked.cumsum(-1) <= 2)
        return Edit(window.columns, own.tokens[:, 0], first)


@MODELS
@pytest.mark.parametrize("cache", ["none", "dual"])
def test_the_shadows_of_the_window_need_no_words(make: Any, cache: str) -> None:
    out = dllm.generate(make(), PROMPTS, Asking(), cache, **OPTIONS)
    assert not (out.completions == 63).any()


@pytest.mark.parametrize("cache", ["d2cache", "dllm_cache", "elastic"])
def test_caches_that_choose_within_a_layer_refuse_them(cache: str) -> None:
    with pytest.raises(ValueError, match="positions that only attend to the canvas"):
        dllm.generate(random_llada(), PROMPTS, Shadowing(), cache, **OPTIONS)
