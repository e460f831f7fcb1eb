"""HumanEval (arXiv 2107.03374): 164 functions to complete, each with tests, for lm-evaluation-harness.

Prompts, stop strings and what is cut from an answer are the harness's own tasks humaneval and
humaneval_instruct; the difference is what runs the tests. The harness loads a metric from the hub that
runs each program unconfined; here `dllm.tasks.sandbox` runs it, and only where that is asked for. pass@1 is
of one answer a problem:

    pass@1 = problems whose program reaches its end / problems,
    program = prompt + completion + tests + a call of them
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dllm.files import check_readable
from dllm.tasks import sandbox
from dllm.tasks.rows import read_rows
from dllm.tasks.sandbox import Sandbox

HUB = "openai/openai_humaneval"
FIELDS = ("task_id", "prompt", "test", "entry_point")
STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
_REQUEST = "Write a solution to the following problem and make sure that it passes the tests:\n"


# Data classes, and no functions: the harness writes a task's fields into its results.
@dataclass(frozen=True)
class Answers:
    """The harness's build_predictions, or build_predictions_instruct: from completions to whole functions."""

    instruct: bool

    def __call__(self, resps: Sequence[Sequence[str]], docs: Sequence[Mapping[str, Any]]) -> list[list[str]]:
        """Put each completion, cut at its first ``` where it comes from a chat, behind its prompt."""
        return [
            [doc["prompt"] + (text.partition("```")[0] if self.instruct else text) for text in texts]
            for texts, doc in zip(resps, docs, strict=True)
        ]


@dataclass(frozen=True)
class ProgramGrader:
    """Runs a whole function against its tests; see `task`."""

    execute: bool
    timeout: float
    memory: int
    confined: Sandbox = "full"

    def __call__(self, doc: Mapping[str, Any], results: Sequence[Sequence[str]]) -> dict[str, float]:
        """The metric of one problem: `pass@1`, or `generated` where nothing is to be executed."""
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
    """Describe the task as ``lm_eval.simple_evaluate(tasks=[...])`` takes it.

    Args:
        data: a JSON Lines file of rows with task_id, prompt, test and entry_point, gzipped or not; None for
            openai/openai_humaneval on the hub.
        execute: run what the model wrote, on this machine; see `dllm.tasks.sandbox` for how far that is
            confined. False runs nothing: there is no pass@1 then, only `generated`, which is 1 for every
            problem; the logged samples hold what `program` needs to be graded elsewhere.
        timeout: seconds a program may run.
        memory: bytes a program may use, in all of its processes together.
        instruct: the harness's humaneval_instruct, for models that chat: the function is asked for, its
            beginning stands at the start of the answer, and the answer ends at its first ```.
        confined: as `dllm.tasks.sandbox.execute` takes its `sandbox`.

    Raises:
        ValueError: the file cannot be read or holds something else, a value out of range, or a platform on
            which programs cannot be executed, or not confined as asked.
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
        config["dataset_kwargs"] = {"data_files": {"test": str(Path(data).absolute())}}
    if instruct:
        config["gen_prefix"] = "Here is the completed function:\n```python\n{{ prompt }}\n"
    return config


def program(doc: Mapping[str, Any], completion: str) -> str:
    """The program that reaches its end where a completion is right: prompt, completion, tests and their call."""
    return _tested(doc, doc["prompt"] + completion)


def _tested(doc: Mapping[str, Any], answer: str) -> str:
    return f"{answer}\n{doc['test']}\ncheck({doc['entry_point']})"


def check_rows(data: str) -> None:
    """Refuse a file that is not rows of problems, before a model answers any of them."""
    where = f"task.data={data!r}"
    check_readable("task.data", Path(data), "HumanEval.jsonl or HumanEval.jsonl.gz")
    for number, row in read_rows(where, Path(data), "HumanEval.jsonl or HumanEval.jsonl.gz"):
        missing = [field for field in FIELDS if not isinstance(row, dict) or not isinstance(row.get(field), str)]
        if missing:
            raise ValueError(f"{where} line {number} has no text {missing[0]!r}; give rows with {', '.join(FIELDS)}")
