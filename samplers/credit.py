"""CreditDecoding: what was predicted before counts again (arXiv 2510.06133).

Rule:

    C(i, v)       <-  decay * C(i, v) + [v = y] * p(y) ^ power
    logits(i, v)  <-  logits(i, v) + strength * log(1 + C(i, v))
    commit i      if  p(top token at i) by these logits >= threshold,  and always the `at_least` best

A token v collects credit C at a masked position i of the block while it is y, the most probable one there by the
model's own distribution p; [v = y] is 1 for that token and 0 for all others. The token committed is the one of the new
logits. A block begins without credit. strength = 0 is the plain confidence threshold.

The tokens that ever collected credit are few, so only these are kept, `SLOTS` a position; of more the one with the
least credit is dropped. The reference keeps a number for every position and entry of the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from dllm.checks import number
from dllm.decoding.prediction import Prediction
from dllm.decoding.request import Request
from dllm.decoding.setup import Setup
from dllm.decoding.window import Edit, Window
from dllm.samplers.base import CONFIDENCES, Denoise, Knob, Policy, commit
from dllm.samplers.selection import top

SLOTS = 128


@dataclass
class Credits:
    """State of an engine.

    Attributes:
        tokens: tokens with credit at each position of a row's block.
        credit: how much each has; 0 in a free slot.
    """

    tokens: Int[Tensor, "rows K S"]
    credit: Float[Tensor, "rows K S"]


@dataclass(frozen=True)
class Credit(Policy):
    """Commit confident predictions, with credit for tokens that were predicted before.

    Args:
        threshold: minimum probability of a committed token; above 1 no token qualifies.
        strength: how much credit raises a logit; 0 is the plain threshold.
        power: of the probability with which a token gains credit; below 1 it favours improbable ones.
        decay: share of the credit that is left after a step.
        at_least: tokens committed per step whatever their confidence.

    Raises:
        ValueError: a number out of range.
    """

    knob = Knob("threshold", CONFIDENCES)

    threshold: float = 0.9
    strength: float = 0.7
    power: float = 0.2
    decay: float = 0.8
    at_least: int = 1

    def __post_init__(self) -> None:
        number("threshold", self.threshold, "0 or more (0.9 is published)", low=0)
        number("strength", self.strength, "0 (no credit) to 1e6 (0.7 is published)", low=0, high=1e6)
        number("power", self.power, "0 to 1e6 (0.2 is published)", low=0, high=1e6)
        number("decay", self.decay, "a number from 0 to 1 (0.8 is published)", low=0, high=1)
        number("at_least", self.at_least, "a whole number of at least 1", low=1, whole=True)

    def start(self, setup: Setup) -> Credits:
        """Start without credit."""
        tokens = torch.zeros((setup.slots, 0, 0), dtype=torch.long, device=setup.device)
        return Credits(tokens, tokens.double())

    def enter(self, state: Credits, row: int, request: Request) -> None:
        """Make room for the blocks of the request, and forget what this row number held."""
        have, slots = state.credit.shape[1:]
        more = max(request.block_length - have, 0), max(min(request.block_length, SLOTS) - slots, 0)
        if any(more):
            state.tokens, state.credit = (
                F.pad(each, (0, more[1], 0, more[0])) for each in (state.tokens, state.credit)
            )
        state.credit[row] = 0

    def step(self, window: Window, denoise: Denoise, state: Credits) -> Edit:
        """Update the credit, then commit what is confident with it."""
        prediction = denoise()
        tokens, credit = self._collected(window, prediction, state)
        tokens, credit = (each.flatten(0, 1)[prediction.index] for each in (tokens, credit))
        prediction = prediction.adjusted(tokens, self.strength * credit.log1p())
        sure = (prediction.confidence >= self.threshold) & window.masked
        edit = commit(window, prediction, sure | top(prediction.confidence, self.at_least, window.masked))
        return replace(edit, prediction=prediction)

    def _collected(
        self, window: Window, prediction: Prediction, state: Credits
    ) -> tuple[Int[Tensor, "B K S"], Float[Tensor, "B K S"]]:
        """The credit of the window's positions, with that of this step."""
        at, width = window.rows, window.masked.shape[1]
        highest, best = prediction.given.max(-1)
        gain = (highest - prediction.given.logsumexp(-1)).exp().double() ** self.power
        best, gain = prediction.aligned(best, 0)[..., None], prediction.aligned(gain, 0.0)[..., None]
        tokens, credit = state.tokens[at, :width], state.credit[at, :width] * self.decay
        credit = credit.masked_fill((window.step == 0)[:, None, None], 0)
        own = (tokens == best) & (credit > 0)
        slot = torch.where(own.any(-1), own.int().argmax(-1), credit.argmin(-1))[..., None]
        tokens = tokens.scatter(-1, slot, best)
        credit = credit.scatter(-1, slot, (credit * own).sum(-1, keepdim=True) + gain)
        state.tokens[at, :width], state.credit[at, :width] = tokens, credit
        return tokens, credit
