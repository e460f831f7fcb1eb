"""Fast-dLLM's confidence threshold (arXiv 2505.22618, section 3.3, algorithm 1).

Rule:

    commit i  if  p(top token at i) >= threshold,  and always the `at_least` most confident ones

Per step, over the masked positions of the block; p is the probability of a predicted token, its confidence. A threshold
above 1 commits `at_least` tokens per step.

With `steps`, the number of tokens committed after step i of a block is capped by the uniform schedule masks (i + 1) /
steps; quota left by one step carries over. The reference's Dream sampler without cache does this, where steps =
generated length means one token per step.

With `steps_per_block` the number that is always committed is the length of the block divided evenly over that many
steps, the remainder first, as in SDAR (arXiv 2510.06303: low_confidence_dynamic) and LLaDA2.0 (arXiv 2512.15745).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dllm.checks import number
from dllm.decoding.request import Request
from dllm.decoding.window import Edit, Window
from dllm.samplers.base import CONFIDENCES, Denoise, Knob, Policy, commit
from dllm.samplers.schedule import check_steps, check_steps_per_block, quota_of_step, steps_of_block
from dllm.samplers.selection import top


@dataclass(frozen=True)
class Threshold(Policy):
    """Commit confident predictions.

    Args:
        threshold: minimum probability of a committed token; above 1 no token qualifies.
        at_least: tokens committed per step whatever their confidence.
        steps: denoising steps for the whole generated region that cap the commits; None for no cap.
        steps_per_block: denoising steps for each block, after which it is complete; None to use `at_least`.

    Raises:
        ValueError: a negative threshold, or a number below 1.
    """

    knob = Knob("threshold", CONFIDENCES)
    single_forward = True

    threshold: float = 0.9
    at_least: int = 1
    steps: int | None = None
    steps_per_block: int | None = None

    def __post_init__(self) -> None:
        number("threshold", self.threshold, "0 or more (0.9 is published)", low=0)
        number("at_least", self.at_least, "a whole number of at least 1", low=1, whole=True)
        if self.steps is not None:
            number("steps", self.steps, "a whole number of at least 1, or null for no cap", low=1, whole=True)
        check_steps_per_block(self.steps_per_block, {"steps": self.steps, "at_least": self.at_least})

    def check(self, state: Any, request: Request) -> None:
        """Reject steps that cannot be divided among the blocks."""
        if self.steps is not None:
            check_steps(self.steps, request)

    def step(self, window: Window, denoise: Denoise, state: Any) -> Edit:
        """Commit all positions at or above the threshold, and always the best."""
        prediction = denoise()
        sure = (prediction.confidence >= self.threshold) & window.masked
        if self.steps is not None:
            steps = steps_of_block(self.steps, window)
            due = window.entry_masks * (window.step + 1).minimum(steps) // steps
            committed = window.entry_masks - window.masked.sum(-1)
            sure &= top(prediction.confidence, due - committed, window.masked)
        least = self.at_least if self.steps_per_block is None else quota_of_step(self.steps_per_block, window)
        return commit(window, prediction, sure | top(prediction.confidence, least, window.masked))
