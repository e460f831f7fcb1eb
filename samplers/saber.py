"""Saber: adaptive acceleration, and backtracking where confidence fell (arXiv 2510.18165).

Rule:

    commit      i  if  p(top token at i) > m,  or the `at_least` most confident if these are more;  say c positions
    mask again  the min(max(floor(at_least / 2), ceil(c / 8)), c - 1) whose p(top) rose least since the last step

Per step, over the block; c is the number of tokens committed, m the mean confidence with which the row's tokens were
committed (1 before the first), and p(top) the highest probability at a position. Tokens are masked again only where
masks are left in the block. In a block's first step this is where p(top) is lowest. A step gains at least one token.

Difference: the reference may also revoke tokens of earlier blocks; with one block, its default, it is the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from dllm.checks import number
from dllm.decoding.request import Request
from dllm.decoding.setup import Setup
from dllm.decoding.window import Edit, Window
from dllm.samplers.base import Denoise, Knob, Policy
from dllm.samplers.selection import top


@dataclass
class Confidences:
    """State of an engine.

    Attributes:
        mask_token_id: id of [MASK].
        last: highest probability at each position of a row's block in the last step.
        committed: confidence with which each position of the block was committed last; NaN if it never was.
        earlier: sum of these in the earlier blocks of a row.
        count: how many these are.
    """

    mask_token_id: int
    last: Float[Tensor, "rows K"]
    committed: Float[Tensor, "rows K"]
    earlier: Float[Tensor, " rows"]
    count: Int[Tensor, " rows"]


@dataclass(frozen=True)
class Saber(Policy):
    """Commit what is more confident than usual, and revoke what lost confidence.

    Args:
        at_least: tokens committed per step, before some are revoked.

    Raises:
        ValueError: a number below 1.
    """

    kind = "revising"
    knob = Knob("at_least", (1, 2, 3, 4, 6, 8))

    at_least: int = 2

    def __post_init__(self) -> None:
        number("at_least", self.at_least, "a whole number of at least 1 (2 is published)", low=1, whole=True)

    def start(self, setup: Setup) -> Confidences:
        """Start without confidences."""
        last = torch.zeros((setup.slots, 0), dtype=torch.float64, device=setup.device)
        earlier = last.new_zeros(setup.slots)
        return Confidences(setup.mask_token_id, last, last, earlier, earlier.long())

    def enter(self, state: Confidences, row: int, request: Request) -> None:
        """Make room for the blocks of the request, and forget what this row number held."""
        more = max(request.block_length - state.last.shape[1], 0)
        state.last = F.pad(state.last, (0, more))
        state.committed = F.pad(state.committed, (0, more), value=torch.nan)
        state.committed[row] = torch.nan
        state.earlier[row] = state.count[row] = 0

    def step(self, window: Window, denoise: Denoise, state: Confidences) -> Edit:
        """Commit, then revoke."""
        prediction, at, width = denoise(decided=True), window.rows, window.masked.shape[1]
        highest = (prediction.logits.amax(-1) - prediction.logits.logsumexp(-1)).exp().double()
        highest = prediction.aligned(highest, 0.0)
        last, usual = self._recalled(window, state)
        confidence = prediction.confidence
        sure = (confidence > usual[:, None]) & window.masked
        best = top(confidence, self.at_least, window.masked)
        chosen = torch.where(sure.sum(-1, keepdim=True) < self.at_least, best, sure)
        count = chosen.sum(-1).clamp(min=self.at_least)

        masks = (window.masked & ~chosen).any(-1)
        number = ((count + 7) // 8).clamp(min=self.at_least // 2).minimum(count - 1).where(masks, 0)
        # Rounded, as a cache may leave predictions unchanged: then the leftmost goes, and not what rounding decides.
        revoked = top((last - highest).round(decimals=6), number, window.inside & (chosen | ~window.masked))
        state.last[at, :width] = highest
        state.committed[at, :width] = torch.where(chosen, confidence, state.committed[at, :width])
        tokens = prediction.tokens.masked_fill(revoked, state.mask_token_id)
        return Edit(window.columns, tokens, chosen | revoked, final=False)

    def _recalled(self, window: Window, state: Confidences) -> tuple[Float[Tensor, "B K"], Float[Tensor, " B"]]:
        """The last probabilities in the block, and the mean confidence of what was committed so far."""
        at, width, fresh = window.rows, window.masked.shape[1], (window.step == 0)[:, None]
        committed, once = state.committed[at], ~state.committed[at].isnan()
        state.earlier[at] += (committed.nan_to_num() * fresh).sum(-1)
        state.count[at] += (once & fresh).sum(-1)
        state.committed[at] = committed.masked_fill(fresh, torch.nan)
        total = state.earlier[at] + state.committed[at].nansum(-1)
        count = state.count[at] + (once & ~fresh).sum(-1)
        usual = torch.where(count > 0, total / count, 1.0)
        return state.last[at, :width].masked_fill(fresh, 0), usual
