"""The cases that `make test` runs of a test over several parameters; `make test-all` runs all of their product.

A covering array (Cohen et al. 1997, "The AETG system"): of two parameters every value is used, of three or more every
pair of values. What fails for one value, or where two meet, fails in it.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any
from zlib import crc32

import pytest

Case = tuple[Hashable, ...]


def left_out(items: Iterable[pytest.Item]) -> list[pytest.Item]:
    """The tests that covering sets of the cases of each test do without; none of a test marked `product`."""
    cases: defaultdict[str, list[tuple[pytest.Item, Mapping[str, Any]]]] = defaultdict(list)
    for item in items:
        given = getattr(item, "callspec", None)
        if given is not None and item.get_closest_marker("product") is None:
            cases[item.nodeid.partition("[")[0]].append((item, given.params))
    # Beginning elsewhere for each test, so that a value does not meet the same others in all of them.
    kept = {
        test: covering(_values([given for _, given in own]), crc32(test.encode()) % len(own))
        for test, own in cases.items()
    }
    return [item for test, own in cases.items() for (item, _), keep in zip(own, kept[test], strict=True) if not keep]


def covering(cases: Sequence[Case], first: int = 0) -> list[bool]:
    """Which cases belong to a set in which everything that these cover is covered.

    Greedily, the case that covers most, then the one whose values were taken least often, then the next.

    Args:
        cases: the value of each parameter.
        first: where to begin.
    """
    strength = min(len(cases[0]) - 1, 2)
    if strength < 1:
        return [True] * len(cases)
    parts = [[*combinations(enumerate(case), strength)] for case in cases]
    missing = {part for own in parts for part in own}
    taken: Counter[Any] = Counter()
    kept = [False] * len(cases)
    while missing:
        best = max(
            (place for place, done in enumerate(kept) if not done),
            key=lambda place: (
                sum(part in missing for part in parts[place]),
                -sum(taken[each] for each in enumerate(cases[place])),
                -((place - first) % len(cases)),
            ),
        )
        kept[best] = True
        missing.difference_update(parts[best])
        taken.update(enumerate(cases[best]))
    return kept


def _values(params: Sequence[Mapping[str, Any]]) -> list[Case]:
    """The values of each independent parameter: one that goes with another counts as one with it."""
    names = [name for name in params[0] if len({_key(each.get(name)) for each in params}) > 1]
    columns: list[Case] = []
    for name in names:
        column = tuple(_key(each.get(name)) for each in params)
        if not any(_together(column, other) for other in columns):
            columns.append(column)
    return [*zip(*columns, strict=True)] if columns else [()] * len(params)


def _together(left: Case, right: Case) -> bool:
    return len(set(zip(left, right, strict=True))) == len(set(left)) == len(set(right))


def _key(value: Any) -> Hashable:
    return (type(value), value) if isinstance(value, (str, int, float, bytes)) else id(value)
