"""Elastic-Cache: everything is recomputed from the layer on in which attention drifts (arXiv 2510.14973, section 3).

Rule:

    layers before the first in which  mean over t, j of cos(a_t,j before, a_t,j now) < gamma    compute
        window     the first `window` masked positions of the row
        new        masks at the last forward that have been decoded since
        tracked    in each layer of the last forward, the `track` decoded positions most attended to by the window,
                   summed over heads and queries
    that layer and those after it                                                               compute every position

The first forward computes every position. The attention a of the tracked positions is compared with what it was after
the last forward, by the cosine over the heads, averaged over the tracked positions t and all positions j. The first
layer in which it drifts is computed for every position, from the inputs that it last had, and so are all layers after
it; before that layer keys and values stay as they are. gamma=0 never refreshes and tracks nothing; gamma=1 refreshes in
every forward, which is no cache. Families with shifted logits compute, instead of a mask, the position at which its
prediction is read.

Differences from the reference: it begins one layer later, with the inputs that the layer after the drifting one had in
an earlier forward, so that no gamma gives the uncached result; the cosine is the one it computes, over the heads, where
the paper writes of the similarity of attention weights; nothing is tracked where nothing is decoded; requested
positions beyond the window are computed; rows of a batch drift each in their own layer; drafts of a policy are computed
on what is cached, and refresh nothing. The device is read in every layer, for what the next one computes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from dllm.cache.base import Flags, Metered, Plan, Question
from dllm.cache.selection import Selection
from dllm.cache.store import KeyValues, PerRow, Reuse, moved
from dllm.checks import number
from dllm.decoding.setup import Setup
from dllm.decoding.transfer import put
from dllm.models.transformer import KVStore, Wider, attention_weights


@dataclass(frozen=True)
class Elastic(Metered):
    """Recompute from the layer on in which the attention of the most attended tokens drifts.

    Args:
        gamma: similarity of attention below which a layer and those after it are recomputed; 0 for never, 1 for
            everything in every forward.
        window: masked positions computed per forward; requested positions are always computed; None for all.
        track: decoded positions of each layer whose attention is compared.

    Raises:
        ValueError: an option out of range.
    """

    gamma: float = 0.9
    window: int | None = 16
    track: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        number("gamma", self.gamma, "a number from 0 to 1", low=0, high=1)
        if self.window is not None:
            number("window", self.window, "a whole number of at least 1, or null", low=1, whole=True)
        number("track", self.track, "a whole number of at least 1", low=1, whole=True)

    @property
    def refuses(self) -> Mapping[str, str]:
        """Requirements of samplers that this cache does not meet, with the reason."""
        reason = "each layer decides what the next one computes"
        return {**super().refuses, "graphs": reason, "shadows": reason}

    def start(self, setup: Setup) -> Reuse:
        """Allocate keys and values of every position, and the queries and inputs of every layer."""
        store = Tracking(self, setup) if 0 < self.gamma < 1 else None
        return Reuse(setup, _Windowed(self, setup, store), store)


class _Windowed(PerRow):
    def __init__(self, options: Elastic, setup: Setup, store: Tracking | None) -> None:
        super().__init__(setup)
        self.options, self.store = options, store
        self.masked = self.per_row(False, setup.length, dtype=bool)

    def plan(self, question: Question, due: Flags, stale: Flags) -> Plan:
        canvas, rows, masked, store = question.canvas, question.rows, question.masked, self.store
        # The column at which the prediction for each column is read.
        at = np.maximum(np.arange(canvas.length) - self.setup.logits_shift, canvas.padding[rows, None])
        most = canvas.length if self.options.window is None else min(self.options.window, canvas.length)
        window = moved(masked & (masked.cumsum(1) <= most), at)
        compute = window | (self.masked[rows] & ~masked) | question.drafted | (self.options.gamma == 1)
        first = question.first
        self.masked[rows[first]] = masked[first]
        if store is None:
            return Plan(compute)
        compute |= store.tracked[rows] & question.visible
        self._prepare(store, question, window)
        return Plan(compute, more=partial(_of_first, store.more, rows, first))

    def _prepare(self, store: Tracking, question: Question, window: Flags) -> None:
        first = question.first
        rows, visible = question.rows[first], question.visible[first]
        store.more[:] = 0
        store.padding[question.rows] = question.canvas.padding[question.rows]
        store.visible[rows] = visible
        store.window[rows], store.candidates[rows] = window[first], visible & ~question.masked[first]


def _of_first(more: NDArray[np.float64], rows: NDArray[np.int64], first: Flags) -> NDArray[np.int64]:
    return np.where(first, np.ceil(more[rows]), 0).astype(np.int64)


class Tracking(KeyValues):
    """Keys, values, and the queries and inputs of each layer, with which it can be computed again.

    Bytes: layers * slots * L * (2 * H * D + Q * D + d) * (bytes per number), with Q query heads.

    Attributes:
        tracked: (rows, L) columns whose attention the next forward compares.
        window: (rows, L) masked columns, whose queries choose them.
        candidates: (rows, L) columns that may be chosen.
        visible: (rows, L) columns that are attended to.
        padding: (rows,) columns of padding.
        more: (rows,) columns computed through a whole layer that were not planned.
    """

    joinable = False
    spare = 0

    def __init__(self, options: Elastic, setup: Setup) -> None:
        super().__init__(setup)
        self.options, self.pattern = options, setup.pattern
        self.layers, heads, size = setup.kv_shape
        shape = self.layers, setup.slots, setup.length
        self.queries = setup.tensor("queries", (*shape, setup.query_heads or heads, size))
        self.inputs = setup.tensor("inputs", (*shape, setup.hidden_size))
        self.tracked, self.window, self.candidates, self.visible = np.zeros((4, setup.slots, setup.length), dtype=bool)
        self.padding, self.more = np.zeros(setup.slots, dtype=np.int64), np.zeros(setup.slots)

    def tensors(self) -> Sequence[Tensor]:
        """All stored tensors, (layers, slots, ...) each."""
        return self.keys, self.values, self.queries, self.inputs

    def bind(self, selection: Selection) -> KVStore:
        """Access for a forward that compares attention, where a row of it is on the canvas."""
        return _Comparing(self, selection) if selection.first.any() else super().bind(selection)

    def plain(self, selection: Selection) -> KVStore:
        """Access without comparing."""
        return super().bind(selection)


@dataclass(frozen=True)
class _Columns:
    """Some of the computed columns of M sequences.

    Attributes:
        column: on the canvas.
        index: among those that are computed.
        valid: False where a sequence has fewer of them.
    """

    column: Int[Tensor, "M N"]
    index: Int[Tensor, "M N"]
    valid: Bool[Tensor, "M N"]

    def of(self, queries: Float[Tensor, "M Q C D"]) -> Float[Tensor, "M Q N D"]:
        """Their queries."""
        index = self.index[:, None, :, None].expand(-1, queries.shape[1], -1, queries.shape[3])
        return queries.gather(2, index)


class _Comparing:
    """One forward, of which M sequences are the canvas of their row and may be computed again."""

    def __init__(self, store: Tracking, selection: Selection) -> None:
        self.store, self.selection, self.device = store, selection, selection.columns.device
        self.canvas = np.flatnonzero(selection.first)
        self.rows = selection.rows[self.canvas]
        self.low, high = selection.span
        self.visible = store.visible[self.rows]
        self.seen = put(self.device, self.visible[:, self.low : high])
        self.padding = put(self.device, store.padding[self.rows])
        self.slots, self.at = put(self.device, selection.slots[self.canvas]), put(self.device, self.canvas)
        self.wide = np.zeros(len(self.canvas), dtype=bool)
        self.chosen: list[Tensor] = []
        self.drift, self.again = np.zeros_like(self.wide), False
        self._lay_out(selection)

    def _lay_out(self, selection: Selection) -> None:
        """Compute these columns from now on."""
        self.current, self.inner = selection, self.store.plain(selection)
        self.columns = self._own(selection.columns)
        host, own = selection.host[self.canvas], selection.own[self.canvas]
        self.window = self._some(host, own, self.store.window[self.rows])
        # Where everything is computed there is nothing to refresh.
        narrow = (own.sum(1) < self.visible.sum(1)) & ~self.wide
        tracked = self.store.tracked[self.rows] & narrow[:, None]
        self.tracked, self.testing = self._some(host, own, tracked), bool(tracked.any())

    def _own(self, values: Float[Tensor, "B ..."] | Int[Tensor, "B ..."]) -> Tensor:
        """Those of the sequences on the canvas."""
        return values if len(self.at) == len(values) else values[self.at]

    def _some(self, host: NDArray[np.int64], own: Flags, flags: Flags) -> _Columns:
        chosen = np.take_along_axis(flags, host, axis=1) & own
        count = chosen.sum(1)
        index = np.argsort(~chosen, axis=1, kind="stable")[:, : max(1, int(count.max()))]
        column = np.take_along_axis(host, index, axis=1)
        valid = np.arange(index.shape[1]) < count[:, None]
        return _Columns(put(self.device, column), put(self.device, index), put(self.device, valid))

    def enter(self, layer: int, hidden: Float[Tensor, "B C d"]) -> None:
        """Keep the input of a layer."""
        self.again = False
        self.store.inputs[layer][self.slots[:, None], self.columns] = self._own(hidden)

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write to and read from the store; before that, the attention of the tracked columns as it was."""
        if self.testing and not self.again:
            queries = self.store.queries[layer][self.slots[:, None], self.tracked.column].transpose(1, 2)
            stored = self.store.keys[layer][self.slots, :, slice(*self.selection.span)]
            self.before = attention_weights(queries, stored, self._mask(self.tracked.column))
        # Before drafts read them, so that these see the same however often the rows beside them compute the layer.
        for kept, fresh in ((self.store.keys, keys), (self.store.values, values)):
            kept[layer].transpose(1, 2)[self.slots[:, None], self.columns] = self._own(fresh).transpose(1, 2)
        k, v = self.inner.update(layer, keys, values)
        self.keys = self._own(k)
        return k, v

    def queried(self, layer: int, queries: Float[Tensor, "B Q C D"]) -> None:
        """Keep the queries, compare the attention, and choose what the next forward tracks."""
        own = self._own(queries)
        self.store.queries[layer][self.slots[:, None], self.columns] = own.transpose(1, 2)
        if self.again:
            return
        if self.testing:
            mask = self._mask(self.tracked.column)
            now = attention_weights(self.tracked.of(own), self.keys, mask)
            before, now = (self.store.all_heads(each, 1) for each in (self.before, now))
            found = similarity(before, now, self.tracked.valid[..., None] & mask[:, 0])
            # Synchronizes: what the layer computes depends on it.
            self.drift = (found < self.store.options.gamma).cpu().numpy()
        weights = attention_weights(self.window.of(own), self.keys, self._mask(self.window.column))
        received = (weights * self.window.valid[:, None, :, None]).sum((1, 2))
        self.chosen.append(self.store.all_heads(received[:, None], 1).sum(1))
        if layer + 1 == self.store.layers:
            self._track(torch.stack(self.chosen, dim=1))

    def _track(self, weights: Float[Tensor, "M layers S"]) -> None:
        """The most attended candidates of each layer."""
        low, high = self.selection.span
        # Synchronizes: the next plan depends on it.
        score = np.where(self.store.candidates[self.rows, None, low:high], weights.double().cpu().numpy(), -1)
        best = np.argsort(-score, axis=2, kind="stable")[:, :, : self.store.options.track]
        tracked = np.zeros_like(score, dtype=bool)
        np.put_along_axis(tracked, best, True, axis=2)
        self.store.tracked[self.rows] = False
        self.store.tracked[self.rows, low:high] = (tracked & (score >= 0)).any(1)

    def wider(self, layer: int, hidden: Float[Tensor, "B C d"], mask: Bool[Tensor, "B 1 #C S"] | None) -> Wider | None:
        """The input of the layer with every column of the rows in which it drifts."""
        self.again = bool(self.drift.any())
        if not self.again:
            return None
        drift, self.drift = self.drift, np.zeros_like(self.drift)
        self.wide |= drift
        before = self.current
        host = _every(before, self.canvas[drift], self.visible[drift])
        share = (self.store.layers - layer) / self.store.layers
        planned = before.own[self.canvas[drift]].sum(1)
        self.store.more[self.rows[drift]] = share * (self.visible[drift].sum(1) - planned)
        place = put(self.device, _places(before.host, host))
        self._lay_out(replace(self.selection, host=host, columns=put(self.device, host)))
        wide = hidden.gather(1, place[..., None].expand(-1, -1, hidden.shape[-1]))
        drifted = put(self.device, np.flatnonzero(drift))
        wide[self.at[drifted]] = self.store.inputs[layer][self.slots[drifted, None], self.columns[drifted]]
        return Wider(wide, self._positions(), self._wide_mask(mask, place, drifted))

    def _positions(self) -> Int[Tensor, "B W"]:
        padding = self.store.padding[self.selection.rows]
        return (self.current.columns - put(self.device, padding)[:, None]).clamp(min=0)

    def _wide_mask(
        self, mask: Bool[Tensor, "B 1 #C S"] | None, place: Int[Tensor, "B W"], drifted: Int[Tensor, " N"]
    ) -> Bool[Tensor, "B 1 #W S"] | None:
        if mask is None or self.store.pattern is None:  # the same for all queries
            return mask
        wide = mask.gather(2, place[:, None, :, None].expand(-1, 1, -1, mask.shape[3]))
        own = self._mask(self.columns)
        wide[self.at[drifted]] = own[drifted]
        return wide

    def narrow(self, hidden: Float[Tensor, "B W d"]) -> Float[Tensor, "B C d"]:
        """The columns that the forward began with."""
        if self.current is self.selection:
            return hidden
        place = put(self.device, _places(self.current.host, self.selection.host))
        return hidden.gather(1, place[..., None].expand(-1, -1, hidden.shape[-1]))

    def _mask(self, columns: Int[Tensor, "M N"]) -> Bool[Tensor, "M 1 #N S"]:
        """What queries at some columns attend to."""
        seen = self.seen[:, None, None]
        if self.store.pattern is None:
            return seen
        keys = torch.arange(self.low, self.low + self.seen.shape[1], device=self.device) - self.padding[:, None]
        return seen & self.store.pattern((columns - self.padding[:, None]).clamp(min=0), keys)


