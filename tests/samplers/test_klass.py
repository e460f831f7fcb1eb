"""KLASS: what is committed once its distribution no longer changes."""

from __future__ import annotations

from math import nan
from typing import Any

import pytest
import torch

import dllm
from dllm.samplers import KLASS, Vanilla
from models import random_dream, random_llada
from sampler_rig import best_at, logits_at

MAKERS = pytest.mark.parametrize("make", [random_llada, random_dream])
PROMPTS = [[3, 4], [5], [7, 8, 9, 10, 11]]
OPTIONS: dict[str, Any] = {"gen_length": 20, "block_length": 8, "stop_at_eos": False}


def spelt_out(lm: Any, prompt: list[int], sampler: KLASS, length: int = 20, block: int = 8) -> tuple[list[int], int]:
    """Tokens and forwards of one prompt, with a full forward per step."""
    mask, start = lm.backbone.mask_token_id, len(prompt)
    canvas, steps = [*prompt, *[mask] * length], 0
    kept: dict[int, tuple[Any, list[float]]] = {}
    for first in range(start, start + length, block):
        places = range(first, min(first + block, start + length))
        if not sampler.ahead:
            kept = {}
        while left := [place for place in places if canvas[place] == mask]:
            logits, steps = logits_at(lm, canvas), steps + 1
            tokens, confidence = best_at(lm, logits)
            ready = []
            for place in [p for p, token in enumerate(canvas) if token == mask and (sampler.ahead or p in places)]:
                new = logits[place].softmax(-1)
                old, past = kept.get(place, (None, []))
                if old is not None:
                    past = [*past, float((new * (new / old).log()).sum())]
                kept[place] = new, past
                stable = len(past) >= sampler.history and max(past[-sampler.history :]) < sampler.kl_threshold
                if place in places and stable and confidence[place] >= sampler.threshold:
                    ready.append(place)
            best = sorted(left, key=lambda place: -float(confidence[place]))[: sampler.at_least]
            for place in ready or best:
                canvas[place] = int(tokens[place])
    return canvas[start:], steps


@MAKERS
@pytest.mark.parametrize(
    "sampler",
    [
        KLASS(0.2, 0.3, 1), KLASS(0.3, 0.5, 2), KLASS(0.3, 0.5, 2, at_least=2), KLASS(0.2, 0.5, 1, ahead=False),
        KLASS(0.0, 1e9, 1), KLASS(0.0, 1e9, 3, ahead=False),
    ],
    ids=repr,
)  # fmt: skip
def test_decodes_as_spelt_out(make: Any, sampler: KLASS) -> None:
    lm = make()
    out = dllm.generate(lm, PROMPTS, sampler, batch_size=2, **OPTIONS)
    for row, prompt in enumerate(PROMPTS):
        tokens, steps = spelt_out(lm, prompt, sampler)
        assert out.completions[row].tolist() == tokens
        assert out.nfe[row] == steps


@MAKERS
def test_without_a_qualifying_position_it_is_one_token_per_step(make: Any) -> None:
    lm = make()
    plain = dllm.generate(lm, PROMPTS, Vanilla(), **OPTIONS)
    for never in (KLASS(1.1, 1e9, 1), KLASS(0.0, 1e-9, 1), KLASS(0.0, 1e9, 20)):
        out = dllm.generate(lm, PROMPTS, never, **OPTIONS)
        assert torch.equal(out.sequences, plain.sequences)
        assert torch.equal(out.commit_step, plain.commit_step)


@MAKERS
def test_with_everything_stable_a_block_takes_as_many_forwards_as_its_history(make: Any) -> None:
    lm = make()
    for history in (1, 3):
        out = dllm.generate(lm, PROMPTS, KLASS(0.0, 1e9, history), **OPTIONS)
        assert out.nfe.tolist() == [history + 3] * len(PROMPTS)  # the later blocks begin with a history
        out = dllm.generate(lm, PROMPTS, KLASS(0.0, 1e9, history, ahead=False), **OPTIONS)
        assert out.nfe.tolist() == [3 * (history + 1)] * len(PROMPTS)


def test_the_block_alone_is_less_to_compute() -> None:
    lm = random_llada()
    ahead, alone = (dllm.generate(lm, PROMPTS, KLASS(1.1, ahead=each), "dual", **OPTIONS) for each in (True, False))
    assert alone.stats.computed_share < 0.7 * ahead.stats.computed_share


@MAKERS
@pytest.mark.parametrize("ahead", [True, False])
def test_infilled_rows_ignore_batchmates_and_whoever_had_their_number(make: Any, ahead: bool) -> None:
    lm = make()
    m = lm.backbone.mask_token_id
    rows = [[m, 5, m, m, 8, 9, *[m] * 7], [3, m, m, 4], [1, 2, m, 7, *[m] * 12, 9], [m, m, 8]]
    sampler = KLASS(0.1, 0.8, 1, ahead=ahead)
    for size in (1, 2):
        batch = dllm.infill(lm, rows, sampler, block_length=4, batch_size=size)
        for row, ids in enumerate(rows):
            alone = dllm.infill(lm, [ids], sampler, block_length=4)
            assert batch.sequences[row, -len(ids) :].tolist() == alone.sequences[0].tolist()
            assert batch.nfe[row] == alone.nfe[0]


def test_the_state_of_an_engine_does_not_grow() -> None:
    sampler, lm = KLASS(0.2, 0.3, 1), random_llada()
    engine = dllm.Engine(lm, sampler, batch_size=2, max_length=32)
    sizes = set()
    for _ in range(3):
        engine.add([5, 6], gen_length=16, block_length=8)
        while engine.busy:
            engine.step()
            last = engine._state.last
            assert last is not None and last.shape[0] <= 32
            sizes.add(engine._state.entry.shape)
    assert len(sizes) == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [("threshold", -0.1), ("kl_threshold", 0.0), ("kl_threshold", nan), ("history", 0), ("at_least", 0), ("ahead", 2)],
)
def test_values_out_of_range_are_named(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"{name}=.*(use|expected) "):
        KLASS(**{name: value})
