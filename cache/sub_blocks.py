"""Sub-block cache: within a block, only the part being decoded is computed (Fast-dLLM v2, arXiv 2509.26328, 4.2).

Rule:

    first forward of a block                      compute every position
    while the first position of the part is masked    compute the block
    then                                          compute the part

The part is that of the active block, of `length` positions, that has its first mask. The other parts keep the keys and
values of the last forward that computed the block. In models whose attention is causal over blocks, finished blocks are
exact and not computed again. Made for `sampler=sub_blocks` with the same length; positions of other parts whose
predictions are requested are computed as well.
"""

from __future__ import annotations

from dataclasses import dataclass

from dllm.cache.base import Flags, Metered, Plan, Question
from dllm.cache.shared import check_shared
from dllm.cache.store import PerRow, Reuse
from dllm.checks import number
from dllm.decoding.setup import Setup


@dataclass(frozen=True)
class SubBlocks(Metered):
    """Compute the part of a block that is being decoded.

    Args:
        length: positions of a part.
        shared: as for `dllm.cache.Block`.

    Raises:
        ValueError: an option out of range; at the start of a run: `shared` as for `dllm.cache.Block`.
    """

    length: int = 8
    shared: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        number("length", self.length, "a whole number of at least 1 (8 is published)", low=1, whole=True)
        check_shared(self.shared)

    def start(self, setup: Setup) -> Reuse:
        """Allocate keys and values for every position."""
        return Reuse(setup, _Parts(self.length, setup), shared=self.shared)


class _Parts(PerRow):
    def __init__(self, length: int, setup: Setup) -> None:
        super().__init__(setup)
        self.length = length
        self.filled = self.per_row(-1)  # the block whose keys and values are all stored

    def plan(self, question: Question, due: Flags, stale: Flags) -> Plan:
        rows, low, masked = question.rows, question.low, question.masked
        first = masked.argmax(1)
        start = low + (first - low) // self.length * self.length
        new = self.filled[rows] != question.block
        # A forward about the block's first position alone may not reach into the block, whose logits are shifted.
        reached = question.first & (question.horizon > low)
        self.filled[rows[reached]] = question.block[reached]
        whole = ~masked.any(1) | (first == start)
        since = question.since(start) & ~question.since(start + self.length)
        block = question.since(low) & ~question.since(question.high)
        return Plan(new[:, None] | (whole[:, None] & block) | (~whole[:, None] & since & block))
