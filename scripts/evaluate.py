"""`dllm evaluate`: quality and cost of one setting on a task, resumable; many of them with Hydra's sweeps."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, get_type_hints

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import dllm
from dllm import compatibility
from dllm.checks import choice, number
from dllm.journal import Journal
from dllm.likelihood import Estimate
from dllm.metrics import COSTS
from dllm.plan import parse_options
from dllm.resolve import options_of
from dllm.run_folder import RunFolder
from dllm.runner import Runner, Setting
from dllm.scripts import app
from dllm.tasks.base import Task

_OPTIONS = set(dllm.Options.__dataclass_fields__) - {"seed"}
KINDS = get_type_hints(dllm.Options) | {
    "gen_length": int | None,
    "temperature": float | None,
    "seed": int,
    "threads": int | None,
    "objective": Sequence[str],
}


def main() -> None:
    """Entry point."""
    app.run(evaluate, "evaluate", KINDS)


def evaluate(cfg: DictConfig) -> tuple[float, ...] | None:
    """Run one setting, or read what it gave before.

    Returns:
        Its objective, where a sweeper wants to know.
    """
    fields: Any = OmegaConf.to_container(cfg, resolve=True)
    for name in fields["objective"]:
        choice("objective", name, ("accuracy", *COSTS))
    for name in ("baselines", "frames"):
        number(name, fields[name], "0 or more", low=0, whole=True)
    if fields["threads"] is not None:
        number("threads", fields["threads"], "1 or more, or null", low=1, whole=True)
        torch.set_num_threads(fields["threads"])
    app.check_writable("out", fields["out"], f"{fields['out']}/results.json")
    hydra = HydraConfig.get()
    out, label = Path(fields["out"]), _label(fields, hydra.runtime.choices)
    refused, sweeping = RunFolder(out, label, fields), hydra.mode == RunMode.MULTIRUN
    try:
        sampler, cache, task = (instantiate(cfg[group]) for group in ("sampler", "cache", "task"))
        folder = RunFolder(out, label, _identity(fields, hydra.runtime.choices, task))
        results = folder.results() or _measure(fields, folder, sampler, cache, task)
    except Exception as error:
        if sweeping:  # the others go on, and the report tells why this one is missing
            refused.fail(app.one_line(error))
        raise
    refused.forgive()
    print(_told(results, folder.path), flush=True)
    searching = sweeping and not hydra.sweeper["_target_"].endswith("BasicSweeper")
    return _objective(results, fields["objective"]) if searching else None


def _measure(fields: dict[str, Any], folder: RunFolder, sampler: Any, cache: Any, task: Task) -> dict[str, Any]:
    options = {name: fields[name] for name in _OPTIONS if fields[name] is not None or name == "block_length"}
    if fields["gen_length"] is None and task.gen_length is not None:
        options["gen_length"] = task.gen_length
    # Bad values are refused before the model loads.
    compatibility.check(sampler, cache, parse_options(options).cfg_scale)
    seed = fields["seed"] if fields["estimate"]["order"] == "random" else 0  # the others draw nothing
    estimate = Estimate(**fields["estimate"], seed=seed, cfg_scale=fields["cfg_scale"])
    lm = _load(json.dumps(fields["model"]))
    with _progress(folder.label) as progress:
        runner = Runner(
            Setting(lm, sampler, cache, options, estimate),
            Journal(folder.journal),
            fields["baselines"],
            fields["frames"],
            progress,
        )
        try:
            folder.begin(lm, fields)
            return folder.finish(runner, task.run(runner, fields["seed"]))
        finally:
            runner.close()


@lru_cache(maxsize=1)
def _load(model: str) -> dllm.LanguageModel:
    """The model of some options, kept for the next job of a sweep."""
    options = json.loads(model)
    return dllm.load(options.pop("path"), **options)


def _identity(fields: Mapping[str, Any], chosen: Mapping[str, Any], task: Task) -> dict[str, Any]:
    """Everything that the results depend on, under the names they have in results.json."""
    apart = ("model", "sampler", "cache", "task", "out", "objective", "threads")
    own = lambda group: {k: v for k, v in fields[group].items() if k != "_target_"}  # noqa: E731
    named = lambda group: {"name": str(chosen[group]).rpartition("/")[2], **own(group)}  # noqa: E731
    return {
        "model": Path(fields["model"]["path"]).name,
        "loading": fields["model"],
        "task": task.name,
        "sampler": named("sampler"),
        "cache": named("cache"),
        "options": {name: value for name, value in fields.items() if name not in apart},
        "asked": own("task") | {"files": task.check()},
    }


def _label(fields: Mapping[str, Any], chosen: Mapping[str, Any]) -> str:
    """A name for people: the choices and those of their options that were changed."""
    parts = []
    for group in ("sampler", "cache"):
        known = options_of(group, chosen[group])
        changed = [f"{name}={value}" for name, value in fields[group].items() if known.get(name, ...) != value]
        parts.append(" ".join([str(chosen[group]), *changed]))
    return " + ".join(part for part in parts if part != "none")


def _objective(results: Mapping[str, Any], names: Sequence[str]) -> tuple[float, ...]:
    metrics = results["metrics"]
    for name in names:
        if not isinstance(metrics[name], (int, float)):
            raise ValueError(f"objective={name} is not known of task={results['task']}; leave it out")
    return tuple(float(metrics[name]) for name in names)


def _told(results: Mapping[str, Any], path: Path) -> str:
    """One line about a run."""
    metrics = results["metrics"]
    parts = []
    if metrics["accuracy"] is not None:
        low, high = metrics["accuracy_interval"] or (None, None)
        between = "" if low is None else f" ({low:.1%} to {high:.1%})"
        parts.append(f"{metrics['accuracy_name']} {metrics['accuracy']:.1%}{between} of {metrics['n']}")
    else:
        parts.append(f"{metrics['n']} not judged")
    if metrics["nfe"] is not None:
        speed = f"{metrics['tokens_per_second']:,.0f} tokens/s"
        parts.append(f"NFE {metrics['nfe']:.1f}  TPF {metrics['tpf']:.2f}  {speed}")
    if metrics["speedup"]:
        naive, aware = (metrics["speedup"][name]["time"] for name in ("naive", "eos_aware"))
        parts.append(f"{naive:.1f}x one token per step, {aware:.1f}x the same up to end-of-text")
    return f"{results['label']}: {'  '.join(parts)}  -> {path}"


@contextmanager
def _progress(label: str) -> Iterator[Callable[[int, int], object]]:
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task(label, total=None)
        yield lambda done, total: progress.update(bar, completed=done, total=total)


if __name__ == "__main__":
    main()
