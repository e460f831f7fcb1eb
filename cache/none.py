"""No cache: every forward computes every column. The exact baseline of all the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Int
from torch import Tensor

from dllm.cache.base import Plan
from dllm.canvas import Change, Window
from dllm.run import Run


@dataclass(frozen=True)
class NoCache:
    """Compute everything, remember nothing."""

    refreshes: ClassVar[int] = 0

    def start(self, run: Run) -> NoCache:
        """Nothing to make room for: the run is the cache itself."""
        return self

    def plan(self, window: Window, live: Int[Tensor, " A"] | None, read: Int[Tensor, "A R"]) -> Plan:
        """Every column, no store."""
        return Plan()

    def observe(self, window: Window, change: Change) -> None:
        """Nothing to learn."""
