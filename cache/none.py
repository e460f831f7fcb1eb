"""No cache: every forward computes every column. The exact baseline of all the others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dllm.cache.base import Metered, Plan, Question
from dllm.decoding.setup import Setup
from dllm.decoding.window import Change, Exchange


@dataclass(frozen=True)
class NoCache(Metered):
    """Compute everything, remember nothing; measured, it is off by nothing.

    Raises:
        ValueError: a bound for refreshing.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.refresh_above is not None:
            raise ValueError(f"refresh_above={self.refresh_above} has no effect without a cache; use null")

    @property
    def refuses(self) -> Mapping[str, str]:
        """What has no effect without it."""
        return {"graphs": "it computes everything, which takes longer than being launched"}

    def start(self, setup: Setup) -> NoCache:
        """Nothing to make room for: the run is the cache itself."""
        return self

    def plan(self, question: Question) -> Plan:
        """Every column, no store."""
        return Plan()

    def exchange(self, exchange: Exchange) -> None:
        """Nothing to learn."""

    def observe(self, change: Change) -> None:
        """Nothing to learn."""

    def expire(self, rows: NDArray[np.int64]) -> None:
        """Everything is computed anew anyway."""
