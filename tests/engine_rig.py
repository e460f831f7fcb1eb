"""Decodes with an engine that can be looked into between its steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import dllm
from dllm.api import prepare
from dllm.decoding.canvas import Canvas
from dllm.decoding.engine import Engine
from dllm.decoding.options import parse_options
from dllm.decoding.step import Step
from dllm.decoding.window import Change, Edit


def waiting_engine(
    lm: dllm.LanguageModel, ids: Sequence[Sequence[int]], sampler: Any, cache: Any = "none", **options: Any
) -> Engine:
    """An engine in which prompts wait."""
    return prepare(lm, ids, sampler, cache, parse_options(options))[1]


def observed(
    see: Callable[[Engine, Step], object],
    lm: dllm.LanguageModel,
    ids: Sequence[Sequence[int]],
    sampler: Any,
    cache: Any = "none",
    **options: Any,
) -> None:
    """Decode, and look at the engine after each step."""
    engine = waiting_engine(lm, ids, sampler, cache, **options)
    for step in engine.steps():
        see(engine, step)


def applied(canvas: Canvas, edit: Edit) -> Change:
    """What an edit of the latest window does, written and read."""
    canvas.write(edit)
    return canvas.read(edit)
