"""Layout of the columns to compute: packed into forwards, and split by width where that is faster."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

# Fixed cost of a forward, in columns, on a CPU and on a GPU: the time to read the weights. About 50 were measured for
# 100 million parameters on two cores; while an H200 reads a weight of two bytes, at 4.8 TB/s, it computes about 200
# columns with it, at 989 TFLOP/s.
OVERHEAD = {"cpu": 64, "cuda": 256}
# Of forwards that are replayed from CUDA graphs: columns of a sequence, and steps of the ends of what is attended to.
WIDTHS = (8, 16, 32, 48, 64, 96, 128, 192, 256, 384, *range(512, 1024, 64), *range(1024, 2049, 128))
_SPAN = 64
# A forward may grow up to so many columns, over all sequences, since reading the weights takes longer than computing
# them; beyond, by so much.
_FREE, _GROWTH = 512, 1.15


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


@dataclass(frozen=True)
class Layout:
    """The columns of one forward.

    Attributes:
        host: (A, C) columns that each sequence computes.
        visible: (A, L) columns that it attends to.
        slots: (A,) slot of its row, ascending.
        source: (A,) the sequence laid out here, one of those that are asked about; -1 where none is, whose result and
            stored values are not used.
        span: the first column that is attended to, and the one after the last.
    """

    host: NDArray[np.int64]
    visible: NDArray[np.bool_]
    slots: NDArray[np.int64]
    source: NDArray[np.int64]
    span: tuple[int, int]

    @property
    def place(self) -> NDArray[np.int64]:
        """The place of each sequence that is asked about."""
        return np.flatnonzero(self.source >= 0)

    def recurring(self, slots: int, most: int) -> Layout:
        """The same forward in one of few shapes, so that its graph is likely to exist: larger, and masked where larger.

        Args:
            slots: of the engine.
            most: columns, over all sequences, beyond which a forward stays as it is; it also does where much more
                would be computed.
        """
        length, (low, high) = self.visible.shape[1], self.span
        # The smallest aligned group of slots, a power of two of them, that holds all sequences.
        first, last, size = int(self.slots[0]), int(self.slots[-1]), 1
        while first // size != last // size:
            size *= 2
        start = first // size * size
        rows = np.arange(start, min(start + size, slots))
        width = next((each for each in WIDTHS if each >= self.host.shape[1]), most + 1)
        if len(rows) * width > min(most, max(_FREE, _GROWTH * self.host.size)):
            return self
        low, high = low // _SPAN * _SPAN, min(-(-high // _SPAN) * _SPAN, length)
        source, place = np.full(len(rows), -1), self.slots - start
        source[place] = self.source
        # What is not asked about is written after the end of the canvas, and attends to whatever is there.
        host, visible = np.full((len(rows), width), length), np.ones((len(rows), length), dtype=bool)
        host[place] = np.pad(self.host, ((0, 0), (0, width - self.host.shape[1])), mode="edge")
        visible[place] = self.visible
        return replace(self, host=host, visible=visible, slots=rows, source=source, span=(low, high))


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
