"""Plots of quality against cost: every run with error bars, the Pareto front, and the oracle as a reference."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from dllm.escape import terminal
from dllm.reports.frontier import front
from dllm.reports.labels import Labels
from dllm.reports.runs import Group, MeasuredRun, Sweep, ordered

# Legible on white and on black, where the page inverts ink and grid.
INK, GRID = "#333333", "#dddddd"
_COLOURS = (
    "#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b", "#17becf", "#e377c2", "#7f7f7f", "#bcbd22",
)  # fmt: skip
_MOST_LABELS = 10  # more would overlap
_LEGEND_ROWS, _LEGEND_WIDTH = 25, 1.5  # what fits beside the axes, and inches of a further column
_MARKERS = "os^DvPXhp<>"
_STYLE = {
    # Text is not converted to paths, and output is deterministic.
    "svg.fonttype": "none", "svg.hashsalt": "dllm", "font.size": 9, "text.color": INK, "axes.edgecolor": INK,
    "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK, "font.family": ["DejaVu Sans"],
    "text.parse_math": False,
}  # fmt: skip
COSTS = {"nfe": "NFE per sample", "tokens_per_second": "tokens per second"}
_SIGNS = {"nfe": 1, "tokens_per_second": -1}


class Look:
    """One colour per sampler and one marker per cache, the same in all plots of a sweep."""

    def __init__(self, sweep: Sweep) -> None:
        runs = [run for group in sweep.groups for run in group.runs if not run.reference]
        samplers = sorted({run.sampler for run in runs})
        kinds = {run.sampler: run.kind for run in runs}
        self.kinds = {kind: [name for name in samplers if kinds[name] == kind] for kind in ordered(kinds.values())}
        # The first marker is for no cache.
        caches = sorted({run.cache for run in runs}, key=lambda name: (name != "none", name))
        self.colours = {name: _COLOURS[place % len(_COLOURS)] for place, name in enumerate(samplers)}
        self.markers = {name: _MARKERS[place % len(_MARKERS)] for place, name in enumerate(caches)}

    def of(self, run: MeasuredRun) -> dict[str, Any]:
        """Colour and marker of a run."""
        if run.reference:
            return {"color": INK, "marker": "*", "markersize": 10, "markerfacecolor": "none"}
        return {"color": self.colours[run.sampler], "marker": self.markers[run.cache], "markersize": 6}


def check() -> None:
    """Raise an error without matplotlib.

    Raises:
        ValueError: it is not installed.
    """
    try:
        import matplotlib as _  # noqa: F401
    except ImportError:
        raise ValueError("the plots need matplotlib: pip install 'dllm-samplers[plot]'") from None


def draw(group: Group, cost: str, look: Look) -> str | None:
    """The plot as SVG; None if no run has both quality and this cost.

    Args:
        group: the runs.
        cost: nfe or tokens_per_second.
        look: colours and markers.
    """
    points = [each for each in group.measured(cost) if each[1] > 0]
    if not points:
        return None
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with rc_context(_STYLE):  # type: ignore[arg-type]  # a dictionary of settings, as documented
        figure = Figure(figsize=(7.8, 4.4), layout="constrained")
        FigureCanvasAgg(figure)
        figure.patch.set_alpha(0)
        axes = figure.add_subplot()
        axes.patch.set_alpha(0)
        _axes(axes, group, cost, points)
        for run, value, quality in points:
            _point(axes, run, value, quality, cost, look)
        best = group.nfe_front if cost == "nfe" else group.speed_front
        on_front = [each for each in points if each[0] in best]
        lines = [[(value, end) for end in run.interval] for run, value, _ in points if run.interval]
        references = [each for each in points if each[0].reference]
        known = front([(value * _SIGNS[cost], quality) for _, value, quality in references])
        for members, style in ((on_front, "-"), ([references[index] for index in known], ":")):
            corners = steps([(value, quality) for _, value, quality in members], cost, axes.get_xlim())
            axes.plot(*zip(*corners, strict=True), color=INK, linestyle=style, linewidth=1.1, alpha=0.7, zorder=1)
            lines += map(list, pairwise(corners))
        _legend(figure, points, look)
        labels = Labels(figure, axes, [(value, quality) for _, value, quality in points], lines)
        for run, value, quality in spread(on_front, _MOST_LABELS):
            labels.put(value, quality, terminal(run.label, one_line=True), look.of(run)["color"])
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    return terminal(re.sub(r"\s*<metadata>.*?</metadata>", "", file.getvalue(), flags=re.DOTALL))


def spread(values: Sequence[Any], most: int) -> list[Any]:
    """At most this many of them, evenly spaced, including the first and the last."""
    if len(values) <= most:
        return list(values)
    return [values[round(place * (len(values) - 1) / max(1, most - 1))] for place in range(most)]


def _axes(axes: Any, group: Group, cost: str, points: Sequence[tuple[MeasuredRun, float, float]]) -> None:
    names = {run.quality_name for run, *_ in points}
    quality_name = terminal(names.pop(), one_line=True) if len(names) == 1 else "quality"
    axes.set(xlabel=COSTS[cost], ylabel=quality_name, title=terminal(group.title, one_line=True))
    costs = [value for _, value, _ in points]
    ends = [end for run, _, quality in points for end in (quality, *(run.interval or ()))]
    room = max(0.02, 0.12 * (max(ends) - min(ends)))
    axes.set_ylim(min(ends) - room, max(ends) + room)
    if max(costs) > 8 * min(costs):
        axes.set_xscale("log")
        axes.set_xlim(min(costs) / 1.4, max(costs) * 1.4)
    else:
        axes.set_xlim(0, max(costs) * 1.15)
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    if axes.get_xscale() == "log":
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    # The axis extends beyond 0 and 1, without ticks there.
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _percent(value)))
    axes.grid(color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _percent(share: float) -> str:
    return f"{100 * share:g}%" if -1e-9 <= share <= 1 + 1e-9 else ""


def _point(axes: Any, run: MeasuredRun, value: float, quality: float, cost: str, look: Look) -> None:
    # At 0% and 100% rounding may exclude the value from its interval.
    low, high = run.interval or (quality, quality)
    errors: dict[str, Any] = {"yerr": [[max(0.0, quality - low)], [max(0.0, high - quality)]]} if run.interval else {}
    spread = run.number("nfe_error") if cost == "nfe" else None
    if spread:
        errors["xerr"] = [[min(spread, value * 0.99)], [spread]]
    style = look.of(run)
    container = axes.errorbar(value, quality, linestyle="none", elinewidth=1, capsize=2, **errors, **style)
    for bar in (*container.lines[1], *container.lines[2]):
        bar.set_alpha(0.45)


def steps(points: Sequence[tuple[float, float]], cost: str, limits: tuple[float, float]) -> list[tuple[float, float]]:
    """The Pareto front as the corners of a step function to the end of the axis.

    Args:
        points: (cost, quality) on the front.
        cost: nfe (lower is better), or tokens_per_second (higher is better).
        limits: of the axis.
    """
    if not points:
        return []
    ordered = sorted(points, key=lambda point: point[0] if cost == "nfe" else -point[0])
    corners = [ordered[0]]
    for (_, before), (value, quality) in pairwise(ordered):
        corners += [(value, before), (value, quality)]
    return [*corners, (limits[1 if cost == "nfe" else 0], ordered[-1][1])]


def _legend(figure: Any, points: Sequence[tuple[MeasuredRun, float, float]], look: Look) -> None:
    from matplotlib.lines import Line2D

    runs = [run for run, *_ in points if not run.reference]
    blank = Line2D([], [], linestyle="none")
    entries: list[tuple[Any, str]] = []
    sections: dict[str, dict[str, dict[str, str]]] = {
        # With policies of several kinds, a section for each.
        **{
            terminal(kind, one_line=True) if len(look.kinds) > 1 else "sampler": {
                name: {"color": look.colours[name], "marker": "o"} for name in names
            }
            for kind, names in look.kinds.items()
        },
        "cache": {name: {"color": INK, "marker": marker} for name, marker in look.markers.items()},
    }
    used = {run.sampler for run in runs}, {run.cache for run in runs}
    for title, styles in sections.items():
        shown = [name for name in styles if name in used[title == "cache"]]
        if shown:
            entries.append((blank, title))
        for name in shown:
            line = Line2D([], [], linestyle="none", **styles[name])  # type: ignore[arg-type]
            entries.append((line, f" {terminal(name, one_line=True)}"))
    entries.append((blank, ""))
    if runs:
        entries.append((Line2D([], [], color=INK, linewidth=1.1), " Pareto front"))
    if len(runs) < len(points):
        star = Line2D([], [], color=INK, linestyle=":", marker="*", markersize=10, markerfacecolor="none")
        entries.append((star, " oracle (reference)"))
    handles, names = zip(*entries, strict=True)
    columns = math.ceil(len(entries) / _LEGEND_ROWS)
    figure.set_figwidth(figure.get_figwidth() + _LEGEND_WIDTH * (columns - 1))
    options = {"frameon": False, "handlelength": 1.4, "fontsize": 8, "columnspacing": 1.0}
    figure.legend(handles, names, loc="outside right upper", ncols=columns, **options)
