"""Fast-dLLM's confidence threshold (arXiv 2505.22618, section 3.3, algorithm 1).

Per step: commit every masked position of the block with p(top token) >= threshold, and always the
`at_least` most confident ones. A threshold above 1 commits `at_least` tokens per step.

With `steps`, the number of tokens committed after step i of a block is capped by the uniform schedule
masks (i + 1) / steps; quota left by one step carries over. The reference's Dream sampler without cache
does this, where steps = generated length means one token per step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dllm.checks import number
from dllm.decoding.request import Request
from dllm.decoding.window import Edit, Window
from dllm.samplers.base import Denoise, Policy, commit
from dllm.samplers.schedule import check_steps, steps_of_block
from dllm.samplers.selection import top


@dataclass(frozen=True)
class Threshold(Policy):
    """Commit confident predictions.

    Args:
        threshold: minimum probability of a committed token; above 1 no token qualifies.
        at_least: tokens committed per step whatever their confidence.
        steps: denoising steps for the whole generated region that cap the commits; None for no cap.

    Raises:
        ValueError: a negative threshold, or a number below 1.
    """

    single_forward = True

    threshold: float = 0.9
    at_least: int = 1
    steps: int | None = None

    def __post_init__(self) -> None:
        number("threshold", self.threshold, "0 or more (0.9 is published)", low=0)
        number("at_least", self.at_least, "a whole number of at least 1", low=1, whole=True)
        if self.steps is not None:
            number("steps", self.steps, "a whole number of at least 1, or null for no cap", low=1, whole=True)

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
        return commit(window, prediction, sure | top(prediction.confidence, self.at_least, window.masked))
