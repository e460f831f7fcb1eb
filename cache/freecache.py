"""FreeCache: decoded positions are frozen, and only those after them are computed (FlashDLM, arXiv 2505.21467, 3.2).

Rule:

    compute the positions from f on,  f the first position that is not frozen

    granularity=prompt    f is the first generated position
    granularity=block     f is the first position of the active block
    granularity=token     f is the row's first mask

minus the shift of the logits; the first forward computes every position. `freeze` decides which keys and values frozen
positions keep:

    last_forward    those of the last forward before they were frozen, in which the tokens committed by that
                    step were still masks; the prompt keeps those of the first forward (the reference)
    clean           those of one more forward, with the final tokens; the prompt is also computed once more,
                    when the first block is complete

Everything to the left of f is reused. Positions more than `window` after the active block keep the keys and values of
the first forward.

Differences from the reference: a revoked or rewritten position is computed again; frozen positions keep their slots
whatever a step commits, whereas the reference's modes for guided decoding misplace them (`aggressive`, our token;
`sliding`, our window).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from dllm.cache.base import Flags, Metered, Plan, Question
from dllm.cache.store import PerRow, Reuse
from dllm.checks import choice, number
from dllm.decoding.setup import Setup


@dataclass(frozen=True)
class FreeCache(Metered):
    """Freeze decoded positions.

    Args:
        freeze: which keys and values a frozen position keeps: last_forward or clean.
        granularity: what is frozen: only the prompt, also complete blocks, or every position before the first mask.
        window: positions after the active block that are computed; None for all.

    Raises:
        ValueError: an option out of range or without effect.
    """

    freeze: Literal["last_forward", "clean"] = "clean"
    granularity: Literal["prompt", "block", "token"] = "block"
    window: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        choice("freeze", self.freeze, ("last_forward", "clean"))
        choice("granularity", self.granularity, ("prompt", "block", "token"))
        if self.window is not None:
            number("window", self.window, "a whole number of at least 0, or null", low=0, whole=True)

    @property
    def repeatable(self) -> bool:
        """Complete blocks are frozen with their final tokens."""
        return self.freeze == "clean" and self.granularity == "block"

    def start(self, setup: Setup) -> Reuse:
        """Allocate keys and values for every position."""
        return Reuse(setup, _Frozen(self, setup))


class _Frozen(PerRow):
    def __init__(self, options: FreeCache, setup: Setup) -> None:
        super().__init__(setup)
        self.options = options
        self.front = self.per_row(0)  # where the last forward of each row started to compute
        # With the shift, what is read before the prompt's end is computed only while the first position is masked.
        prompt = options.granularity == "prompt" and not setup.logits_shift
        self.foreseeable = options.granularity == "block" or prompt
        self.raw = self.per_row(True, dtype=bool)  # the prompt has the keys and values of the first forward

    def plan(self, question: Question, due: Flags, stale: Flags) -> Plan:
        options, rows, start = self.options, question.rows, question.canvas.start[question.rows]
        later = question.low > start  # than the first block
        match options.granularity:
            case "prompt":
                # Without the shift: f is decoded by the first forward, or its prediction is requested and so computed.
                front = start
            case "block":
                front = question.low - self.setup.logits_shift
            case _:
                front = question.masked.argmax(1) - self.setup.logits_shift
        since = front
        if options.freeze == "clean":
            # Positions frozen since the last forward are computed once more; after the first block, the prompt too.
            since = np.minimum(front, self.front[rows])
            since = np.where(later & self.raw[rows], 0, since)
        kept, first = rows[question.first], question.first
        self.front[kept] = front[first]
        self.raw[kept] &= ~later[first]
        compute = question.since(since)
        if options.window is not None:
            compute &= ~question.since(question.high + min(options.window, question.canvas.length))
        return Plan(compute)
