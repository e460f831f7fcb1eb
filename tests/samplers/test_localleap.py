"""LocalLeap's anchor rule."""

from __future__ import annotations

from math import nan
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import dllm
from dllm.samplers import LocalLeap, Threshold
from models import random_dream, random_llada
from sampler_rig import chosen, confidences


def test_near_an_anchor_the_relaxed_threshold_is_enough() -> None:
    assert chosen(LocalLeap(0.9, 0.7, 2), [0.8, 0.5, 0.95, 0.75, 0.8, 0.8]) == [0, 2, 3, 4]


def test_what_an_anchor_drew_in_is_no_anchor_in_the_same_step() -> None:
    assert chosen(LocalLeap(0.9, 0.7, 1), [0.95, 0.8, 0.8, 0.8]) == [0, 1]


def test_decoded_positions_are_no_anchors() -> None:
    assert chosen(LocalLeap(0.9, 0.7, 4), [nan, 0.8, 0.75]) == [1]


def test_without_an_anchor_only_the_leftmost_of_the_best_goes() -> None:
    assert chosen(LocalLeap(0.9, 0.7, 4), [0.2, 0.8, 0.8]) == [1]


def test_the_radius_may_exceed_the_block() -> None:
    assert chosen(LocalLeap(0.9, 0.5, 99), [0.6, 0.4, 0.95]) == [0, 2]


@given(confidences, st.floats(0.1, 1.0), st.floats(0, 1), st.floats(0, 1), st.integers(0, 6))
def test_a_lower_relaxed_threshold_or_larger_radius_commits_at_least_as_much(
    values: list[float], threshold: float, one: float, other: float, radius: int
) -> None:
    low, high = sorted((one * threshold, other * threshold))
    few = set(chosen(LocalLeap(threshold, high, radius), values))
    assert few <= set(chosen(LocalLeap(threshold, low, radius), values))
    assert few <= set(chosen(LocalLeap(threshold, high, radius + 1), values))


@pytest.mark.parametrize("make", [random_llada, random_dream])
@pytest.mark.parametrize("same", [LocalLeap(0.5, 0.1, 0), LocalLeap(0.5, 0.5, 4)], ids=repr)
def test_without_reach_or_relaxation_it_is_the_threshold(make: Any, same: LocalLeap) -> None:
    lm = make()
    options = {"gen_length": 20, "block_length": 8, "stop_at_eos": False}
    plain = dllm.generate(lm, [[3, 4], [5]], Threshold(0.5), **options)
    leap = dllm.generate(lm, [[3, 4], [5]], same, **options)
    assert torch.equal(plain.sequences, leap.sequences)
    assert torch.equal(plain.commit_step, leap.commit_step)


@pytest.mark.parametrize(
    ("name", "value"), [("threshold", -0.1), ("relaxed_threshold", 0.95), ("relaxed_threshold", -1), ("radius", 1.5)]
)
def test_values_out_of_range_are_named(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"{name}=.*use "):
        LocalLeap(**{name: value})
