"""Tasks of lm-evaluation-harness, from the hub or from local files, graded by the harness itself."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

from datasets import disable_progress_bars, enable_progress_bars, is_progress_bar_enabled
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from omegaconf import OmegaConf

from dllm.checks import number
from dllm.loading import quiet
from dllm.runner import Runner
from dllm.tasks.base import Graded


@dataclass(frozen=True)
class Harness:
    """A task, group or tag of lm-evaluation-harness.

    Args:
        name: as `lm_eval --tasks` takes it.
        data: files in place of the hub's data set: one JSON or JSONL file (.gz too) for each split that the task
            reads, such as {train: ..., test: ...}.
        limit: documents of each task; None for all.
        num_fewshot: examples before each question; None for the task's own.
        chat: apply the model's chat template.
        system_instruction: system prompt.
        metric: "METRIC" or "METRIC,FILTER", the score that counts as the accuracy; None for the task's first.
        include_path: folder with further task definitions.

    Raises:
        ValueError: a value out of range.
    """

    gen_length: ClassVar[None] = None

    name: str
    data: Mapping[str, str] | None = None
    limit: int | None = None
    num_fewshot: int | None = None
    chat: bool = False
    system_instruction: str | None = None
    metric: str | None = None
    include_path: str | None = None

    def __post_init__(self) -> None:
        for name, low in (("limit", 1), ("num_fewshot", 0)):
            if (value := getattr(self, name)) is not None:
                number(f"task.{name}", value, f"{low} or more, or null", low=low, whole=True)

    def check(self) -> Mapping[str, str]:
        """See that the harness, the task and the files are there."""
        found = fingerprints(self.data or {})
        manager = _manager(self.include_path)
        if not manager.match_tasks([self.name]):
            raise ValueError(f"task={self.name!r} is unknown; `dllm lm-eval ls tasks` lists those of lm-eval")
        return found

    def run(self, runner: Runner, seed: int) -> Graded:
        """Let the harness ask and grade."""
        manager = _manager(self.include_path)
        with TemporaryDirectory() as folder:
            if self.data:
                (Path(folder) / "local.yaml").write_text(local(manager, self.name, self.data), encoding="utf-8")
                manager = _harness().TaskManager(include_path=folder, include_defaults=False)
            return evaluate(
                runner,
                self.name,
                seed,
                self.metric,
                manager,
                limit=self.limit,
                num_fewshot=self.num_fewshot,
                apply_chat_template=self.chat,
                system_instruction=self.system_instruction,
            )


def local(manager: Any, name: str, data: Mapping[str, str]) -> str:
    """The definition of a task of the harness that reads local files, as YAML for its `include_path`.

    Raises:
        ValueError: the name is that of several tasks.
    """
    base = getattr(manager.task_index[name], "yaml_path", None)
    if base is None or name not in manager.all_subtasks:
        raise ValueError(f"task.data={dict(data)!r} is for a single task, and {name} is several; name one of them")
    files = {split: str(Path(file).resolve()) for split, file in data.items()}
    own = {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": files}}
    return OmegaConf.to_yaml({"include": str(base), "task": name, **own})


def fingerprints(data: Mapping[str, str]) -> dict[str, str]:
    """SHA-256 of each file.

    Raises:
        ValueError: one is not there.
    """
    found = {}
    for split, file in data.items():
        try:
            found[split] = hashlib.sha256(Path(file).read_bytes()).hexdigest()
        except OSError as error:
            reason = error.strerror
            raise ValueError(f"task.data.{split}={file!r} cannot be read ({reason}); give a JSONL file") from None
    return found


def evaluate(runner: Runner, task: Any, seed: int, metric: str | None, manager: Any = None, **options: Any) -> Graded:
    """Run `lm_eval.simple_evaluate` and sort its results by sample.

    Args:
        runner: answers.
        task: a name or a task's configuration.
        seed: of the answers; the harness's own seeds stay its defaults.
        metric: the score that counts as the accuracy; None for the first.
        manager: knows the task; None where its configuration says everything.
        **options: of `simple_evaluate`.

    Raises:
        ValueError: no such metric, or a data set that cannot be had.
    """
    from lm_eval import simple_evaluate

    from dllm.harness import DLLM

    lm = DLLM(runner, seed)
    with quiet(), _calm(), _naming(task):
        results: Any = simple_evaluate(
            model=lm, tasks=[task], task_manager=manager or _bare(), bootstrap_iters=0, **options
        )
    scores: dict[str, dict[str, float]] = {}
    rows: dict[str, dict[str, Any]] = {}
    for name, samples in results["samples"].items():
        for sample in samples:
            identity = f"{name}/{sample['doc_id']}"
            asked = {"question": _text(sample["arguments"]), "reference": str(sample["target"])}
            suffix = "" if sample["filter"] == "none" else f",{sample['filter']}"
            rows.setdefault(identity, asked)[f"answer{suffix}"] = str(sample["filtered_resps"])
            for each in sample["metrics"]:
                value = sample[each]
                if isinstance(value, (int, float)):
                    scores.setdefault(each + suffix, {})[identity] = float(value)
    if metric is not None and metric not in scores:
        raise ValueError(f"task.metric={metric!r} is unknown; use one of {', '.join(scores)}")
    kept = ("results", "versions", "n-shot", "configs", "n-samples")
    details = {name: results[name] for name in kept if name in results}
    return Graded(scores, metric or next(iter(scores), None), rows, details | {"truncated": lm.truncated})


def _text(arguments: Any) -> str:
    """The context of a sample's first request."""
    first = next(iter(arguments.values())) if isinstance(arguments, Mapping) else arguments[0]
    return str(next(iter(first.values())) if isinstance(first, Mapping) else first[0])


@cache
def _manager(include_path: str | None) -> Any:
    """Knows all tasks, which takes it seconds to find."""
    return _harness().TaskManager(include_path=include_path)


@cache
def _bare() -> Any:
    return _harness().TaskManager(include_defaults=False)


def _harness() -> Any:
    try:
        import lm_eval.tasks
    except ImportError:
        raise ValueError("tasks of lm-eval need it: pip install 'dllm-samplers[eval]'") from None
    return lm_eval.tasks


@contextmanager
def _calm() -> Iterator[None]:
    """Only errors of the harness, and no bars beside the run's own."""
    logger, bars = logging.getLogger("lm_eval"), is_progress_bar_enabled()
    level = logger.level
    logger.setLevel(logging.ERROR)
    disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(level)
        if bars:
            enable_progress_bars()


@contextmanager
def _naming(task: Any) -> Iterator[None]:
    """Errors about data that cannot be had, in one line."""
    name = task["task"] if isinstance(task, Mapping) else task
    try:
        yield
    except (ConnectionError, DatasetNotFoundError, DatasetGenerationError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"the data of task={name} cannot be had ({reason}); give files with task.data") from None
