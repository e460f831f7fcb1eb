"""`dllm evaluate`: quality and cost of one setting on a task, resumable; many of them with Hydra's sweeps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_type_hints

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import dllm
from dllm import compatibility
from dllm.checks import number
from dllm.journal import Journal
from dllm.likelihood import Estimate
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
    "objective": Any,
}


def main() -> None:
    """Entry point."""
    app.run(evaluate, "evaluate", KINDS)


def evaluate(cfg: DictConfig) -> tuple[float, ...]:
    """Run one setting, or read what it gave before; returns its objective."""
    fields: Any = OmegaConf.to_container(cfg, resolve=True)
    for name in ("baselines", "frames"):
        number(name, fields[name], "0 or more", low=0, whole=True)
    if fields["threads"] is not None:
        number("threads", fields["threads"], "1 or more, or null", low=1, whole=True)
        torch.set_num_threads(fields["threads"])
    app.check_writable("out", fields["out"], f"{fields['out']}/results.json")
    chosen = HydraConfig.get().runtime.choices
    names = {group: str(chosen[group]).rpartition("/")[2] for group in ("sampler", "cache")}
    folder = RunFolder(Path(fields["out"]), _label(fields, chosen), {"names": names, "task": _task_name(fields)})
    try:
        sampler, cache, task = (instantiate(cfg[group]) for group in ("sampler", "cache", "task"))
        identity = _identity(fields, names, task)
        folder = RunFolder(Path(fields["out"]), folder.label, identity)
        results = folder.results() or _measure(fields, folder, sampler, cache, task)
    except app.BAD_INPUT as error:
        folder.fail(app.one_line(error))
        raise
    print(_told(results, folder.path), flush=True)
    return _objective(results, fields["objective"])


def _measure(fields: dict[str, Any], folder: RunFolder, sampler: Any, cache: Any, task: Task) -> dict[str, Any]:
    options = {name: fields[name] for name in _OPTIONS if fields[name] is not None or name == "block_length"}
    if fields["gen_length"] is None and task.gen_length is not None:
        options["gen_length"] = task.gen_length
    # Bad values are refused before the model loads.
    compatibility.check(sampler, cache, parse_options(options).cfg_scale)
    seed = fields["seed"] if fields["estimate"]["order"] == "random" else 0  # the others draw nothing
    estimate = Estimate(**fields["estimate"], seed=seed, cfg_scale=fields["cfg_scale"])
    model = dict(fields["model"])
    lm = dllm.load(model.pop("path"), **model)
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


def _identity(fields: Mapping[str, Any], names: Mapping[str, str], task: Task) -> dict[str, Any]:
    """Everything that the results depend on, under the names they have in results.json."""
    apart = ("model", "sampler", "cache", "task", "out", "objective", "threads")
    own = lambda group: {k: v for k, v in fields[group].items() if k != "_target_"}  # noqa: E731
    return {
        "model": Path(fields["model"]["path"]).name,
        "loading": fields["model"],
        "task": task.name,
        "sampler": {"name": names["sampler"], **own("sampler")},
        "cache": {"name": names["cache"], **own("cache")},
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


def _task_name(fields: Mapping[str, Any]) -> str:
    return str(fields["task"].get("name", fields["task"]["_target_"]))


def _objective(results: Mapping[str, Any], names: Any) -> tuple[float, ...]:
    metrics = results["metrics"]
    for name in names:
        if not isinstance(metrics.get(name), (int, float)):
            known = ", ".join(key for key, value in metrics.items() if isinstance(value, (int, float)))
            raise ValueError(f"objective={name} is no figure of this run; use some of {known}")
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
