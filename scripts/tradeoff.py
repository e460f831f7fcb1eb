"""`dllm tradeoff`: measure several settings on held-out word problems; write a table and a chart."""

from __future__ import annotations

if __name__ == "__main__":
    import dllm.scripts.cli

    dllm.scripts.cli.run_file(__file__)

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import dllm
from dllm.cache.base import Cache
from dllm.checks import naming, number, seed
from dllm.decoding import compatibility
from dllm.decoding.options import parse_options
from dllm.escape import markdown, terminal
from dllm.evaluation.word_problems import Score, evaluate
from dllm.resolve import build
from dllm.samplers.base import Sampler
from dllm.scripts import app, own
from dllm.tasks import word_problems

_MOST_LABELS = 8  # more of them cover each other
_COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b", "#17becf", "#7f7f7f")
KINDS = {"block_length": int | None, "settings": dict, "out": str | None}


def main() -> None:
    """Entry point."""
    app.run(tradeoff, "tradeoff", KINDS)


def tradeoff(cfg: DictConfig, command: str = "tradeoff", cost: str = "nfe") -> None:
    """Measure every setting and write `out`.md and `out`.svg.

    Args:
        cfg: the composed configuration.
        command: whose it is.
        cost: what the chart draws accuracy over: nfe or positions.
    """
    out = cfg.out or f"outputs/{command}-{Path(cfg.model.path).name}"
    figure = _new_figure()  # missing matplotlib is told now, not after the measuring
    word_problems.check_count("problems", cfg.problems)
    number("repeats", cfg.repeats, "1 to 1000", low=1, high=1000, whole=True)
    seed("seed", cfg.seed)
    own.check("out", out, {Path(out + ".md"): own.TRADEOFF, Path(out + ".svg"): own.CHART})
    settings = {str(label): _setting(str(label), entry) for label, entry in cfg.settings.items()}
    options = {name: cfg[name] for name in ("gen_length", "block_length", "batch_size")}
    for label, (sampler, cache, more) in settings.items():
        # Bad values are refused before the model loads.
        with naming({name: f"settings.{label}.run.{name}" for name in more}):
            compatibility.check(sampler, cache, parse_options(options | more).cfg_scale)
    lm = app.load_model(cfg.model)

    scores = _measure(lm, word_problems.problems(cfg.problems, cfg.seed), settings, options, cfg.repeats)
    shared = ", ".join(f"{name}={value}" for name, value in options.items())
    where = f"{lm.backbone.device.type} with {torch.get_num_threads()} thread(s)"
    text = table(scores, f"{lm.name}, {cfg.problems} problems of seed {cfg.seed}, {shared}, {where}")
    draw(figure, scores, lm.name, cost)
    files: dict[Path, tuple[own.Kind, str | bytes]] = {
        Path(out + ".md"): (own.TRADEOFF, text),
        Path(out + ".svg"): (own.CHART, own.svg(figure)),
    }
    console = Console()
    if console.is_terminal:
        console.print(Markdown(text))
    else:
        print(text, flush=True)
    own.write("out", out, files)  # last, so that a full disk loses nothing that was measured
    print(f"written to {out}.md and {out}.svg")


def _setting(label: str, entry: DictConfig) -> tuple[Any, Any, dict[str, Any]]:
    """A sampler, a cache, and the options of the run that are their own."""
    fields: Any = OmegaConf.to_container(entry, resolve=True)
    place = f"settings.{label}"
    if not isinstance(fields, dict):
        raise ValueError(f"{place}={fields!r} is no setting; give {{_target_: dllm.samplers..., its options}}")
    more, cache = fields.pop("run", {}), fields.pop("cache", {"_target_": "dllm.cache.NoCache"})
    return build(place, fields, Sampler), build(f"{place}.cache", cache, Cache), more


def _measure(
    lm: dllm.LanguageModel,
    problems: list[word_problems.Problem],
    settings: dict[str, tuple[Any, Any, dict[str, Any]]],
    options: dict[str, Any],
    repeats: int,
) -> dict[str, Score]:
    """The scores of all settings; speeds are medians over runs that take turns."""
    console = Console(stderr=True)
    columns = TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    for sampler, cache, more in settings.values():
        # What a run refuses is told now, not when the settings before it are measured.
        dllm.generate(lm, problems[0].question, sampler, cache, **options | more)
    runs: dict[str, list[Score]] = {label: [] for label in settings}
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=len(problems) * len(settings) * repeats)
        count = lambda step: progress.advance(task, step.finished)  # noqa: E731
        for label in [*settings] * repeats:
            sampler, cache, more = settings[label]
            progress.update(task, description=terminal(label, one_line=True))
            runs[label].append(evaluate(lm, problems, sampler, cache, callback=count, **options | more))
    return {
        label: replace(scores[0], tokens_per_second=median(each.tokens_per_second for each in scores))
        for label, scores in runs.items()
    }


