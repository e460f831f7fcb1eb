"""`dllm calibrate`: the fastest setting of a policy that keeps the quality of one token per step, with a guarantee."""

from __future__ import annotations

if __name__ == "__main__":
    import dllm.scripts.cli

    dllm.scripts.cli.run_file(__file__)

import warnings
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_type_hints

import numpy as np
from hydra.core.hydra_config import HydraConfig
from numpy.typing import NDArray
from omegaconf import DictConfig, OmegaConf
from pyarrow import parquet

import dllm
from dllm.calibration import Calibration, Defaults, Tested, files_of
from dllm.checks import Notice, naming, number, seed, threads
from dllm.escape import terminal
from dllm.evaluation.claim import claimed
from dllm.evaluation.records import sample_of
from dllm.evaluation.risk import Test, at_most, fixed_sequence, losses_of
from dllm.evaluation.run_folder import sessions
from dllm.files import disturbed
from dllm.resolve import CALIBRATION, TARGET, build, option_names, options_of, with_option
from dllm.samplers.base import Knob, Sampler
from dllm.scripts import app, evaluate, own
from dllm.stored import misfit
from dllm.structure import read_format_file
from dllm.tasks.base import Task

KINDS = get_type_hints(dllm.Options) | {
    "knob": str | None,
    "values": Sequence[float] | None,
    "gen_length": int | Literal["auto"] | None,
    "temperature": float | None,
    "seed": int,
    "threads": int | None,
}
# Decoding options that a certificate does not depend on.
_FREE = ("batch_size", "cuda_graphs", "seed")
# Options of `dllm evaluate` that a certificate does not need.
_UNUSED = {
    "baselines": 0,
    "frames": 0,
    "estimate": {"method": "monte_carlo", "samples": 128, "order": "random", "batch_size": 32},
}
_ENDED = "of which the last was not certified, and testing ends there for these problems"
_OTHERS = "use problems that were not tested yet (such as task.seed=N), and another out"


def main() -> None:
    """Entry point."""
    app.run(calibrate, "calibrate", KINDS)


def calibrate(cfg: DictConfig) -> None:
    """Test the values of a knob from safe to fast, and write the card of the fastest certified one."""
    certify(cfg, HydraConfig.get().runtime.choices)


def certify(cfg: DictConfig, chosen: Mapping[str, Any]) -> None:
    """The same for named choices.

    Args:
        cfg: the configuration of `dllm calibrate`.
        chosen: names of the sampler, the cache and the task.
    """
    fields: Any = OmegaConf.to_container(cfg, resolve=True)
    fields["response_format"] = read_format_file(fields["response_format"])
    knob, values = check(fields, str(chosen["sampler"]))
    out = Path(fields["out"])
    card_file, plot_file = out / "calibration.json", out / "calibration.svg"
    own.check("out", fields["out"], {card_file: own.CALIBRATION, plot_file: own.CERTIFICATE})
    called = f"out={fields['out']!r}"
    policy = build("sampler", fields["sampler"], Sampler)
    with claimed(card_file, called, "another out"), evaluate.limited_threads(fields["threads"]):
        there = card_file.read_bytes() if card_file.is_file() else b""
        files, before = files_of(policy), _check_card(fields, knob, values, called, card_file, policy)
        runs = _Runs(cfg, fields, chosen)
        base = runs.scores({**options_of("sampler", "vanilla"), CALIBRATION: None}, "vanilla")
        if before is not None:
            made = before.compared_score(runs.score) | {"model": (before.weights, runs.weights)}
            made |= before.compared_dtype(runs.dtype) | before.compared_defaults(runs.defaults)
            refuse_others(called, card_file, made)
        tests: list[Tested] = []
        named = str(chosen["sampler"])

        def losses(value: float) -> NDArray[np.float64]:
            scores = runs.scores(with_option("sampler", fields["sampler"], knob, value), named, f"{knob}={value!r}")
            return losses_of(*_paired(base, scores))

        print(f"one token per step: {_shown(runs.last)}", flush=True)
        if not any(base.values()):
            told = (
                "one token per step has nothing right that could be lost; look at the prompts, the task and its metric"
            )
            warnings.warn(told, Notice, stacklevel=1)
        for test in fixed_sequence(values, losses, fields["loss"], fields["delta"]):
            tests.append(_row(test, runs.last))
            if not test.certified or len(tests) == len(values):  # the last one: it is on the card before it is told
                _check_files(policy, files)
                card = runs.card(knob, tests, files)
                own.check("out", fields["out"], {card_file: own.CALIBRATION})  # hours may have passed
                if (card_file.read_bytes() if card_file.is_file() else b"") != there:
                    raise disturbed(str(card_file), card_file, "; put it back, or give another out")
                card.write(card_file, before)
            print(f"{knob}={test.setting!r}: {_shown(runs.last)}  {_verdict(test)}", flush=True)
        own.write("out", fields["out"], {plot_file: (own.CERTIFICATE, plot)} if (plot := _plot(card)) else {})
        print(_summary(card, card_file))


