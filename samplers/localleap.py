"""LocalLeap's anchor propagation (arXiv 2510.07081, section 3.2, algorithm 1).

Rule:

    commit i  if  p(top token at i) >= threshold,
              or  p(top token at i) >= relaxed_threshold  with an anchor at most `radius` positions away,
    and always the most confident position

Per step, over the masked positions of the block; anchors are those with p(top token) >= threshold. Positions accepted
via an anchor do not act as anchors in the same step. radius = 0 or relaxed_threshold = threshold is the plain
confidence threshold.

Differences: the reference's `early_stop` discards everything after a finished block that contains an
end-of-text; here `stop_at_eos` stops right after the end-of-text itself, for every policy.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F

from dllm.checks import number
from dllm.decoding.window import Edit, Window
from dllm.samplers.base import CONFIDENCES, Denoise, Knob, Policy, commit
from dllm.samplers.selection import top


@dataclass(frozen=True)
class LocalLeap(Policy):
    """Commit confident positions, and with a lower threshold their neighbours.

    Args:
        threshold: minimum probability of an anchor; above 1 there are no anchors.
        relaxed_threshold: minimum probability of a token near an anchor.
        radius: positions on either side of an anchor that count as near.

    Raises:
        ValueError: a negative number, or a relaxed threshold above the threshold.
    """

    knob = Knob("threshold", CONFIDENCES)
    single_forward = True

    threshold: float = 0.9
    relaxed_threshold: float = 0.75
    radius: int = 4

    def __post_init__(self) -> None:
        number("threshold", self.threshold, "0 or more (0.9 is published)", low=0)
        use = f"a number from 0 to threshold={self.threshold} (0.75 is published)"
        number("relaxed_threshold", self.relaxed_threshold, use, low=0, high=self.threshold)
        number("radius", self.radius, "a whole number of at least 0 (4 is published)", low=0, whole=True)

    def step(self, window: Window, denoise: Denoise, state: None) -> Edit:
        """Commit the anchors, their neighbours above the relaxed threshold, and always the best position."""
        prediction = denoise()
        confidence = prediction.confidence
        anchors = (confidence >= self.threshold) & window.masked
        reach = min(self.radius, anchors.shape[1])
        near = F.max_pool1d(anchors[:, None].float(), 2 * reach + 1, stride=1, padding=reach)[:, 0] > 0
        drawn = near & (confidence >= self.relaxed_threshold) & window.masked
        return commit(window, prediction, anchors | drawn | top(confidence, 1, window.masked))
