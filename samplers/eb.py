"""The entropy-bounded sampler, EB-Sampler (arXiv 2505.24857).

Rule:

    commit the longest prefix U with  sum of H(p_i) over U  -  max of H(p_i) over U  <=  gamma,
    and always the `at_least` best ones

H is the entropy, in nats, of the predicted distribution p_i at i. The joint entropy of the positions in a set U is at
least their largest entropy and at most the sum of them all; predicting them independently costs at most the difference.
Per step, a prefix is one of the block's masked positions in order of their error proxy, best first. The proxy is
`order`: -p(top token), the margin or the entropy. gamma = 0 commits one token per step unless entropies are zero.

Difference: d2Cache's implementation leaves out the entropy of the last position of the prefix instead of the largest
one (leave_out=last), a bound that is at most as wide; with order=entropy they are the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from dllm.checks import choice, number
from dllm.decoding.prediction import Prediction
from dllm.decoding.window import Edit, Window
from dllm.samplers.base import Denoise, Knob, Policy, commit
from dllm.samplers.selection import ranks, top


@dataclass(frozen=True)
class EB(Policy):
    """Commit the best positions while their entropies stay within a bound.

    Args:
        gamma: bound, in nats, on the sum of the committed entropies but one; larger commits more.
        order: what ranks masked positions: low_confidence, margin or entropy.
        leave_out: the entropy that the sum leaves out: the largest (as published), or that of the last position.
        at_least: tokens committed per step whatever their entropy.

    Raises:
        ValueError: a number out of range, or an unknown choice.
    """

    knob = Knob("gamma", (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0))
    single_forward = True

    gamma: float = 0.1
    order: Literal["low_confidence", "margin", "entropy"] = "low_confidence"
    leave_out: Literal["largest", "last"] = "largest"
    at_least: int = 1

    def __post_init__(self) -> None:
        number("gamma", self.gamma, "0 or more nats (0.001 to 0.1 is published)", low=0)
        choice("order", self.order, ("low_confidence", "margin", "entropy"))
        choice("leave_out", self.leave_out, ("largest", "last"))
        number("at_least", self.at_least, "a whole number of at least 1", low=1, whole=True)

    def step(self, window: Window, denoise: Denoise, state: None) -> Edit:
        """Commit the longest prefix of the ranking within the bound."""
        prediction = denoise()
        score = self._score(prediction).masked_fill(~window.masked, -torch.inf)
        place = ranks(score)
        entropy = torch.zeros_like(prediction.entropy).scatter(1, place, prediction.entropy)
        # Positions that are not masked rank last, with infinite entropy.
        largest = entropy.cummax(-1).values if self.leave_out == "largest" else entropy
        within = (entropy.cumsum(-1) - largest <= self.gamma).gather(1, place) & window.masked
        return commit(window, prediction, within | top(score, self.at_least, window.masked))

    def _score(self, prediction: Prediction) -> Float[Tensor, "B K"]:
        match self.order:
            case "low_confidence":
                return prediction.confidence
            case "margin":
                return prediction.margin
            case _:
                return -prediction.entropy
