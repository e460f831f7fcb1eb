"""The table of a sweep, as text and as raw numbers."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dllm.escape import cell
from dllm.reports.frontier import aup
from dllm.reports.reading import flat
from dllm.reports.runs import Group, MeasuredRun, Sweep

Value = float | str | None
_BASELINES = {"eos_aware": "EOS-aware", "naive": "naive"}


@dataclass(frozen=True)
class Column:
    """One column.

    Attributes:
        head: its heading.
        value: of a run, for sorting; None if not measured.
        text: of a run, for display.
        about: its explanation.
    """

    head: str
    value: Callable[[MeasuredRun], Value]
    text: Callable[[MeasuredRun], str]
    about: str = ""


@dataclass(frozen=True)
class Area:
    """Accuracy Under Parallelism of some runs.

    Attributes:
        of: the sampler or cache of the runs.
        runs: number of runs.
        aup: the area under their front.
    """

    of: str
    runs: int
    aup: float


def columns(group: Group) -> list[Column]:
    """The columns, most important first, without those that are empty for all runs."""
    head = group.runs[0].quality_name if len(group.judged_by) == 1 else "quality"
    found = [
        Column(
            "setting", lambda run: run.label, lambda run: f"{run.label} (reference)" if run.reference else run.label
        ),
        *(
            []
            if len(group.judged_by) == 1
            else [Column("judged by", lambda run: run.quality_name, lambda run: run.quality_name)]
        ),
        Column(head, lambda run: run.quality, lambda run: _share(run.quality), "right answers, or the score chosen"),
        Column("95% interval", lambda run: run.interval and run.interval[0], _interval),
        Column("n", lambda run: run.number("n"), lambda run: _text(run.number("n"), ",.0f"), "samples"),
        Column(
            "front",
            lambda run: fronts(group, run),
            lambda run: fronts(group, run),
            "no other method is as good with fewer forwards (NFE), with more tokens/s (speed)",
        ),
        *(
            []
            if len(group.kinds) == 1
            else [Column("kind", lambda run: run.kind, lambda run: run.kind, "what becomes of committed tokens")]
        ),
        Column(
            "NFE",
            lambda run: run.number("nfe"),
            _nfe,
            "forwards of the denoiser per sample, over all its answers, ± standard error; a guide's are apart",
        ),
        _number("TPF", ".2f", "tpf", about="generated tokens up to end-of-text per forward"),
        _number("tokens/s", ",.0f", "tokens_per_second"),
        *_speedups(),
        *_scores(group, head),
        _number(
            "p50 s", ".2f", "latency_p50", about="latency: seconds from an answer's first step to its last, median"
        ),
        _number("p95 s", ".2f", "latency_p95", about="the same, 95th percentile"),
        _number("guide NFE", ".1f", "guide_nfe", about="forwards of the guide per sample"),
        _number("positions", ",.0f", "positions", about="positions computed per sample"),
        _number(
            "computed",
            ".0%",
            "computed_share",
            about="share of the canvas computed per forward: a cache reduces it, drafts add to it",
        ),
        _number("refreshes", ".1f", "refreshes", about="full refreshes of the cache per sample"),
        _number("KV error", ".1%", "drift", "kv_error", about="relative error of cached keys and values"),
        _number("KL", ".3f", "drift", "kl", about="KL divergence from the exact predictions, in nats per position"),
        _number("flips", ".1%", "drift", "flips", about="share of predicted tokens that the cache changed"),
        _number(
            "peak MiB",
            ",.0f",
            "peak_memory",
            scale=2**-20,
            about="peak memory: of the device on CUDA, of the whole process elsewhere",
        ),
    ]
    zero = {"guide NFE", "refreshes", "front"}
    empty = lambda value, head: value in (None, "") or (head in zero and value == 0)  # noqa: E731
    return [each for each in found if not all(empty(each.value(run), each.head) for run in group.runs)]


def fronts(group: Group, run: MeasuredRun) -> str:
    """The Pareto fronts that a run is on."""
    if run.reference:
        return "reference"
    named = {"NFE": group.nfe_front, "speed": group.speed_front}
    return ", ".join(name for name, members in named.items() if any(run is member for member in members))


def areas(group: Group) -> list[Area]:
    """AUP of all runs, and of each sampler and cache with two or more runs; the oracle is excluded.

    Runs with different scores are not combined.
    """
    if len(group.judged_by) > 1:
        return []
    points = [(run, tpf, 100 * quality) for run, tpf, quality in group.measured("tpf") if not run.reference]
    best = max((quality for *_, quality in points), default=0.0)
    kinds = {
        **{f"sampler {run.sampler}": [each for each in points if each[0].sampler == run.sampler] for run, *_ in points},
        **{f"cache {run.cache}": [each for each in points if each[0].cache == run.cache] for run, *_ in points},
    }
    chosen = {"all": points, **{name: kinds[name] for name in sorted(kinds) if len(kinds[name]) > 1}}
    found = {name: (len(each), aup([(tpf, y) for _, tpf, y in each], best)) for name, each in chosen.items()}
    return [Area(name, count, area) for name, (count, area) in found.items() if area is not None]


def raw(sweep: Sweep) -> str:
    """CSV with one line per run and all its numbers."""
    rows: list[dict[str, object]] = []
    for group in sweep.groups:
        for run in group.runs:
            row: dict[str, object] = {"label": run.label, "model": run.model, "task": run.task, "folder": run.place}
            row |= {"quality_name": run.quality_name, "quality": run.quality, "front": fronts(group, run)}
            row["kind"] = run.kind
            rows.append(row | run.settings | dict(flat("", run.metrics)))
    names = dict.fromkeys(name for row in rows for name in row)
    # What is null in some runs, and has parts in others, is represented by these.
    null = {name for name in names if all(row.get(name) is None for row in rows)}
    names = {name: None for name in names if name not in null or not any(each.startswith(f"{name}.") for each in names)}
    # Settings before metrics, in any order of runs.
    parts = ("sampler.", "cache.", "options.", "asked.", "loading.")
    rank = lambda name: parts.index(name.split(".")[0] + ".")  # noqa: E731
    settings = sorted((name for name in names if name.startswith(parts)), key=rank)
    first = [*rows[0]][:8]
    order = [*first, *settings, *(name for name in names if name not in {*first, *settings})]
    file = io.StringIO()
    writer = csv.DictWriter(file, order, restval="", extrasaction="ignore", lineterminator="\n")
    writer.writerow({name: cell(name) for name in order})
    writer.writerows({name: cell(value) for name, value in row.items()} for row in rows)
    return file.getvalue()


def cells(group: Group, shown: Sequence[Column]) -> list[list[str]]:
    """The texts of a table, one list per run."""
    return [[column.text(run) for column in shown] for run in group.runs]


def _number(head: str, form: str, *path: str, scale: float = 1, about: str = "") -> Column:
    def text(run: MeasuredRun) -> str:
        value = run.number(*path)
        return "" if value is None else _text(value * scale, form)

    return Column(head, lambda run: run.number(*path), text, about)


def _speedups() -> list[Column]:
    about = {
        "eos_aware": "one token per step that stops at end-of-text",
        "naive": "one token per step that fills the whole canvas",
    }
    return [
        _number(f"{what} ({name})", ".1fx", "speedup", key, kind, about=f"than {about[key]}, on the same samples")
        for key, name in _BASELINES.items()
        for kind, what in (("time", "faster"), ("forwards", "TPF gain"))
    ]


def _scores(group: Group, head: str) -> list[Column]:
    names = dict.fromkeys(name for run in group.runs for name in run.metrics["scores"] if name != head)
    return [_score(group, name) for name in names]


def _score(group: Group, name: str) -> Column:
    def value(run: MeasuredRun) -> float | None:
        return run.number("scores", name, "value")

    # Perplexities and likelihoods are scores too.
    share = all(0 <= (value(run) or 0) <= 1 for run in group.runs)
    return Column(name, value, lambda run: _share(value(run)) if share else _text(value(run), ",.3f"))


def _nfe(run: MeasuredRun) -> str:
    error = run.number("nfe_error")
    return _text(run.number("nfe"), ".1f") + ("" if error is None else f" ± {error:.1f}")


def _interval(run: MeasuredRun) -> str:
    return f"{run.interval[0]:.1%} to {run.interval[1]:.1%}" if run.interval else ""


def _share(value: float | None) -> str:
    return _text(value, ".1%")


def _text(value: float | None, form: str) -> str:
    """A number in a format, optionally with a trailing x."""
    return "" if value is None else format(value, form.removesuffix("x")) + "x" * form.endswith("x")
