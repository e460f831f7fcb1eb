"""Learn-then-Test: valid p-values, and certificates that hold as often as they say."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from math import comb

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from dllm.evaluation.risk import at_most, binomial_tail, fixed_sequence, losses_of, p_value, upper_bound

LIMIT, DELTA, N = 0.05, 0.05, 200
RISKS = (0.005, 0.01, 0.03, 0.045, 0.051, 0.06, 0.08)  # of the settings, from safe to fast
Draw = Callable[[np.random.Generator, float], NDArray[np.float64]]


def binary(generator: np.random.Generator, risk: float) -> NDArray[np.float64]:
    return (generator.random(N) < risk).astype(float)


def graded(generator: np.random.Generator, risk: float) -> NDArray[np.float64]:
    """Losses of a half and of one, with this mean."""
    return np.where(generator.random(N) < risk / 0.75, generator.choice([0.5, 1.0], N), 0.0)


def violations(choose: Callable[[Callable[[float], NDArray[np.float64]]], list[float]], draw: Draw) -> int:
    """In how many of 500 calibrations a chosen setting has a risk above the limit."""
    generator, count = np.random.default_rng(0), 0
    for _ in range(500):
        count += any(risk > LIMIT for risk in choose(lambda risk: draw(generator, risk)))
    return count


def certified(losses: Callable[[float], NDArray[np.float64]]) -> list[float]:
    return [test.setting for test in fixed_sequence(RISKS, losses, LIMIT, DELTA) if test.certified]


def by_mean(losses: Callable[[float], NDArray[np.float64]]) -> list[float]:
    """An invalid method: whatever loses little enough on the problems at hand."""
    return [risk for risk in RISKS if losses(risk).mean() <= LIMIT]


@pytest.mark.parametrize("draw", [binary, graded])
def test_certificates_hold_as_often_as_they_say(draw: Draw) -> None:
    assert violations(certified, draw) <= 500 * DELTA


def test_an_invalid_method_would_be_found_out() -> None:
    assert violations(by_mean, binary) > 500 * DELTA


def test_safe_settings_are_certified() -> None:
    generator = np.random.default_rng(1)
    found = [certified(lambda risk: binary(generator, risk)) for _ in range(100)]
    assert sum(0.005 in each for each in found) > 90


def test_the_tail_is_exact() -> None:
    for n, k, p in ((1, 0, 0.3), (50, 3, 0.01), (400, 2, 0.01), (1000, 0, 0.01), (30, 29, 0.9), (30, 30, 0.9)):
        exact = Fraction(p)
        wanted = sum(comb(n, i) * exact**i * (1 - exact) ** (n - i) for i in range(k + 1))
        assert binomial_tail(k, n, p) == pytest.approx(float(wanted), rel=1e-9)


@pytest.mark.parametrize("n", [1, 7, 60])
@pytest.mark.parametrize("limit", [0.01, 0.1, 0.5])
def test_a_true_hypothesis_is_seldom_rejected(n: int, limit: float) -> None:
    p_values = [p_value(np.arange(n) < lost, limit) for lost in range(n + 1)]
    chance = [comb(n, lost) * limit**lost * (1 - limit) ** (n - lost) for lost in range(n + 1)]
    for level in (0.001, 0.05, 0.3, 0.9):
        assert sum(each for p, each in zip(p_values, chance, strict=True) if p <= level) <= level + 1e-12


def test_the_bound_is_where_the_test_turns() -> None:
    losses = (np.arange(300) < 4).astype(float)
    bound = upper_bound(losses, 0.05)
    assert p_value(losses, bound * 1.001) <= 0.05 < p_value(losses, bound * 0.999)
    assert upper_bound(np.zeros(300), 0.05) == pytest.approx(1 - 0.05 ** (1 / 300))
    assert upper_bound(np.ones(3), 0.05) == 1.0


@given(
    losses=st.lists(st.sampled_from([0.0, 0.25, 1.0]), min_size=1, max_size=40).map(np.array),
    limit=st.floats(0.01, 0.99),
    delta=st.floats(0.001, 0.999),
)
def test_what_is_certified_is_within_its_bound(losses: NDArray[np.float64], limit: float, delta: float) -> None:
    (test,) = fixed_sequence([0], lambda _: losses, limit, delta)
    assert test.certified == (test.bound <= limit) or test.bound == pytest.approx(limit, abs=1e-9)


def test_gains_do_not_make_up_for_losses() -> None:
    base, other = np.array([1.0, 1.0, 0.0, 0.5]), np.array([0.0, 1.0, 1.0, 0.25])
    assert losses_of(base, other).tolist() == [1.0, 0.0, 0.0, 0.25]


def test_the_share_is_of_all_problems() -> None:
    base = (np.arange(1000) < 400).astype(float)  # right on 40%
    other = np.where(np.arange(1000) < 10, 0.0, base)  # 1% of the problems, 2.5% of the right answers
    assert losses_of(base, other).mean() == 0.01


def test_testing_ends_with_the_first_failure() -> None:
    asked: list[float] = []

    def losses(risk: float) -> NDArray[np.float64]:
        asked.append(risk)
        return np.full(1000, 0.0 if risk < 0.03 else 1.0)

    found = list(fixed_sequence(RISKS, losses, LIMIT, DELTA))
    assert asked == [0.005, 0.01, 0.03]
    assert [test.certified for test in found] == [True, True, False]


def test_what_is_said_of_a_bound_holds() -> None:
    assert [at_most(bound) for bound in (0.0, 0.012301, 0.05, 0.07, 0.5701, 0.1, 0.99995, 1.0)] == [
        "0.00%", "1.24%", "5.00%", "7.00%", "57.01%", "10.00%", "100.00%", "100.00%",
    ]  # fmt: skip
