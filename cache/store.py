"""The keys and values of an engine, allocated once, and the bookkeeping shared by all caches with a store."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from dllm.cache.base import Plan, Question
from dllm.cache.binding import bind
from dllm.cache.selection import Flags, Selection, Store
from dllm.cache.shared import SharedBlocks
from dllm.decoding.canvas import Canvas
from dllm.decoding.setup import Setup
from dllm.decoding.window import Change, Exchange
from dllm.models.transformer import KVStore


class KeyValues:
    """Keys and values of all columns in all slots: (layers, slots, H, L, D) each.

    Bytes: 2 * layers * slots * H * L * D * (bytes per number), from the first forward on; the next engine of the
    same size reuses them.
    Keys are stored after the rotary embedding, since a column never changes its position. The last column belongs to
    no canvas: what is computed only to fill a forward is written there.
    """

    joinable = True
    spare = 1

    def __init__(self, setup: Setup) -> None:
        layers, heads, size = setup.kv_shape
        shape = layers, setup.slots, heads, setup.length + self.spare, size
        self.length, self.all_heads = setup.length, setup.all_heads
        self.keys, self.values = setup.tensor("keys", shape), setup.tensor("values", shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all stored tensors."""
        return sum(stored.nbytes for stored in self.tensors())

    def bind(self, selection: Selection) -> KVStore:
        """Access for a forward that computes these columns, by the cheapest indexing they allow."""
        return bind((self.keys, self.values), selection)

    def held(self, layer: int, slots: Int[Tensor, " M"]) -> tuple[Float[Tensor, "M H L D"], Float[Tensor, "M H L D"]]:
        """Stored keys and values of some slots."""
        return self.keys[layer][slots, :, : self.length], self.values[layer][slots, :, : self.length]

    def clear(self, slots: NDArray[np.int64]) -> None:
        """Zero some slots."""
        for stored in self.tensors():
            for slot in slots:
                stored[:, slot] = 0

    def move(self, moved: NDArray[np.int64]) -> None:
        """Move rows from one slot to another."""
        for stored in self.tensors():
            for source, target in moved:
                stored[:, target] = stored[:, source]

    def tensors(self) -> Sequence[Tensor]:
        """All stored tensors, (layers, slots, ...) each."""
        return self.keys, self.values


class PerRow:
    """State of each row, indexed by row number.

    Args:
        setup: of the engine.

    Attributes:
        foreseeable: as in `Rule`.
    """

    foreseeable = False

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self._kept: list[tuple[NDArray[Any], float]] = []

    def per_row(self, initial: float, *shape: int, dtype: type = np.int64) -> NDArray[Any]:
        """An array with one entry per row, which is reset to `initial` when a row enters."""
        array: NDArray[Any] = np.full((self.setup.slots, *shape), initial, dtype=dtype)
        self._kept.append((array, initial))
        return array

    def enter(self, rows: NDArray[np.int64]) -> None:
        """Reset the state of row numbers that now belong to other requests."""
        for array, initial in self._kept:
            array[rows] = initial


@runtime_checkable
class Rule(Protocol):
    """The rule of a cache: which columns are computed when.

    Attributes:
        foreseeable: while a row stays in its block, the columns do not depend on what is decoded there; False if it
            does not say.
    """

    def enter(self, rows: NDArray[np.int64]) -> None:
        """Reset the state of row numbers that now belong to other requests."""
        ...

    def plan(self, question: Question, due: Flags, stale: Flags) -> Plan:
        """Select the columns to compute beside those that are read.

        Args:
            question: the requested predictions.
            due: (A,) sequences whose columns are all computed, whatever the rule selects.
            stale: (A, L) columns that were revoked or rewritten; they are computed, whatever the rule selects.
        """
        ...