def _check_files(policy: Sampler, before: Mapping[str, str]) -> None:
    """Verify that the files that a policy reads are those of before."""
    now = files_of(policy)
    if other := [name for name in before if now.get(name) != before[name]]:
        raise OSError(f"{other[0]} was changed by another program during this run; run the command again")


class _Runs:
    """Evaluates samplers on the problems.

    Args:
        cfg: of the command.
        fields: the same as a dictionary.
        chosen: names of the sampler, the cache and the task.
    """

    def __init__(self, cfg: DictConfig, fields: Mapping[str, Any], chosen: Mapping[str, Any]) -> None:
        self._cfg, self._fields, self._chosen = cfg, fields, chosen
        self._weights: list[dict[str, Any]] = []
        self._known: dict[str, dict[str, Any]] = {}  # of what the runs so far were made
        self.first: dict[str, Any] = {}
        self.last: dict[str, Any] = {}

    def scores(self, sampler: Mapping[str, Any], name: str, setting: str = "") -> dict[str, float]:
        """The score of each problem, by id.

        Args:
            sampler: `_target_` and options.
            name: of the sampler.
            setting: of the knob; none for one token per step.

        Raises:
            ValueError: the task does not score generated answers one by one.
        """
        ours = ("knob", "values", "loss", "delta")
        fields = {key: value for key, value in self._fields.items() if key not in ours} | _UNUSED
        fields |= {"sampler": dict(sampler), "objective": ["accuracy"]}
        if not setting and fields["gen_length"] == "auto":  # one token per step needs a length: the task's
            fields["gen_length"] = None
        chosen = {**self._chosen, "sampler": name}
        cache = "" if chosen["cache"] == "none" else f" + {chosen['cache']}"
        self.last, folder = evaluate.run(
            OmegaConf.create(fields), fields, " ".join(filter(None, (name, setting))) + cache, chosen
        )
        metrics, task = self.last["metrics"], self.last["task"]
        if metrics["nfe"] is None or metrics["accuracy"] is None:
            raise ValueError(f"task={task!r} does not grade generated answers; use a task that does")
        main = metrics["accuracy_name"]
        table = parquet.read_table(folder / "samples.parquet", columns=["id", main]).to_pydict()
        found: dict[str, float] = {}
        for sample, score in zip(table["id"], table[main], strict=True):
            if score is None:
                raise ValueError(f"task={task!r} leaves answers without a score; use a task that grades each problem")
            # Several answers to a problem are one draw, with one score.
            problem = sample_of(str(sample))
            if found.setdefault(problem, float(score)) != float(score):
                raise ValueError(f"task={task!r} scores several answers to a problem apart; use one answer to each")
        if not all(0 <= score <= 1 for score in found.values()):
            raise ValueError(f"task={task!r} has scores outside 0 to 1; use task.metric= for another score")
        if not self.first:
            self.first, self._weights = self.last, sessions(folder)[-1:]
            if not self._weights or "weights" not in self._weights[0]:
                raise ValueError(f"{folder}/manifest.json is damaged; remove {folder} to run that setting again")
        self._check_same(folder)
        return found

    def _check_same(self, folder: Path) -> None:
        """Reject a run of another model, of other data or files than those before: they were changed in between."""
        parts = {name: self.last[name] for name in ("loading", "asked", "files")}
        parts |= {"session": {name: each.get(name) for each in sessions(folder) for name in ("weights", "dtype")}}
        for part, now in parts.items():
            before = self._known.setdefault(part, {})
            now = {name: value for name, value in now.items() if name != "path" and value is not None}
            if other := [name for name in now if before.get(name, now[name]) != now[name]]:
                raise ValueError(
                    f"{other[0]} of {folder} is not that of the runs before, as another program changed it meanwhile; "
                    "run the command again"
                )
            before |= now

    @property
    def weights(self) -> str:
        """The fingerprint of the model."""
        return str(self._weights[0]["weights"])

    @property
    def defaults(self) -> Defaults | None:
        """What null and auto stand for; None for runs of earlier versions."""
        found: Defaults | None = self._weights[0].get("defaults")
        return None if misfit(found, Defaults) else found

    @property
    def dtype(self) -> str | None:
        """The precision of the model; None for runs of earlier versions."""
        found = self._weights[0].get("dtype")
        return found if isinstance(found, str) else None

    @property
    def score(self) -> str:
        """The name of the score that counts as accuracy."""
        return str(self.first["metrics"]["accuracy_name"])

    def card(self, knob: str, tests: Sequence[Tested], files: dict[str, str]) -> Calibration:
        """The card of the fastest certified value."""
        fields = self._fields
        certified = [test for test in tests if test["certified"]]
        best = min(certified, key=lambda test: test["nfe"], default=None)
        return Calibration(
            model=self.first["model"],
            weights=self.weights,
            sampler={name: value for name, value in fields["sampler"].items() if name != CALIBRATION},
            knob=knob,
            value=None if best is None else best["value"],
            cache=dict(fields["cache"]),
            options=decoding(fields),
            task=str(self.first["task"]),
            data=self.first["asked"],
            n=self.first["metrics"]["n"],
            loss=fields["loss"],
            delta=fields["delta"],
            bound=None if best is None else best["bound"],
            baseline={name: self.first["metrics"][name] for name in ("accuracy", "nfe")},
            tests=list(tests),
            contents=files,
            score=self.score,
            defaults=self.defaults,
            dtype=self.dtype,
        )


