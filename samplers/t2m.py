"""T2M: doubtful tokens become masks again, instead of other tokens (token-to-mask remasking, arXiv 2604.18738).

Rule:

    commit i    if  p(top token at i) > threshold,  and always the best
    mask again  the tokens that were there before with
                low_prob  q < bound                                             (0.1)
                t2t       another token predicted with p > bound                (0.9; LLaDA2.1's editing replaces it)
                change    |q - q at the step before| > bound                    (0.3)

Per step, of one forward about the whole block, with p the probability of a predicted token and q that of the token that
is there. What is masked again:

the most doubtful first, at most max(1, share * tokens) of them, and each position at most `most` times. Once its block
has no mask, a row stays for up to `post_steps` steps without masks, until nothing is taken back.

A block of K positions ends within (1 + 2 most) K + 1 forwards: each commits, or is the last, or takes a token back.

Differences: the reference is for LLaDA2.1 alone, keeps all logits of the step before (here the one probability), and
compares the first step of a block with the last of the block before it (here with nothing).
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
from dllm.samplers.base import CONFIDENCES, Denoise, Knob, Policy
from dllm.samplers.selection import remember, top

_BOUNDS = {"low_prob": 0.1, "t2t": 0.9, "change": 0.3}


@dataclass(frozen=True)
class Revisions:
    """State of an engine.

    Attributes:
        mask_token_id: id of [MASK].
        count: how often each position was masked again.
        before: probability of the token at each position at the step before; NaN for none.
        block: block of the latest step of each row; -1 before the first.
        post: steps without masks in that block.
    """

    mask_token_id: int
    count: Int[Tensor, "rows L"]
    before: Float[Tensor, "rows L"]
    block: Int[Tensor, " rows"]
    post: Int[Tensor, " rows"]


@dataclass(frozen=True)
class T2M(Policy):
    """Commit confident masks, and mask doubtful tokens again.

    Args:
        threshold: minimum probability of a committed token, exclusive; 1 or more commits one token per step.
        trigger: what makes a token doubtful: low_prob, t2t or change.
        bound: of the trigger; None for the published one.
        most: how often a position is masked again at most; 0 for never.
        share: of the tokens of a block that are masked again in one step at most; always one.
        post_steps: steps of a block without masks at most; 0 leaves it at once.

    Raises:
        ValueError: an unknown trigger, or a value out of range.
    """

    kind = "revising"
    knob = Knob("threshold", CONFIDENCES)

    threshold: float = 0.7
    trigger: Literal["low_prob", "t2t", "change"] = "low_prob"
    bound: float | None = None
    most: int = 3
    share: float = 0.25
    post_steps: int = 16

    def __post_init__(self) -> None:
        number("threshold", self.threshold, "0 or more (0.7 is published)", low=0)
        choice("trigger", self.trigger, ("low_prob", "t2t", "change"))
        if self.bound is not None:
            number("bound", self.bound, "0 or more, or null for the published one", low=0)
        # Above 7 the engine could not tell a long run from one without end.
        number("most", self.most, "a whole number from 0 to 7 (3 is published)", low=0, high=7, whole=True)
        number("share", self.share, "a number from 0 to 1 (0.25 is published)", low=0, high=1)
        number("post_steps", self.post_steps, "a whole number of at least 0 (16 is published)", low=0, whole=True)

    def start(self, setup: Setup) -> Revisions:
        """Allocate the state of every row."""
        shape, device = (setup.slots, setup.length), setup.device
        count, (block, post) = (
            torch.zeros(size, dtype=torch.long, device=device) for size in (shape, (2, setup.slots))
        )
        before = torch.full(shape, torch.nan, dtype=torch.float64, device=device)
        return Revisions(setup.mask_token_id, count, before, block - 1, post)

    def enter(self, state: Revisions, row: int, request: Request) -> None:
        """Nothing was masked again yet."""
        state.count[row], state.before[row], state.block[row] = 0, torch.nan, -1

    def step(self, window: Window, denoise: Denoise, state: Revisions) -> Edit:
        """Commit confident masks; mask doubtful tokens again; stay at a block that was revised."""
        rows, columns, masked = window.rows[:, None], window.columns, window.masked
        prediction = denoise(decided=True)
        sure = (prediction.confidence > self.threshold) & masked
        chosen = sure | top(prediction.confidence, 1, masked)

        held = window.tokens.gather(1, columns)
        probability = prediction.probability(torch.where(masked, prediction.tokens, held))
        present = window.inside & ~masked
        bound = _BOUNDS[self.trigger] if self.bound is None else self.bound
        if self.trigger == "low_prob":
            score, doubtful = -probability, probability < bound
        elif self.trigger == "t2t":
            score = prediction.confidence
            doubtful = (score > bound) & (prediction.tokens != held)
        else:
            score = (probability - state.before[rows, columns]).abs().nan_to_num(nan=0.0)
            doubtful = score > bound
        doubtful &= present & (state.count[rows, columns] < self.most)
        limit = (present.sum(-1) * self.share).long().clamp(min=1)
        back = top(score, limit, doubtful)

        remember(state.count, window, state.count[rows, columns] + back)
        remember(state.before, window, probability.masked_fill(~(present | chosen) | back, torch.nan))
        stays = self._stays(window, masked & ~chosen | back, back, state)
        tokens = prediction.tokens.masked_fill(back, state.mask_token_id)
        return Edit(columns, tokens, chosen | back, held=stays, final=False)

    def _stays(
        self, window: Window, left: Bool[Tensor, "B K"], back: Bool[Tensor, "B K"], state: Revisions
    ) -> Bool[Tensor, " B"]:
        """(B,) rows that stay at a block without masks."""
        rows = window.rows
        post = state.post[rows].where(state.block[rows] == window.block, 0) + ~window.masked.any(-1)
        state.block[rows], state.post[rows] = window.block, post
        revised = window.masked.any(-1) | back.any(-1)
        return ~left.any(-1) & revised & (post < self.post_steps)
