"""Fast-dLLM's confidence threshold (arXiv 2505.22618, section 3.3, algorithm 1).

Per step: commit every masked position of the block with p(top token) >= threshold, and always the
`at_least` most confident ones. A threshold above 1 is `at_least` tokens per step.

With `steps`, the count after step i of a block may not run ahead of the even schedule
masks (i + 1) / steps; what a step leaves unspent the next ones may use. This is what the reference's
Dream sampler without cache does, where steps = generated length means one token per step.
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
    """Commit what the model is sure of.

    Args:
        threshold: least probability of a token to be committed; above 1 none is enough.
        at_least: tokens committed per step however unsure.
        steps: denoising steps for the whole generated region to pace the commits by; None for no pace.

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
            number("steps", self.steps, "a whole number of at least 1, or null for no pace", low=1, whole=True)

    def check(self, state: Any, request: Request) -> None:
        """Refuse steps that the blocks cannot share."""
        if self.steps is not None:
            check_steps(self.steps, request)

    def step(self, window: Window, denoise: Denoise, state: Any) -> Edit:
        """Commit all positions at or above the threshold, and the best in any case."""
        prediction = denoise()
        sure = (prediction.confidence >= self.threshold) & window.masked
        if self.steps is not None:
            steps = steps_of_block(self.steps, window)
            due = window.entry_masks * (window.step + 1).minimum(steps) // steps
            committed = window.entry_masks - window.masked.sum(-1)
            sure &= top(prediction.confidence, due - committed, window.masked)
        return commit(window, prediction, sure | top(prediction.confidence, self.at_least, window.masked))
