"""ReMDM: remasking by a schedule (arXiv 2503.00307, sections 4.1 and 4.2).

Rule:

    mask again  every decided token of the block with probability sigma,  at most m - d(i + 1) of them;
                cap: sigma = min(eta, most),  rescale: sigma = eta * most,  most = min(1, (1 - b) / a)
    commit      the most confident masks,  until m - d(i + 1) are left

A block of m masks is decoded in T steps, of which step i leaves m - d(i + 1) masks, d(i) = floor(m i / T), however many
tokens it masks again. a = d(i) / m is the share that is decided, b = d(i + 1) / m the next one, and `most` the largest
probability that keeps the schedule. With `by_confidence` the probability of a token is sigma times its
weight exp(-c) of the confidence c with which it was committed, relative to the mean weight.

`loop` inserts that many steps before the share would exceed `loop_at`; they mask tokens again, at least one, and commit
as many. So a block takes T + loop forwards, always.

Differences: the published sampler draws whether a mask is committed, and which token; here the schedule is exact, and
the most confident masks are committed, as LLaDA does. Its loop turns remasking off elsewhere; here eta = 0 does without
a loop, and a loop adds to what the schedule takes back. `by_confidence` there gives weights that sum to one, not
weights of mean one, so that about one token is taken back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dllm.checks import choice, number
from dllm.decoding.request import Request
from dllm.decoding.setup import Setup
from dllm.decoding.window import Edit, Window
from dllm.samplers.base import Denoise, Policy
from dllm.samplers.schedule import check_steps, steps_of_block
from dllm.samplers.selection import remember, top

_PER_POSITION = 15  # steps; the engine stops what takes more


@dataclass(frozen=True)
class Committed:
    """State of an engine: the id of [MASK], and the confidence with which each position was committed."""

    mask_token_id: int
    confidence: Float[Tensor, "rows L"]


@dataclass(frozen=True)
class ReMDM(Policy):
    """Commit by a schedule, and mask tokens again by another.

    Args:
        steps: denoising steps for the whole generated region, without loops; None for one per position.
        schedule: how the probability of remasking follows from eta: cap or rescale.
        eta: of the schedule; 0 masks nothing again.
        by_confidence: mask tokens of low confidence with a higher probability.
        loop: further steps per block that leave the number of masks unchanged.
        loop_at: decided share of the block at which they are taken.

    Raises:
        ValueError: an unknown schedule, or a value out of range; for a request, steps or loops that do not fit.
    """

    kind = "revising"

    steps: int | None = None
    schedule: Literal["cap", "rescale"] = "cap"
    eta: float = 0.04
    by_confidence: bool = False
    loop: int = 0
    loop_at: float = 0.9

    def __post_init__(self) -> None:
        if self.steps is not None:
            number("steps", self.steps, "a whole number of at least 1, or null for one per position", low=1, whole=True)
        choice("schedule", self.schedule, ("cap", "rescale"))
        number("eta", self.eta, "a number from 0 to 1", low=0, high=1)
        choice("by_confidence", self.by_confidence, (True, False))
        number("loop", self.loop, "a whole number of at least 0", low=0, whole=True)
        number("loop_at", self.loop_at, "a number above 0, up to 1 (0.9 is published)", above=0, high=1)

    def start(self, setup: Setup) -> Committed:
        """Allocate the state of every row."""
        confidence = torch.zeros((setup.slots, setup.length), dtype=torch.float64, device=setup.device)
        return Committed(setup.mask_token_id, confidence)

    def check(self, state: Committed, request: Request) -> None:
        """Reject steps that cannot be divided among the blocks, and loops that take too many."""
        if self.steps is not None:
            check_steps(self.steps, request)
        most = _PER_POSITION * request.span // request.block_count
        if self.loop > most:
            raise ValueError(
                f"loop={self.loop} is out of range; use at most {most} ({_PER_POSITION} steps per generated position)"
            )

    def enter(self, state: Committed, row: int, request: Request) -> None:
        """Nothing is committed yet."""
        state.confidence[row] = 0

    def step(self, window: Window, denoise: Denoise, state: Committed) -> Edit:
        """Mask some tokens again; commit as many masks as the schedule wants."""
        prediction = denoise()
        uniform = window.uniform()
        looping, target = self._target(window)
        entry, masks = window.entry_masks, window.masked.sum(-1)
        present, sure = window.inside & ~window.masked, state.confidence[window.rows[:, None], window.columns]
        decided = present.sum(-1)
        most = ((entry - target) / decided.clamp(min=1)).clamp(max=1)
        sigma = most.clamp(max=self.eta) if self.schedule == "cap" else self.eta * most
        weight = torch.ones_like(sure)
        if self.by_confidence:
            weight = (-sure).exp() * present
            weight = weight / (weight.sum(-1, keepdim=True) / decided.clamp(min=1)[:, None]).clamp(min=1e-300)
        odds = uniform / (sigma[:, None] * weight)  # below 1: masked again; the lowest first
        back = present & (odds < 1)
        if self.loop:
            back |= top(-uniform / weight.clamp(min=1e-300), looping.long(), present)
        back = top(-odds.nan_to_num(nan=torch.inf), entry - target, back)
        chosen = top(prediction.confidence, masks + back.sum(-1) - (entry - target), window.masked)
        remember(state.confidence, window, prediction.confidence.where(chosen, sure))
        return Edit(
            window.columns, prediction.tokens.masked_fill(back, state.mask_token_id), chosen | back, final=False
        )

    def _target(self, window: Window) -> tuple[Bool[Tensor, " B"], Int[Tensor, " B"]]:
        """Whether each row is in a loop, and the tokens that are to be decided after this step."""
        entry, step = window.entry_masks, window.step
        steps = entry if self.steps is None else steps_of_block(self.steps, window).minimum(entry)
        # The first step that would exceed the share, but one that has a token to mask again and leaves a mask.
        share = (entry.double() * self.loop_at).floor().long().clamp(min=1)
        begin = ((share + 1) * steps - 1).div(entry, rounding_mode="floor").minimum(steps - 1)
        loops = torch.where(begin > 0, self.loop, 0)
        looping = (step >= begin) & (step < begin + loops)
        base = torch.where(step < begin, step, (step - loops).maximum(begin))
        return looping, entry * torch.where(looping, begin, base + 1) // steps
