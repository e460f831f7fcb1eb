"""Tasks of lm-evaluation-harness, with data from the hub or local files, graded by the harness."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from traceback import walk_tb
from typing import Any, ClassVar
from unittest.mock import patch

import datasets
from datasets import disable_progress_bars, enable_progress_bars, is_progress_bar_enabled
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from jinja2 import UndefinedError
from omegaconf import OmegaConf

from dllm.checks import number
from dllm.evaluation.metrics import not_a_share
from dllm.evaluation.runner import Runner
from dllm.files import check_readable
from dllm.identity import digest, tree
from dllm.models.loading import quiet
from dllm.tasks.base import Graded
from dllm.tasks.definition import definition, refused
from dllm.tasks.rows import check_data, pattern_of

_SPLITS = ("train", "validation", "test")
_BUILDERS = ("json", "csv", "parquet", "arrow", "text")  # read files of a kind


@dataclass(frozen=True)
class Harness:
    """A task, group or tag of lm-evaluation-harness.

    Args:
        name: as in `lm_eval --tasks`.
        data: files instead of the data set on the hub: one JSON or JSONL file (.gz too) for each split that the task
            reads, such as {train: ..., test: ...}.
        limit: documents per task; None for all.
        num_fewshot: examples before each question; None for the task's own.
        chat: apply the model's chat template.
        system_instruction: system prompt.
        metric: "METRIC" or "METRIC,FILTER", the score reported as accuracy; None for the task's first.
        include_path: folder with more task definitions. Their code (`!function`) is executed, so only use trusted
            ones.

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
        """Verify the harness, the task and the files."""
        if self.include_path is not None and not Path(self.include_path).is_dir():
            raise ValueError(f"task.include_path={self.include_path!r} is not a folder; give one with task definitions")
        found = fingerprints(self.data or {})
        manager = self._manager()
        if self.name not in manager.all_tasks:
            faults = [] if self.include_path is None else [f"; {each}" for each in refused(Path(self.include_path))]
            listed = "; `dllm lm-eval ls tasks` lists those of lm-eval"
            raise ValueError(f"unknown task={self.name!r}{next(iter(faults), listed)}")
        if self.data:
            local(manager, self.name, self.data)  # rejects several tasks
            check_data(self.data, getattr(manager.task_index[self.name], "cfg", None) or {}, self.num_fewshot)
        return found | {"definition": definition(manager, self.name, self.include_path)}

    def run(self, runner: Runner, seed: int) -> Graded:
        """Run and grade by the harness."""
        manager = self._manager()
        with TemporaryDirectory() as folder:
            if self.data:
                (Path(folder) / "local.yaml").write_text(local(manager, self.name, self.data), encoding="utf-8")
                manager = _harness().TaskManager(include_path=folder, include_defaults=False)
            with self._naming_faults():
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

    def _manager(self) -> Any:
        return _manager(self.include_path, "" if self.include_path is None else tree(Path(self.include_path)))

    @contextmanager
    def _naming_faults(self) -> Iterator[None]:
        """One-line errors for faults of the task's definition, its code or its data."""
        try:
            yield
        except Exception as error:
            if (fault := fault_of(error, f"task={self.name}", __file__)) is None:
                raise
            if self.data and isinstance(error, (KeyError, UndefinedError)):
                missing = error.args[0] if isinstance(error, KeyError) else None
                fix = f"add {missing}: FILE" if missing in _SPLITS else f"its rows lack what the task reads ({error})"
                fault = f"task.data={dict(self.data)!r} does not fit {self.name}: {fix}"
            raise ValueError(fault) from None


def fault_of(error: Exception, task: str, caller: str) -> str | None:
    """A one-line message for an error by a task's definition, its code or its data; None for errors of this package.

    Args:
        error: the exception.
        task: name of the task in the message.
        caller: the file that caught it.
    """
    places = [(frame.f_code.co_filename, line) for frame, line in walk_tb(error.__traceback__)]
    own = [file for file, _ in places if Path(__file__).parents[1] in Path(file).parents]
    file, line = places[-1]
    if file in own or any(each != caller for each in own):
        return None
    where = f"{type(error).__name__} in {file}, line {line}"
    return f"{task} cannot be used: {_reason(error)} ({where}); fix its definition, its code or its data"


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "its members are cyclic"
    if "Sample larger than population" in str(error):
        return "it has fewer examples than task.num_fewshot asks for"
    return " ".join(str(error.args[0] if isinstance(error, KeyError) and error.args else error).split())