def table(scores: dict[str, Score], caption: str) -> str:
    """The scores as a Markdown table."""
    head = ["setting", "right answers", "95% interval", "whole chain right", "NFE", "TPF"]
    rows = [
        [
            markdown(label),
            f"{s.final:.1%}",
            f"{s.interval[0]:.1%} to {s.interval[1]:.1%}",
            f"{s.chain:.1%}",
            f"{s.nfe:.1f}",
            f"{s.tpf:.2f}",
        ]
        for label, s in scores.items()
    ]
    # Where NFE is the whole cost the rest would say nothing.
    cached = any(s.drift or s.refreshes for s in scores.values())
    more: dict[str, Callable[[Score], str]] = {}
    if cached or any(s.guide_nfe or s.extra_positions for s in scores.values()):
        more["positions"] = lambda s: f"{s.positions:,.0f}"
    if any(s.extra_positions > 0 for s in scores.values()):
        more["extra positions"] = lambda s: f"{s.extra_positions:,.0f}"
    if any(s.guide_nfe for s in scores.values()):
        more["guide NFE"] = lambda s: f"{s.guide_nfe:.1f}"
    if cached:
        more["refreshes"] = lambda s: f"{s.refreshes:.1f}"
        more["KV error"] = lambda s: f"{s.drift.kv_error:.1%}" if s.drift else ""
        more["KL"] = lambda s: f"{s.drift.kl:.3f}" if s.drift else ""
        more["flips"] = lambda s: f"{s.drift.flips:.1%}" if s.drift else ""
    if more:
        more["tokens/s"] = lambda s: f"{s.tokens_per_second:,.0f}"
    head += list(more)
    for row, s in zip(rows, scores.values(), strict=True):
        row += [cell(s) for cell in more.values()]
    return f"{markdown(caption)}\n\n{app.markdown(head, rows)}\n"


def draw(figure: Any, scores: dict[str, Score], title: str, cost: str = "nfe") -> None:
    """Draw accuracy over cost: one labelled point a setting with its 95% interval, one colour a family."""
    axes = figure.add_subplot()
    colours: dict[str, str] = {}
    # Neighbours are labelled above and below in turn, so that their labels keep apart.
    for place, (label, s) in enumerate(sorted(scores.items(), key=lambda entry: getattr(entry[1], cost))):
        family, setting = _split(label)
        known = family in colours
        colour = colours.setdefault(family, _COLOURS[len(colours) % len(_COLOURS)])
        low, high = s.interval
        # At 0% and 100% rounding may put the interval's end beyond the share itself.
        error = [[max(0.0, s.final - low)], [max(0.0, high - s.final)]]
        name = None if known else family
        axes.errorbar(getattr(s, cost), s.final, yerr=error, fmt="o", color=colour, capsize=3, markersize=5, label=name)
        if len(scores) > _MOST_LABELS:
            continue
        end, offset, side = ((low, -4, "top"), (high, 4, "bottom"))[place % 2]
        axes.annotate(
            setting, (getattr(s, cost), end), (0, offset), textcoords="offset points",
            ha="center", va=side, fontsize=9, color=colour,
        )  # fmt: skip
    names = {"nfe": "NFE per problem", "positions": "positions computed per problem"}
    axes.set(xlabel=names[cost], ylabel="right answers", title=title, ylim=(-0.08, 1.1))
    axes.set_xlim(0, max(getattr(s, cost) for s in scores.values()) * 1.1)
    axes.set_yticks([share / 5 for share in range(6)], [f"{share:.0%}" for share in (0, 0.2, 0.4, 0.6, 0.8, 1)])
    axes.grid(axis="y", color="#eeeeee")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right")


def _split(label: str) -> tuple[str, str]:
    """A label's sampler and its setting: "vanilla, 2 per step" and "threshold 0.9" alike."""
    family, _, setting = label.partition(" ")
    return family.rstrip(","), setting or family


def _new_figure() -> Any:
    """An empty figure on matplotlib's Agg canvas, which needs no display."""
    try:
        from matplotlib import rcParams
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("the chart needs matplotlib: pip install 'dllm-samplers[plot]'") from None
    # Text stays text, and the same numbers give the same file.
    rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "dllm"})
    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    return figure
