"""WINO: draft widely, verify each token without itself, take doubtful ones back (arXiv 2507.18578).

Rule:

    wide in     commit masks with p >= wide_in, at most max(5, min(20, 0.7 masks)), and always the `at_least` best
    narrow out  mask again the tokens with q < narrow_out, the least probable first, fewer than were committed:
                at most (committed - at_least)

One forward per step. Beside the canvas it computes a shadow of the block: masks at its positions that attend to
everything but the position they stand for, and that the canvas does not attend to. p is the probability of a mask's top
token, q a shadow's probability of the token that its position was given in an earlier step; `masks` and `committed` are
numbers, of the block's masks and of what the step commits. So every step leaves fewer masks, and a block of K positions
takes at most K forwards. With narrow_out = 0 it takes nothing back and computes shadows for nothing; above 1 it takes
back as much as the bound allows.

Differences: the authors' code bounds what is taken back by the commits of the step before, and forgets positions that
it masked again, so that its output keeps masks; this is the rule as d2Cache states it. Of models with shifted logits
(Dream) a shadow is computed where its prediction is read.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dllm.checks import number
from dllm.decoding.setup import Setup
from dllm.decoding.window import Edit, Window
from dllm.samplers.base import CONFIDENCES, Denoise, Knob, Policy
from dllm.samplers.selection import top

# Bounds of the commits of a step, as published: at least, at most, and the share of the masks in between in tenths.
_FEW, _MANY, _TENTHS = 5, 20, 7


@dataclass(frozen=True)
class Wino(Policy):
    """Commit with a low threshold, and verify with a high one.

    Args:
        wide_in: minimum probability of a committed token; above 1 no token qualifies.
        narrow_out: minimum probability of a committed token given all others; 0 takes no token back.
        at_least: tokens committed per step whatever their probability.

    Raises:
        ValueError: a negative threshold, or a number below 1.
    """

    kind = "revising"
    knob = Knob("wide_in", CONFIDENCES)
    needs = frozenset({"shadows"})

    wide_in: float = 0.6
    narrow_out: float = 0.9
    at_least: int = 1

    def __post_init__(self) -> None:
        number("wide_in", self.wide_in, "0 or more (0.6 is published)", low=0)
        number("narrow_out", self.narrow_out, "0 or more (0.9 is published)", low=0)
        number("at_least", self.at_least, "a whole number of at least 1", low=1, whole=True)

    def start(self, setup: Setup) -> int:
        """The id of [MASK]."""
        return setup.mask_token_id

    def step(self, window: Window, denoise: Denoise, state: int) -> Edit:
        """Commit the confident masks; mask again what the shadows doubt."""
        both = denoise(attention="shadow")
        now = both.arranged(lambda values: values[:, 0])
        most = (window.masked.sum(-1) * _TENTHS // 10).clamp(_FEW, _MANY).clamp(min=self.at_least)
        wide = (now.confidence >= self.wide_in) & window.masked
        wide |= top(now.confidence, self.at_least, window.masked)
        wide &= top(now.confidence, most, window.masked)

        held = window.tokens.gather(1, window.columns)
        without = both.probability(torch.stack((now.tokens, held), dim=1))[:, 1]
        doubtful = window.inside & ~window.masked & (without < self.narrow_out)
        narrow = top(-without, (wide.sum(-1) - self.at_least).clamp(min=0), doubtful)
        return Edit(window.columns, now.tokens.masked_fill(narrow, state), wide | narrow, final=False)
