"""Fast-dLLM's threshold rule."""

from __future__ import annotations

from math import nan
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import dllm
from dllm.samplers import Threshold, Vanilla
from models import random_dream, random_llada
from sampler_rig import chosen, confidences, request


def test_commits_everything_at_or_above_the_threshold() -> None:
    assert chosen(Threshold(0.9), [0.95, 0.5, nan, 0.91, 0.2]) == [0, 3]


def test_the_best_is_committed_when_none_is_sure() -> None:
    assert chosen(Threshold(0.9), [0.3, nan, 0.5, 0.4]) == [2]


def test_of_equals_the_leftmost_is_committed() -> None:
    assert chosen(Threshold(0.9), [nan, 0.5, 0.5, 0.5]) == [1]


def test_at_least_adds_the_next_best() -> None:
    assert chosen(Threshold(0.9, at_least=2), [0.3, 0.95, 0.5, 0.4]) == [1, 2]
    assert chosen(Threshold(0.3, at_least=2), [0.3, 0.95, 0.5, 0.2]) == [0, 1, 2]


def test_pace_holds_commits_to_the_schedule_and_carries_what_is_left() -> None:
    # 8 masks in 4 steps of this block: two a step.
    paced = Threshold(0.9, steps=8)
    sure = [0.99, 0.98, 0.97, 0.96, 0.95, 0.94, 0.93, 0.92]
    assert chosen(paced, sure) == [0, 1]
    # Only one of two was sure in the first step: the second may commit three.
    assert chosen(paced, [nan, *sure[1:]], step=1) == [1, 2, 3]
    # Past the schedule everything sure goes.
    assert chosen(paced, [nan, *sure[1:]], step=4) == [1, 2, 3, 4, 5, 6, 7]


@given(confidences, st.floats(0, 1.1), st.floats(0, 1.1))
def test_a_lower_threshold_commits_at_least_as_much(values: list[float], one: float, other: float) -> None:
    low, high = sorted((one, other))
    assert set(chosen(Threshold(high), values)) <= set(chosen(Threshold(low), values))


@pytest.mark.parametrize("make", [random_llada, random_dream])
def test_above_one_it_is_one_token_per_step(make: object) -> None:
    lm = make()  # type: ignore[operator]
    options = {"gen_length": 20, "block_length": 8, "stop_at_eos": False}
    slow = dllm.generate(lm, [[3, 4], [5]], Vanilla(), **options)
    same = dllm.generate(lm, [[3, 4], [5]], Threshold(1.01), **options)
    assert torch.equal(slow.sequences, same.sequences)
    assert torch.equal(slow.commit_step, same.commit_step)


@pytest.mark.parametrize(("name", "value"), [("threshold", -0.1), ("threshold", nan), ("at_least", 0), ("steps", 0)])
def test_values_out_of_range_are_named(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"{name}=.*use "):
        Threshold(**{name: value})  # type: ignore[arg-type]


def test_fewer_steps_than_blocks_are_refused() -> None:
    with pytest.raises(ValueError, match=r"steps=1 .*between 2"):
        Threshold(steps=1).check(None, request())


def test_with_steps_of_each_block_it_is_complete_after_them() -> None:
    lm = random_llada()
    options: dict[str, Any] = {"gen_length": 16, "block_length": 8, "stop_at_eos": False}
    none = dllm.generate(lm, [[5, 9, 3]], Threshold(2.0, steps_per_block=3), **options)
    assert none.commit_step[0].bincount().tolist() == [3, 3, 2, 3, 3, 2]
    paced = dllm.generate(lm, [[5, 9, 3]], Threshold(0.4, steps_per_block=3), **options)
    assert int(paced.nfe[0]) < 6
    with pytest.raises(ValueError, match="steps_per_block=3 and at_least=2 are mutually exclusive"):
        Threshold(at_least=2, steps_per_block=3)
