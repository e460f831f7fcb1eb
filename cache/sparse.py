"""Sparse-dLLM: the block attends to the part of the cache that its queries score highest (arXiv 2508.02558).

Rule:

    first delay + 1 forwards of a block    compute every position
    the last of them, in every layer       evict from what is outside the block all but the
                                           floor(retention * n) of the n positions with the highest importance
    then                                   compute the block, which attends to itself and to what is left

    importance_j = max over the positions i within kernel_size // 2 of j of  mean over the heads of  q . k_i

with q the mean of the block's queries, k_i the key of position i, and n the number of positions outside the block.
Prompt and suffix are one list, in which the two positions beside the block are neighbours. All heads of a layer keep
the same positions. With retention=1 and delay=0 it is the dual cache.

Differences from the reference: ties, of which pooling makes many, go to the leftmost; what is computed outside the
block, because it was revoked or is read there, is attended to in that forward even if it was evicted; evicted keys and
values are masked and keep their memory, so that rows at different blocks share a forward. The block is the positions
that the dual cache computes, in families with shifted logits one to the left.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from dllm.cache.base import Flags, Metered, Plan, Question
from dllm.cache.selection import Selection
from dllm.cache.store import Blocks, KeyValues, Reuse
from dllm.checks import number
from dllm.decoding.graphs import FixedStore
from dllm.decoding.setup import Setup
from dllm.decoding.transfer import put
from dllm.models.transformer import KVStore, PartedStore


@dataclass(frozen=True)
class Sparse(Metered):
    """Evict what the block attends to least.

    Args:
        retention: share of the positions outside the block that each layer keeps.
        kernel_size: positions over which the importance is pooled; 1 is no pooling.
        delay: forwards of a block before the one that evicts.

    Raises:
        ValueError: an option out of range.
    """

    retention: float = 0.5
    kernel_size: int = 3
    delay: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        number("retention", self.retention, "a number from 0 to 1", low=0, high=1)
        number("kernel_size", self.kernel_size, "an odd whole number of at least 1", low=1, whole=True)
        if self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size={self.kernel_size} is out of range; use an odd whole number of at least 1")
        number("delay", self.delay, "a whole number of at least 0", low=0, whole=True)

    @property
    def repeatable(self) -> bool:
        """Without a delay everything is cached and evicted at the start of each block."""
        return self.delay == 0

    @property
    def refuses(self) -> Mapping[str, str]:
        """Requirements of samplers that this cache does not meet, with the reason."""
        reasons = dict(super().refuses)
        if self.delay and self.refresh_above is None:
            reasons["repeatable"] = "what it evicts depends on the first steps of a block, but not with delay=0"
        return reasons

    def start(self, setup: Setup) -> Reuse:
        """Allocate keys and values for every position."""
        store = Evicting(self.retention, self.kernel_size, setup)
        return Reuse(setup, _Delayed(self.delay, setup, store), store)


class _Delayed(Blocks):
    def __init__(self, delay: int, setup: Setup, store: Evicting) -> None:
        super().__init__(setup)
        self.delay, self.store = delay, store
        self.forwards = self.per_row(0)  # of the active block

    def plan(self, question: Question, due: Flags, stale: Flags) -> Plan:
        rows, first, shift = question.rows, question.first, self.setup.logits_shift
        forward = np.where(self.entered(question), 0, self.forwards[rows])
        self.forwards[rows[first]] = forward[first] + 1
        whole = due | (forward <= self.delay)
        block = question.since(question.low - shift) & ~question.since(question.high - shift)
        visible = question.visible
        self.store.prepare(question.slots, whole, whole & first & (forward >= self.delay), block & visible, visible)
        return Plan(block | whole[:, None])


class Evicting(KeyValues):
    """Keys and values, of which each layer attends to those that are not evicted.

    Bytes: those of `KeyValues`, and layers * slots * L * (bytes per number).

    Attributes:
        thinned: (slots,) where the next forward attends to part of the cache.
        deciding: (slots,) where it evicts.
        block: (slots, L) columns whose queries decide.
        outside: (slots, L) columns to choose from.
    """

    def __init__(self, retention: float, kernel_size: int, setup: Setup) -> None:
        super().__init__(setup)
        self.retention, self.kernel_size = retention, kernel_size
        # Other than 0 where evicted; at a fixed address, as captured graphs read it.
        self.evicted = setup.tensor("evicted", (setup.kv_shape[0], setup.slots, setup.length + self.spare))
        self.thinned, self.deciding = np.zeros((2, setup.slots), dtype=bool)
        self.block, self.outside = np.zeros((2, setup.slots, setup.length), dtype=bool)

    def tensors(self) -> tuple[Tensor, ...]:
        """All stored tensors, (layers, slots, ...) each."""
        return self.keys, self.values, self.evicted

    def prepare(self, slots: NDArray[np.int64], whole: Flags, decide: Flags, block: Flags, visible: Flags) -> None:
        """Prepare a forward.

        Args:
            slots: (A,) slot of each sequence.
            whole: (A,) sequences that compute, and attend to, every column.
            decide: (A,) those of them that evict.
            block: (A, L) columns whose queries decide.
            visible: (A, L) columns that are attended to.
        """
        restored = np.unique(slots[whole])
        if restored.size:
            self.evicted[:, put(self.evicted.device, restored)] = 0
        self.deciding[:] = False
        if self.retention == 1:  # nothing is ever evicted
            return
        self.thinned[slots], chosen = ~whole, slots[decide]
        self.deciding[chosen] = True
        self.block[chosen], self.outside[chosen] = block[decide], (visible & ~block)[decide]

    def bind(self, selection: Selection) -> KVStore:
        """Access for a forward that attends to what is not evicted, and perhaps evicts."""
        inner, (low, high), slots = super().bind(selection), selection.span, selection.neighbours
        # What only fills the forward has the slot of a row that is not asked about.
        real = selection.first & (selection.host[:, 0] < self.length)
        deciding = np.flatnonzero(real & self.deciding[selection.slots])
        if not deciding.size and not self.thinned[selection.slots].any():
            return inner
        evicted = self.evicted[:, put(self.evicted.device, selection.slots) if slots is None else slots, low:]
        index = selection.columns - low if selection.drafts == 1 else None
        if deciding.size:
            return _Evicting(inner, evicted, index, high - low, self._choice(selection, deciding))
        if isinstance(inner, FixedStore):
            return _Fixed(inner, evicted, index, high - low)
        return (_Parted if isinstance(inner, PartedStore) else _Sparse)(inner, evicted, index, high - low)

    def _choice(self, selection: Selection, sequence: NDArray[np.int64]) -> _Choice:
        slots, host = selection.slots[sequence], selection.host[sequence]
        within = np.take_along_axis(self.block[slots], np.minimum(host, self.length - 1), axis=1)
        within &= selection.own[sequence]
        among, count = self.outside[slots], self.outside[slots].sum(1)
        order = np.argsort(~among, axis=1, kind="stable")[:, : max(1, int(count.max()))]
        kept = np.floor(count * self.retention).astype(np.int64)
        return _Choice(self, selection, *(put(self.keys.device, each) for each in (
            sequence, slots, within, order, np.arange(order.shape[1]) < count[:, None], kept
        )))  # fmt: skip


@dataclass(frozen=True)
class _Choice:
    """What M sequences evict.

    Attributes:
        store: keeps it.
        selection: of the forward.
        sequence: of the forward.
        slots: of their rows.
        block: which of the computed columns decide.
        among: columns to choose from, ascending.
        valid: False where `among` only fills up.
        kept: columns left.
    """

    store: Evicting
    selection: Selection
    sequence: Int[Tensor, " M"]
    slots: Int[Tensor, " M"]
    block: Bool[Tensor, "M C"]
    among: Int[Tensor, "M N"]
    valid: Bool[Tensor, "M N"]
    kept: Int[Tensor, " M"]

    def __call__(self, layer: int, queries: Float[Tensor, "B H C D"]) -> None:
        """Evict in one layer."""
        low, high = self.selection.span
        keys = self.store.keys[layer][self.slots, :, low:high]
        scores = self.store.all_heads(_scores(queries[self.sequence], keys, self.block)[:, None], 1).mean(1)
        pooled = _pooled(scores, self.among - low, self.valid, self.store.kernel_size)
        rank = pooled.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        gone = (rank >= self.kept[:, None]) & self.valid
        evicted = self.store.evicted[layer]
        evicted[self.slots] = torch.zeros_like(evicted[self.slots]).scatter(1, self.among, gone.to(evicted.dtype))


def _scores(
    queries: Float[Tensor, "M Q C D"], keys: Float[Tensor, "M H S D"], block: Bool[Tensor, "M K"]
) -> Float[Tensor, "M S"]:
    """Product of the block's mean query with each key, averaged over the heads."""
    wide = torch.promote_types(queries.dtype, torch.float32)
    weight = block.to(wide) / block.sum(1, keepdim=True).clamp(min=1)
    # The first columns are those of the canvas; drafts that are joined to it follow.
    mean = torch.einsum("mqcd,mc->mqd", queries[:, :, : block.shape[1]].to(wide), weight)
    shared = rearrange(mean, "m (h g) d -> m h g d", h=keys.shape[1]).sum(2)
    return torch.einsum("mhd,mhsd->ms", shared, keys.to(wide)) / queries.shape[1]


