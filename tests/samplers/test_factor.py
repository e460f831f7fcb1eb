"""Fast-dLLM's factor rule."""

from __future__ import annotations

from math import nan

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dllm.samplers import Factor
from sampler_rig import chosen, confidences


def by_hand(confidence: list[float], factor: float) -> list[int]:
    """The rule as it is written: smallest n with (n + 1)(1 - c_n) >= factor, commit the best n - 1."""
    order = sorted((i for i, c in enumerate(confidence) if c == c), key=lambda i: (-confidence[i], i))
    failing = [n for n, i in enumerate(order, 1) if (n + 1) * (1 - confidence[i]) >= factor]
    count = (failing[0] if failing else len(order)) - 1
    return sorted(order[: max(1, count)])


@pytest.mark.parametrize(
    ("factor", "expected"),
    [(0.01, [1]), (0.1, [1]), (0.5, [0, 1, 4]), (1.0, [0, 1, 4]), (2.0, [0, 1, 4]), (9.0, [0, 1, 2, 4])],
)
def test_commits_the_longest_safe_head(factor: float, expected: list[int]) -> None:
    confidence = [0.96, 0.99, 0.5, nan, 0.9, 0.45]
    assert by_hand(confidence, factor) == expected
    assert chosen(Factor(factor), confidence) == expected


@given(confidences, st.floats(0.01, 5))
def test_equals_the_rule_as_written(values: list[float], factor: float) -> None:
    # A rounding error away from equality the two may differ.
    ranked = sorted((c for c in values if c == c), reverse=True)
    if all(abs((n + 1) * (1 - c) - factor) > 1e-9 for n, c in enumerate(ranked, 1)):
        assert chosen(Factor(factor), values) == by_hand(values, factor)


@given(confidences, st.floats(0.01, 5), st.floats(0.01, 5))
def test_a_larger_factor_commits_at_least_as_much(values: list[float], one: float, other: float) -> None:
    low, high = sorted((one, other))
    assert set(chosen(Factor(low), values)) <= set(chosen(Factor(high), values))


def test_a_factor_that_is_not_positive_is_refused() -> None:
    with pytest.raises(ValueError, match=r"factor=0 .*positive"):
        Factor(0)
