"""`dllm evaluate`: quality and cost of one setting on a task, resumable; several settings by Hydra sweeps."""

from __future__ import annotations

if __name__ == "__main__":
    import dllm.scripts.cli

    dllm.scripts.cli.run_file(__file__)

import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal, get_type_hints

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

import dllm
from dllm import identity
from dllm.checks import choice, known, naming, number, seed, threads
from dllm.decoding import compatibility
from dllm.decoding.options import parse_options
from dllm.escape import terminal
from dllm.evaluation.journal import Journal
from dllm.evaluation.likelihood import Estimate
from dllm.evaluation.metrics import COSTS
from dllm.evaluation.run_folder import RunFolder, sessions
from dllm.evaluation.runner import Runner, Setting, refusals
from dllm.files import expanded, is_folder, parse_json, portable
from dllm.progress import progress_reports
from dllm.resolve import CALIBRATION, TARGET, build, is_shipped, names, options_of, variants
from dllm.scripts import app
from dllm.scripts.kinds import canonical
from dllm.structure import read_format_file
from dllm.tasks.base import Task

_OPTIONS = set(dllm.Options.__dataclass_fields__) - {"seed", "stop"}  # stop strings are the task's
KINDS = get_type_hints(dllm.Options) | {
    "gen_length": int | Literal["auto"] | None,
    "temperature": float | None,
    "seed": int,
    "threads": int | None,
    "objective": Sequence[str],
}


def main() -> None:
    """Entry point."""
    app.run(evaluate, "evaluate", KINDS)


def evaluate(cfg: DictConfig) -> float | tuple[float, ...] | None:
    """Run one setting, or read its earlier results.

    Returns:
        Its objective, for a sweeper.
    """
    fields: Any = OmegaConf.to_container(cfg, resolve=True)
    fields["response_format"] = read_format_file(fields["response_format"])
    _check(fields)
    hydra = HydraConfig.get()
    out, label = Path(fields["out"]), _label(fields, hydra.runtime.choices)
    refused, sweeping = failure_folder(out, label, fields), hydra.mode == RunMode.MULTIRUN
    try:
        with limited_threads(fields["threads"]):
            results, path = run(cfg, fields, label, hydra.runtime.choices)
    except Exception as error:
        if sweeping and not isinstance(
            error, BrokenPipeError
        ):  # the other jobs continue, and the report shows the error
            refused.fail(app.one_line(error))
        raise
    refused.clear_error()
    print(terminal(_summary(results, path), one_line=True), flush=True)
    searching = sweeping and not hydra.sweeper["_target_"].endswith("BasicSweeper")
    return _objective(results, fields["objective"]) if searching else None


def _check(fields: Mapping[str, Any]) -> None:
    for name in fields["objective"]:
        choice("objective", name, ("accuracy", *COSTS))
    if not fields["objective"]:
        raise ValueError(f"objective=[] names no metric; use some of accuracy, {', '.join(COSTS)}")
    known(fields["estimate"], ("method", "samples", "order", "batch_size"), "estimate.")
    seed("seed", fields["seed"])
    for name in ("baselines", "frames"):
        number(name, fields[name], "0 or more", low=0, whole=True)
    threads(fields["threads"])
    if not Path(fields["out"]).is_dir():  # finished runs may be read-only
        _check_out(fields)


def _check_out(fields: Mapping[str, Any]) -> None:
    app.check_writable("out", fields["out"], f"{fields['out']}/results.json")


def run(
    cfg: DictConfig, fields: Mapping[str, Any], label: str, chosen: Mapping[str, Any]
) -> tuple[dict[str, Any], Path]:
    """The results of a run and its folder; computed unless they exist.

    Args:
        cfg: the configuration of `dllm evaluate`.
        fields: the same as a dictionary.
        label: display name.
        chosen: names of the sampler, the cache and the task.
    """
    with refusals():
        sampler, cache, stamps = app.build_both(cfg)
    task: Task = build("task", cfg.task, Task)
    options = {name: fields[name] for name in _OPTIONS if fields[name] is not None or name == "block_length"}
    if fields["gen_length"] is None and task.gen_length is not None:
        options["gen_length"] = task.gen_length
    # Bad values are rejected before the model is loaded.
    with refusals():
        compatibility.check(sampler, cache, parse_options(options).cfg_scale)
    seed = fields["seed"] if fields["estimate"]["order"] == "random" else 0  # other orders are deterministic
    with naming({name: f"estimate.{name}" for name in fields["estimate"]}):
        estimate = Estimate(**fields["estimate"], seed=seed, cfg_scale=fields["cfg_scale"])
    files = task.check()
    path, asked = fields["model"]["path"], normal(fields)
    read = identity.contents([asked["sampler"], asked["cache"]])
    for each in (sampler, cache, task):
        read |= identity.read_by(each)
    by_path = read | identity.contents(asked["model"].get("adapter"), paths=True)
    state = [identity.checkpoint(Path(path)), identity.stamps(Path(path))] if Path(path).is_dir() else []
    lm, weights = _load(json.dumps(fields["model"]), json.dumps([state, by_path], default=str), app.option_of("model"))
    typed = asked, by_path
    named = (_by_name(asked), read) if Path(path).is_dir() else typed
    made = [
        RunFolder(Path(fields["out"]), label, _identity(options_, weights, task, files, read_, chosen))
        for options_, read_ in (typed, named, _portable(*named))
    ]
    folder = next((each for each in made if each.path.exists()), made[-1])  # runs of earlier versions keep their paths
    main = fields["task"].get("metric")
    if (found := folder.results(main)) is not None:
        return found, folder.path
    _check_out(fields)
    with progress_reports(f"{terminal(label, one_line=True)}:") as progress:
        journal = Journal(folder.journal, run=folder.key)
        setting = Setting(lm, sampler, cache, options, estimate)
        guarded = _unless_orphaned(progress)
        same = partial(_check_same, task, files)
        runner = Runner(setting, journal, fields["baselines"], fields["frames"], guarded, stamps, same)
        try:
            if (found := folder.results(main)) is None:  # unless another process finished it
                folder.begin(lm, fields, runner.answers)
                found = folder.finish(runner, task.run(runner, fields["seed"]))
            return found, folder.path
        finally:
            runner.close()


