"""How the columns that a cache wants computed are laid out as forwards: packed, and apart where they are few."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def pack(compute: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Lay the chosen columns of each sequence side by side.

    Args:
        compute: (A, L) True at the columns to compute; at least one in each sequence.

    Returns:
        The columns (A, C), ascending, a sequence with fewer repeating its last; and (A, L) the slot of
        each column, out of all bounds where it has none.
    """
    counts = compute.sum(1)
    sequence, column = np.nonzero(compute)
    slot = np.arange(len(column)) - np.repeat(counts.cumsum() - counts, counts)
    columns = np.zeros((len(compute), int(counts.max())), dtype=np.int64)
    columns[sequence, slot] = column
    behind = np.arange(columns.shape[1]) >= counts[:, None]
    last = np.take_along_axis(columns, counts[:, None] - 1, axis=1)
    slots = np.full(compute.shape, 2**40)
    slots[sequence, column] = slot
    return np.where(behind, last, columns), slots


def span(visible: NDArray[np.bool_]) -> tuple[int, int]:
    """The first column that some sequence (A, L) looks at, and the one behind the last."""
    columns = np.flatnonzero(visible.any(0))
    return int(columns[0]), int(columns[-1]) + 1


def apart(cost: NDArray[np.int64], rows: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Split sequences into forwards, so that none costs twice its own or more because of another one.

    Args:
        cost: (A,) columns of each sequence.
        rows: (A,) ascending; sequences of one row stay together.

    Returns:
        Indices of the sequences of each forward, ascending.
    """
    if 2 * cost.min() > cost.max():
        return [np.arange(len(cost))]
    starts = np.flatnonzero(np.r_[True, rows[1:] != rows[:-1]])
    most = np.repeat(np.maximum.reduceat(cost, starts), np.diff(np.r_[starts, len(rows)]))
    forwards, left = [], np.ones(len(cost), dtype=bool)
    while left.any():
        together = left & (2 * most > most[left].max())
        forwards.append(np.flatnonzero(together))
        left &= ~together
    return forwards
