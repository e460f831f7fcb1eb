"""What a task is: it asks a runner, and grades what comes back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from dllm.evaluation.runner import Runner


@dataclass(frozen=True)
class Graded:
    """A task's judgement.

    Attributes:
        scores: per score its values by sample, whose mean it is; 0 or 1 where a sample is right or wrong.
        main: the score that counts as the accuracy, from 0 to 1 and better the higher; None where there is none.
        rows: more about each sample for the table of samples, such as the question.
        details: what else there is to keep, such as the harness's own results.
        totals: scores that are no mean over samples, such as a perplexity.
        own: the task's own main score, where the user chose another.
    """

    scores: Mapping[str, Mapping[str, float]]
    main: str | None
    rows: Mapping[str, Mapping[str, Any]]
    details: Mapping[str, Any] = field(default_factory=dict)
    totals: Mapping[str, float] = field(default_factory=dict)
    own: str | None = None


@runtime_checkable
class Task(Protocol):
    """A task of conf/task.

    Attributes:
        name: of the task.
        gen_length: positions to generate where the user does not say; None for what each question asks for.
    """

    name: str
    gen_length: int | None

    def check(self) -> Mapping[str, str]:
        """Refuse what cannot work, before a model is loaded.

        Returns:
            What tells the data from other data, by file: part of the run's identity.

        Raises:
            ValueError: a missing file, an unknown name.
        """
        ...

    def run(self, runner: Runner, seed: int) -> Graded:
        """Ask everything and grade the answers."""
        ...
