"""The keys and values of a run, allocated once, and the bookkeeping that every cache with a store shares."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from dllm.backbones.transformer import KVStore
from dllm.cache.base import Flags, Plan, Probe, Question, Selection, Store
from dllm.canvas import Change
from dllm.run import Run


class KeyValues:
    """Keys and values of all columns of the rows in all slots: (layers, slots, H, L, D) each.

    They take 2 * layers * slots * H * L * D * (bytes of a number), from the first forward to the last.
    Keys are kept with their rotary embedding, since a column never changes its position.
    """

    joinable = True

    def __init__(self, run: Run) -> None:
        layers, heads, size = run.kv_shape
        self.keys = torch.zeros((layers, run.slots, heads, run.length, size), dtype=run.dtype, device=run.device)
        self.values = torch.zeros_like(self.keys)

    @property
    def nbytes(self) -> int:
        """Bytes of everything kept."""
        return sum(stored.nbytes for stored in self.tensors())

    def bind(self, selection: Selection) -> KVStore:
        """Serve a forward that computes these columns, in the cheapest way they allow."""
        host = selection.host
        if selection.drafts > 1:
            return _Joined(self, selection)
        if not selection.first.all():
            return _Gathered(self, selection)
        if selection.neighbours is None:
            runs = selection.runs()
            return _Runs([self.bind(run) for run in runs], [len(run.slots) for run in runs])
        # Neighbouring rows, each once: what is stored is attended to where it is, and nothing but fresh columns copied.
        if (host == host[0, 0] + np.arange(host.shape[1])).all():
            return _Slice(self, selection)
        return _Scattered.of(self, selection)

    def held(self, layer: int, slots: Int[Tensor, " M"]) -> tuple[Float[Tensor, "M H L D"], Float[Tensor, "M H L D"]]:
        """Keys and values of the rows in some slots as they are."""
        return self.keys[layer][slots], self.values[layer][slots]

    def move(self, moved: NDArray[np.int64]) -> None:
        """Follow rows from one slot to another."""
        for stored in self.tensors():
            for source, target in moved:
                stored[:, target] = stored[:, source]

    def tensors(self) -> Sequence[Tensor]:
        """Everything kept, (layers, slots, ...) each."""
        return self.keys, self.values


class _Slice:
    """Neighbouring columns, the same in every row."""

    def __init__(self, store: KeyValues, selection: Selection) -> None:
        (low, high), slots = selection.span, selection.neighbours
        start, width = int(selection.host[0, 0]), selection.host.shape[1]
        self.everything = (start, start + width) == (low, high)
        self.stored = [each[:, slots, :, low:high] for each in (store.keys, store.values)]
        self.fresh = [each[:, slots, :, start : start + width] for each in (store.keys, store.values)]
        self.memory, self.index = _memory(selection), selection.columns - low

    def through(self, index: Int[Tensor, "A C"]) -> _Scattered:
        """The same, with the columns read from a tensor."""
        return _Scattered(self.stored, index, self.memory)

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write in place."""
        for stored, fresh in zip(self.fresh, (keys, values), strict=True):
            stored[layer].copy_(fresh)
        if self.everything:
            return keys, values
        return self.stored[0][layer], self.stored[1][layer]


class _Scattered:
    """Columns that differ between the rows."""

    def __init__(self, stored: Sequence[Tensor], index: Int[Tensor, "A C"], memory: Hashable) -> None:
        self.stored, self.index, self.memory = stored, index, memory
        self._expanded = index[:, None, :, None]

    @classmethod
    def of(cls, store: KeyValues, selection: Selection) -> _Scattered:
        """Bind some columns of a store."""
        (low, high), slots = selection.span, selection.neighbours
        stored = [each[:, slots, :, low:high] for each in (store.keys, store.values)]
        return cls(stored, selection.columns - low, _memory(selection))

    def through(self, index: Int[Tensor, "A C"]) -> _Scattered:
        """The same, with the columns read from a tensor."""
        return _Scattered(self.stored, index, self.memory)

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write in place."""
        index = self._expanded.expand_as(keys)
        k, v = (
            stored[layer].scatter_(2, index, fresh) for stored, fresh in zip(self.stored, (keys, values), strict=True)
        )
        return k, v


def _memory(selection: Selection) -> Hashable:
    """Which part of the store is attended to."""
    return int(selection.slots[0]), len(selection.slots), selection.span


class _Runs:
    """Rows of which some are neighbours: each run of these is served where it is."""

    def __init__(self, bound: Sequence[KVStore], sizes: Sequence[int]) -> None:
        self.bound, self.sizes = bound, sizes

    def parts(self, layer: int, keys: Tensor, values: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Write in place."""
        fresh = zip(self.bound, keys.split(self.sizes), values.split(self.sizes), strict=True)
        return [each.update(layer, k, v) for each, k, v in fresh]

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write in place; join copies."""
        k, v = zip(*self.parts(layer, keys, values), strict=True)
        return torch.cat(k), torch.cat(v)


class _Gathered:
    """Several drafts of a row: each sequence gets a copy of what its row has."""

    def __init__(self, store: KeyValues, selection: Selection) -> None:
        self.store, self.columns, self.span = store, selection.columns, slice(*selection.span)
        self.rows = torch.as_tensor(selection.slots, device=store.keys.device)
        self.kept = torch.as_tensor(np.flatnonzero(selection.first), device=store.keys.device)

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Put the fresh columns over the copies; of several drafts, what the first wrote is kept."""
        return self._merge(self.store.keys[layer], keys), self._merge(self.store.values[layer], values)

    def _merge(self, stored: Tensor, fresh: Tensor) -> Tensor:
        index = (self.columns - self.span.start)[:, None, :, None].expand_as(fresh)
        whole = stored[:, :, self.span][self.rows].scatter_(2, index, fresh)
        _write(stored, self.rows[self.kept], self.columns[self.kept], fresh[self.kept])
        return whole


