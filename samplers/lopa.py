"""LoPA: look ahead which order of filling makes the rest most certain (arXiv 2512.16229, section 3).

Rule:

    the canvas  becomes the branch with the largest
                weight * creation + (1 - weight) * mean of the lower half of the confidences of its masks
    commit i    if  p(top token at i) >= threshold  on that branch,  and always the best

p is the probability of a predicted token, its confidence. A step has the canvas and, but for the first step of a block,
the predictions for it before its last tokens were committed. Branches are the canvas, and the canvas with one of its
`branches` most confident masks filled. One forward over all of them gives each its own predictions. `creation` is the
confidence of the token that made a branch, 1 for the canvas itself; of equals the canvas comes first, then the more
confident token. The predictions of the branch that are not committed are kept for the branches of the next step.

So every forward commits at least one token. weight = 1 is the plain threshold.

Differences: the authors' code is for models that decode several blocks at once (D2F), and lets a branch win a tie with
the canvas.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dllm.checks import number
from dllm.decoding.flags import flagged
from dllm.decoding.request import Request
from dllm.decoding.setup import Setup
from dllm.decoding.window import Edit, Window
from dllm.samplers.base import CONFIDENCES, Denoise, Knob, Policy
from dllm.samplers.selection import ranks, remember, top


@dataclass(frozen=True)
class Outlook:
    """State of an engine: the id of [MASK], and the latest prediction of each mask; the confidence is NaN for none."""

    mask_token_id: int
    tokens: Int[Tensor, "rows L"]
    confidence: Float[Tensor, "rows L"]


@dataclass(frozen=True)
class LoPA(Policy):
    """Commit confident predictions on the most promising of several branches.

    Args:
        threshold: minimum probability of a committed token; above 1 no token qualifies.
        branches: further canvases in each forward.
        weight: of the confidence with which a branch was made, against what it leaves; 1 never branches.

    Raises:
        ValueError: a value out of range.
    """

    knob = Knob("threshold", CONFIDENCES)

    threshold: float = 0.9
    branches: int = 4
    weight: float = 0.5

    def __post_init__(self) -> None:
        number("threshold", self.threshold, "0 or more (0.9 is published)", low=0)
        number("branches", self.branches, "a whole number from 1 to 64", low=1, high=64, whole=True)
        number("weight", self.weight, "a number from 0 to 1 (0.5 is published)", low=0, high=1)

    def start(self, setup: Setup) -> Outlook:
        """Allocate the predictions of every row."""
        shape, device = (setup.slots, setup.length), setup.device
        tokens = torch.zeros(shape, dtype=torch.long, device=device)
        return Outlook(setup.mask_token_id, tokens, torch.full(shape, torch.nan, dtype=torch.float64, device=device))

    def enter(self, state: Outlook, row: int, request: Request) -> None:
        """Nothing was predicted yet."""
        state.confidence[row] = torch.nan

    def step(self, window: Window, denoise: Denoise, state: Outlook) -> Edit:
        """Branch, look at all branches in one forward, and go on from the most promising one."""
        places = window.rows[:, None], window.columns
        guess, sure = state.tokens[places], state.confidence[places]
        # A branch must leave something to look at.
        known = window.masked & ~sure.isnan() & (window.masked.sum(-1, keepdim=True) > 1)
        rank = ranks(sure.masked_fill(~known, -torch.inf))
        fills = torch.stack([known & (rank == branch) for branch in range(-1, self.branches)], dim=1)
        drafts = [Edit(window.columns, guess, fill).on(window.tokens) for fill in fills.unbind(1)]
        made = fills.any(-1)
        made[:, 0] = True
        asked = window.masked[:, None] & ~fills & made[..., None]
        prediction = denoise(asked, tokens=torch.stack(drafts, dim=1))

        creation = sure[:, None].masked_fill(~fills, -torch.inf).amax(-1)
        creation[:, 0] = 1.0
        score = self.weight * creation + (1 - self.weight) * _lower_half(prediction.confidence, asked)
        best = score.masked_fill(~made, -torch.inf).argmax(-1)
        entry = torch.arange(len(best), device=best.device)
        fill, left = fills[entry, best], asked[entry, best]
        tokens, confidence = prediction.tokens[entry, best], prediction.confidence[entry, best]
        chosen = (confidence >= self.threshold) & left
        chosen |= top(confidence, 1, left)
        remember(state.tokens, window, tokens)
        remember(state.confidence, window, confidence.masked_fill(~left | chosen, torch.nan))
        return Edit(
            window.columns,
            torch.where(fill, guess, tokens),
            fill | chosen,
            drafted=guess.where(fills.any(1), state.mask_token_id),
            source=torch.where(flagged(torch.zeros_like(window.region), window.columns, fill), 0, best[:, None]),
        )


def _lower_half(confidence: Float[Tensor, "B D K"], asked: Bool[Tensor, "B D K"]) -> Float[Tensor, "B D"]:
    """Mean of the lower half of each draft's confidences, the middle one included."""
    count = (asked.sum(-1, keepdim=True) + 1) // 2
    lowest = confidence.masked_fill(~asked, torch.inf).sort(dim=-1).values
    among = torch.arange(confidence.shape[-1], device=confidence.device) < count
    return lowest.masked_fill(~among, 0).sum(-1) / count[..., 0].clamp(min=1)
