"""`dllm results`: every policy with every cache for a model, at certified settings, and the page of what was found."""

from __future__ import annotations

if __name__ == "__main__":
    import dllm.scripts.cli

    dllm.scripts.cli.run_file(__file__)

import shlex
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

import dllm
from dllm import identity
from dllm.calibration import Calibration
from dllm.checks import Notice, number, seed, threads
from dllm.escape import terminal
from dllm.evaluation.runner import RefusedError, refusals
from dllm.files import BUNDLED, read_json
from dllm.reports import matrix, matrix_page
from dllm.reports.matrix import Setting
from dllm.reports.matrix_page import CARDS, card_name
from dllm.resolve import CALIBRATION, build, merged, names, options_of, resolve, variants
from dllm.samplers.base import Knob, Sampler
from dllm.scripts import app, calibrate, evaluate, own
from dllm.tasks.base import Task

KINDS = evaluate.KINDS | {
    "samplers": Sequence[str] | None,
    "caches": Sequence[str] | None,
    "runs": str | None,
    "cards": str | None,
    "problems": int | None,
}
_BASE, _ORACLE = "vanilla", "oracle"  # neither has a setting to choose
_OTHER_CACHE = r".* was measured with (cache[^=]*=[^,]*, )+and is used with (cache[^=]*=[^,]*(, |: ))+its guarantee"
_PLACES = ("out", "runs", "cards", "run", "speed")  # options that change no number
_OURS = ("samplers", "caches", "calibrate", "problems", "loss", "delta", *_PLACES)


def main() -> None:
    """Entry point."""
    app.run(results, "results", KINDS)


def results(cfg: DictConfig) -> None:
    """Calibrate, evaluate, and write data and page; what exists is read."""
    fields: Any = OmegaConf.to_container(cfg, resolve=True)
    samplers, caches = _check(fields)
    out = Path(fields["out"])
    out = out if out.name not in ("", "..") else out.resolve()
    page = out.with_name(f"{out.name}.md")
    own.check("out", fields["out"], {page: own.RESULTS})
    if fields["run"] or fields["runs"]:
        _collect(fields, samplers, caches)
    speed = ["speed=true"] if fields["speed"] else []
    again = shlex.join(["dllm", "results", f"out={fields['out']}", "run=false", *speed])
    speeds = (page.parent / "performance.md").is_file()
    text = matrix_page.page(out, again, fields["speed"], speeds)
    own.write("out", fields["out"], {page: (own.RESULTS, text)})
    print(f"written to {terminal(page, one_line=True)}")


