"""dParallel's entropy rule."""

from __future__ import annotations

from math import log, nan

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dllm.samplers import EntropyThreshold
from sampler_rig import GUESSES, chosen, confidences


def entropy(confidence: float) -> float:
    """Of the rig's distribution: one token with the confidence, the rest spread evenly."""
    return -confidence * log(confidence) - (1 - confidence) * log((1 - confidence) / GUESSES)


def test_commits_everything_at_or_below_the_bound() -> None:
    values = [0.9, 0.5, 0.99, nan, 0.7]
    bound = entropy(0.9) + 1e-9
    assert chosen(EntropyThreshold(bound), values) == [0, 2]


def test_the_lowest_is_committed_when_all_are_above() -> None:
    assert chosen(EntropyThreshold(0.0), [0.5, 0.8, nan, 0.6]) == [1]


@given(confidences, st.floats(0, 5), st.floats(0, 5))
def test_a_larger_bound_commits_at_least_as_much(values: list[float], one: float, other: float) -> None:
    low, high = sorted((one, other))
    assert set(chosen(EntropyThreshold(low), values)) <= set(chosen(EntropyThreshold(high), values))


def test_a_negative_bound_is_refused() -> None:
    with pytest.raises(ValueError, match=r"threshold=-1.*nats"):
        EntropyThreshold(-1)
