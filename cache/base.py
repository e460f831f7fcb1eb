"""What a cache is: a plan of which columns the next forward computes, and where the others come from.

A cache is a frozen dataclass of its options; `start` returns the object that holds one run's keys
and values. It knows the canvas and what changed, never the sampler that changed it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from jaxtyping import Int
from torch import Tensor

from dllm.backbones.transformer import KVStore
from dllm.canvas import Change, Window
from dllm.run import Run


@dataclass(frozen=True)
class Plan:
    """How to compute the next forward.

    Attributes:
        columns: canvas columns to compute for each sequence, ascending; None for all.
        store: takes the fresh keys and values of these columns and gives those of all L columns;
            None when every column is computed.
    """

    columns: Int[Tensor, "B C"] | None = None
    store: KVStore | None = None


@runtime_checkable
class CacheRun(Protocol):
    """One run's cached keys and values.

    Attributes:
        refreshes: how often a row's columns were all computed anew, summed over rows.
    """

    refreshes: int

    def plan(self, window: Window, live: Int[Tensor, " A"] | None, read: Int[Tensor, "A R"]) -> Plan:
        """Plan one forward.

        Args:
            window: the rows of this step and their active blocks.
            live: the entry of the window that each computed sequence belongs to: entries that take no
                part are missing, and one with several drafts comes as often. None for every entry once.
            read: columns whose hidden states the forward must produce, for each sequence.
        """
        ...

    def observe(self, window: Window, change: Change) -> None:
        """Learn what a step committed and revoked."""
        ...


@runtime_checkable
class Cache(Protocol):
    """A way to reuse computation between denoising steps."""

    def start(self, run: Run) -> CacheRun:
        """Refuse what cannot work (ValueError, before any forward) and make room for one run."""
        ...