def _check(fields: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """The samplers and the caches; bad options are rejected before the model is loaded."""
    for name in ("loss", "delta"):
        number(name, fields[name], "a number above 0 and below 1", above=0, high=1 - 1e-12)
    if fields["problems"] is not None:
        number("problems", fields["problems"], "a whole number of at least 1, or null", low=1, whole=True)
    for name in ("baselines", "frames"):
        number(name, fields[name], "0 or more", low=0, whole=True)
    number("batch_size", fields["batch_size"], "a whole number of at least 1", low=1, whole=True)
    seed("seed", fields["seed"])
    threads(fields["threads"])
    found = []
    for option, group in (("samplers", "sampler"), ("caches", "cache")):
        chosen, there = fields[option], names(group) + variants(group)
        if chosen is None:
            small = (BUNDLED / fields["model"]["path"]).is_dir()
            chosen = [f"tiny/{each}" if small and f"tiny/{each}" in there else each for each in names(group)]
            chosen.sort(key=lambda name: (name not in (_BASE, "none"), name == _ORACLE))
        if unknown := [each for each in chosen if each not in there]:
            raise ValueError(f"{option} has the unknown {group} {unknown[0]!r}; expected some of {', '.join(there)}")
        if odd := [each for each in chosen if not matrix.is_name(each)]:
            raise ValueError(f"{option} has {odd[0]!r}, which a page cannot show; rename its YAML")
        if not chosen or len(set(chosen)) < len(chosen):
            raise ValueError(f"{option}={chosen!r} are none, or not distinct; give some, each once")
        found.append(list(chosen))
    return found[0], found[1]


def _collect(fields: Mapping[str, Any], samplers: Sequence[str], caches: Sequence[str]) -> None:
    """Run what is missing, unless told otherwise, and write the data of this model."""
    out = Path(fields["out"]) / Path(fields["model"]["path"]).name
    runs, cards = (Path(fields[name] or out / place) for name, place in (("runs", "runs"), ("cards", CARDS)))
    data = out / matrix.NAME
    own.check("out", fields["out"], {data: own.MATRIX_DATA})
    if fields["run"]:
        _check_cards(fields, samplers, cards)
        lm = app.load_model(fields["model"])  # refused here, rather than once for each run
        dtype = str(lm.backbone.dtype).removeprefix("torch.")
        asked = evaluate.normal({**merged("evaluate"), **fields})
        made = asked | {f"task.{name}": value for name, value in asked["task"].items()}
        made |= {"weights": lm.backbone.fingerprint(), "task": build("task", fields["task"], Task).name}
        _check_same(fields["out"], data, samplers, caches, made | {"model.dtype": dtype})
        for _, file in _present(samplers, cards):
            calibrate.refuse_others(_called(fields), file, Calibration.read(file).compared_dtype(dtype))
        for sampler in samplers:
            _certify(fields, sampler, cards)
    chosen = {sampler: _options(sampler, cards) for sampler in samplers}
    found = _run(fields, chosen, caches, runs) if fields["run"] else matrix.found_in(runs)
    _check_runs(fields, found, cards)
    used = {name: _as_run(name, options, found) for name, options in chosen.items()}
    settings = {name: _setting(name, options) for name, options in used.items()}
    results = matrix.collect(found, settings, caches, _command(fields))
    if results.header.model != out.name:
        raise ValueError(f"runs={str(runs)!r} has runs of {results.header.model}; use model={results.header.model}")
    _check_same(fields["out"], data, samplers, caches, results.header.made_with)
    for sampler in samplers:
        card, copy = _card(sampler, cards), _card(sampler, out / CARDS)
        if card.is_file() and sampler != _ORACLE and not (copy.is_file() and card.samefile(copy)):
            own.write("out", fields["out"], {copy: (own.CALIBRATION, card.read_bytes())})
    own.write("out", fields["out"], {data: (own.MATRIX_DATA, results.text())})


def _called(fields: Mapping[str, Any]) -> str:
    """The option that names the folder of the cards."""
    return f"out={fields['out']!r}" if fields["cards"] is None else f"cards={fields['cards']!r}"


def _card(sampler: str, cards: Path) -> Path:
    return cards / card_name(sampler) / "calibration.json"


def _present(samplers: Sequence[str], cards: Path) -> list[tuple[str, Path]]:
    """The samplers that have a card, and their cards."""
    files = [(name, _card(name, cards)) for name in samplers if name not in (_BASE, _ORACLE)]
    return [(name, file) for name, file in files if file.is_file()]


def _check_cards(fields: Mapping[str, Any], samplers: Sequence[str], cards: Path) -> None:
    """Reject cards that do not certify what is asked for."""
    called, task = _called(fields), build("task", fields["task"], Task)
    options = calibrate.decoding({**merged("evaluate"), **fields})
    for sampler, file in _present(samplers, cards):
        card = Calibration.read(file)
        pairs = {"task": (card.task, task.name)} | calibrate.certified_for(card, options)
        if fields["calibrate"]:  # otherwise those that exist are used, whatever they certify
            pairs |= {name: (getattr(card, name), fields[name]) for name in ("loss", "delta")}
            if fields["problems"] is not None:
                pairs["number of problems"] = card.data.get("limit"), fields["problems"]
        policy = build("sampler", {**options_of("sampler", sampler), CALIBRATION: None}, Sampler)
        pairs |= card.compared(policy)
        if (metric := fields["task"].get("metric")) is not None:
            pairs |= card.compared_score(metric)
        calibrate.refuse_others(called, file, pairs)


def _check_runs(fields: Mapping[str, Any], found: Mapping[tuple[str, str], Path | str], cards: Path) -> None:
    """Reject finished runs whose card is not the one that is there, or does not certify them."""
    called, task = _called(fields), build("task", fields["task"], Task)
    for (sampler, _), folder in found.items():
        if not isinstance(folder, Path):
            continue
        results = read_json(folder / "results.json")
        made_with, content = matrix.card_of(results)
        if made_with is None:
            continue
        file = _card(sampler, cards)
        fix = "put that card there, or give cards= or other runs="
        if not file.is_file():
            raise ValueError(f"{called} has no {file}, and {folder} was made with a card ({made_with}); {fix}")
        card = Calibration.read(file)
        options = {name: results["options"].get(name) for name in dllm.Options.__dataclass_fields__}
        if options["gen_length"] is None and results["task"] == task.name:
            options["gen_length"] = task.gen_length
        pairs = {"task": (card.task, results["task"])} | calibrate.certified_for(card, options)
        pairs |= card.compared_score(results["metrics"]["accuracy_name"])
        pairs |= card.compared_dtype(matrix.dtype_of(folder))
        calibrate.refuse_others(called, file, pairs, str(folder))
        if content not in (None, identity.digest(file)):
            raise ValueError(f"{called}: {file} is another card than that of {folder} ({made_with}); {fix}")


def _certify(fields: Mapping[str, Any], sampler: str, cards: Path) -> None:
    """Make the card of a sampler with a knob, unless it exists or none are to be made."""
    folder, options = cards / card_name(sampler), options_of("sampler", sampler)
    if _card(sampler, cards).is_file() or not fields["calibrate"] or _knob(sampler, options) is None:
        return
    task = f"calibration/{HydraConfig.get().runtime.choices['task']}"
    if task not in variants("task"):
        raise ValueError(f"there is no task={task} to calibrate with; use calibrate=false, with cards= or without")
    more = {name: value for name, value in fields.items() if name in merged("calibrate") and name != "out"}
    own_task = options_of("task", task) | ({} if fields["problems"] is None else {"limit": fields["problems"]})
    made = merged("calibrate") | more | {"out": str(folder), "task": own_task, "model": fields["model"]}
    made |= {"sampler": options, "cache": options_of("cache", "none")}
    print(f"{sampler}:", flush=True)
    try:
        with refusals():
            calibrate.check(made, sampler)
        calibrate.certify(OmegaConf.create(made), {"sampler": sampler, "cache": "none", "task": task})
    except RefusedError as error:  # the others continue
        warnings.warn(f"{sampler} is not calibrated: {app.one_line(error)}", Notice, stacklevel=2)


def _run(
    fields: Mapping[str, Any],
    chosen: Mapping[str, Mapping[str, Any]],
    caches: Sequence[str],
    runs: Path,
) -> dict[tuple[str, str], Path | str]:
    """Each run's folder, or why it is refused; finished runs are found and not repeated."""
    found: dict[tuple[str, str], Path | str] = {}
    common = {name: value for name, value in fields.items() if name not in _OURS}
    common |= {"out": str(runs)}
    task = HydraConfig.get().runtime.choices["task"]
    with evaluate.limited_threads(fields["threads"]), warnings.catch_warnings():
        # The page says for which cache a guarantee holds.
        warnings.filterwarnings("ignore", _OTHER_CACHE, Notice)
        for sampler, options in chosen.items():
            for cache in caches:
                made = {**merged("evaluate"), **common, "sampler": dict(options), "cache": options_of("cache", cache)}
                label = sampler + (f" + {cache}" if cache != "none" else "")
                refused = evaluate.failure_folder(runs, label, made)
                try:
                    names_ = {"sampler": sampler, "cache": cache, "task": task}
                    metrics, folder = evaluate.run(OmegaConf.create(made), made, label, names_)
                except RefusedError as error:
                    found[sampler, cache] = app.one_line(error)
                    refused.fail(app.one_line(error))
                    print(terminal(f"{label}: refused: {app.one_line(error)}", one_line=True), flush=True)
                    continue
                refused.clear_error()
                found[sampler, cache] = folder
                print(terminal(f"{label}: {_shown(metrics)}  -> {folder}", one_line=True), flush=True)
    return found


def _shown(results: Mapping[str, Any]) -> str:
    metrics = matrix.graded(results)
    return f"{metrics['accuracy']:.1%} of {metrics['n']}  NFE {metrics['nfe']:.1f}  TPF {metrics['tpf']:.2f}"


def _options(sampler: str, cards: Path) -> dict[str, Any]:
    """The options of a sampler: its own, with its card if that certifies a value."""
    options = options_of("sampler", sampler)
    card = _card(sampler, cards)
    if sampler not in (_BASE, _ORACLE) and card.is_file() and Calibration.read(card).value is not None:
        options[CALIBRATION] = str(card)
    return options


def _knob(sampler: str, options: Mapping[str, Any]) -> Knob | None:
    if sampler in (_BASE, _ORACLE):
        return None
    return getattr(build("sampler", {**options, CALIBRATION: None}, Sampler), "knob", None)


def _as_run(sampler: str, options: Mapping[str, Any], found: Mapping[tuple[str, str], Path | str]) -> Mapping[str, Any]:
    """The options that the runs of a sampler were made with; its card may have been made after them."""
    folders = (folder for (name, _), folder in found.items() if name == sampler and isinstance(folder, Path))
    run = next((read_json(folder / "results.json") for folder in folders), {})
    made = run.get("sampler")
    if not isinstance(made, dict) or matrix.card_of(run)[0] is not None:
        return options
    return {name: made.get(name, value) for name, value in options.items()} | {CALIBRATION: None}


def _check_same(out: str, data: Path, samplers: Sequence[str], caches: Sequence[str], made: Mapping[str, Any]) -> None:
    """Reject data of another model, task or setting, or of runs that are left out, in the same place."""
    if not data.is_file():
        return
    found = matrix.Matrix.read(data)
    before = found.header
    for option, chosen in (("sampler", samplers), ("cache", caches)):
        if lost := list(dict.fromkeys(name for each in found.cells if (name := getattr(each, option)) not in chosen)):
            raise ValueError(
                f"{option}s={list(chosen)} leaves out {', '.join(lost)}, of which {data} has results, which would be "
                "lost; add what is left out, or give another out"
            )
    for name, other in before.made_with.items():
        if made.get(name, other) != other:
            raise ValueError(
                f"out={out!r}: {data} has the results of {before.model} with another value of {name} ({other}); give "
                "another out, or remove it and the cards beside it"
            )


def _setting(sampler: str, options: Mapping[str, Any]) -> Setting:
    if (card := options.get(CALIBRATION)) is not None:
        made = Calibration.read(card)
        return Setting(made.knob, made.value, True)
    if (knob := _knob(sampler, options)) is None:
        return Setting(None, None, False)
    value, usual = (_value(each, knob) for each in (options, options_of("sampler", sampler)))
    return Setting(knob.name, value, False, given=value != usual)


def _value(options: Mapping[str, Any], knob: Knob) -> Any:
    """The value of a knob, or of that of its base (`base.NAME`)."""
    held: Any = build("sampler", options, Sampler)
    for name in knob.name.split("."):
        value = getattr(held, name)
        held = resolve("sampler", value, Sampler) if isinstance(value, str) else value
    return held


def _command(fields: Mapping[str, Any]) -> str:
    """The command that makes these runs again, beside the page that is being made; or that reads those of `runs`."""
    places = _PLACES if fields["run"] or fields["runs"] is None else ("out", "cards", "speed")
    model = f"model={fields['model']['path']}"
    rest = [each for name, each in app.given().items() if name not in (*places, "model", "model.path")]
    return shlex.join(["dllm", "results", model, *rest, f"out={fields['out']}"])
