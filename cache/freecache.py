"""FreeCache: what is decoded is frozen, and only what lies behind it is computed (FlashDLM, arXiv 2505.21467, 3.2).

The first forward computes every column. Then, with f the column from which on nothing is frozen,

    compute the columns from f on

    granularity=prompt    f is the first generated column
    granularity=block     f is the active block's first column
    granularity=token     f is the row's first mask

less the shift of the logits, and `freeze` says which keys and values are kept for what f passes:

    last_forward    those of the last forward before it was passed, in which tokens committed by that very
                    step were masks still; the prompt keeps those it got before anything was decoded
                    (the reference)
    clean           those of one more forward, with the final tokens; the prompt too is computed once more,
                    when the first block is done

`window` keeps columns further than that behind the active block as the first forward left them.

Differences from the reference: a position that is revoked or rewritten is computed again; frozen
columns keep their own slots whatever a step commits, where the reference's modes for guided decoding
misplace them (`aggressive`, our token; `sliding`, our window).
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
    """Freeze what is decoded.

    Args:
        freeze: which keys and values a finished column keeps: last_forward or clean.
        granularity: what is frozen: the prompt alone, finished blocks too, or every leading run of tokens.
        window: columns behind the active block that are computed; None for all.

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
        """Finished blocks are kept as they are in the end, not as some step left them."""
        return self.freeze == "clean" and self.granularity == "block"

    def start(self, setup: Setup) -> Reuse:
        """Make room for every column."""
        return Reuse(setup, _Frozen(self, setup))


class _Frozen(PerRow):
    def __init__(self, options: FreeCache, setup: Setup) -> None:
        super().__init__(setup)
        self.options = options
        self.front = self.per_row(0)  # where the last forward of each row started to compute
        self.raw = self.per_row(True, dtype=bool)  # the prompt is as the first forward left it

    def plan(self, question: Question, due: Flags, stale: Flags) -> Plan:
        options, rows, start = self.options, question.rows, question.canvas.start[question.rows]
        match options.granularity:
            case "prompt":
                # Position f itself is decoded by the first forward, or its prediction is read and so computed.
                front = start
            case "block":
                front = question.low - self.setup.logits_shift
            case _:
                front = question.masked.argmax(1) - self.setup.logits_shift
        since = front
        if options.freeze == "clean":
            # What was passed since the last forward is computed once more; behind the first block, the prompt as well.
            since = np.minimum(front, self.front[rows])
            since = np.where((question.block > 0) & self.raw[rows], 0, since)
        kept, first = rows[question.first], question.first
        self.front[kept] = front[first]
        self.raw[kept] &= question.block[first] == 0
        compute = question.since(since)
        if options.window is not None:
            compute &= ~question.since(question.high + min(options.window, question.canvas.length))
        return Plan(compute)
