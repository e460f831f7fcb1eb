"""No cache: every forward recomputes every position. The exact baseline of the others.

Rule:

    compute every position
"""

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
    """Recomputes every position: exact.

    Raises:
        ValueError: `refresh_above` is set.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.refresh_above is not None:
            raise ValueError(f"refresh_above={self.refresh_above} has no effect without a cache; use null")

    @property
    def refuses(self) -> Mapping[str, str]:
        """Nothing."""
        return {}

    def start(self, setup: Setup) -> NoCache:
        """No memory to allocate: the run is the cache itself."""
        return self

    def steady(self, rows: NDArray[np.int64]) -> bool:
        """Always."""
        return True

    def plan(self, question: Question) -> Plan:
        """Every position, no store."""
        return Plan()

    def exchange(self, exchange: Exchange) -> None:
        """No state."""

    def observe(self, change: Change) -> None:
        """No state."""

    def expire(self, rows: NDArray[np.int64]) -> None:
        """Every position is always recomputed."""