def _pooled(
    scores: Float[Tensor, "M S"], among: Int[Tensor, "M N"], valid: Bool[Tensor, "M N"], kernel_size: int
) -> Float[Tensor, "M N"]:
    """The maximum of each score and those beside it in a list of columns."""
    listed = scores.gather(1, among.clamp(0, scores.shape[1] - 1)).masked_fill(~valid, -torch.inf)
    width = min(kernel_size // 2, listed.shape[1])
    pooled = F.max_pool1d(listed[:, None], 2 * width + 1, stride=1, padding=width)[:, 0]
    return pooled.masked_fill(~valid, -torch.inf)


class _Sparse:
    """A forward that attends to what is not evicted and to what it computes.

    Args:
        inner: keys and values.
        evicted: from the first column attended to on, (layers, A, ...).
        index: computed columns, within `evicted`; None where they follow the stored ones.
        width: columns attended to.
    """

    def __init__(self, inner: KVStore, evicted: Tensor, index: Int[Tensor, "A C"] | None, width: int) -> None:
        self.inner: Any = inner
        self.evicted, self.computed, self.width = evicted, index, width

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write to and read from the store."""
        found: tuple[Tensor, Tensor] = self.inner.update(layer, keys, values)
        return found

    def mask(self, layer: int, mask: Bool[Tensor, "B 1 #C S"] | None) -> Bool[Tensor, "B 1 #C S"]:
        """Without the evicted columns."""
        left = self.evicted[layer] == 0
        if self.computed is not None:
            left = left.scatter(1, self.computed, True)
        left = left[:, None, None, : self.width]
        if mask is None:
            return left
        return F.pad(left, (0, mask.shape[-1] - self.width), value=True) & mask


class _Fixed(_Sparse):
    """The same over a `FixedStore`."""

    @property
    def memory(self) -> Hashable:
        """As in `FixedStore`."""
        memory: Hashable = self.inner.memory
        return "evicted", memory

    @property
    def index(self) -> Int[Tensor, "A C"]:
        """As in `FixedStore`."""
        index: Int[Tensor, "A C"] = self.inner.index
        return index

    def through(self, index: Int[Tensor, "A C"]) -> _Fixed:
        """The same, with the columns given by a tensor."""
        return _Fixed(self.inner.through(index), self.evicted, index, self.width)


class _Parted(_Sparse):
    """The same over a `PartedStore`."""

    def parts(self, layer: int, keys: Tensor, values: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Write to and read from the store."""
        found: list[tuple[Tensor, Tensor]] = self.inner.parts(layer, keys, values)
        return found


class _Evicting(_Sparse):
    """The same, after which some sequences evict."""

    def __init__(self, inner: KVStore, evicted: Tensor, index: Tensor | None, width: int, choice: _Choice) -> None:
        super().__init__(inner, evicted, index, width)
        self.choice = choice

    def queried(self, layer: int, queries: Float[Tensor, "B H C D"]) -> None:
        """Evict, once the layer has attended to everything."""
        self.choice(layer, queries)
