"""The store protocol: holds keys and values per slot, and a `Selection` describes the columns of one forward."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, TypeAlias, runtime_checkable

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from dllm.models.transformer import KVStore

Flags: TypeAlias = NDArray[np.bool_]


@dataclass(frozen=True)
class Selection:
    """The columns that one forward computes for A sequences.

    Attributes:
        rows: (A,) canvas row of each sequence.
        slots: (A,) slot of that row, ascending.
        first: (A,) True at each row's first sequence, whose keys and values are stored.
        host: (A, C) the columns, ascending; a sequence with fewer of them repeats its last. Those after the canvas only
            fill the forward.
        columns: the same on the device.
        span: the first column that is attended to, and the one after the last.
        drafts: sequences of a row that are joined into one.
    """

    rows: NDArray[np.int64]
    slots: NDArray[np.int64]
    first: Flags
    host: NDArray[np.int64]
    columns: Int[Tensor, "A C"]
    span: tuple[int, int]
    drafts: int = 1

    @cached_property
    def within(self) -> Int[Tensor, "A C"]:
        """The columns within the span; the same tensor each time."""
        return self.columns - self.span[0]

    @property
    def neighbours(self) -> slice | None:
        """The slots as a slice, if they are contiguous with one sequence each; else None."""
        first, last = int(self.slots[0]), int(self.slots[-1])
        alone = bool(self.first.all()) and bool((self.slots == first + np.arange(len(self.slots))).all())
        return slice(first, last + 1) if alone else None

    def runs(self) -> list[Selection]:
        """The same, split into contiguous runs of slots."""
        cuts = np.flatnonzero(np.diff(self.slots) != 1) + 1
        runs = np.split(np.arange(len(self.slots)), cuts)
        columns = self.columns.tensor_split(cuts.tolist())
        return [
            Selection(self.rows[run], self.slots[run], self.first[run], self.host[run], own, self.span, self.drafts)
            for run, own in zip(runs, columns, strict=True)
        ]

    @property
    def own(self) -> Flags:
        """(A, C) False where a sequence repeats its last column."""
        own = np.ones(self.host.shape, dtype=bool)
        own[:, 1:] = self.host[:, 1:] != self.host[:, :-1]
        return own


@runtime_checkable
class Store(Protocol):
    """Keys and values of the rows being decoded, each in its slot.

    Attributes:
        joinable: it supports drafts joined into one sequence.
        spare: columns after those of the canvas, which hold what is computed only to fill a forward.
    """

    joinable: bool
    spare: int

    def bind(self, selection: Selection) -> KVStore:
        """Access for a forward that computes these columns."""
        ...

    def held(self, layer: int, slots: Int[Tensor, " M"]) -> tuple[Float[Tensor, "M H L D"], Float[Tensor, "M H L D"]]:
        """Stored keys and values of some slots."""
        ...

    def clear(self, slots: NDArray[np.int64]) -> None:
        """Zero some slots."""
        ...

    def move(self, moved: NDArray[np.int64]) -> None:
        """Move rows, (M, 2), from one slot to another."""
        ...
