"""The report as a self-contained HTML page: tables, plots, and a trace player."""

from __future__ import annotations

import json
import re
import shlex
import warnings
from base64 import b64encode
from collections.abc import Mapping, Sequence
from hashlib import sha256
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from dllm.checks import Notice
from dllm.decoding.colours import RAMPS
from dllm.escape import terminal
from dllm.evaluation.run_folder import load_trace
from dllm.evaluation.trace import Frames, Trace
from dllm.reports import plots, table
from dllm.reports.player import word
from dllm.reports.runs import Group, MeasuredRun, Sweep

_MOST = 2_000_000  # maximum characters of the samples of a run


def render(sweep: Sweep, drawn: Sequence[Mapping[str, str]], traces: int) -> str:
    """The page as HTML.

    Args:
        sweep: the sweep.
        drawn: plots as SVG of each group, by cost metric.
        traces: maximum number of runs with traces.
    """
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    template = environment.from_string(_file("page.html.jinja"))
    scripts = "\n".join(["", *map(_file, ("canvas.js", "table.js", "player.js")), ""])
    numbers = {id(run): number for number, run in enumerate(run for group in sweep.groups for run in group.runs)}
    rendered = template.render(
        sweep=sweep,
        tables=[_table(group, numbers) for group in sweep.groups],
        plots=[
            [(plots.COSTS[cost], Markup(_inline(svg, f"{cost}{place}-"))) for cost, svg in pictures.items()]
            for place, pictures in enumerate(drawn)
        ],
        areas=[table.areas(group) for group in sweep.groups],
        style=Markup(_file("canvas.css") + _file("page.css")),
        scripts=Markup(scripts),
        allowed=b64encode(sha256(scripts.encode()).digest()).decode(),
        data=Markup(_json(_player(sweep, traces))),
    )
    return terminal(rendered)


def chosen(sweep: Sweep, most: int) -> list[MeasuredRun]:
    """The runs whose traces are included.

    Of each group those on its front, evenly spaced; then the best of each sampler; then others, evenly spaced.
    """
    found = []
    for place, group in enumerate(sweep.groups):
        share = most // len(sweep.groups) + (place < most % len(sweep.groups))
        traced = [run for run in group.runs if run.trace is not None]
        kept = plots.spread([run for run in group.nfe_front if run.trace is not None], share)
        for run in traced:
            if len(kept) < share and run.sampler not in {each.sampler for each in kept}:
                kept.append(run)
        others = [run for run in traced if not any(run is each for each in kept)]
        found += kept + plots.spread(others, share - len(kept))
    return found


def _table(group: Group, numbers: Mapping[int, int]) -> dict[str, Any]:
    shown = table.columns(group)
    rows = [
        {
            "number": numbers[id(run)],
            "reference": run.reference,
            "cells": [{"text": column.text(run), "value": column.value(run)} for column in shown],
        }
        for run in group.runs
    ]
    return {"title": group.title, "columns": shown, "rows": rows}


def _player(sweep: Sweep, traces: int) -> dict[str, Any]:
    included = {id(run) for run in chosen(sweep, traces)}
    runs = []
    for group in sweep.groups:
        for run in group.runs:
            entry: dict[str, Any] = {
                "label": terminal(run.label, one_line=True),
                "group": terminal(group.title, one_line=True),
                "samples": [],
            }
            if run.trace is None:
                entry["note"] = "This run left no trace."
            elif id(run) in included:
                entry |= _loaded(run.trace, run.place)
            else:
                entry["note"] = f"Its trace is not on this page; see it with: {_command(run.place)}"
            runs.append(entry)
    return {"ramps": RAMPS, "runs": runs}


def _loaded(file: Path, place: str) -> dict[str, Any]:
    """A trace for the player; a damaged or changed one is skipped with a warning."""
    try:
        return _trace(load_trace(file), place)
    except ValueError as error:
        warnings.warn(f"{terminal(error, one_line=True)}; the page omits this trace", Notice, stacklevel=2)
        return {
            "note": f"Its trace cannot be read: {place}/{file.name} is damaged, changed or of another version of dllm."
        }


def _trace(trace: Trace, place: str) -> dict[str, Any]:
    recorded = [frames for frames in trace.frames if len(frames.canvas)]
    samples: list[dict[str, Any]] = []
    size = 0
    for frames in recorded:
        sample = _sample(frames, trace.mask_token_id)
        size += len(_json(sample))
        if samples and size > _MOST:
            break
        samples.append(sample)
    used = {
        token
        for frames in recorded[: len(samples)]
        for name in ("prompt", "canvas", "predicted", "drafted")
        for token in np.unique(getattr(frames, name)).tolist()
    }
    note = "" if recorded else "This run recorded no sample step by step."
    if left := len(recorded) - len(samples):
        note = f"{left} more of its samples would make this page heavy; see them with: {_command(place)}"
    words = {str(token): word(trace, token) for token in sorted(used)}
    return {"mask": trace.mask_token_id, "words": words, "samples": samples, "note": note}


def _command(place: str) -> str:
    return f"dllm show {shlex.quote(terminal(place, one_line=True))} (in the sweep's folder)"


def _sample(frames: Frames, mask: int) -> dict[str, Any]:
    """A sample for the player: per step only changes, predictions, and runs of computed positions."""
    before = np.vstack([np.full((1, frames.canvas.shape[1]), mask), frames.canvas[:-1]])
    steps = []
    for step, (canvas, computed) in enumerate(zip(frames.canvas, frames.computed, strict=True)):
        guesses = _where(frames.predicted[step], frames.predicted[step] != mask)
        shares = [frames.confidence[step, place] for place, _ in guesses]
        steps.append(
            {
                "written": _where(canvas, canvas != before[step]),
                # Confidences are stored in thousandths.
                "predicted": [
                    [*guess, None if np.isnan(share) else round(1000 * float(share))]
                    for guess, share in zip(guesses, shares, strict=True)
                ],
                "drafted": _where(frames.drafted[step], frames.drafted[step] != mask),
                "computed": _runs(computed),
                "nfe": int(frames.nfe[step]),
            }
        )
    return {
        "id": terminal(frames.id, one_line=True),
        "prompt": frames.prompt.tolist(),
        "length": frames.canvas.shape[1],
        "steps": steps,
    }


def _where(tokens: Any, chosen: Any) -> list[list[int]]:
    return [[int(place), int(tokens[place])] for place in np.flatnonzero(chosen)]


def _runs(flags: Sequence[bool]) -> list[list[int]]:
    """Starts and ends of runs of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], np.asarray(flags, np.int8), [0]])))
    return edges.reshape(-1, 2).tolist()


def _inline(svg: str, prefix: str) -> str:
    """An SVG to embed in a page: with unique ids and the colours of the page."""
    svg = re.sub(r"(\bid=\"|href=\"#|url\(#)", rf"\g<1>{prefix}", svg[svg.index("<svg") :])
    return svg.replace(plots.INK, "currentColor").replace(plots.GRID, "var(--line)")


def _json(value: Any) -> str:
    """JSON that is safe in a script element."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _file(name: str) -> str:
    return (resources.files("dllm.reports") / name).read_text(encoding="utf-8")