class Blocks(PerRow):
    """Tracks the active block of each row."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self._last = self.per_row(-1)

    def entered(self, question: Question) -> Flags:
        """(A,) whether the active block differs from that of the last forward."""
        entered = question.block != self._last[question.rows]
        self._last[question.rows[question.first]] = question.block[question.first]
        return entered


class Reuse(PerRow):
    """A running cache: a rule and a store.

    Tracks, for all caches, the rows due for a full refresh and the positions whose cached keys and values are
    stale because their token was revoked or rewritten. In models whose attention is causal over blocks it also tracks
    the positions that are exact, computed when neither their block nor any before it had a mask; these are not
    recomputed, and are shared with later requests (`dllm.cache.shared`).

    Args:
        setup: of the engine.
        rule: which columns are computed when.
        store: of the keys and values; None for `KeyValues`.
        shared: where attention is causal over blocks: columns kept for later requests that begin alike; 0 for none,
            None for as many as a canvas has.

    Raises:
        ValueError: columns to share of a model that attends to every position.
    """

    def __init__(self, setup: Setup, rule: Rule, store: Store | None = None, shared: int | None = 0) -> None:
        super().__init__(setup)
        self.rule, self.store = rule, store or KeyValues(setup)
        self._due = self.per_row(True, dtype=bool)
        self._stale = self.per_row(False, setup.length, dtype=bool)
        self._exact = self.per_row(False, setup.length, dtype=bool)
        self._block_length = 0 if setup.pattern is None else setup.pattern.grain  # 0: nothing is ever exact
        self._new = self.per_row(True, dtype=bool)
        self._finished = self.per_row(0)
        self._shared: SharedBlocks | None = None
        if setup.pattern is not None and shared != 0 and isinstance(self.store, KeyValues):
            self._shared = SharedBlocks(setup, self.store.tensors(), setup.length if shared is None else shared)
        elif shared:
            raise ValueError(f"shared={shared} has no effect on a model that attends to every position; use null")
        self._canvas: Canvas | None = None

    def plan(self, question: Question) -> Plan:
        """The columns that the rule selects, those that are read, and stale ones."""
        rows, first = question.rows, question.first
        due, stale = self._due[rows], self._stale[rows]
        plan = self.rule.plan(question, due, stale)
        assert plan.compute is not None
        compute = plan.compute | question.read | stale | due[:, None]
        if not first.all():  # tokens that a draft changes outside the block; within the block the rule decides
            compute |= question.drafted & (question.since(question.high) | ~question.since(question.low))
        # Planned positions beyond the horizon (later blocks of a block-causal model) stay stale for a later forward.
        self._due[rows[first]], self._stale[rows[first]] = False, (compute & question.since(question.horizon))[first]
        taken = np.zeros(len(rows), dtype=np.int64)
        if self._block_length and plan.cost is None:
            taken = self._take(question)
            compute = self._without_exact(question, compute)
        joint = question.joint(self.setup.logits_shift)
        if joint is not None:  # what attended to later columns is to be computed again
            within = question.since(joint[:, 0]) & ~question.since(joint[:, 1])
            self._stale[rows[first]] |= (compute & within)[first]
        # Confidences are read where columns are computed, not where they are exact.
        probe = plan.probe and replace(plan.probe, read=plan.probe.read & compute)
        return replace(plan, compute=compute, store=self.store, taken=taken, probe=probe)

    def steady(self, rows: NDArray[np.int64]) -> bool:
        """Whether the rule says so, and no row is due for a refresh; what is stale is computed by the next plan."""
        return bool(getattr(self.rule, "foreseeable", False)) and not self._due[rows].any()

    def _take(self, question: Question) -> NDArray[np.int64]:
        """(A,) columns that rows take over from earlier requests, in their first forward."""
        taken = np.zeros(len(question.rows), dtype=np.int64)
        canvas = self._canvas = question.canvas
        if self._shared is not None:
            for at in np.flatnonzero(self._new[question.rows] & question.first).tolist():
                row, padding = question.rows[at], canvas.padding[question.rows[at]]
                taken[at] = self._shared.take(canvas, int(row), int(question.slots[at]))
                self._exact[row, padding : padding + taken[at]] = True
        self._new[question.rows] = False
        return taken

    def _keep(self, change: Change) -> None:
        """Keep what the last step finished for later requests."""
        if self._shared is None or (canvas := self._canvas) is None:
            return
        whole = self._exact[change.rows].sum(1) // self._shared.length
        more = (whole > self._finished[change.rows]) & ~np.isin(change.rows, change.failed)
        slots = {int(row): slot for slot, row in enumerate(canvas.rows)}
        for row in change.rows[more].tolist():
            self._shared.keep(canvas, row, slots[row], self._exact[row])
        self._finished[change.rows] = whole

    def _without_exact(self, question: Question, compute: Flags) -> Flags:
        """Drop positions whose stored keys and values are exact; mark those that this forward makes exact.

        A position is exact once its block and all before it hold their final tokens (no mask before the open block) and
        everything it attends to is exact or computed now.
        """
        rows, first = question.rows, question.first
        drafted, visible = question.drafted, question.visible
        changed = np.where(drafted.any(1), drafted.argmax(1), drafted.shape[1])
        exact = self._exact[rows] & ~question.since(self._block_start(question, changed))
        compute = (compute & visible & ~exact) | question.read
        missing = visible & ~exact & ~compute
        upto = np.where(missing.any(1), missing.argmax(1), missing.shape[1])
        masked = question.masked
        final = np.where(masked.any(1), masked.argmax(1), masked.shape[1])  # a block may be edited without masks
        if self.setup.pattern is not None and self.setup.pattern.encodes:
            final = np.minimum(final, question.low)
        upto = self._block_start(question, np.minimum(upto, final))
        self._exact[rows[first]] |= (compute & ~question.since(upto))[first]
        return compute

    def _block_start(self, question: Question, column: NDArray[np.int64]) -> NDArray[np.int64]:
        """(A,) first column of the block of a column of each sequence."""
        padding = question.canvas.padding[question.rows]
        return np.asarray(padding + (column - padding) // self._block_length * self._block_length)

    def exchange(self, exchange: Exchange) -> None:
        """Reset rows that entered, and move those that changed slots."""
        self.enter(exchange.rows)
        self.rule.enter(exchange.rows)
        # Masked values are multiplied by zero, and NaN stays NaN: padding must not hold values of an earlier row.
        self.store.clear(exchange.slots)
        self.store.move(exchange.moved)

    def observe(self, change: Change) -> None:
        """Mark positions with stale keys and values."""
        changed = change.revoked | change.edited
        self._stale[change.rows] |= changed
        if self._block_length and changed.any():
            # Whatever shares a block with the first change, or comes after it, attends to it.
            kept = np.where(changed.any(1), changed.argmax(1) - self._block_length, changed.shape[1])
            self._exact[change.rows] &= np.arange(changed.shape[1]) <= kept[:, None]
        self._keep(change)

    def expire(self, rows: NDArray[np.int64]) -> None:
        """Recompute every position in the next forward of these rows."""
        self._due[rows] = True


def moved(flags: Flags, at: NDArray[np.int64]) -> Flags:
    """The columns that some columns are mapped to."""
    found = np.zeros_like(flags)
    sequence, column = np.nonzero(flags)
    found[sequence, at[sequence, column]] = True
    return found