class _Joined:
    """Drafts in one sequence: what is stored is shared, and the fresh columns of all drafts come behind it."""

    def __init__(self, store: KeyValues, selection: Selection) -> None:
        kept = torch.as_tensor(np.flatnonzero(selection.first), device=store.keys.device)
        self.store, self.columns, self.span = store, selection.columns[kept], slice(*selection.span)
        self.rows = torch.as_tensor(selection.slots[selection.first], device=store.keys.device)

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Show every draft everything; the mask says which columns are its own."""
        return self._merge(self.store.keys[layer], keys), self._merge(self.store.values[layer], values)

    def _merge(self, stored: Tensor, fresh: Tensor) -> Tensor:
        whole = torch.cat((stored[:, :, self.span][self.rows], fresh), dim=2)
        _write(stored, self.rows, self.columns, fresh[:, :, : self.columns.shape[1]])
        return whole


def _write(stored: Tensor, rows: Tensor, columns: Tensor, fresh: Tensor) -> None:
    """Keep fresh columns of some rows."""
    stored.transpose(1, 2)[rows[:, None], columns] = fresh.transpose(1, 2)


@dataclass(frozen=True)
class Choice:
    """Which columns a rule wants computed.

    Attributes:
        compute: (A, L) the columns, beside those that are read.
        due: (A,) where all columns are, whatever `compute` says.
        cost: (A,) columns computed through a whole layer, where that is fewer.
        probe: what else the rule wants to know.
    """

    compute: Flags
    due: Flags
    cost: NDArray[np.int64] | None = None
    probe: Probe | None = None


class Rule(Protocol):
    """What tells one cache from another: which columns are computed when."""

    def choose(self, question: Question, due: Flags, stale: Flags) -> Choice:
        """Choose columns.

        Args:
            question: what is asked.
            due: (A,) sequences whose columns are all computed, whatever the rule says.
            stale: (A, L) columns that were revoked or rewritten; they are computed, whatever the rule says.
        """
        ...


class Blocks:
    """Remembers the active block of each row."""

    def __init__(self, run: Run) -> None:
        self._last = np.full(run.rows, -1)

    def entered(self, question: Question) -> Flags:
        """(A,) whether the active block is another one than at the last forward."""
        entered = question.block != self._last[question.rows]
        self._last[question.rows[question.first]] = question.block[question.first]
        return entered


class Reuse:
    """One run of a cache: a rule over a store.

    What is due for a full computation, and what was revoked or rewritten under kept keys and values, is
    followed here for all caches alike.

    Args:
        run: the facts of the run.
        rule: which columns are computed when.
        store: what keeps the keys and values; None for `KeyValues`.
    """

    def __init__(self, run: Run, rule: Rule, store: Store | None = None) -> None:
        self.rule, self.store = rule, store or KeyValues(run)
        self._due = np.ones(run.rows, dtype=bool)
        self._stale = np.zeros((run.rows, run.length), dtype=bool)

    def plan(self, question: Question) -> Plan:
        """What the rule says, what is read, and what changed under the store."""
        rows, first = question.rows, question.first
        chosen = self.rule.choose(question, self._due[rows], self._stale[rows])
        compute = chosen.compute | question.read | self._stale[rows] | chosen.due[:, None]
        # What a draft changes behind or before the block; within the block the rule decides.
        compute |= question.drafted & (question.since(question.high) | ~question.since(question.low))
        self._due[rows[first]], self._stale[rows[first]] = False, False
        return Plan(compute, self.store, chosen.cost, chosen.probe)

    def observe(self, change: Change) -> None:
        """Remember what lost its keys and values, and follow rows that moved."""
        self._stale[change.rows] |= change.revoked | change.edited
        self.store.move(change.moved)

    def expire(self, rows: NDArray[np.int64]) -> None:
        """Compute everything anew in the next forward of these rows."""
        self._due[rows] = True
