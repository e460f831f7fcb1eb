"""The keys and values of a run, allocated once, and the bookkeeping that every cache with a store shares."""

from __future__ import annotations

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
    """Keys and values of all columns of all rows: (layers, rows, H, L, D) each.

    They take 2 * layers * rows * H * L * D * (bytes of a number), from the first forward to the last.
    Keys are kept with their rotary embedding, since a column never changes its position.
    """

    joinable = True

    def __init__(self, run: Run) -> None:
        layers, heads, size = run.kv_shape
        self.keys = torch.zeros((layers, run.rows, heads, run.length, size), dtype=run.dtype, device=run.device)
        self.values = torch.zeros_like(self.keys)

    @property
    def nbytes(self) -> int:
        """Bytes of everything kept."""
        return self.keys.nbytes + self.values.nbytes

    def bind(self, selection: Selection) -> KVStore:
        """Serve a forward that computes these columns, in the cheapest way they allow."""
        rows, host = selection.rows, selection.host
        if selection.drafts > 1:
            return _Joined(self, selection)
        if len(rows) < self.keys.shape[1] or not selection.first.all():
            return _Gathered(self, selection)
        # Every row once: what is stored is what is attended to, and nothing is copied but the fresh columns.
        if (host == host[0, 0] + np.arange(host.shape[1])).all():
            return _Slice(self, int(host[0, 0]), host.shape[1])
        return _Scattered(self, selection)

    def held(self, layer: int, rows: Int[Tensor, " M"]) -> tuple[Float[Tensor, "M H L D"], Float[Tensor, "M H L D"]]:
        """Keys and values of some rows as they are."""
        return self.keys[layer][rows], self.values[layer][rows]


class _Slice:
    """Neighbouring columns, the same in every row."""

    def __init__(self, store: KeyValues, start: int, width: int) -> None:
        self.store, self.start, self.width = store, start, width

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write in place."""
        for stored, fresh in ((self.store.keys, keys), (self.store.values, values)):
            stored[layer].narrow(2, self.start, self.width).copy_(fresh)
        if self.width == self.store.keys.shape[3]:
            return keys, values
        return self.store.keys[layer], self.store.values[layer]


class _Scattered:
    """Columns that differ between the rows."""

    def __init__(self, store: KeyValues, selection: Selection) -> None:
        self.store = store
        self.index = selection.columns[:, None, :, None]

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write in place."""
        index = self.index.expand_as(keys)
        return self.store.keys[layer].scatter_(2, index, keys), self.store.values[layer].scatter_(2, index, values)


class _Gathered:
    """Some of the rows, or several drafts of one: each sequence gets a copy of its row."""

    def __init__(self, store: KeyValues, selection: Selection) -> None:
        self.store, self.columns = store, selection.columns
        self.rows = torch.as_tensor(selection.rows, device=store.keys.device)
        self.kept = torch.as_tensor(np.flatnonzero(selection.first), device=store.keys.device)

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Put the fresh columns over the copies; of several drafts, what the first wrote is kept."""
        return self._merge(self.store.keys[layer], keys), self._merge(self.store.values[layer], values)

    def _merge(self, stored: Tensor, fresh: Tensor) -> Tensor:
        whole = stored[self.rows].scatter_(2, self.columns[:, None, :, None].expand_as(fresh), fresh)
        _write(stored, self.rows[self.kept], self.columns[self.kept], fresh[self.kept])
        return whole


class _Joined:
    """Drafts in one sequence: what is stored is shared, and the fresh columns of all drafts come behind it."""

    def __init__(self, store: KeyValues, selection: Selection) -> None:
        kept = torch.as_tensor(np.flatnonzero(selection.first), device=store.keys.device)
        self.store, self.columns = store, selection.columns[kept]
        self.rows = torch.as_tensor(selection.rows[selection.first], device=store.keys.device)

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Show every draft everything; the mask says which columns are its own."""
        return self._merge(self.store.keys[layer], keys), self._merge(self.store.values[layer], values)

    def _merge(self, stored: Tensor, fresh: Tensor) -> Tensor:
        whole = torch.cat((stored[self.rows], fresh), dim=2)
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
        rows, first, canvas = question.rows, question.first, question.canvas
        chosen = self.rule.choose(question, self._due[rows], self._stale[rows])
        compute = chosen.compute | question.read | self._stale[rows] | chosen.due[:, None]
        # What a draft changes behind or before the block; within the block the rule decides.
        compute |= question.drafted & (question.since(question.high) | ~question.since(question.low))
        compute &= ~canvas.cut[rows]
        self._due[rows[first]], self._stale[rows[first]] = False, False
        return Plan(compute, self.store, chosen.cost, chosen.probe)

    def observe(self, change: Change) -> None:
        """Remember what lost its keys and values."""
        self._stale[change.rows] |= change.revoked | change.edited

    def expire(self, rows: NDArray[np.int64]) -> None:
        """Compute everything anew in the next forward of these rows."""
        self._due[rows] = True