def local(manager: Any, name: str, data: Mapping[str, str]) -> str:
    """A YAML definition for `include_path` of a task of the harness that reads local files.

    Raises:
        ValueError: the name is a group of tasks.
    """
    base = getattr(manager.task_index[name], "yaml_path", None)
    if base is None or name not in manager.all_subtasks:
        raise ValueError(f"task.data={dict(data)!r} is for a single task, and {name} is several; name one of them")
    files = {split: pattern_of(file) for split, file in data.items()}
    own = {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": files}}
    return OmegaConf.to_yaml({"include": str(base), "task": name, **own})


def fingerprints(data: Mapping[str, str]) -> dict[str, str]:
    """SHA-256 of each file.

    Raises:
        ValueError: one is missing.
    """
    found = {}
    for split, file in data.items():
        check_readable(f"task.data.{split}", Path(file), "a JSONL file")
        try:
            found[split] = digest(Path(file))
        except OSError as error:
            reason = error.strerror
            raise ValueError(f"task.data.{split}={file!r} cannot be read ({reason}); give a JSONL file") from None
    return found


def evaluate(runner: Runner, task: Any, seed: int, metric: str | None, manager: Any = None, **options: Any) -> Graded:
    """Run `lm_eval.simple_evaluate` and collect its results by sample.

    Args:
        runner: answers the requests.
        task: a name or a task's configuration.
        seed: of the answers; the harness's seeds are its defaults.
        metric: the score reported as accuracy; None for the first.
        manager: task manager; None for a task given by configuration.
        **options: of `simple_evaluate`.

    Raises:
        ValueError: an unknown metric, or a data set that cannot be loaded.
    """
    from lm_eval import simple_evaluate

    from dllm.evaluation.lm_eval import DLLM

    lm = DLLM(runner, seed, overruled=False)
    with quiet(), _calm(), _naming(task), _read_anew():
        results: Any = simple_evaluate(
            model=lm, tasks=[task], task_manager=manager or _bare(), bootstrap_iters=0, **options
        )
    if not any(results["samples"].values()):
        name = task["task"] if isinstance(task, Mapping) else task
        raise ValueError(f"task={name} has no requests: no members, or no documents; fix its definition")
    rows, scores = _by_sample(results["samples"])
    shares = _shares(results, scores)
    if metric is not None and metric not in shares:
        raise ValueError(not_a_share(metric, shares))
    kept = ("results", "groups", "versions", "n-shot", "configs", "n-samples", "higher_is_better")
    return Graded(
        scores=shares,
        main=metric or next(iter(shares), None),
        rows=rows,
        details={name: results[name] for name in kept if name in results} | {"truncated": lm.truncated},
        totals={name: value for name, value in _totals(results).items() if name not in shares},
        own=next(iter(shares), None),
    )


def _by_sample(found: Mapping[str, Any]) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, float]]]:
    """Question and answer of each sample, and its scores."""
    rows: dict[str, dict[str, Any]] = {}
    scores: dict[str, dict[str, float]] = {}
    for task, samples in found.items():
        for sample in samples:
            identity = f"{task}/{sample['doc_id']}"
            asked = {"question": _text(sample["arguments"]), "reference": str(sample["target"])}
            suffix = "" if sample["filter"] == "none" else f",{sample['filter']}"
            rows.setdefault(identity, asked)[f"answer{suffix}"] = str(sample["filtered_resps"])
            for each in sample["metrics"]:
                if isinstance(sample[each], (int, float)):
                    name = _label(found, task, f"{each},{sample['filter']}")
                    scores.setdefault(name, {})[identity] = float(sample[each])
    return rows, scores


def _label(tasks: Mapping[str, Any], task: str, name: str) -> str:
    """A score by the harness's name without the filter "none", prefixed by the task if there are several."""
    name = name.removesuffix(",none")
    return name if len(tasks) == 1 else f"{task}: {name}"


