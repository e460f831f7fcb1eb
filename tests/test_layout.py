"""Laying columns out as forwards."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dllm.decoding.layout import WIDTHS, Layout, by_width, pack

rows_of_flags = st.integers(1, 12).flatmap(
    lambda length: st.lists(
        st.lists(st.booleans(), min_size=length, max_size=length).filter(any), min_size=1, max_size=5
    )
)


@given(rows_of_flags)
def test_columns_are_packed_in_order_and_found_again(flags: list[list[bool]]) -> None:
    compute = np.array(flags)
    columns, slots = pack(compute)
    assert columns.shape[1] == compute.sum(1).max()
    for wanted, packed, found in zip(compute, columns, slots, strict=True):
        own = np.flatnonzero(wanted)
        assert packed[: len(own)].tolist() == own.tolist()
        assert (packed[len(own) :] == own[-1]).all()
        assert packed[found[own]].tolist() == own.tolist()
        assert (found[~wanted] >= 2**40).all()


sizes_and_drafts = st.lists(st.tuples(st.integers(1, 500), st.integers(1, 3)), min_size=1, max_size=6)


def time_of(groups: list[list[int]], cost: np.ndarray) -> int:
    return sum(64 + len(group) * int(cost[group].max()) for group in groups)


def partitions(rows: list[int]) -> list[list[list[int]]]:
    if not rows:
        return [[]]
    first, rest = rows[0], partitions(rows[1:])
    return [[[first], *part] for part in rest] + [
        [*part[:i], [first, *part[i]], *part[i + 1 :]] for part in rest for i in range(len(part))
    ]


@given(sizes_and_drafts)
def test_no_other_forwards_take_less_time_together(sizes: list[tuple[int, int]]) -> None:
    drafts = [count for _, count in sizes]
    rows = np.repeat(np.arange(len(sizes)), drafts)
    cost = np.repeat([width for width, _ in sizes], drafts)
    groups = by_width(cost, rows, 64)
    assert sorted(np.concatenate(groups).tolist()) == [*range(len(cost))]
    # The drafts of a row stay together.
    assert all(set(np.flatnonzero(np.isin(rows, rows[group])).tolist()) == set(group.tolist()) for group in groups)
    found = time_of([group.tolist() for group in groups], cost)
    others = (
        [np.flatnonzero(np.isin(rows, group)).tolist() for group in partition]
        for partition in partitions([*range(len(sizes))])
    )
    assert found == min(time_of(other, cost) for other in others)


def test_rows_that_refresh_do_not_widen_those_that_do_not() -> None:
    groups = by_width(np.array([512, 32, 512, 40, 32]), np.arange(5), 64)
    assert [group.tolist() for group in groups] == [[0, 2], [1, 3, 4]]


def layout(slots: list[int], columns: list[list[int]], visible: tuple[int, int]) -> Layout:
    seen = np.zeros((len(slots), 200), dtype=bool)
    seen[:, slice(*visible)] = True
    return Layout(np.array(columns), seen, np.array(slots), np.arange(len(slots)), visible)


def test_a_recurring_layout_computes_the_same_columns() -> None:
    found = layout([2, 5], [[70, 71, 72], [90, 95, 95]], (65, 130)).recurring(8, 512)
    assert found.host.shape == (8, 8)
    assert found.slots.tolist() == [*range(8)]
    assert found.source.tolist() == [-1, -1, 0, -1, -1, 1, -1, -1]
    assert found.place.tolist() == [2, 5]
    assert found.host[2].tolist() == [70, 71, *[72] * 6]
    assert (found.host[[0, 1, 3, 4, 6, 7]] == 200).all()
    assert found.span == (64, 192)
    assert found.visible[[2, 5]].sum(1).tolist() == [65, 65]
    assert found.visible[[0, 1, 3, 4, 6, 7], 64:192].all()


@given(st.data())
def test_recurring_layouts_have_few_shapes(data: st.DataObject) -> None:
    slots = sorted(data.draw(st.sets(st.integers(0, 6), min_size=1)))
    width, low = data.draw(st.integers(1, 40)), data.draw(st.integers(0, 100))
    found = layout(slots, [[*range(low, low + width)]] * len(slots), (low, 200)).recurring(7, 512)
    assert found.host.shape[1] in WIDTHS
    assert found.host.size <= 512
    assert found.span[0] % 64 == 0
    assert (found.span[1], found.slots[0] % len(found.slots) if len(found.slots) in (1, 2, 4) else 0) == (200, 0)
    assert [int(found.slots[place]) for place in found.place] == slots


def test_a_layout_that_would_become_too_wide_stays() -> None:
    wide = layout([0, 9], [[*range(60)]] * 2, (3, 130))
    assert wide.recurring(16, 512) is wide
