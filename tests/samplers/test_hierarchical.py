"""Hierarchical decoding: one token in every run of masks."""

from __future__ import annotations

from itertools import groupby
from math import nan
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import dllm
from dllm.samplers import Hierarchical, Threshold, Vanilla
from models import random_dream, random_llada
from sampler_rig import chosen, confidences

MAKERS = pytest.mark.parametrize("make", [random_llada, random_dream])
OPTIONS: dict[str, Any] = {"gen_length": 20, "block_length": 8, "stop_at_eos": False}


def spelt_out(values: list[float], threshold: float, low: float) -> list[int]:
    masked = [k for k, value in enumerate(values) if value == value]
    found = {k for k in masked if values[k] > threshold} | {max(masked, key=lambda k: values[k])}
    for is_run, run in groupby(range(len(values)), key=lambda k: k in masked):
        best = max(run, key=lambda k: values[k]) if is_run else None
        found |= {best} if best is not None and values[best] > low else set()
    return sorted(found)


@given(confidences, st.floats(0, 1.2), st.floats(0, 1))
def test_commits_as_spelt_out(values: list[float], threshold: float, share: float) -> None:
    values, low = [round(value, 6) for value in values], share * threshold
    # The rig gives a confidence up to rounding.
    assume(all(min(abs(value - threshold), abs(value - low)) > 1e-9 for value in values if value == value))
    assert chosen(Hierarchical(threshold, low), values) == spelt_out(values, threshold, low)


def test_each_run_gives_its_best_above_the_low_threshold() -> None:
    values = [0.5, 0.6, nan, 0.3, 0.2, nan, 0.7, 0.69]
    assert chosen(Hierarchical(0.9, 0.4), values) == [1, 6]
    assert chosen(Hierarchical(0.9, 0.0), values) == [1, 3, 6]


def test_above_the_threshold_a_run_gives_all() -> None:
    assert chosen(Hierarchical(0.9, 0.4), [0.95, 0.92, 0.5, nan, 0.91, 0.3]) == [0, 1, 4]


def test_the_thresholds_themselves_are_not_enough() -> None:
    assert chosen(Hierarchical(0.75, 0.75), [0.75, nan, 0.5, nan, 0.75]) == [0]
    assert chosen(Hierarchical(0.75, 0.5), [0.75, nan, 0.5, nan, 0.75, 0.75]) == [0, 4]


def test_the_leftmost_of_equals_goes() -> None:
    assert chosen(Hierarchical(0.9, 0.1), [0.2, 0.5, 0.5, nan, 0.4, 0.4]) == [1, 4]


@given(confidences, st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))
def test_a_lower_threshold_commits_at_least_as_much(values: list[float], one: float, two: float, low: float) -> None:
    small, large = sorted((one, two))
    assert set(chosen(Hierarchical(large, small), values)) <= set(chosen(Hierarchical(large, low * small), values))
    assert set(chosen(Hierarchical(large, low * small), values)) <= set(
        chosen(Hierarchical(small, low * small), values)
    )


@MAKERS
def test_the_ends_are_one_token_the_threshold_and_the_whole_block(make: Any) -> None:
    lm = make()
    for sampler, same in (
        (Hierarchical(1.0, 1.0), Vanilla()), (Hierarchical(0.0, 0.0), Threshold(0.0)),
        (Hierarchical(0.5, 0.5), Threshold(0.5)),
    ):  # fmt: skip
        found, plain = (dllm.generate(lm, [[3, 4], [5]], each, **OPTIONS) for each in (sampler, same))
        assert torch.equal(found.sequences, plain.sequences)
        assert torch.equal(found.commit_step, plain.commit_step)


@MAKERS
def test_given_tokens_divide_runs(make: Any) -> None:
    lm = make()
    m = lm.backbone.mask_token_id
    out = dllm.infill(lm, [[m, m, 7, m, m, 8, m]], Hierarchical(1.0, 0.0), block_length=None)
    steps = out.commit_step[0].tolist()
    assert [steps[k] for k in (0, 1, 3, 4, 6)].count(0) == 3
    assert out.nfe[0] == 2


@pytest.mark.parametrize(
    ("name", "value"), [("threshold", -0.1), ("low_threshold", 0.95), ("low_threshold", -1), ("threshold", nan)]
)
def test_values_out_of_range_are_named(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"{name}=.*use "):
        Hierarchical(**{name: value})
