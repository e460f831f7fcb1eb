"""What a cache is: a plan of which columns the next forward computes, and where the others come from.

A cache is a frozen dataclass of its options; `start` returns the object that holds one engine's keys
and values. It knows the canvas and what changed, never the sampler that changed it. Plans are made
on the host, from what the host knows; only a cache that chooses by what came out (d2cache) reads the device.
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
    """Columns whose predictions a cache wants to know about beside those that the sampler asks for.

    Attributes:
        read: (A, L) columns whose hidden states are projected for it.
        tell: called with the probability of the most probable token there, (A, L).
    """

    read: Flags
    tell: Callable[[Float[Tensor, "A L"]], None]


@dataclass(frozen=True)
class Plan:
    """How to compute the next forward.

    Attributes:
        compute: (A, L) canvas columns to compute, as far as they are looked at; None for all of them, without a store.
        store: takes their keys and values and gives those of all L columns.
        cost: (A,) columns computed through a whole layer, where that is fewer than `compute` says.
        probe: what else the cache wants to know.
    """

    compute: Flags | None = None
    store: Store | None = None
    cost: NDArray[np.int64] | None = None
    probe: Probe | None = None

    def whole(self, visible: Flags) -> Flags:
        """(A,) where every column that is looked at is computed, through all layers."""
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
        """Learn which rows entered, and which are in another slot now."""
        ...

    def observe(self, change: Change) -> None:
        """Learn what a step committed and revoked."""
        ...

    def expire(self, rows: NDArray[np.int64]) -> None:
        """Compute everything anew in the next forward of these rows."""
        ...


@dataclass(frozen=True, kw_only=True)
class Metered:
    """The options that all caches have.

    Args:
        measure_every: a row's forwards from one that is compared with an exact one to the next; None never
            measures.
        refresh_above: where the relative error of keys and values is larger than this, the exact predictions are
            used and everything is computed anew in the next forward; None only measures.

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
                told = f"refresh_above={self.refresh_above} has no effect without measuring"
                raise ValueError(f"{told}; set measure_every too")

    @property
    def repeatable(self) -> bool:
        """Whether what is kept is the same for every way in which a block may have been decoded."""
        return False

    @property
    def refuses(self) -> Mapping[str, str]:
        """What a sampler may need that this cache cannot give, with the reason."""
        reasons = {
            "guidance": "it keeps one set of keys and values a row, and guidance computes every row twice",
            "next_block": "a block is computed anew when it is entered; drafts for it from before would not hold",
            "several_devices": "it keeps keys and values on one",
        }
        if self.refresh_above is not None:
            reasons["repeatable"] = "when it refreshes (refresh_above) depends on the way a block is decoded"
        elif not self.repeatable:
            reasons["repeatable"] = "what it keeps depends on the way a block is decoded"
        return reasons


@runtime_checkable
class Cache(Protocol):
    """A way to reuse computation between denoising steps.

    Attributes:
        measure_every: forwards of a row from one comparison with an exact one to the next; None for never.
        refresh_above: relative error of keys and values above which everything is computed anew.
    """

    measure_every: int | None
    refresh_above: float | None

    @property
    def refuses(self) -> Mapping[str, str]:
        """What a sampler may need (the words of `dllm.decoding.compatibility`) that it cannot give, with the reason."""
        ...

    def start(self, setup: Setup) -> CacheRun:
        """Refuse what cannot work (ValueError, before any forward) and make room for one engine."""
        ...
