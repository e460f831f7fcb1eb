"""SlowFast sampling: explore a stretch of stable predictions, then decode it (arXiv 2506.10848).

Rule:

    commit i  of the range  if  p(top token at i) >= threshold,  where these are two or more;  else the most confident
    range     slow: from s to the block's end;  fast: from s to the end of the stretch that the slow steps found

A block is decoded in cycles, each from where the last one ended, at offset s of the block. A cycle has two phases:

    slow  exactly `exploration` steps over the range from s to the block's end. Each estimates where the
          cycle ends: after the last masked position with p(top) >= cycle_threshold, or after s without one.
          The end is the estimate of the first step in which the last `window` estimates have a standard
          deviation below max_deviation, or, if there is none, their mean (rounded down).
    fast  steps over the range from s to the cycle's end, until it has no masks. In all of these but the first,
          nothing from the cycle's end on is attended to, or computed.

Differences: the steps of a block that is complete are skipped, which the reference still counts; and a full
forward does not keep the predictions from the cycle's end on, which are not used again.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dllm.checks import number
from dllm.decoding.request import Request
from dllm.decoding.setup import Setup
from dllm.decoding.window import Edit, Window
from dllm.samplers.base import CONFIDENCES, Denoise, Knob, Policy, commit
from dllm.samplers.selection import top


@dataclass
class Cycles:
    """State of an engine: the cycle of each row.

    Attributes:
        start: offset in the block at which it starts.
        end: offset at which it ends; an estimate while it is explored.
        explored: slow steps so far.
        settled: whether the end is determined.
        estimates: the latest estimates of the end, the last one last.
        length: canvas columns.
    """

    start: Int[Tensor, " rows"]
    end: Int[Tensor, " rows"]
    explored: Int[Tensor, " rows"]
    settled: Bool[Tensor, " rows"]
    estimates: Int[Tensor, "rows W"]
    length: int


@dataclass(frozen=True)
class SlowFast(Policy):
    """Explore how far predictions are stable, then decode that far.

    Args:
        threshold: minimum probability of tokens that are committed together.
        cycle_threshold: minimum probability of a token up to which a cycle may reach.
        exploration: slow steps of a cycle.
        window: estimates of a cycle's end that must agree.
        max_deviation: standard deviation, in positions, below which they agree.

    Raises:
        ValueError: a number out of range.
    """

    knob = Knob("threshold", CONFIDENCES)

    threshold: float = 0.9
    cycle_threshold: float = 0.3
    exploration: int = 6
    window: int = 2
    max_deviation: float = 1.0

    def __post_init__(self) -> None:
        number("threshold", self.threshold, "0 or more (0.9 is published)", low=0)
        number("cycle_threshold", self.cycle_threshold, "0 or more (0.3 is published)", low=0)
        number("exploration", self.exploration, "a whole number of at least 1 (6 is published)", low=1, whole=True)
        number("window", self.window, "a whole number of at least 1 (2 is published)", low=1, whole=True)
        number("max_deviation", self.max_deviation, "0 or more (1.0 is published)", low=0)

    def start(self, setup: Setup) -> Cycles:
        """Every row begins with a cycle of its own."""
        start, end, explored = torch.zeros((3, setup.slots), dtype=torch.long, device=setup.device)
        # A step commits at least one position, so that no cycle explores longer than this.
        kept = min(self.window, self.exploration, setup.length)
        return Cycles(start, end, explored, start > 0, start.new_zeros((setup.slots, kept)), setup.length)

    def enter(self, state: Cycles, row: int, request: Request) -> None:
        """Begin with a cycle."""
        state.start[row] = state.end[row] = state.explored[row] = 0
        state.settled[row] = False

    def step(self, window: Window, denoise: Denoise, state: Cycles) -> Edit:
        """Take a slow or a fast step of each row's cycle."""
        at, prediction = window.rows, denoise()
        fresh = window.step == 0
        start, explored = state.start[at].masked_fill(fresh, 0), state.explored[at].masked_fill(fresh, 0)
        settled, slow = state.settled[at] & ~fresh, explored < self.exploration
        end, agree = self._estimate(window, prediction.confidence, start, explored, state)
        end = torch.where(slow & ~settled, end, state.end[at])

        offset = torch.arange(window.masked.shape[1], device=at.device)
        within = window.masked & (offset >= start[:, None]) & (slow[:, None] | (offset < end[:, None]))
        sure = within & (prediction.confidence >= self.threshold)
        chosen = torch.where(sure.sum(-1, keepdim=True) > 1, sure, top(prediction.confidence, 1, within))

        left = (window.masked & ~chosen & (offset < end[:, None])).any(-1)
        over = ~left & (explored + 1 >= self.exploration)
        state.start[at], state.end[at] = torch.where(over, end, start), end
        state.explored[at] = (explored + 1).clamp(max=self.exploration).masked_fill(over, 0)
        state.settled[at] = (settled | agree) & ~over
        hides = ~slow & ~over
        return replace(
            commit(window, prediction, chosen), until=(window.columns[:, 0] + end).where(hides, state.length)
        )

    def _estimate(
        self,
        window: Window,
        confidence: Float[Tensor, "B K"],
        start: Int[Tensor, " B"],
        explored: Int[Tensor, " B"],
        state: Cycles,
    ) -> tuple[Int[Tensor, " B"], Bool[Tensor, " B"]]:
        """Where each row's cycle ends by the estimates so far, with that of this step, and whether they agree."""
        after = torch.arange(1, confidence.shape[1] + 1, device=start.device)
        reached = (confidence >= self.cycle_threshold) & window.masked & (after > start[:, None])
        farthest = (after * reached).amax(-1)
        latest = torch.where(farthest > 0, farthest, start + 1).minimum(window.block_length)
        estimates = torch.cat((state.estimates[window.rows, 1:], latest[:, None]), dim=1)
        state.estimates[window.rows] = estimates
        count = (explored + 1).clamp(max=estimates.shape[1])
        used = torch.arange(estimates.shape[1], device=start.device) >= estimates.shape[1] - count[:, None]
        total = (estimates * used).sum(-1)
        spread = ((estimates - (total.double() / count)[:, None]).square() * used).sum(-1) / count
        agree = (explored + 1 >= self.window) & (spread.sqrt() < self.max_deviation)
        return torch.where(agree, latest, total // count), agree
