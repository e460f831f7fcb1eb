"""Reading the results of a sweep."""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypedDict

from dllm.evaluation.metrics import impossible
from dllm.evaluation.run_folder import sessions
from dllm.identity import is_system, within
from dllm.reports.runs import Failure, Group, MeasuredRun, Sweep
from dllm.resolve import find_class, options_of
from dllm.samplers.base import Policy, Sampler
from dllm.stored import misfit, shallow, there

VERSION = 1


class _Score(TypedDict):
    value: float | None
    interval: tuple[float | None, float | None] | None


_NUMBERS = """n accuracy nfe nfe_error tpf tokens tokens_per_sample tokens_per_second seconds latency_p50 latency_p95
guide_nfe guide_seconds positions computed_share refreshes peak_memory""".split()

# What times depend on and answers do not.
_PACE = ("options.batch_size", "options.threads", "session.threads", "session.device")
_SHORT = re.compile(r"^(options|session)\.")


def load(folder: Path, quality: str | None = None) -> Sweep:
    """Read the results of all runs below a folder, which may be a run itself.

    Args:
        folder: of a sweep or a run.
        quality: the score that measures quality; None for the accuracy of each run.

    Raises:
        ValueError: there are no runs, a file is damaged or of another version, or no run has such a score.
    """
    if not folder.is_dir():
        raise ValueError(f"folder={str(folder)!r} is not a folder; give that of a sweep or of a run")
    files = _named("results.json", folder)
    failures = tuple(
        Failure(*(str(entry.get(name, "")) for name in ("label", "message")))
        for path in _named("error.json", folder)
        if path.with_name("results.json") not in files and (entry := _read(path, "dllm-error"))
    )
    if not files:
        why = f"; {len(failures)} failed, the first one, {failures[0].label}: {failures[0].message}" if failures else ""
        raise ValueError(
            f"folder={str(folder)!r} holds no finished run (results.json){why or '; give that of a sweep'}"
        )
    runs = [_run(path, folder, quality) for path in files]
    if quality is not None and all(run.quality is None for run in runs):
        raise ValueError(f"quality={quality!r} is not a score of these runs; use one of {_shares(runs)}")
    if quality is not None and any(run.metrics["scores"].get(quality, {}).get("lower_is_better") for run in runs):
        raise ValueError(f"quality={quality!r} is better the lower it is; use one of {_shares(runs)}")
    for run in runs:
        if run.quality is not None and not 0 <= run.quality <= 1:
            where = f"{run.quality_name}={run.quality:g} of {run.place}"
            raise ValueError(f"{where} is not a share of right answers; use quality=NAME, with one of {_shares(runs)}")
    runs = _apart(runs)
    keys = sorted({(run.model, run.task) for run in runs})
    groups = tuple(Group(*key, _ranked([run for run in runs if (run.model, run.task) == key])) for key in keys)
    return Sweep(folder.resolve().name, groups, failures)


def _named(name: str, folder: Path) -> list[Path]:
    """The files with a name below a folder, following links; each once, preferably by its real path."""
    found = [*(path for path in within(folder, _is_hidden) if path.name == name), *folder.rglob(name)]
    return sorted({os.path.realpath(path): path for path in found}.values())


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or is_system(name)


def _apart(runs: Sequence[MeasuredRun]) -> list[MeasuredRun]:
    """Runs with different task or loading settings are not compared: the settings are added to the task's name."""
    named = []
    for run in runs:
        alike = [other for other in runs if (other.model, other.task) == (run.model, run.task)]
        names = {name for other in alike for name in other.settings if name.startswith(("asked.", "loading."))}
        differing = sorted(name for name in names if len({repr(other.settings.get(name)) for other in alike}) > 1)
        text = ", ".join(f"{name.partition('.')[2]}={run.settings.get(name)}" for name in differing)
        named.append(replace(run, task=f"{run.task} ({text})") if text else run)
    return named


def _shares(runs: Sequence[MeasuredRun]) -> str:
    """The scores that can measure quality: those from 0 to 1."""
    values: dict[str, list[float]] = {}
    for run in runs:
        for name in (name for name, score in run.metrics["scores"].items() if not score["lower_is_better"]):
            values.setdefault(name, []).append(run.number("scores", name, "value") or 0.0)
    return ", ".join(name for name, found in values.items() if 0 <= min(found) <= max(found) <= 1) or "null"


