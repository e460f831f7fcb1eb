"""Runs one row with a cache and tells which columns each forward computed."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import dllm
from dllm.cache.selection import Selection
from toys import Spying


def planned(
    lm: dllm.LanguageModel, given: int, cache: Any, sampler: Any, **options: Any
) -> tuple[list[list[int]], dllm.Generation]:
    """The columns of each forward, and the result, of a row with that many given tokens."""
    spy = Spying(cache)
    prompt = [5 + i for i in range(given)]
    result = dllm.generate(lm, [prompt], sampler, spy, **{"stop_at_eos": False, "seed": 0} | options)
    return [forward[0] for forward in spy.log], result


def selected(columns: list[list[int]] | NDArray[np.int64], slots: list[int] | None = None, **others: Any) -> Selection:
    """These columns, (A, C), of a canvas of 20, of the rows in some slots; the first ones if none are given."""
    host = np.asarray(columns)
    at = np.arange(len(host)) if slots is None else np.asarray(slots)
    return Selection(
        **{
            "rows": at,
            "slots": at,
            "first": np.ones(len(host), dtype=bool),
            "host": host,
            "columns": torch.as_tensor(host),
            "span": (0, 20),
        }
        | others
    )
