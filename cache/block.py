"""Block cache: exact, for models whose attention is causal over blocks (arXiv 2503.09573, section 3).

Rule:

    compute every position that is not exact yet: the active block, and what was finished since the last forward

A position attends to its own block and to those before it. So once a block and all before it are decoded, one more
forward gives it keys and values that stay exact.

The finished block is computed once more together with the next one, where the published samplers of these models take
a forward of its own. Over models that attend to every position nothing is ever exact, and everything is computed.

Finished blocks are kept for later requests that begin alike, see `dllm.cache.shared`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dllm.cache.base import Flags, Metered, Plan, Question
from dllm.cache.shared import check_shared
from dllm.cache.store import PerRow, Reuse
from dllm.decoding.setup import Setup


@dataclass(frozen=True)
class Block(Metered):
    """Keep the keys and values of finished blocks.

    Args:
        shared: tokens whose keys and values are kept for later requests that begin alike, in whole blocks; 0 for none,
            None for as many as the longest request may have.

    Raises:
        ValueError: `shared` out of range; at the start of a run: more than there is memory for, or given for a model
            that attends to every position.
    """

    repeatable = True  # exact

    shared: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_shared(self.shared)

    def start(self, setup: Setup) -> Reuse:
        """Allocate keys and values for every position."""
        return Reuse(setup, _Everything(setup), shared=self.shared)


class _Everything(PerRow):
    foreseeable = True

    def plan(self, question: Question, due: Flags, stale: Flags) -> Plan:
        # `Reuse` leaves out what is exact.
        return Plan(np.ones_like(question.read))
