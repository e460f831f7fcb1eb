"""dParallel's entropy threshold (arXiv 2509.26488, section 3.3).

Rule:

    commit i  if  H(p_i) <= threshold,  and always the position with the lowest H

Per step, over the masked positions of the block, with H the entropy, in nats, of the predicted distribution p_i. The
reference for Dream uses <; here both families use <=.
"""

from __future__ import annotations

from dataclasses import dataclass

from dllm.checks import number
from dllm.decoding.window import Edit, Window
from dllm.samplers.base import Denoise, Knob, Policy, commit
from dllm.samplers.selection import top


@dataclass(frozen=True)
class EntropyThreshold(Policy):
    """Commit low-entropy predictions.

    Args:
        threshold: maximum entropy, in nats, of a committed position.

    Raises:
        ValueError: a negative threshold.
    """

    knob = Knob("threshold", (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0))
    single_forward = True

    threshold: float = 0.5

    def __post_init__(self) -> None:
        number("threshold", self.threshold, "0 or more nats (0.5 is published)", low=0)

    def step(self, window: Window, denoise: Denoise, state: None) -> Edit:
        """Commit all positions at or below the threshold, at least the lowest."""
        prediction = denoise()
        lowest = top(-prediction.entropy, 1, window.masked)
        return commit(window, prediction, lowest | (prediction.entropy <= self.threshold) & window.masked)
