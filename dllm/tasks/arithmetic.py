"""The bundled word problems as a task, graded by final answer and by the whole chain of equations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from dllm.checks import seed
from dllm.evaluation.records import Query
from dllm.evaluation.runner import Runner
from dllm.models.tokenizers import tokens_of
from dllm.tasks import word_problems
from dllm.tasks.base import Graded


@dataclass(frozen=True)
class WordProblems:
    """Held-out word problems.

    Args:
        limit: number of problems.
        seed: of the problems; 1,000,000 and above are never used in training.

    Raises:
        ValueError: a value out of range.
    """

    name: ClassVar[str] = "word_problems"
    gen_length: ClassVar[int] = 64

    limit: int = 200
    seed: int = 1_000_001

    def __post_init__(self) -> None:
        word_problems.check_count("task.limit", self.limit)
        seed("task.seed", self.seed, 1_000_000, "; models are trained on seeds below")

    def check(self) -> Mapping[str, str]:
        """No files."""
        return {}

    def run(self, runner: Runner, seed: int) -> Graded:
        """Run all problems, each as plain text."""
        tokenizer = runner.lm.tokenizer
        if tokenizer is None:
            raise ValueError(f"{runner.lm.name} has no tokenizer, and word problems are texts; add one")
        asked = word_problems.problems(self.limit, self.seed)
        problems = {f"{self.name}/{place}": problem for place, problem in enumerate(asked)}
        requests = [
            Query(
                name,
                tokens_of(tokenizer, problem.question, "a problem", special=True),
                seed=seed + place,
                length=self.gen_length,
            )
            for place, (name, problem) in enumerate(problems.items())
        ]
        records = {record.id: record for record in runner.answer(requests)}
        grades = {name: word_problems.grade(records[name].text or "", problem) for name, problem in problems.items()}
        return Graded(
            scores={
                "final answer": {name: float(grade.final) for name, grade in grades.items()},
                "whole chain": {name: float(grade.chain) for name, grade in grades.items()},
            },
            main="final answer",
            rows={
                name: {"question": problem.question, "reference": str(problem.answer)}
                for name, problem in problems.items()
            },
        )
