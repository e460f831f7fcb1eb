"""A policy at a fixed number of tokens per step, so that what a step costs is measured apart from confidence."""

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
    """Let a policy decide, at its cost, and commit the most confident positions instead.

    Args:
        commits: tokens per step.
        base: the policy; one that takes one forward a step, about its window.

    Raises:
        ValueError: a number below 1, or a policy of another kind.
    """

    single_forward = True

    commits: int
    base: Sampler

    def __post_init__(self) -> None:
        number("commits_per_step", self.commits, "a whole number of at least 1, or null", low=1, whole=True)
        if not self.base.single_forward:
            raise ValueError(
                f"commits_per_step={self.commits} cannot pace {self.base!r}, whose step is more than one forward about "
                "the active block; leave one of them out"
            )

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """What a cache must give (`dllm.decoding.compatibility`): what the policy needs."""
        return self.base.needs

    def start(self, setup: Setup) -> Any:
        """Start the policy."""
        return self.base.start(setup)

    def check(self, state: Any, request: Request) -> None:
        """Refuse what the policy refuses."""
        self.base.check(state, request)

    def enter(self, state: Any, row: int, request: Request) -> None:
        """Begin a row of the policy's."""
        self.base.enter(state, row, request)

    def step(self, window: Window, denoise: Denoise, state: Any) -> Edit:
        """Commit the best positions."""
        heard: list[Prediction] = []

        def listening(*args: Any, **asked: Any) -> Prediction:
            heard.append(denoise(*args, **asked))
            return heard[0]

        self.base.step(window, listening, state)
        return commit(window, heard[0], top(heard[0].confidence, self.commits, window.masked))
