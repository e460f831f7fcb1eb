"""A policy with a fixed number of tokens per step, so that the time of a step does not depend on confidences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dllm.checks import number
from dllm.decoding.prediction import Prediction
from dllm.decoding.request import Request
from dllm.decoding.setup import Setup
from dllm.decoding.window import Edit, Window
from dllm.samplers.base import Denoise, Policy, Sampler, commit
from dllm.samplers.selection import top


@dataclass(frozen=True)
class CommitsPerStep(Policy):
    """Run a policy, including its cost, but commit a fixed number of the most confident positions.

    Args:
        commits: tokens per step.
        base: the policy; one with one forward per step, about its window.

    Raises:
        ValueError: a number below 1, or a policy with another kind of step.
    """

    single_forward = True

    commits: int
    base: Sampler

    def __post_init__(self) -> None:
        number("commits_per_step", self.commits, "a whole number of at least 1, or null", low=1, whole=True)
        if not self.base.single_forward:
            raise ValueError(
                f"commits_per_step={self.commits} does not apply to {self.base!r}, whose step is more than one forward "
                "about the active block; leave one of them out"
            )

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """Requirements for the cache (`dllm.decoding.compatibility`): those of the policy."""
        return self.base.needs

    def start(self, setup: Setup) -> Any:
        """Start the policy."""
        return self.base.start(setup)

    def check(self, state: Any, request: Request) -> None:
        """Reject what the policy rejects."""
        self.base.check(state, request)

    def enter(self, state: Any, row: int, request: Request) -> None:
        """Begin a row of the policy."""
        self.base.enter(state, row, request)

    def step(self, window: Window, denoise: Denoise, state: Any) -> Edit:
        """Commit the best positions."""
        heard: list[Prediction] = []

        def listening(*args: Any, **asked: Any) -> Prediction:
            heard.append(denoise(*args, **asked))
            return heard[0]

        self.base.step(window, listening, state)
        return commit(window, heard[0], top(heard[0].confidence, self.commits, window.masked))
