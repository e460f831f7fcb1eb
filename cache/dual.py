"""Dual cache: everything but the active block is computed once per block (Fast-dLLM, arXiv 2505.22618, section 3.2).

Rule:

    first forward of a block    compute every position
    then                        compute the block

Families with shifted logits read a prediction one position to its left: there the block is shifted left by one, as in
d2Cache's implementation.

Difference: the reference runs a redundant forward where the first one completed the block; here it is skipped.
"""

from __future__ import annotations

from dataclasses import dataclass

from dllm.cache.base import Flags, Metered, Plan, Question
from dllm.cache.store import Blocks, Reuse
from dllm.decoding.setup import Setup


@dataclass(frozen=True)
class Dual(Metered):
    """Cache everything before and after the block."""

    repeatable = True  # a full refresh at the start of each block

    def start(self, setup: Setup) -> Reuse:
        """Allocate keys and values for every position."""
        return Reuse(setup, _BlockAlone(setup))


class _BlockAlone(Blocks):
    foreseeable = True

    def plan(self, question: Question, due: Flags, stale: Flags) -> Plan:
        shift = self.setup.logits_shift
        block = question.since(question.low - shift) & ~question.since(question.high - shift)
        return Plan(block | self.entered(question)[:, None])
