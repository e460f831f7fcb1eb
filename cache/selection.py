"""What a store is: where keys and values lie, and what it is told of a forward that it serves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, TypeAlias, runtime_checkable

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from dllm.models.transformer import KVStore

Flags: TypeAlias = NDArray[np.bool_]


@dataclass(frozen=True)
class Selection:
    """Columns that one forward computes for A sequences.

    Attributes:
        rows: (A,) canvas row of each sequence.
        slots: (A,) the slot that row is in, ascending.
        first: (A,) True at each row's first sequence, whose keys and values are the ones to keep.
        host: (A, C) the columns, ascending; a sequence with fewer of them repeats its last.
        columns: the same on the device.
        span: the first column that is attended to, and the one after the last.
        drafts: sequences of a row that are joined to one.
    """

    rows: NDArray[np.int64]
    slots: NDArray[np.int64]
    first: Flags
    host: NDArray[np.int64]
    columns: Int[Tensor, "A C"]
    span: tuple[int, int]
    drafts: int = 1

    @property
    def neighbours(self) -> slice | None:
        """The slots, where they are neighbours, and of each there is just the sequence to keep; None where not."""
        first, last = int(self.slots[0]), int(self.slots[-1])
        alone = bool(self.first.all()) and bool((self.slots == first + np.arange(len(self.slots))).all())
        return slice(first, last + 1) if alone else None

    def runs(self) -> list[Selection]:
        """The same, split into slots that are neighbours."""
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
        joinable: it can serve drafts joined to one sequence.
    """

    joinable: bool

    def bind(self, selection: Selection) -> KVStore:
        """Serve a forward that computes these columns."""
        ...

    def held(self, layer: int, slots: Int[Tensor, " M"]) -> tuple[Float[Tensor, "M H L D"], Float[Tensor, "M H L D"]]:
        """Keys and values of the rows in some slots as they are."""
        ...

    def clear(self, slots: NDArray[np.int64]) -> None:
        """Fill some slots with zeros."""
        ...

    def move(self, moved: NDArray[np.int64]) -> None:
        """Follow rows, (M, 2), from one slot to another."""
        ...
