"""HumanEval (arXiv 2107.03374): 164 functions to complete, each with tests, for lm-evaluation-harness.

Prompts, stop strings and post-processing are those of the harness's tasks humaneval and humaneval_instruct;
the difference is the execution. The harness loads a metric from the hub that runs each program without
isolation; here `dllm.tasks.sandbox` runs it, and only if enabled. pass@1 uses one answer per problem:

    pass@1 = problems whose program runs to completion / problems,
    program = prompt + completion + tests + a call of them
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dllm.files import check_readable
from dllm.tasks import sandbox
from dllm.tasks.rows import pattern_of, read_rows
from dllm.tasks.sandbox import Sandbox

HUB = "openai/openai_humaneval"
FIELDS = ("task_id", "prompt", "test", "entry_point")
STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
_REQUEST = "Write a solution to the following problem and make sure that it passes the tests:\n"


# Data classes instead of functions: the harness writes a task's fields into its results.
@dataclass(frozen=True)
class Answers:
    """The harness's build_predictions, or build_predictions_instruct: complete functions from completions."""

    instruct: bool

    def __call__(self, resps: Sequence[Sequence[str]], docs: Sequence[Mapping[str, Any]]) -> list[list[str]]:
        """Append each completion, truncated at its first ``` for chats, to its prompt."""
        return [
            [doc["prompt"] + (text.partition("```")[0] if self.instruct else text) for text in texts]
            for texts, doc in zip(resps, docs, strict=True)
        ]


@dataclass(frozen=True)
class ProgramGrader:
    """Runs a complete function against its tests; see `task`."""

    execute: bool
    timeout: float
    memory: int
    confined: Sandbox = "full"

    def __call__(self, doc: Mapping[str, Any], results: Sequence[Sequence[str]]) -> dict[str, float]:
        """The metric of one problem: `pass@1`, or `generated` without execution."""
        if not self.execute:
            return {"generated": 1.0}
        outcome = sandbox.execute(_tested(doc, results[0][0]), self.timeout, self.memory, self.confined)
        return {"pass@1": float(outcome.passed)}


def task(
    data: str | None,
    execute: bool,
    timeout: float = 5.0,
    memory: int = 1 << 30,
    instruct: bool = False,
    confined: Sandbox = "full",
) -> dict[str, Any]:
    """The task's configuration for ``lm_eval.simple_evaluate(tasks=[...])``.

    Args:
        data: a JSON Lines file of rows with task_id, prompt, test and entry_point, gzipped or not; None for
            openai/openai_humaneval on the hub.
        execute: run the generated programs on this machine; see `dllm.tasks.sandbox` for the isolation.
            False: no pass@1, only `generated`, which is 1 for every problem; the logged samples are
            sufficient to grade them elsewhere with `program`.
        timeout: time limit per program, in seconds.
        memory: memory limit of all processes of a program, in bytes.
        instruct: the harness's humaneval_instruct, for chat models: the answer starts with the beginning
            of the function and ends at its first ```.
        confined: `sandbox` of `dllm.tasks.sandbox.execute`.

    Raises:
        ValueError: the file cannot be read or has other content, a value out of range, or a platform on
            which programs cannot be executed or isolated.
    """
    if execute:
        sandbox.check(timeout, memory, confined)

    metric = {"metric": "pass@1" if execute else "generated", "aggregation": "mean", "higher_is_better": True}
    config: dict[str, Any] = {
        "task": "humaneval_instruct" if instruct else "humaneval",
        "dataset_path": HUB if data is None else "json",
        "output_type": "generate_until",
        "test_split": "test",
        "doc_to_text": f"{_REQUEST}```python\n{{{{ prompt }}}}\n```\n" if instruct else "{{prompt}}",
        "doc_to_target": "{{test}}\ncheck({{entry_point}})",
        "process_results": ProgramGrader(execute, timeout, memory, confined),
        "metric_list": [metric],
        "generation_kwargs": {"until": list(STOPS), "max_gen_toks": 1024, "do_sample": False},
        "repeats": 1,
        "num_fewshot": 0,
        "filter_list": [
            {"name": "create_test", "filter": [{"function": "custom", "filter_fn": Answers(instruct)}]},
        ],
        "metadata": {"version": 4.0 if instruct else 1.0},
    }
    if data is not None:
        check_rows(data)
        config["dataset_kwargs"] = {"data_files": {"test": pattern_of(data)}}
    if instruct:
        config["gen_prefix"] = "Here is the completed function:\n```python\n{{ prompt }}\n"
    return config


def program(doc: Mapping[str, Any], completion: str) -> str:
    """The test program of a completion: prompt, completion, tests and their call."""
    return _tested(doc, doc["prompt"] + completion)


def _tested(doc: Mapping[str, Any], answer: str) -> str:
    return f"{answer}\n{doc['test']}\ncheck({doc['entry_point']})"


def check_rows(data: str) -> None:
    """Reject an invalid file before a model is loaded."""
    where = f"task.data={data!r}"
    check_readable("task.data", Path(data), "HumanEval.jsonl or HumanEval.jsonl.gz")
    for number, row in read_rows(where, Path(data), "HumanEval.jsonl or HumanEval.jsonl.gz"):
        missing = [field for field in FIELDS if not isinstance(row, dict) or not isinstance(row.get(field), str)]
        if missing:
            raise ValueError(f"{where} line {number} has no text {missing[0]!r}; give rows with {', '.join(FIELDS)}")