def _totals(results: Mapping[str, Any]) -> dict[str, tuple[float, int]]:
    """The harness's aggregated metrics, of tasks and groups, and the number of samples of each."""
    found, members = results["samples"], results.get("group_subtasks", {})
    figures = {task: _figures(results["results"][task]) for task in found}
    counts = {task: len({sample["doc_id"] for sample in samples}) for task, samples in found.items()}
    totals = {
        _label(found, task, name): (value, counts[task]) for task in found for name, value in figures[task].items()
    }
    for group, own in results.get("groups", {}).items():
        tasks = _tasks_of(group, members, set())
        for name, value in _figures(own).items():
            count = sum(counts[task] for task in tasks & set(counts) if name in figures[task])
            totals[f"{group}: {name.removesuffix(',none')}"] = value, count
    return totals


def _figures(found: Mapping[str, Any]) -> dict[str, float]:
    return {
        name: float(value)
        for name, value in found.items()
        if isinstance(value, (int, float)) and "," in name and "_stderr" not in name
    }


def _tasks_of(group: str, members: Mapping[str, list[str]], seen: set[str]) -> set[str]:
    """A group's members, and theirs."""
    seen.add(group)
    for each in members.get(group, ()):
        if each not in seen:
            _tasks_of(each, members, seen)
    return seen


def _shares(results: Mapping[str, Any], scores: Mapping[str, Mapping[str, float]]) -> dict[str, Mapping[str, float]]:
    """The scores that can be an accuracy: means over samples from 0 to 1, higher is better."""
    totals, better = _totals(results), results.get("higher_is_better", {})
    kept = {}
    for name, values in scores.items():
        metric = name.rpartition(": ")[2].partition(",")[0]
        worse = any(task.get(metric) is False for task in better.values())
        mean = sum(values.values()) / len(values)
        is_share = all(0 <= value <= 1 for value in values.values()) and not worse
        if is_share and abs(totals.get(name, (-1.0, 0))[0] - mean) < 1e-6:
            kept[name] = values
    return kept


def _text(arguments: Any) -> str:
    """The context of a sample's first request."""
    first = next(iter(arguments.values())) if isinstance(arguments, Mapping) else arguments[0]
    return str(next(iter(first.values())) if isinstance(first, Mapping) else first[0])


@cache
def _manager(include_path: str | None, state: str) -> Any:
    """The task manager, whose indexing takes seconds; cached by the content of the folder."""
    try:
        return _harness().TaskManager(include_path=include_path)
    except Exception as error:
        if fault_of(error, "", __file__) is None or include_path is None:
            raise
        fault = next(refused(Path(include_path)), _reason(error))
        raise ValueError(f"task.include_path={include_path!r} cannot be used: {fault}") from None


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
    """Suppress the harness's log below errors, its progress bars, and its call of git."""
    from lm_eval import evaluator
    from lm_eval.api import task

    bars = is_progress_bar_enabled()
    # datasets also raises the errors that it logs.
    levels = {logging.getLogger("lm_eval"): logging.ERROR, logging.getLogger("datasets"): logging.CRITICAL}
    before = {logger: logger.level for logger in levels}
    for logger, level in levels.items():
        logger.setLevel(level)
    disable_progress_bars()
    try:
        with (
            patch.object(evaluator, "get_git_commit_hash", lambda: None),
            patch.object(task, "tqdm", lambda items, *_, **__: items),
        ):
            yield
    finally:
        for logger, level in before.items():
            logger.setLevel(level)
        if bars:
            enable_progress_bars()


@contextmanager
def _read_anew() -> Iterator[None]:
    """Read local data again from its files: datasets caches by their names and times, not by content."""
    before = datasets.load_dataset
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder:

        def load(path: str, *arguments: Any, **options: Any) -> Any:
            named = [path, options.get("data_files"), options.get("data_dir")]
            local = path in _BUILDERS or Path(path).exists()
            if local and not any("://" in str(each) for each in named):
                options.setdefault("cache_dir", folder)
            return before(path, *arguments, **options)

        with patch.object(datasets, "load_dataset", load):
            yield


@contextmanager
def _naming(task: Any) -> Iterator[None]:
    """One-line errors about data that cannot be loaded."""
    name = task["task"] if isinstance(task, Mapping) else task
    try:
        yield
    except (ConnectionError, DatasetNotFoundError, DatasetGenerationError) as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise ValueError(f"the data of task={name} cannot be loaded ({reason}); give files with task.data") from None