def similarity(
    before: Float[Tensor, "M Q T S"], now: Float[Tensor, "M Q T S"], among: Bool[Tensor, "M T S"]
) -> Float[Tensor, " M"]:
    """Cosine over the heads of two attention maps, averaged over some of it; infinite where that is nothing."""
    cosine = F.cosine_similarity(before, now, dim=1).masked_fill(~among, 0).sum((1, 2))
    count = among.sum((1, 2))
    return (cosine / count).masked_fill(count == 0, torch.inf)


def _every(selection: Selection, sequences: NDArray[np.int64], visible: Flags) -> NDArray[np.int64]:
    """The columns (A, W) of a selection, in which some sequences have every visible column."""
    columns = [own[: int(count)] for own, count in zip(selection.host, selection.own.sum(1), strict=True)]
    for sequence, every in zip(sequences, visible, strict=True):
        columns[sequence] = np.flatnonzero(every)
    width = max(len(each) for each in columns)
    return np.stack([np.pad(each, (0, width - len(each)), mode="edge") for each in columns])


def _places(host: NDArray[np.int64], wanted: NDArray[np.int64]) -> NDArray[np.int64]:
    """(A, W) where the wanted columns of each sequence are among (A, C) others; 0 where they are not."""
    places = np.zeros((len(host), int(max(host.max(), wanted.max())) + 1), dtype=np.int64)
    np.put_along_axis(places, host, np.broadcast_to(np.arange(host.shape[1]), host.shape), axis=1)
    return np.take_along_axis(places, wanted, axis=1)
