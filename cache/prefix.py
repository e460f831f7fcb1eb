"""Prefix cache: everything before the active block is computed once per block (Fast-dLLM, arXiv 2505.22618, 3.2).

Rule:

    first forward of a block    compute every position
    then                        compute the positions from the block's start on

Families with shifted logits read the block's first prediction one position to its left, so that the computed range
starts and ends one position earlier, as in d2Cache's implementation.

Differences: Fast-dLLM commits the first token of a Dream block unconditionally instead, and runs a redundant forward
where the first one completed the block; here it is skipped.
"""

from __future__ import annotations

from dataclasses import dataclass

from dllm.cache.base import Flags, Metered, Plan, Question
from dllm.cache.store import Blocks, Reuse
from dllm.decoding.setup import Setup


@dataclass(frozen=True)
class Prefix(Metered):
    """Cache everything before the block."""

    repeatable = True  # a full refresh at the start of each block

    def start(self, setup: Setup) -> Reuse:
        """Allocate keys and values for every position."""
        return Reuse(setup, _FromBlockOn(setup))


class _FromBlockOn(Blocks):
    foreseeable = True

    def plan(self, question: Question, due: Flags, stale: Flags) -> Plan:
        shift = self.setup.logits_shift
        compute = question.since(question.low - shift)
        compute[:, question.canvas.length - shift :] = False
        return Plan(compute | self.entered(question)[:, None])
