"""Prefix cache: what lies before the active block is computed once a block (Fast-dLLM, arXiv 2505.22618, section 3.2).

    at a block's first forward    compute every column
    then                          compute the columns from the block's start on

Families with shifted logits read the block's first prediction one column to its left, so that what is
computed starts and ends one column earlier, as in d2Cache's implementation; Fast-dLLM's commits the
first token of a Dream block unconditionally instead. The reference runs a useless forward where the
first one finished the block; here there is none.
"""

from __future__ import annotations

from dataclasses import dataclass

from dllm.cache.base import Flags, Metered, Plan, Question
from dllm.cache.store import Blocks, Reuse
from dllm.decoding.setup import Setup


@dataclass(frozen=True)
class Prefix(Metered):
    """Keep what lies before the block."""

    repeatable = True  # a block is always entered with a full computation

    def start(self, setup: Setup) -> Reuse:
        """Make room for every column."""
        return Reuse(setup, _FromBlockOn(setup))


class _FromBlockOn(Blocks):
    def plan(self, question: Question, due: Flags, stale: Flags) -> Plan:
        shift = self.setup.logits_shift
        compute = question.since(question.low - shift)
        compute[:, question.canvas.length - shift :] = False
        return Plan(compute | self.entered(question)[:, None])
