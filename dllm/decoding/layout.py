"""Layout of the columns to compute: packed into forwards, and split by width where that is faster."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

# Fixed cost of a forward, in columns, on a CPU and on a GPU: the time to read the weights. About 50 were measured for
# 100 million parameters on two cores; while an H200 reads a weight of two bytes, at 4.8 TB/s, it computes about 200
# columns with it, at 989 TFLOP/s.
OVERHEAD = {"cpu": 64, "cuda": 256}


def pack(compute: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Lay the chosen columns of each sequence side by side.

    Args:
        compute: (A, L) True at the columns to compute; at least one in each sequence.

    Returns:
        The columns (A, C), ascending, padded by repeating the last; and (A, L) the slot of each column,
        out of bounds where it has none.
    """
    counts = compute.sum(1)
    sequence, column = np.nonzero(compute)
    slot = np.arange(len(column)) - np.repeat(counts.cumsum() - counts, counts)
    columns = np.zeros((len(compute), int(counts.max())), dtype=np.int64)
    columns[sequence, slot] = column
    after = np.arange(columns.shape[1]) >= counts[:, None]
    last = np.take_along_axis(columns, counts[:, None] - 1, axis=1)
    slots = np.full(compute.shape, 2**40)
    slots[sequence, column] = slot
    return np.where(after, last, columns), slots


def span(visible: NDArray[np.bool_]) -> tuple[int, int]:
    """The first column that some sequence (A, L) attends to, and the one after the last."""
    columns = np.flatnonzero(visible.any(0))
    return int(columns[0]), int(columns[-1]) + 1


def by_width(cost: NDArray[np.int64], rows: NDArray[np.int64], overhead: int) -> list[NDArray[np.int64]]:
    """Split sequences into forwards of minimum total time.

    The time of a forward is that of its columns, each sequence padded to the longest one, plus `overhead`.

    Args:
        cost: (A,) columns of each sequence.
        rows: (A,) ascending; sequences of one row stay together.
        overhead: of a forward, in columns.

    Returns:
        Indices of the sequences of each forward, ascending.
    """
    if len(cost) * cost.max() - cost.sum() <= overhead:
        return [np.arange(len(cost))]
    starts = np.flatnonzero(np.r_[True, rows[1:] != rows[:-1]])
    counts = np.diff(np.r_[starts, len(rows)])
    most = np.maximum.reduceat(cost, starts)
    order = np.argsort(-most, kind="stable")
    most, before = most[order], np.r_[0, counts[order].cumsum()]
    # best[i]: minimum time of the first i rows in this order; the last forward of these begins at cut[i].
    best, cut = [0], [0]
    for end in range(1, len(order) + 1):
        times = best + (before[end] - before[:end]) * most[:end] + overhead
        cut.append(int(times.argmin()))
        best.append(int(times.min()))
    number, end = np.zeros(len(order), dtype=np.int64), len(order)
    while end:
        number[order[cut[end] : end]] = cut[end]
        end = cut[end]
    each = np.repeat(number, counts)
    return [np.flatnonzero(each == own) for own in np.unique(number)]
