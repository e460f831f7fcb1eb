"""The cache protocol: a plan of which positions the next forward computes, and which are read from a store.

A cache is a frozen dataclass of its options; `start` returns the object that holds one engine's keys
and values. It sees the canvas and its changes, never the sampler. Plans are made on the host, from the
host's copy of the canvas; only a cache that selects by model outputs (d2cache) reads the device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from dllm.cache.selection import Flags as Flags
from dllm.cache.selection import Store
from dllm.checks import number
from dllm.decoding.question import Question as Question
from dllm.decoding.setup import Setup
from dllm.decoding.window import Change, Exchange


@dataclass(frozen=True)
class Probe:
    """Positions whose confidences a cache needs beside those that the sampler requests.

    Attributes:
        read: (A, L) columns whose hidden states are projected to the vocabulary.
        tell: callback that gets the columns that were read, and the probability of the most probable token there,
            (A, L) each.
    """

    read: Flags
    tell: Callable[[Flags, Float[Tensor, "A L"]], None]


@dataclass(frozen=True)
class Plan:
    """How to compute the next forward.

    Attributes:
        compute: (A, L) canvas columns to compute, where they are attended to; None for all of them, without a store.
        store: takes their keys and values and returns those of all L columns.
        cost: (A,) columns computed through a whole layer, where that is fewer than in `compute`.
        probe: confidences that the cache needs.
        taken: (A,) columns that are not computed as an earlier request had them; None for none.
        more: called after the forward: (A,) columns computed through a whole layer that were not planned.
    """

    compute: Flags | None = None
    store: Store | None = None
    cost: NDArray[np.int64] | None = None
    probe: Probe | None = None
    taken: NDArray[np.int64] | None = None
    more: Callable[[], NDArray[np.int64]] | None = None

    def whole(self, visible: Flags) -> Flags:
        """(A,) where every column that is attended to is computed, through all layers."""
        assert self.compute is not None
        every = (self.compute | ~visible).all(1)
        return np.asarray(every if self.cost is None else every & (self.cost >= self.compute.sum(1)))


@runtime_checkable
class CacheRun(Protocol):
    """One engine's cached keys and values."""

    def plan(self, question: Question) -> Plan:
        """Plan one forward."""
        ...

    def exchange(self, exchange: Exchange) -> None:
        """Update for rows that entered, and rows that moved to another slot."""
        ...

    def observe(self, change: Change) -> None:
        """Update for what a step committed and revoked."""
        ...

    def expire(self, rows: NDArray[np.int64]) -> None:
        """Recompute every position in the next forward of these rows."""
        ...


@runtime_checkable
class Steady(Protocol):
    """A running cache whose next plan may be independent of what the last step wrote."""

    def steady(self, rows: NDArray[np.int64]) -> bool:
        """Whether it is for these rows, while they stay in their blocks; to plan it twice then changes nothing."""
        ...


@dataclass(frozen=True, kw_only=True)
class Metered:
    """Options shared by all caches.

    Args:
        measure_every: measure the approximation error, against an exact forward, every this many forwards of a
            row; None for never.
        refresh_above: where the relative error of keys and values exceeds this, the exact predictions are used
            and every position is recomputed in the next forward; None only measures.

    Raises:
        ValueError: an option out of range or without effect.
    """

    measure_every: int | None = None
    refresh_above: float | None = None

    def __post_init__(self) -> None:
        if self.measure_every is not None:
            number("measure_every", self.measure_every, "a whole number of at least 1, or null", low=1, whole=True)
        if self.refresh_above is not None:
            number("refresh_above", self.refresh_above, "a number from 0 to 1e6, or null", low=0, high=1e6)
            if self.measure_every is None:
                problem = f"refresh_above={self.refresh_above} has no effect without measuring"
                raise ValueError(f"{problem}; set measure_every too")

    @property
    def repeatable(self) -> bool:
        """Whether cached keys and values do not depend on the order a block was decoded in (for lossless drafting)."""
        return False

    @property
    def refuses(self) -> Mapping[str, str]:
        """Requirements of samplers that this cache does not meet, with the reason."""
        reasons = {
            "growth": "it keeps keys and values by position, and inserted masks move what follows them",
            "guidance": "it keeps one set of keys and values per row, and guidance computes every row twice",
            "next_block": "entering a block recomputes every position, which invalidates earlier drafts for it",
            "several_devices": "it keeps keys and values on one device",
        }
        if self.refresh_above is not None:
            reasons["repeatable"] = "when it refreshes (refresh_above) depends on the order a block is decoded in"
        elif not self.repeatable:
            reasons["repeatable"] = "its keys and values depend on the order a block is decoded in"
        if not self.repeatable:
            reasons["whole_blocks"] = "it reuses keys and values within a block"
        return reasons


@runtime_checkable
class Cache(Protocol):
    """Reuse of computation between denoising steps.

    Attributes:
        measure_every: measure the approximation error every this many forwards of a row; None for never.
        refresh_above: relative error of keys and values above which every position is recomputed.
    """

    measure_every: int | None
    refresh_above: float | None

    @property
    def refuses(self) -> Mapping[str, str]:
        """Requirements (names in `dllm.decoding.compatibility`) that it does not meet, with the reason."""
        ...

    def start(self, setup: Setup) -> CacheRun:
        """Reject invalid setups (ValueError, before any forward) and allocate memory for one engine."""
        ...
