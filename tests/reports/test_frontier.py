"""The Pareto front and the area under it."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dllm.reports.frontier import aup, front

SMALL = st.integers(0, 6).map(float)
POINTS = st.lists(st.tuples(SMALL, SMALL), max_size=12)


def dominates(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return one[0] <= other[0] and one[1] >= other[1] and one != other


class TestFront:
    @given(points=POINTS)
    def test_holds_exactly_what_nothing_dominates_by_rising_cost(self, points: list[tuple[float, float]]) -> None:
        found = front(points)
        kept = {i for i, point in enumerate(points) if not any(dominates(other, point) for other in points)}
        assert set(found) == kept
        assert len(found) == len(kept)
        costs = [points[index][0] for index in found]
        assert costs == sorted(costs)

    def test_equals_stand_on_it_together(self) -> None:
        assert front([(2, 0.9), (1, 0.5), (2, 0.9), (3, 0.9)]) == [1, 0, 2]


class TestAup:
    def test_is_the_formula_of_the_paper(self) -> None:
        # Three points, none dominated, the best accuracy 90.
        w = lambda y: math.exp(-3 * (1 - y / 90))  # noqa: E731
        expected = 1 * 90 + (2 - 1) * (88 * w(88) + 90) / 2 + (4 - 2) * (86 * w(86) + 88 * w(88)) / 2
        assert aup([(4, 86), (1, 90), (2, 88)], best=90) == pytest.approx(expected)

    def test_accuracy_that_fell_too_far_is_left_out(self) -> None:
        assert aup([(1, 90), (2, 84.9)], best=90) == 90
        assert aup([(1, 90), (2, 85.0)], best=90) > 90  # type: ignore[operator]  # there are points

    def test_settings_that_are_slower_and_worse_do_not_count_against_it(self) -> None:
        assert aup([(1, 70), (3, 90), (2, 88)], best=90) == aup([(3, 90)], best=90) == 270

    def test_of_nothing_there_is_none(self) -> None:
        assert aup([], best=90) is None
        assert aup([(2, 0.0)], best=0.0) == 0

    @given(
        points=st.lists(st.tuples(st.floats(0.1, 20), st.floats(1, 100)), min_size=1, max_size=8),
        more=st.tuples(st.floats(0.1, 20), st.floats(1, 100)),
    )
    def test_a_dominated_setting_changes_nothing(
        self, points: list[tuple[float, float]], more: tuple[float, float]
    ) -> None:
        best = max(y for _, y in points)
        worse = [each for each in points if each[0] >= more[0] and each[1] >= more[1]]
        if worse:
            assert aup([*points, more], best) == aup(points, best)
