"""The cases that `make test` leaves out meet nothing that the others do not."""

from __future__ import annotations

from itertools import combinations, product
from types import SimpleNamespace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from covering import covering, left_out

SIZES = st.lists(st.integers(1, 5), min_size=1, max_size=4)


def pairs(cases: list[tuple[Any, ...]], strength: int) -> set[Any]:
    return {part for case in cases for part in combinations(enumerate(case), strength)}


@given(SIZES, st.data())
def test_every_value_and_of_three_or_more_every_pair_is_taken(sizes: list[int], data: st.DataObject) -> None:
    whole = [*product(*map(range, sizes))]
    cases = data.draw(st.lists(st.sampled_from(whole), min_size=1, unique=True))  # some combinations may not exist
    first = data.draw(st.integers(0, len(cases) - 1))
    kept = [case for case, keep in zip(cases, covering(cases, first=first), strict=True) if keep]
    strength = {1: 1, 2: 1}.get(len(sizes), 2)
    assert pairs(kept, strength) == pairs(cases, strength)


def test_it_is_about_as_small_as_can_be_and_takes_values_in_turn() -> None:
    cases = [*product(range(6), "ab")]
    kept = [case for case, keep in zip(cases, covering(cases), strict=True) if keep]
    assert len(kept) == 6 and sum(letter == "a" for _, letter in kept) == 3
    assert sum(covering([*product(range(6), range(4), "ab")])) == 24
    assert sum(covering([*product(range(6), range(4), "ab")], 1)) == 6
    assert all(covering([(each,) for each in range(5)])) and covering([()]) == [True]


def item(test: str, strength: int | None = None, /, spare: bool = False, **params: Any) -> Any:
    return SimpleNamespace(
        nodeid=f"test_a.py::{test}[{params}]",
        callspec=SimpleNamespace(params=params),
        get_closest_marker=lambda name: {
            "covering": None if strength is None else SimpleNamespace(args=(strength,)),
            "spare": spare or None,
        }[name],
    )


def test_tests_are_told_apart_and_parameters_that_go_together_are_one() -> None:
    first = [item("test_one", size=size, name=str(size), make=make) for size, make in product(range(3), (list, dict))]
    second = [item("test_two", size=size, fixed=None) for size in range(3)]
    third = [item("test_three", 2, size=size, make=make) for size, make in product(range(3), (list, dict))]
    plain: Any = SimpleNamespace(nodeid="test_a.py::test_four", get_closest_marker=lambda name: None)
    spare = item("test_two", spare=True, size=7)
    others = left_out([*first, *second, *third, plain, spare])
    assert len(others) == 4 and all(each in (*first, spare) for each in others) and spare in others