def check(fields: Mapping[str, Any], called: str) -> tuple[str, Sequence[float]]:
    """The knob and its values; bad options are rejected before the model is loaded.

    Args:
        fields: options of `dllm calibrate`.
        called: name of the sampler.

    Raises:
        ValueError: bad options.
    """
    for name in ("loss", "delta"):
        number(name, fields[name], "a number above 0 and below 1", above=0, high=1 - 1e-12)
    seed("seed", fields["seed"])
    threads(fields["threads"])
    if fields["sampler"].get(CALIBRATION) is not None:
        raise ValueError(f"sampler.{CALIBRATION} has no effect here: a card is what is made; leave it out")
    sampler = build("sampler", fields["sampler"], Sampler)
    usual: Knob | None = getattr(sampler, "knob", None)
    if fields["knob"] is None and usual is None:
        raise ValueError(
            f"sampler={called} has no knob of its own; give knob= one of its options, and values= from safe to fast"
        )
    knob = str(usual.name if fields["knob"] is None and usual is not None else fields["knob"])
    if knob not in (given := option_names("sampler", fields["sampler"])):
        raise ValueError(f"unknown knob={knob!r}; expected one of {', '.join(given) or 'none'}")
    values = list(usual.values) if usual is not None and usual.name == knob else []
    if fields["values"] is not None:
        values = list(fields["values"])
    elif not values:
        raise ValueError(f"knob={knob} needs values=; give them from safe to fast, such as values=[1,2,4]")
    else:  # other options may rule some out
        values = [value for value in values if _refused(with_option("sampler", fields["sampler"], knob, value)) is None]
    if not values or len(set(values)) < len(values):
        raise ValueError(f"values={values!r} are none, or not distinct; give some, each once, from safe to fast")
    for place, value in enumerate(values):
        number(f"values[{place}]", value, "a number", high=float("inf"))
        if (reason := _refused(with_option("sampler", fields["sampler"], knob, value))) is not None:
            raise ValueError(f"values[{place}]={value!r} is not valid for {knob} ({reason})")
    return knob, values


