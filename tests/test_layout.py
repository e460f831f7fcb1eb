"""Laying columns out as forwards."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dllm.layout import apart, pack

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


@given(st.lists(st.tuples(st.integers(1, 50), st.integers(1, 3)), min_size=1, max_size=8))
def test_no_sequence_costs_twice_its_row_because_of_another(sizes: list[tuple[int, int]]) -> None:
    rows = np.repeat(np.arange(len(sizes)), [drafts for _, drafts in sizes])
    cost = np.repeat([width for width, _ in sizes], [drafts for _, drafts in sizes])
    groups = apart(cost, rows)
    assert sorted(np.concatenate(groups).tolist()) == [*range(len(cost))]
    for group in groups:
        assert 2 * cost[group].min() > cost[group].max()
        # The drafts of a row stay together.
        assert set(np.flatnonzero(np.isin(rows, rows[group])).tolist()) == set(group.tolist())


def test_rows_that_refresh_do_not_widen_those_that_do_not() -> None:
    groups = apart(np.array([512, 32, 512, 40, 32]), np.arange(5))
    assert [group.tolist() for group in groups] == [[0, 2], [1, 3, 4]]
