"""The cases that `make test` runs of a test over several parameters; `make test-all` runs all of their product.

Cases with the mark `spare` are those of `make test-all` alone.

A covering array (Cohen et al. 1997, "The AETG system"): of two parameters every value is used, of three or more every
pair of values. A mark sets it otherwise for one test.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any
from zlib import crc32

import pytest

Case = tuple[Hashable, ...]


class Covering:
    """The plugin that chooses, among what `-k` and `-m` left."""

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """Deselect the others."""
        others = left_out(items)
        config.hook.pytest_deselected(items=others)
        unwanted = set(others)
        items[:] = [item for item in items if item not in unwanted]


def left_out(items: Iterable[pytest.Item]) -> list[pytest.Item]:
    """The tests that covering sets of the cases of each test do without; see `covering`.

    The mark `covering(n)` is the strength of a test's set.
    """
    cases: defaultdict[str, list[Any]] = defaultdict(list)
    others: list[pytest.Item] = []
    for item in items:
        if item.get_closest_marker("spare"):
            others.append(item)
        elif hasattr(item, "callspec"):
            cases[item.nodeid.partition("[")[0]].append(item)
    for test, own in cases.items():
        mark = own[0].get_closest_marker("covering")
        # Beginning elsewhere for each test, so that a value does not meet the same others in all of them.
        first = crc32(test.encode()) % len(own)
        kept = covering(_values([each.callspec.params for each in own]), None if mark is None else mark.args[0], first)
        others += [item for item, keep in zip(own, kept, strict=True) if not keep]
    return others


def covering(cases: Sequence[Case], strength: int | None = None, first: int = 0) -> list[bool]:
    """Which cases belong to a set in which everything that these cover is covered.

    Greedily, the case that covers most, then the one whose values were taken least often, then the next.

    Args:
        cases: the value of each parameter.
        strength: number of parameters whose values are combined; None for one of two, and two of three or more.
        first: where to begin.
    """
    count = len(cases[0])
    strength = min(count - 1, 2) if strength is None else strength
    if not 0 < strength < count:
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
