"""What a notebook shows of a trace: the canvas of the first samples after each step, as tables without scripts."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int

from dllm.decoding import html

if TYPE_CHECKING:
    from dllm.evaluation.trace import Frames, Trace

MOST_SAMPLES, MOST_STEPS, MOST_TOKENS = 4, 48, 512  # of a trace, of a sample, of a canvas
_CELL = "text-align:left;vertical-align:top;padding:.1em .6em;white-space:nowrap"


def table(trace: Trace) -> str:
    """The steps of each sample; the first one is unfolded."""
    recorded = [frames for frames in trace.frames if len(frames.canvas)]
    parts = [html.line([html.counted(len(trace.ids), "sample"), f"{len(recorded)} step by step"])]
    for number, frames in enumerate(recorded[:MOST_SAMPLES]):
        facts = f"{frames.id} · {html.counted(len(frames.canvas), 'step')} · NFE {frames.nfe[-1]}"
        parts.append(
            f"<details{'' if number else ' open'}><summary>{escape(html.visible(facts))}</summary>"
            f"{html.words([(_word(trace, token), html.SOFT, '') for token in frames.prompt[-MOST_TOKENS:].tolist()])}"
            f'<div style="max-height:28em;overflow:auto">{_steps(trace, frames)}</div></details>'
        )
    if len(recorded) > MOST_SAMPLES:
        parts.append(html.line([f"and {len(recorded) - MOST_SAMPLES} more"]))
    return html.box(parts)


def _steps(trace: Trace, frames: Frames) -> str:
    steps = len(frames.canvas)
    chosen = np.unique(np.linspace(0, steps - 1, min(steps, MOST_STEPS)).round().astype(int)).tolist()
    heads = "".join(f'<th style="{_CELL}">{name}</th>' for name in ("step", "NFE", "computed", "canvas"))
    before, rows = np.full(frames.canvas.shape[1], trace.mask_token_id), []
    for step in chosen:
        computed = f"{frames.computed[step].sum()} of {frames.computed.shape[1]}"
        facts = "".join(f'<td style="{_CELL}">{fact}</td>' for fact in (step + 1, frames.nfe[step], computed))
        cells = html.words(_canvas(trace, before, frames.canvas[step]))
        rows.append(f'<tr>{facts}<td style="text-align:left">{cells}</td></tr>')
        before = frames.canvas[step]
    left = html.line([f"and {html.counted(steps - len(chosen), 'more step')}"]) if len(chosen) < steps else ""
    return f'<table style="border-collapse:collapse;width:100%"><tr>{heads}</tr>{"".join(rows)}</table>{left}'


def _canvas(trace: Trace, before: Int[np.ndarray, " G"], tokens: Int[np.ndarray, " G"]) -> list[html.Cell]:
    """The canvas of a step, with what changed since the one before highlighted."""
    ends = np.isin(tokens, trace.eos_token_ids)
    shown = len(tokens)
    while shown > 1 and ends[shown - 1] and ends[shown - 2]:  # one stands for all at the end
        shown -= 1
    cells: list[html.Cell] = []
    for token, was in zip(tokens[: min(shown, MOST_TOKENS)].tolist(), before.tolist(), strict=False):
        if token == trace.mask_token_id:
            cells.append((_word(trace, token), html.OPEN if was == token else html.REVOKED, ""))
        else:
            cells.append((_word(trace, token), html.NEW if was != token else "", ""))
    if shown > MOST_TOKENS:
        cells.append((f" … and {html.counted(shown - MOST_TOKENS, 'more token')}", html.SOFT, ""))
    elif shown < len(tokens):
        cells.append((f" x{len(tokens) - shown + 1}", html.SOFT, ""))
    return cells


def _word(trace: Trace, token: int) -> str:
    if token == trace.mask_token_id:
        return "·"
    if token in trace.eos_token_ids:
        return "∎"
    return html.visible(trace.words.get(token, f" {token}"))
