"""Dual cache: everything but the active block is computed once a block (Fast-dLLM, arXiv 2505.22618, section 3.2).

    at a block's first forward    compute every column
    then                          compute the block

Families with shifted logits read a prediction one column to its left: there the columns computed are
the block's, each moved one to the left, as in d2Cache's implementation. The reference runs a useless
forward where the first one finished the block; here there is none.
"""

from __future__ import annotations

from dataclasses import dataclass

from dllm.cache.base import Flags, Metered, Plan, Question
from dllm.cache.store import Blocks, Reuse
from dllm.decoding.setup import Setup


@dataclass(frozen=True)
class Dual(Metered):
    """Keep what lies before the block and behind it."""

    repeatable = True  # a block is always entered with a full computation

    def start(self, setup: Setup) -> Reuse:
        """Make room for every column."""
        return Reuse(setup, _BlockAlone(setup))


class _BlockAlone(Blocks):
    def plan(self, question: Question, due: Flags, stale: Flags) -> Plan:
        shift = self.setup.logits_shift
        block = question.since(question.low - shift) & ~question.since(question.high - shift)
        return Plan(block | self.entered(question)[:, None])
