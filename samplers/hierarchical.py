"""Hierarchical decoding: one token in every gap (dInfer, arXiv 2510.08666).

Rule:

    commit i  if  p(top token at i) > threshold,  or  > low_threshold and i is the most confident of its run,
    and always the most confident of all

p is the probability of a predicted token, by which one is more confident than another. Committed tokens divide the
block's masked positions into runs of consecutive ones; tokens in different runs depend less on each other than
neighbours do. A block without committed tokens is a single run, so that the middle of long runs is divided first.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from dllm.checks import number
from dllm.decoding.window import Edit, Window
from dllm.samplers.base import CONFIDENCES, Denoise, Knob, Policy, commit
from dllm.samplers.selection import ranks, top


@dataclass(frozen=True)
class Hierarchical(Policy):
    """Commit confident positions, and with a lower threshold the best of every run of masks.

    Args:
        threshold: a token is committed anywhere above this probability; 1 or more for none.
        low_threshold: the best token of a run is committed above this probability; 0 for any.

    Raises:
        ValueError: a negative number, or a low threshold above the threshold.
    """

    knob = Knob("threshold", CONFIDENCES)
    single_forward = True

    threshold: float = 0.9
    low_threshold: float = 0.6

    def __post_init__(self) -> None:
        number("threshold", self.threshold, "0 or more", low=0)
        use = f"a number from 0 to threshold={self.threshold}"
        number("low_threshold", self.low_threshold, use, low=0, high=self.threshold)

    def step(self, window: Window, denoise: Denoise, state: None) -> Edit:
        """Commit everything above the threshold, the best of every run above the low one, and always the best."""
        prediction = denoise()
        confidence = prediction.confidence
        divided = best_of_runs(confidence, window.masked) & (confidence > self.low_threshold)
        sure = (confidence > self.threshold) & window.masked
        return commit(window, prediction, divided | sure | top(confidence, 1, window.masked))


def best_of_runs(score: Float[Tensor, "B K"], masked: Bool[Tensor, "B K"]) -> Bool[Tensor, "B K"]:
    """The best position of every run of masked positions, the leftmost of equals."""
    run = (~masked).cumsum(-1)  # what separates runs ranks last in the one after it
    place = ranks(score.masked_fill(~masked, -torch.inf))
    first = torch.full_like(F.pad(place, (0, 1)), place.shape[1]).scatter_reduce(1, run, place, "amin")
    return (place == first.gather(1, run)) & masked
