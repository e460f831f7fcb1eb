"""The task protocol: a task passes requests to a runner and grades the answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from dllm.evaluation.runner import Runner


@dataclass(frozen=True)
class Graded:
    """The grades of a task.

    Attributes:
        scores: per score its values by sample, which are averaged; 0 or 1 for wrong or right.
        main: the score reported as accuracy, from 0 to 1, higher is better; None without one.
        rows: additional columns of the table of samples, such as the question.
        details: additional results, such as those of the harness.
        totals: scores that are not a mean over samples, such as perplexity; with the number of their samples if these
            are not all.
        own: the task's default main score, if the user chose another.
    """

    scores: Mapping[str, Mapping[str, float]]
    main: str | None
    rows: Mapping[str, Mapping[str, Any]]
    details: Mapping[str, Any] = field(default_factory=dict)
    totals: Mapping[str, float | tuple[float, int]] = field(default_factory=dict)
    own: str | None = None


@runtime_checkable
class Task(Protocol):
    """A task of conf/task.

    Attributes:
        name: of the task.
        gen_length: default number of positions to generate; None if set by each request.
    """

    name: str
    gen_length: int | None

    def check(self) -> Mapping[str, str]:
        """Validate the task before a model is loaded.

        Returns:
            What tells the data from other data, by file: part of the run's identity.

        Raises:
            ValueError: a missing file, an unknown name.
        """
        ...

    def run(self, runner: Runner, seed: int) -> Graded:
        """Run all requests and grade the answers."""
        ...
