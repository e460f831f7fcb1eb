"""Every policy with every cache, for one model: the small file that a page of results is made from.

`runs.jsonl`: the first line says what was run, each further one is a run, or a combination that is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from dllm.escape import terminal
from dllm.evaluation.run_folder import sessions
from dllm.files import parse_json, read_json
from dllm.reports.frontier import aup
from dllm.reports.reading import load
from dllm.resolve import CALIBRATION
from dllm.stored import LATER, misfit

FORMAT, VERSION = "dllm-matrix", 1
NAME = "runs.jsonl"
_MEANT = re.compile(r"[<>|`&\\]")  # in Markdown, also within code
_DATE = re.compile(r"\d{4}-\d\d-\d\d|$", re.ASCII)
_ROUNDING, _LARGEST = 1e-6, 1e9
_FIX = "remove it, and make it again with dllm results"


@dataclass(frozen=True)
class Cell:
    """One finished run.

    Attributes:
        sampler: its choice, such as "tiny/threshold".
        cache: its choice.
        kind: of the policy.
        n: problems.
        quality: share of right answers.
        interval: 95% Wilson interval; None without one.
        nfe: forwards per sample.
        nfe_error: its standard error; None without one.
        tpf: generated tokens per forward.
        tokens_per_second: speed.
        started: date and time.
        place: index of its environment.
    """

    sampler: str
    cache: str
    kind: str
    n: int
    quality: float
    interval: tuple[float, float] | None
    nfe: float
    nfe_error: float | None
    tpf: float
    tokens_per_second: float
    started: str
    place: int


@dataclass(frozen=True)
class Refusal:
    """A combination that is refused.

    Attributes:
        sampler: its choice.
        cache: its choice.
        refused: why.
    """

    sampler: str
    cache: str
    refused: str


@dataclass(frozen=True)
class Setting:
    """The knob of a policy.

    Attributes:
        knob: the option; None for a policy without one.
        value: as used.
        certified: whether a card of `dllm calibrate` sets it.
        given: whether it is another value than that of the policy's YAML, without a card.
    """

    knob: str | None
    value: float | int | None
    certified: bool
    given: bool = field(default=False, metadata=LATER)


@dataclass(frozen=True)
class Place:
    """The environment of runs; None where it is unknown."""

    device: str | None
    platform: str | None
    threads: int | None
    dtype: str | None
    python: str | None
    packages: dict[str, str | None] | None
    git: str | None


@dataclass(frozen=True)
class Header:
    """What was run, for all runs of a table.

    Attributes:
        command: that made it.
        model: name of the denoiser.
        weights: its fingerprint.
        task: name of the task.
        asked: its options.
        score: the score that counts as the accuracy.
        samplers: choices, in the order of the table.
        caches: choices, in the order of the table.
        settings: of the samplers.
        places: environments of the runs.
        decoding: the decoding options and `model.dtype`; empty in files of earlier versions.
    """

    command: str
    model: str
    weights: str
    task: str
    asked: dict[str, Any]
    score: str
    samplers: list[str]
    caches: list[str]
    settings: dict[str, Setting]
    places: list[Place]
    decoding: dict[str, Any] = field(default_factory=dict, metadata=LATER)

    @property
    def made_with(self) -> dict[str, Any]:
        """What the results depend on, but for samplers and caches, by name as typed where that is an option."""
        own = {"weights": self.weights, "task": self.task, "score": self.score}
        return own | {f"task.{name}": value for name, value in self.asked.items()} | self.decoding


@dataclass(frozen=True)
class Matrix:
    """The results of one model.

    Attributes:
        header: what was run.
        cells: finished runs.
        refusals: refused combinations.
    """

    header: Header
    cells: tuple[Cell, ...]
    refusals: tuple[Refusal, ...]

    @classmethod
    def read(cls, file: Path) -> Matrix:
        """Read a file.

        Raises:
            ValueError: it is damaged or something else.
        """
        try:
            # Texts may hold separators of lines other than \n, at which str.splitlines would break them.
            lines = file.read_text(encoding="utf-8").removesuffix("\n").split("\n")
            head, *rows = [parse_json(line) for line in lines]
            if head.pop("format", None) != FORMAT or head.pop("version", None) != VERSION:
                raise ValueError("it is of another kind or version")
            wrong = misfit(head, Header, "the first line")
            for number, row in enumerate(rows, start=2):
                wrong = wrong or misfit(row, Refusal if "refused" in row else Cell, f"line {number}")
            if wrong := wrong or _implausible(head, rows):
                raise ValueError(wrong)
        except (OSError, ValueError, AttributeError, TypeError) as error:
            raise ValueError(f"{file} cannot be read ({error}); {_FIX}") from None
        head["settings"] = {name: Setting(**value) for name, value in head["settings"].items()}
        head["places"] = [Place(**each) for each in head["places"]]
        return cls(
            Header(**head),
            tuple(Cell(**row) for row in rows if "refused" not in row),
            tuple(Refusal(**row) for row in rows if "refused" in row),
        )

    def text(self) -> str:
        """The content of its file."""
        rows = [asdict(each) for each in self.rows]
        head = {"format": FORMAT, "version": VERSION, **asdict(self.header)}
        return "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in (head, *rows))

    @property
    def rows(self) -> list[Cell | Refusal]:
        """The runs, then the refusals."""
        return [*self.cells, *self.refusals]

    def find(self, sampler: str, cache: str) -> Cell | Refusal | None:
        """A run, or its refusal; None if there is neither."""
        return next((each for each in self.rows if (each.sampler, each.cache) == (sampler, cache)), None)

    def missing(self) -> list[tuple[str, str]]:
        """Combinations that were neither run nor refused."""
        pairs = {(each.sampler, each.cache) for each in self.rows}
        planned = [(sampler, cache) for sampler in self.header.samplers for cache in self.header.caches]
        return [pair for pair in planned if pair not in pairs]

    def aup(self, **of: str) -> float | None:
        """Accuracy Under Parallelism of the runs of a sampler or a cache; None without any, and for the oracle.

        Args:
            of: `sampler` or `cache`, and which.
        """
        methods = [each for each in self.cells if each.sampler != "oracle"]
        best = max((100 * each.quality for each in methods), default=0.0)
        chosen = [each for each in methods if all(getattr(each, name) == value for name, value in of.items())]
        return aup([(each.tpf, 100 * each.quality) for each in chosen], best)


def is_name(text: str) -> bool:
    """Whether a page shows a name as it is."""
    return terminal(text, one_line=True) == text and not _MEANT.search(text)


def _implausible(head: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str | None:
    """The first value of the right type that no run has; None if there is none."""
    knobs = [each["knob"] for each in head["settings"].values() if each["knob"] is not None]
    named = [*head["samplers"], *head["caches"], *head["settings"], *knobs]
    if odd := next((name for name in named if not is_name(name)), None):
        return f"the first line names {odd!r}"
    for number, row in enumerate(rows, start=2):
        for name in ("sampler", "cache"):
            if row[name] not in head[f"{name}s"]:
                return f"line {number}: {name} is {row[name]!r}, which the first line does not name"
        if "refused" in row:
            continue
        low, high = row["interval"] or (row["quality"], row["quality"])
        ranges = {"n": 1e15, "nfe": 1e9, "nfe_error": 1e9, "tpf": 1e9, "tokens_per_second": 1e12}
        ranges["place"] = len(head["places"]) - 1
        for name, most in ranges.items():
            if row[name] is not None and not 0 <= row[name] <= most:
                return f"line {number}: {name} is {row[name]!r}"
        if not -_LARGEST < low <= row["quality"] + _ROUNDING or not row["quality"] - _ROUNDING <= high < _LARGEST:
            return f"line {number}: interval is {row['interval']}, and quality {row['quality']!r}"
        if not _DATE.match(row["started"]):
            return f"line {number}: started is {row['started']!r}"
    return None


Found = Mapping[tuple[str, str], Path | str]


def found_in(folder: Path) -> dict[tuple[str, str], Path | str]:
    """The runs below a folder by sampler and cache, and why others failed.

    Raises:
        ValueError: there are none, or two of one combination.
    """
    sweep = load(folder)
    found: dict[tuple[str, str], Path | str] = {
        _choices(each.label): each.message for each in sweep.failures if each.label
    }
    for group in sweep.groups:
        for run in group.runs:
            label = str(read_json(run.folder / "results.json")["label"])
            if isinstance(other := found.get(_choices(label)), Path):
                raise ValueError(
                    f"{other} and {run.folder} are both of {' + '.join(_choices(label))}; keep one of them in {folder}"
                )
            found[_choices(label)] = run.folder
    return found


def _choices(label: str) -> tuple[str, str]:
    """Sampler and cache of a label such as "tiny/threshold at_least=2 + dual, seed=1"."""
    sampler, _, cache = label.partition(" + ")
    return sampler.partition(" ")[0].rstrip(","), cache.partition(" ")[0].rstrip(",") or "none"


def collect(found: Found, settings: dict[str, Setting], caches: Sequence[str], command: str) -> Matrix:
    """The results of every sampler with every cache; model, task and environments are read from the runs.

    Args:
        found: the folder of each finished run, or why it was refused, by sampler and cache.
        settings: of the samplers, in the order of the table.
        caches: choices, in the order of the table.
        command: that made the runs.

    Raises:
        ValueError: no run is finished, or the runs are of several models, tasks or decoding options, or those of a
            sampler or a cache differ.
    """
    cells: list[Cell] = []
    refusals: list[Refusal] = []
    places: list[Place] = []
    common: dict[str, Any] = {}
    decoding: dict[str, Any] = {}
    chosen: dict[str, dict[str, Any]] = {}
    for sampler in settings:
        for cache in caches:
            what = found.get((sampler, cache))
            if isinstance(what, str):
                refusals.append(Refusal(sampler, cache, what))
            elif what is not None:
                results, session = read_json(what / "results.json"), _session(what)
                _check_alike(common, _common(results, session), what)
                _check_alike(decoding, _decoding(results, session), what)
                _check_alike(chosen.setdefault(f"sampler={sampler}", {}), _chosen(results.get("sampler")), what)
                _check_alike(chosen.setdefault(f"cache={cache}", {}), _chosen(results.get("cache")), what)
                place = Place(**{each.name: session.get(each.name) for each in fields(Place)})
                places += [] if place in places else [place]
                cells.append(_cell(sampler, cache, results, str(session.get("started", "")), places.index(place)))
    if not cells:
        raise ValueError(f"no run is finished; the first is refused: {refusals[0].refused}" if refusals else "no run")
    header = Header(
        command, **common, samplers=[*settings], caches=[*caches], settings=settings, places=places, decoding=decoding
    )
    return Matrix(header, tuple(cells), tuple(refusals))


def _session(folder: Path) -> Mapping[str, Any]:
    """The last session of a run; empty where it is unknown."""
    return (sessions(folder) or [{}])[-1]


def dtype_of(folder: Path) -> str | None:
    """The precision that a run was made in; None where it is unknown."""
    found = _session(folder).get("dtype")
    return found if isinstance(found, str) else None


def _common(results: Mapping[str, Any], session: Mapping[str, Any]) -> dict[str, Any]:
    """What all runs of a table have in common."""
    return {
        "model": results["model"],
        "weights": str(session.get("weights", "")),
        "task": results["task"],
        "asked": results.get("asked") or {},
        "score": str(results["metrics"]["accuracy_name"]),
    }


# Options of a run that change no number of its own, or not those of a table.
_FREE = ("batch_size", "cuda_graphs", "seed", "threads", "baselines", "frames", "estimate")


def _decoding(results: Mapping[str, Any], session: Mapping[str, Any]) -> dict[str, Any]:
    """The decoding options and the precision; a policy that finds the length itself has none of its own."""
    found = {name: value for name, value in _mapping(results.get("options")).items() if name not in _FREE}
    if session.get("dtype") is not None:
        found["model.dtype"] = session["dtype"]
    return {name: value for name, value in found.items() if (name, value) != ("gen_length", "auto")}


def _chosen(options: Any) -> dict[str, Any]:
    """The options of a sampler or a cache, whose card may be at several places."""
    return {name: value is not None if name == CALIBRATION else value for name, value in _mapping(options).items()}


def card_of(results: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """The card that a run was made with, and its SHA-256; None without a card, or where its content is unknown."""
    file = _mapping(results.get("sampler")).get(CALIBRATION)
    return (None, None) if file is None else (str(file), _mapping(results.get("files")).get(str(file)))


def _mapping(found: Any) -> Mapping[str, Any]:
    return found if isinstance(found, Mapping) else {}


def _check_alike(common: dict[str, Any], own: Mapping[str, Any], folder: Path) -> None:
    for name, value in own.items():
        if common.setdefault(name, value) != value:
            raise ValueError(f"{folder} has another {name} ({value}) than others ({common[name]}); give another runs")


def graded(results: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics of a run.

    Raises:
        ValueError: its task does not grade generated answers.
    """
    metrics: dict[str, Any] = results["metrics"]
    if metrics["nfe"] is None or metrics["accuracy"] is None:
        raise ValueError(f"task={results['task']!r} does not grade generated answers; use a task that does")
    return metrics


def _cell(sampler: str, cache: str, results: Mapping[str, Any], started: str, place: int) -> Cell:
    metrics = graded(results)
    low, high = metrics["accuracy_interval"] or (None, None)
    return Cell(
        sampler=sampler,
        cache=cache,
        kind=str(results.get("kind", "")),
        n=metrics["n"],
        quality=metrics["accuracy"],
        interval=None if low is None or high is None else (round(low, 6), round(high, 6)),
        nfe=round(metrics["nfe"], 4),
        nfe_error=None if metrics["nfe_error"] is None else round(metrics["nfe_error"], 4),
        tpf=round(metrics["tpf"], 4),
        tokens_per_second=round(metrics["tokens_per_second"], 1),
        started=started,
        place=place,
    )
