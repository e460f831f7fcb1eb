"""SlowFast sampling: how far a cycle reaches, and what its steps see and commit."""

from __future__ import annotations

from math import nan
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import dllm
from dllm.samplers import SlowFast, Vanilla
from models import random_dream, random_llada
from sampler_rig import best_at, chosen, confidences, logits_at

MAKERS = pytest.mark.parametrize("make", [random_llada, random_dream])
PROMPTS = [[3, 4], [5], [7, 8, 9, 10, 11]]
OPTIONS: dict[str, Any] = {"gen_length": 24, "block_length": 12, "stop_at_eos": False}


class SpeltOut:
    """One prompt at a time, with a forward of its own for every step."""

    def __init__(self, lm: Any, sampler: SlowFast, prompt: list[int], length: int = 24, block: int = 12) -> None:
        self.lm, self.sampler, self.mask, self.steps = lm, sampler, lm.backbone.mask_token_id, 0
        self.canvas = [*prompt, *[self.mask] * length]
        self.hidden = 0
        for low in range(len(prompt), len(prompt) + length, block):
            start = 0
            while self.left(low, low + block):
                end = self.slow(low, start, block)
                self.fast(low + start, low + end)
                start = end

    def left(self, low: int, high: int) -> list[int]:
        return [place for place in range(low, high) if self.canvas[place] == self.mask]

    def look(self, upto: int | None = None) -> tuple[Any, Any]:
        self.steps += 1
        self.hidden += len(self.canvas[upto:]) if upto is not None else 0
        return best_at(self.lm, logits_at(self.lm, self.canvas[:upto]))

    def fill(self, tokens: Any, confidence: Any, low: int, high: int) -> None:
        left = self.left(low, high)
        sure = [place for place in left if confidence[place] >= self.sampler.threshold]
        for place in sure if len(sure) > 1 else [max(left, key=lambda place: float(confidence[place]))]:
            self.canvas[place] = int(tokens[place])

    def slow(self, low: int, start: int, block: int) -> int:
        history: list[int] = []
        end = 0
        for _ in range(self.sampler.exploration):
            if not self.left(low, low + block):
                break
            tokens, confidence = self.look()
            if not end:
                far = [p for p in self.left(low + start, low + block) if confidence[p] >= self.sampler.cycle_threshold]
                history.append(max(far) + 1 - low if far else min(start + 1, block))
                latest = history[-self.sampler.window :]
                if len(latest) == self.sampler.window and np.std(latest) < self.sampler.max_deviation:
                    end = history[-1]
            self.fill(tokens, confidence, low + start, low + block)
        return end or int(np.mean(history[-self.sampler.window :]))

    def fast(self, low: int, high: int) -> None:
        upto = None
        while self.left(low, high):
            self.fill(*self.look(upto), low, high)
            upto = high


@MAKERS
@pytest.mark.parametrize(
    "sampler",
    [
        SlowFast(0.4, 0.3, 2, 2, 3.0), SlowFast(0.3, 0.2, 3, 3, 1.0), SlowFast(1.1, 0.5, 1, 1, 0.5),
        SlowFast(0.3, 0.25, 2, 5, 1.0), SlowFast(0.4, 0.6, 4, 2, 0.0), SlowFast(1.1, 1.1, 1, 1, 1.0),
    ],
    ids=repr,
)  # fmt: skip
def test_decodes_as_spelt_out(make: Any, sampler: SlowFast) -> None:
    lm = make()
    out = dllm.generate(lm, PROMPTS, sampler, batch_size=2, **OPTIONS)
    hidden = 0
    for row, prompt in enumerate(PROMPTS):
        expected = SpeltOut(lm, sampler, prompt)
        assert out.sequences[row, -24 - len(prompt) :].tolist() == expected.canvas
        assert out.nfe[row] == expected.steps
        hidden += expected.hidden
    whole = sum(int(nfe) * (24 + len(prompt)) for nfe, prompt in zip(out.nfe, PROMPTS, strict=True))
    assert out.stats.computed_share == pytest.approx(1 - hidden / whole)


def test_fast_steps_hide_what_comes_after_the_cycle() -> None:
    lm = random_llada()
    sampler = SlowFast(0.3, 0.2, 3, 3, 1.0)
    assert dllm.generate(lm, PROMPTS, sampler, **OPTIONS).stats.computed_share < 0.97


@MAKERS
def test_one_slow_step_after_another_is_one_token_per_step(make: Any) -> None:
    lm = make()
    plain = dllm.generate(lm, PROMPTS, Vanilla(), **OPTIONS)
    out = dllm.generate(lm, PROMPTS, SlowFast(1.1, exploration=99), **OPTIONS)
    assert torch.equal(out.sequences, plain.sequences)
    assert torch.equal(out.commit_step, plain.commit_step)


@MAKERS
def test_without_a_threshold_a_block_is_one_step(make: Any) -> None:
    lm = make()
    once = dllm.generate(lm, PROMPTS, SlowFast(0.0), **OPTIONS)
    assert once.nfe.tolist() == [2] * len(PROMPTS)


def test_one_confident_position_alone_is_no_reason_to_commit_several() -> None:
    assert chosen(SlowFast(0.9), [0.95, 0.5, 0.6]) == [0]
    assert chosen(SlowFast(0.59), [0.95, 0.5, 0.6]) == [0, 2]


@given(confidences, st.floats(0, 1), st.floats(0, 1))
def test_a_lower_threshold_commits_at_least_as_much(values: list[float], one: float, other: float) -> None:
    low, high = sorted((one, other))
    assert set(chosen(SlowFast(high), values)) <= set(chosen(SlowFast(low), values))


@MAKERS
def test_infilled_rows_ignore_batchmates_and_whoever_had_their_number(make: Any) -> None:
    lm = make()
    m = lm.backbone.mask_token_id
    rows = [[m, 5, m, m, 8, 9, *[m] * 7], [3, m, m, 4], [1, 2, m, 7, *[m] * 12, 9], [m, m, 8]]
    sampler = SlowFast(0.4, 0.3, 1, 1)
    for size in (1, 2):
        batch = dllm.infill(lm, rows, sampler, block_length=6, batch_size=size)
        for row, ids in enumerate(rows):
            alone = dllm.infill(lm, [ids], sampler, block_length=6)
            assert batch.sequences[row, -len(ids) :].tolist() == alone.sequences[0].tolist()
            assert batch.nfe[row] == alone.nfe[0]


@pytest.mark.parametrize(
    ("name", "value"),
    [("threshold", -0.1), ("cycle_threshold", nan), ("exploration", 0), ("window", 0), ("max_deviation", -1)],
)
def test_values_out_of_range_are_named(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"{name}=.*use "):
        SlowFast(**{name: value})