def flat(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The leaves of nested dictionaries, by dotted names; the two ends of an interval are low and high."""
    if isinstance(value, Mapping):
        for name, part in value.items():
            yield from flat(f"{prefix}.{name}" if prefix else str(name), part)
    elif isinstance(value, list) and len(value) == 2 and prefix.endswith("interval"):
        yield from ((f"{prefix}.{end}", part) for end, part in zip(("low", "high"), value, strict=True))
    else:
        yield prefix, json.dumps(value) if isinstance(value, list) else value


def _read(path: Path, kind: str) -> dict[str, Any]:
    if not there(path, "remove it"):
        raise ValueError(f"{path} cannot be read; remove it to run that setting again")
    try:
        # Values that are not numbers were not measured.
        content = json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda text: None)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read ({error}); remove it to run that setting again") from None
    if not shallow(content):
        raise ValueError(f"{path} is damaged (nested too deep); remove it to run that setting again")
    if not isinstance(content, dict) or content.get("format") != kind:
        raise ValueError(f"{path} is not a {kind} file; remove it, or give another folder")
    if content.get("version") != VERSION:
        raise ValueError(
            f"{path} is of version {content.get('version')!r}, this dllm reads version {VERSION}; "
            "remove it to run that setting again, or use the dllm that wrote it"
        )
    return content


def _run(path: Path, folder: Path, quality: str | None) -> MeasuredRun:
    content = _read(path, "dllm-results")
    try:
        metrics = dict(content["metrics"])
        lower = _lower_is_better(content.get("details"))
        metrics["scores"] = {
            str(name): dict(score) | {"lower_is_better": _metric_of(str(name)) in lower}
            for name, score in (metrics.get("scores") or {}).items()
        }
        settings = dict(flat("", {name: content[name] for name in ("sampler", "cache")}))
        for part in ("options", "asked", "loading"):
            settings |= dict(flat(part, content.get(part) or {}))
        settings |= _where(path.parent)
        run = MeasuredRun(
            folder=path.parent,
            place=path.parent.relative_to(folder).as_posix(),
            **{name: str(content[name]) for name in ("label", "model", "task")},
            settings={"sampler.name": settings["sampler.name"], "cache.name": settings["cache.name"]} | settings,
            metrics=metrics,
            quality_name=str(metrics.get("accuracy_name") or "accuracy"),
            quality=metrics.get("accuracy"),
            interval=_interval(metrics.get("accuracy_interval")),
            kind=_kind(content, str(settings["sampler.name"])),
        )
        if quality is not None:
            score = metrics["scores"].get(quality, {})
            metrics["n"] = score.get("n")
            run = replace(
                run, quality_name=quality, quality=score.get("value"), interval=_interval(score.get("interval"))
            )
        for name, value in {"quality": run.quality, **{name: metrics.get(name) for name in _NUMBERS}}.items():
            if value is not None and (isinstance(value, bool) or not math.isfinite(value)):
                raise TypeError(f"{name}={value!r}")
        for _, value in flat("metrics", metrics):
            if isinstance(value, (int, float)):
                float(value)  # raises an error for huge integers
        if wrong := misfit(metrics["scores"], dict[str, _Score], "scores"):
            raise TypeError(wrong)
        if wrong := impossible(metrics):
            raise ValueError(wrong)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        message = f"{path} is damaged ({type(error).__name__}: {error}); remove it to run that setting again"
        raise ValueError(message) from None
    return run


def _lower_is_better(details: Any) -> set[tuple[str, str]]:
    """The metrics of which the harness says that lower is better, with their tasks, and with "" if there is one."""
    tasks = details.get("higher_is_better") if isinstance(details, dict) else None
    if not isinstance(tasks, dict):
        return set()
    parts = [(str(task), str(name), better) for task, part in tasks.items() if isinstance(part, dict)
             for name, better in part.items()]  # fmt: skip
    return {(where, name) for task, name, better in parts if better is False for where in (task, "")}


def _metric_of(score: str) -> tuple[str, str]:
    """The task, "" if there is one, and the metric of `task: metric,filter`."""
    task, _, name = score.rpartition(": ")
    return task, name.partition(",")[0]


def _where(folder: Path) -> dict[str, str]:
    """Threads and device of a run's sessions, as its manifest says; nothing without one."""
    found = {name: dict.fromkeys(str(each.get(name)) for each in sessions(folder)) for name in ("threads", "device")}
    return {f"session.{name}": " and ".join(values) for name, values in found.items() if values}


def _kind(content: Mapping[str, Any], sampler: str) -> str:
    """The kind of a policy as recorded, else that of the class of this name."""
    if "kind" in content:
        if not isinstance(content["kind"], str):
            raise TypeError(f"kind={content['kind']!r}")
        return content["kind"]
    try:
        return str(find_class("sampler", options_of("sampler", sampler), Sampler).kind)  # type: ignore[attr-defined]
    except ValueError:  # a policy of one's own
        return Policy.kind


def _interval(value: Any) -> tuple[float, float] | None:
    if value is None:
        return None
    low, high = (None if end is None else float(end) for end in value)
    return None if low is None or high is None else (low, high)


def _ranked(runs: Sequence[MeasuredRun]) -> tuple[MeasuredRun, ...]:
    """Sorted by score, then by cost; with unique labels."""
    labelled = [replace(run, label=run.label + suffix) for run, suffix in zip(runs, _suffixes(runs), strict=True)]
    last = math.inf
    return tuple(
        sorted(
            labelled,
            key=lambda run: (
                run.quality_name,
                last if run.quality is None else -run.quality,
                last if (nfe := run.number("nfe")) is None else nfe,
                run.label,
            ),
        )
    )


def _suffixes(runs: Sequence[MeasuredRun]) -> list[str]:
    """What labels do not say: settings that times depend on, where those of the runs differ.

    Runs with the same label are distinguished by all settings that differ, else by their folders.
    """
    suffixes, pace = [], _differing(runs, _PACE)
    for run in runs:
        alike = [other for other in runs if other.label == run.label]
        names = dict.fromkeys(name for other in alike for name in other.settings)
        differing = [*dict.fromkeys([*_differing(alike, names), *pace])]
        own = lambda other: tuple(repr(other.settings.get(name)) for name in differing)  # noqa: B023, E731
        parts = [f"{_SHORT.sub('', name)}={run.settings.get(name)}" for name in differing]
        if Counter(map(own, alike))[own(run)] > 1:
            parts.append(run.place)
        suffixes.append(f" ({', '.join(parts)})" if parts else "")
    return suffixes


def _differing(runs: Sequence[MeasuredRun], names: Iterable[str]) -> list[str]:
    """Settings whose values differ between some runs; of threads what was used, where that is known."""
    found = [name for name in names if len({repr(run.settings.get(name)) for run in runs}) > 1]
    return [name for name in found if name != "options.threads" or "session.threads" not in found]