def normal(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Normalized options, with the format as JSON: the order of a schema's properties is that of an answer."""
    form = fields["response_format"]
    return canonical({**fields, "response_format": None}, KINDS) | {"response_format": form and json.dumps(form)}


def failure_folder(out: Path, label: str, fields: Mapping[str, Any]) -> RunFolder:
    """Where the failure of a setting is recorded, which may have no model, data or files to be known by."""
    path = fields["model"]["path"]
    if path.startswith((".", "~", os.sep)) or is_folder(expanded(path)):
        path = os.path.abspath(expanded(path))  # noqa: PTH100
    model = fields["model"] | {"path": path}
    setting = {name: value for name, value in fields.items() if name not in ("out", "objective")}
    return RunFolder(out, label, normal(setting | {"model": model}))


def _by_name(fields: Mapping[str, Any]) -> dict[str, Any]:
    """A local model by the name of its folder, independent of its path: its content identifies it."""
    name = Path(os.path.abspath(fields["model"]["path"])).name  # noqa: PTH100  # a link keeps its name
    return {**fields, "model": fields["model"] | {"path": name}}


def _portable(fields: Mapping[str, Any], read: Mapping[str, str]) -> tuple[Mapping[str, Any], dict[str, str]]:
    """A card by the name of its file, and bundled files by their path in the package: their content identifies them."""
    card = fields["sampler"].get(CALIBRATION)
    if card is not None:
        fields = {**fields, "sampler": fields["sampler"] | {CALIBRATION: Path(card).name}}
    files = {Path(path): content for path, content in read.items()}
    return fields, {
        path.name if card is not None and path == Path(card) else portable(path): content
        for path, content in files.items()
    }


def _check_same(task: Task, before: Mapping[str, str]) -> None:
    """Verify that the task's data did not change while the model was loaded."""
    if task.check() != before:
        raise OSError(
            f"the data or the definition of task={task.name} was changed by another program during this run; run the "
            "command again"
        )


@lru_cache(maxsize=1)
def _load(model: str, state: str, option: str) -> tuple[dllm.LanguageModel, dict[str, str]]:
    """The model and its identity; cached for the next job of a sweep, unless its files changed.

    `option` is the option of its name in errors.
    """
    lm = app.load_model(parse_json(model), option)
    return lm, identity.model(lm)


def _identity(
    fields: Mapping[str, Any],
    weights: Mapping[str, str],
    task: Task,
    data: Mapping[str, str],
    read: Mapping[str, str],
    chosen: Mapping[str, Any],
) -> dict[str, Any]:
    """Everything that the results depend on, except the code, by the names in results.json."""
    apart = ("model", "sampler", "cache", "task", "out", "objective")
    own = partial(_own, fields, chosen)
    named = lambda group: {"name": str(chosen[group]).rpartition("/")[2], **own(group)}  # noqa: E731
    return {
        "model": Path(fields["model"]["path"]).name,
        "loading": {**_loading(fields["model"]), **weights},
        "task": task.name,
        "sampler": named("sampler"),
        "cache": named("cache"),
        "options": {name: value for name, value in fields.items() if name not in apart},
        # The choice of the accuracy does not change the scores.
        "asked": {name: value for name, value in own("task").items() if name != "metric"}
        | {f"{split}_sha256": digest for split, digest in data.items()},
        "files": read,
    }


def _own(fields: Mapping[str, Any], chosen: Mapping[str, Any], group: str) -> dict[str, Any]:
    """The options of a group, and its class unless its name tells it: that of a choice of this package."""
    name = str(chosen[group])
    usual = options_of(group, name)[TARGET] if is_shipped(group, name) else None
    left_out = ((TARGET, usual), (CALIBRATION, None))
    return {name: value for name, value in fields[group].items() if (name, value) not in left_out}


def _loading(options: Mapping[str, Any]) -> dict[str, Any]:
    """The loading options, without those that came later where they are not used: earlier runs are resumed."""
    later = {"tp": False, "quantization": None}
    return {name: value for name, value in options.items() if later.get(name, ...) != value}


def _label(fields: Mapping[str, Any], chosen: Mapping[str, Any]) -> str:
    """Display name: the choices, their changed options, and the options of the command line."""
    given = app.given()
    parts = []
    for group in ("sampler", "cache"):
        ours = chosen[group] in names(group) + variants(group)  # not a custom YAML
        known, options = options_of(group, chosen[group]) if ours else {}, fields[group].items()
        own = [(name, value) for name, value in options if known.get(name, ...) != value or f"{group}.{name}" in given]
        entries = [each for name, value in own for each in _entries((group, name), value, known.get(name), given)]
        parts.append(" ".join([str(chosen[group]), *(f"{name}={_shown(value)}" for name, value in entries)]))
    more = [
        f"{name}={_shown(fields[name])}" for name in sorted((_OPTIONS | {"seed"}) - {"batch_size"}) if name in given
    ]
    return ", ".join([" + ".join(part for part in parts if part != "none"), *more])


def _shown(value: Any) -> str:
    """A value of a label: of a range that was swept, without what rounding left."""
    return f"{value:.12g}" if isinstance(value, float) else str(value)


def _entries(place: tuple[str, str], value: Any, default: Any, given: Collection[str]) -> list[tuple[str, Any]]:
    """What the label says of an option: of a base that is written out, its class and what is changed or given."""
    group, name = place
    if not isinstance(value, Mapping) or TARGET not in value:
        return [(name, value)]
    usual = options_of(group, default) if isinstance(default, str) else {}
    other = usual.get(TARGET) != value[TARGET]
    shown = [
        (f"{name}.{key}", each)
        for key, each in value.items()
        if key != TARGET and (f"{group}.{name}.{key}" in given or (each is not None and usual.get(key, ...) != each))
    ]
    return [*([(name, value[TARGET].rpartition(".")[2])] if other else []), *shown]


def _objective(results: Mapping[str, Any], names: Sequence[str]) -> float | tuple[float, ...]:
    metrics = results["metrics"]
    for name in names:
        if not isinstance(metrics.get(name), (int, float)):
            raise ValueError(f"objective={name} is not available for task={results['task']}; leave it out")
    values = tuple(float(metrics[name]) for name in names)
    return values if len(values) > 1 else values[0]


def _summary(results: Mapping[str, Any], path: Path) -> str:
    """One-line summary of a run."""
    metrics = results["metrics"]
    parts = []
    if metrics["accuracy"] is not None:
        low, high = metrics["accuracy_interval"] or (None, None)
        between = "" if low is None or high is None else f" ({low:.1%} to {high:.1%})"
        parts.append(f"{metrics['accuracy_name']} {metrics['accuracy']:.1%}{between} of {metrics['n']}")
    else:
        scores = ", ".join(f"{name} {score['value']:.4g}" for name, score in metrics["scores"].items())
        parts.append(f"{scores or 'not graded'} of {metrics['n']}")
    if metrics["nfe"] is not None:
        taken = len(sessions(path))
        speed = f"{metrics['tokens_per_second']:,.0f} tokens/s{f' over {taken} sessions' if taken > 1 else ''}"
        parts.append(f"NFE {metrics['nfe']:.1f}  TPF {metrics['tpf']:.2f}  {speed}")
    else:
        parts.append("nothing was generated: sampler and cache were not used")
    if cut := results["details"].get("truncated"):
        parts.append(f"prompts truncated: {cut}")  # of all tasks, and n is of one score
    if metrics["speedup"]:
        naive, aware = (metrics["speedup"][name]["time"] for name in ("naive", "eos_aware"))
        parts.append(f"{naive:.1f}x one token per step, {aware:.1f}x the same up to end-of-text")
    return f"{results['label']}: {'  '.join(parts)}  -> {path}"


@contextmanager
def limited_threads(count: int | None) -> Iterator[None]:
    """Use this many CPU threads; None for torch's default."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _unless_orphaned(progress: Callable[[int, int], object]) -> Callable[[int, int], object]:
    """Exit if the parent process (the sweep) was killed: joblib's workers would continue."""
    if not HydraConfig.get().launcher["_target_"].endswith("JoblibLauncher"):
        return progress
    parent = os.getppid()

    def guarded(done: int, total: int) -> None:
        if os.getppid() != parent:
            os._exit(1)
        progress(done, total)

    return guarded