def _refused(sampler: Mapping[str, Any]) -> str | None:
    """Why the options of a sampler are refused; None if they are not."""
    try:
        build("sampler", sampler, Sampler)
    except ValueError as error:
        return str(error)
    return None


def decoding(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The decoding options as a card has them.

    Args:
        fields: options of `dllm evaluate`.
    """
    asked = evaluate.normal(fields)
    if asked["gen_length"] is None:
        task: Task = build("task", fields["task"], Task)
        asked["gen_length"] = task.gen_length
    return {name: asked[name] for name in sorted(dllm.Options.__dataclass_fields__) if name in asked}


def certified_for(card: Calibration, options: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The decoding options that a certificate depends on: of a card, and here.

    Args:
        card: the card.
        options: from `decoding`.
    """
    names = [name for name in dict.fromkeys([*options, *card.options]) if name not in _FREE]
    return {name: (card.options.get(name), options.get(name)) for name in names}


def refuse_others(
    called: str,
    file: Path,
    pairs: Mapping[str, tuple[Any, Any]],
    what: str = "this run",
    retried: Collection[str] = (),
) -> None:
    """Reject a card of another setting.

    Args:
        called: the option that names its folder, with its value.
        file: the card.
        pairs: by name, what it was made with, and what it is to certify.
        what: that is to be certified.
        retried: names of which another value tries again what was not certified, also in another folder.

    Raises:
        ValueError: they differ.
    """
    for name, (made, asked) in pairs.items():
        if made != asked:
            made, asked = ("null" if value is None else value for value in (made, asked))
            problem = f"{called} holds a card of another {name} ({made}); {what} has {asked}"
            if name in retried:
                raise ValueError(f"{problem}, which voids the guarantee: {file} has tests, {_ENDED}; {_OTHERS}")
            raise ValueError(f"{problem}: give another {called.partition('=')[0]}, or remove {file}")


def _check_card(
    fields: Mapping[str, Any], knob: str, values: Sequence[float], called: str, file: Path, policy: Sampler
) -> Calibration | None:
    """Reject a card of another setting in the same place; others rely on it.

    Reject also values that do not go on with those of the card: its certificate would be lost, or, once one was not
    certified, testing has ended there, for all values and seeds on these problems.

    Returns:
        The card that is there, whose model is not compared yet.
    """
    if not file.is_file() or file.stat().st_size == 0:
        return None
    with naming({"calibration": "out"}):
        card = Calibration.read(file)
    own = {name: value for name, value in fields["sampler"].items() if name != CALIBRATION}
    # Whatever the value that is chosen.
    own, theirs = (with_option("sampler", options, knob, None) for options in (own, card.sampler))
    pairs = {"knob": (card.knob, knob), "sampler": (theirs, own), "cache": (card.cache, dict(fields["cache"]))}
    pairs |= {name: (getattr(card, name), fields[name]) for name in ("loss", "delta")}
    task: Task = build("task", fields["task"], Task)
    asked = decoding(fields)
    pairs |= {"task": (card.task, task.name)} | certified_for(card, asked)
    data = evaluate.normal(fields)["task"] | {f"{split}_sha256": content for split, content in task.check().items()}
    pairs |= {f"task.{name}": (made, data[name]) for name, made in card.data.items() if name in data}
    tested, ended = [test["value"] for test in card.tests], not all(test["certified"] for test in card.tests)
    same = ["knob", "sampler"] if own[TARGET] == theirs[TARGET] else []  # other options of the same policy
    retried = ["loss", "delta", "task.limit", *same] if ended else []
    refuse_others(called, file, pairs | card.compared(policy), retried=retried)
    again = [name for name in _FREE if name in asked and card.options.get(name) != asked[name]]
    if ended and again:
        given, made = (f"{again[0]}={each.get(again[0])}" for each in (asked, card.options))
        raise ValueError(f"{given} voids the guarantee: {file} has tests with {made}, {_ENDED}; {_OTHERS}")
    if list(values[: len(tested)]) != tested:
        raise ValueError(
            f"values={list(values)!r} void the guarantee: {file} has {tested!r}, {_ENDED}; {_OTHERS}"
            if ended
            else f"values={list(values)!r} do not begin with those that {file} certifies, {tested!r}; begin with "
            "these, or give another out"
        )
    return card


def _paired(base: Mapping[str, float], other: Mapping[str, float]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Both scores of each problem."""
    if base.keys() != other.keys():
        raise ValueError("two runs of the task have other problems; use a task whose problems stay the same")
    return np.array(list(base.values())), np.array([other[name] for name in base])


def _row(test: Test, results: Mapping[str, Any]) -> Tested:
    metrics = results["metrics"]
    return {
        "value": test.setting,
        "n": test.n,
        "mean_loss": test.mean,
        "p_value": test.p_value,
        "bound": test.bound,
        "accuracy": metrics["accuracy"],
        "nfe": metrics["nfe"],
        "certified": test.certified,
    }


def _shown(results: Mapping[str, Any]) -> str:
    metrics = results["metrics"]
    return f"{metrics['accuracy']:.1%} of {metrics['n']}  NFE {metrics['nfe']:.1f}"


def _verdict(test: Test) -> str:
    verdict = "certified" if test.certified else "not certified"
    return f"lost {test.mean:.2%} of the problems, at most {at_most(test.bound)}  p = {test.p_value:.2g}  {verdict}"


def _summary(card: Calibration, file: Path) -> str:
    where = terminal(str(file), one_line=True)
    if card.value is None:
        return (
            f"no value of {card.knob} {card.guarantee}; {where} says what was tried. Testing ends here for these "
            f"problems; for safer values, more problems or a larger loss, {_OTHERS}"
        )
    best = next(test for test in card.tests if test["value"] == card.value)
    faster = card.baseline["nfe"] / best["nfe"]
    cost = f"{faster:.1f}x fewer forwards than" if faster >= 1 else f"{1 / faster:.1f}x as many forwards as"
    return (
        f"{card.knob}={card.value!r} is the fastest that {card.guarantee}: NFE {best['nfe']:.1f}, {cost} one token per "
        f"step  -> {where}"
    )


def _plot(card: Calibration) -> bytes | None:
    """The bound on the loss of each value over its NFE; None without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(5.2, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.axhline(card.loss, color="#bbbbbb", linewidth=1)
    nfe = [test["nfe"] for test in card.tests]
    axes.plot(nfe, [test["mean_loss"] for test in card.tests], "o-", label="lost")
    axes.plot(nfe, [test["bound"] for test in card.tests], "v--", label="bound")
    for test in card.tests:
        axes.annotate(repr(test["value"]), (test["nfe"], test["bound"]), fontsize=8, ha="left", va="bottom")
    title = f"{card.model}, {card.knob} of {card.sampler[TARGET].rpartition('.')[2]}, n = {card.n}"
    axes.set(xlabel="NFE per sample", ylabel="share of problems lost against one token per step", title=title)
    axes.legend()
    return own.svg(figure)
