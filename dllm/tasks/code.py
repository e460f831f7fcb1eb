"""HumanEval as a task: requests by the harness, and optional execution of the programs in a sandbox."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, get_args

from dllm.checks import choice, number
from dllm.evaluation.runner import Runner
from dllm.tasks import humaneval, sandbox
from dllm.tasks.base import Graded
from dllm.tasks.definition import harness_version
from dllm.tasks.harness import evaluate, fingerprints
from dllm.tasks.sandbox import Sandbox


@dataclass(frozen=True)
class HumanEval:
    """Programs that complete a function (Chen et al. 2021, arXiv 2107.03374).

    Args:
        data: JSONL file (.gz too) in place of the hub's data set.
        execute: run the generated programs in a sandbox; without it nothing is graded.
        sandbox: "full" raises an error if the system cannot isolate a program as in `dllm.tasks.sandbox`;
            "partial" takes what there is.
        timeout: time limit per program, in seconds.
        memory: memory limit of all processes of a program, in bytes.
        limit: number of problems; None for all 164.
        instruct: prompts of the harness's humaneval_instruct; for chat models, with `chat`.
        chat: apply the model's chat template.

    Raises:
        ValueError: a value out of range.
    """

    name: ClassVar[str] = "humaneval"
    gen_length: ClassVar[None] = None

    data: str | None = None
    execute: bool = False
    timeout: float = 5.0
    memory: int = 1 << 30
    sandbox: Sandbox = "full"
    limit: int | None = None
    instruct: bool = False
    chat: bool = False

    def __post_init__(self) -> None:
        if self.limit is not None:
            number("task.limit", self.limit, "1 or more, or null", low=1, whole=True)
        choice("task.sandbox", self.sandbox, get_args(Sandbox))
        number("task.timeout", self.timeout, "seconds above 0", above=0)
        number("task.memory", self.memory, "bytes, 67108864 (64 MiB) or more", low=1 << 26, whole=True)

    def check(self) -> Mapping[str, str]:
        """Verify the file, and the sandbox if programs are executed."""
        if self.execute:
            sandbox.check(self.timeout, self.memory, self.sandbox)
        if self.data is not None:
            humaneval.check_rows(self.data)
        return fingerprints({} if self.data is None else {"test": self.data}) | {"definition": harness_version()}

    def run(self, runner: Runner, seed: int) -> Graded:
        """Generate all programs, and grade them if execution is enabled."""
        task = humaneval.task(self.data, self.execute, self.timeout, self.memory, self.instruct, self.sandbox)
        metric = "pass@1" if self.execute else None
        graded = evaluate(runner, task, seed, None, limit=self.limit, apply_chat_template=self.chat)
        scores = {label.partition(",")[0]: values for label, values in graded.scores.items()}
        kept = {label: values for label, values in scores.items() if label == metric}
        return Graded(kept, metric, graded.rows, {**graded.details, "executed": self.execute})
