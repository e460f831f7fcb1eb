"""Access of one forward to cached keys and values, by the cheapest indexing that its columns and rows allow."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TypeAlias

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from dllm.cache.selection import Selection
from dllm.decoding.transfer import put
from dllm.models.kernels import write
from dllm.models.transformer import KVStore

# Keys and values, (layers, slots, H, L, D) each.
Kept: TypeAlias = tuple[Tensor, Tensor]


def bind(kept: Kept, selection: Selection) -> KVStore:
    """Access for a forward that computes these columns."""
    if selection.drafts > 1:
        return Joined(kept, selection)
    if not selection.first.all():
        return Gathered(kept, selection)
    slots = selection.neighbours
    if slots is None:
        runs = selection.runs()
        return Runs([bind(kept, run) for run in runs], [len(run.slots) for run in runs])
    # Contiguous rows, one sequence each: attention reads the store in place, and only fresh columns are copied.
    (low, high), host = selection.span, selection.host
    stored, index = [each[:, slots, :, low:] for each in kept], selection.within
    memory = slots.start, slots.stop, low, high
    if (host == host[0, 0] + np.arange(host.shape[1])).all() and int(host[0, -1]) < high:
        return Slice(stored, high - low, index, memory, int(host[0, 0]) - low)
    return Scattered(stored, high - low, index, memory)


class Scattered:
    """Columns that differ between the rows.

    Args:
        stored: keys and values from the first column attended to on, (layers, A, H, ..., D) each.
        width: columns attended to.
        index: computed columns, within `stored`; beyond `width` they are only written.
        memory: as in `FixedStore`.
    """

    def __init__(self, stored: Sequence[Tensor], width: int, index: Int[Tensor, "A C"], memory: Hashable) -> None:
        self.stored, self.width, self.index, self.memory = stored, width, index, memory

    def through(self, index: Int[Tensor, "A C"]) -> Scattered:
        """The same, with the columns given by a tensor."""
        return Scattered(self.stored, self.width, index, self.memory)

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write in place."""
        k, v = (stored[layer] for stored in self.stored)
        write(keys, values, k, v, self.index)
        return k[:, :, : self.width], v[:, :, : self.width]


class Slice(Scattered):
    """Contiguous columns, the same in every row."""

    def __init__(
        self, stored: Sequence[Tensor], width: int, index: Int[Tensor, "A C"], memory: Hashable, start: int
    ) -> None:
        super().__init__(stored, width, index, memory)
        count = index.shape[1]
        self.everything = count == width
        self.fresh = [each[:, :, :, start : start + count] for each in stored]

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write in place."""
        for stored, fresh in zip(self.fresh, (keys, values), strict=True):
            stored[layer].copy_(fresh)
        if self.everything:
            return keys, values
        return self.stored[0][layer][:, :, : self.width], self.stored[1][layer][:, :, : self.width]


class Runs:
    """Rows in several contiguous runs of slots, each accessed in place."""

    def __init__(self, bound: Sequence[KVStore], sizes: Sequence[int]) -> None:
        self.bound, self.sizes = bound, sizes

    def parts(self, layer: int, keys: Tensor, values: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Write in place."""
        fresh = zip(self.bound, keys.split(self.sizes), values.split(self.sizes), strict=True)
        return [each.update(layer, k, v) for each, k, v in fresh]

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write in place; concatenate copies."""
        k, v = zip(*self.parts(layer, keys, values), strict=True)
        return torch.cat(k), torch.cat(v)


class Gathered:
    """Several drafts of a row: each sequence gets a copy of its row's keys and values."""

    def __init__(self, kept: Kept, selection: Selection) -> None:
        self.kept, self.columns, (low, high) = kept, selection.columns, selection.span
        # Columns after those that are attended to are only written.
        self.span, self.width = slice(low, max(high, int(selection.host.max()) + 1)), high - low
        self.rows = put(self.columns.device, selection.slots)
        self.first = put(self.columns.device, np.flatnonzero(selection.first))

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write the fresh columns into the copies; only those of a row's first draft go to the store."""
        return self._merge(self.kept[0][layer], keys), self._merge(self.kept[1][layer], values)

    def _merge(self, stored: Tensor, fresh: Tensor) -> Tensor:
        index = (self.columns - self.span.start)[:, None, :, None].expand_as(fresh)
        whole = stored[:, :, self.span][self.rows].scatter_(2, index, fresh)
        _write(stored, self.rows[self.first], self.columns[self.first], fresh[self.first])
        return whole[:, :, : self.width]


class Joined:
    """Drafts in one sequence: stored columns are shared, followed by the fresh columns of all drafts."""

    def __init__(self, kept: Kept, selection: Selection) -> None:
        first = put(selection.columns.device, np.flatnonzero(selection.first))
        self.kept, self.columns, self.span = kept, selection.columns[first], slice(*selection.span)
        self.rows = put(self.columns.device, selection.slots[selection.first])

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return all columns; the attention mask restricts each draft to its own."""
        return self._merge(self.kept[0][layer], keys), self._merge(self.kept[1][layer], values)

    def _merge(self, stored: Tensor, fresh: Tensor) -> Tensor:
        whole = torch.cat((stored[:, :, self.span][self.rows], fresh), dim=2)
        _write(stored, self.rows, self.columns, fresh[:, :, : self.columns.shape[1]])
        return whole


def _write(stored: Tensor, rows: Tensor, columns: Tensor, fresh: Tensor) -> None:
    """Store fresh columns of some rows."""
    stored.transpose(1, 2)[rows[:, None], columns] = fresh.transpose(1, 2)
