"""dKV-Cache, delayed: a token is cached one step after it is decoded (arXiv 2505.15781, section 4, dKV-Cache-Decode).

Rule:

    s = 0, 1, or s mod interval = 0    compute every position
    else                               compute the masks of the whole canvas, and those of the last forward

s counts the row's forwards in its active block so far. Keys and values change most when a mask becomes a token and
little afterwards: so a token is computed once more after its commit and then frozen. Families with shifted logits also
compute the positions at which the requested predictions are read.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dllm.cache.base import Flags, Metered, Plan, Question
from dllm.cache.store import Blocks, Reuse
from dllm.checks import number
from dllm.decoding.setup import Setup


@dataclass(frozen=True)
class DKVCache(Metered):
    """Freeze a token one step after it is decoded.

    Args:
        interval: forwards within a block between full refreshes; 1 is no reuse.

    Raises:
        ValueError: an interval below 1.
    """

    interval: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        number("interval", self.interval, "a whole number of at least 1", low=1, whole=True)

    def start(self, setup: Setup) -> Reuse:
        """Allocate keys and values for every position."""
        return Reuse(setup, _Delayed(self.interval, setup))


class _Delayed(Blocks):
    def __init__(self, interval: int, setup: Setup) -> None:
        super().__init__(setup)
        self.interval = interval
        self.forwards = self.per_row(0)
        self.masked = self.per_row(True, setup.length, dtype=bool)

    def plan(self, question: Question, due: Flags, stale: Flags) -> Plan:
        rows, masked = question.rows, question.masked
        step = np.where(self.entered(question), 0, self.forwards[rows] + 1)
        compute = masked | self.masked[rows]
        kept, first = rows[question.first], question.first
        self.forwards[kept], self.masked[kept] = step[first], masked[first]
        return Plan(compute | ((step <= 1) | (step % self.interval == 0))[:, None])
