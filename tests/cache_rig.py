"""Runs one row with a cache and tells which columns each forward computed."""

from __future__ import annotations

from typing import Any

import dllm
from toys import Spying


def planned(
    lm: dllm.LanguageModel, given: int, cache: Any, sampler: Any, **options: Any
) -> tuple[list[list[int]], dllm.Generation]:
    """The columns of each forward, and the result, of a row with that many given tokens."""
    spy = Spying(cache)
    prompt = [5 + i for i in range(given)]
    result = dllm.generate(lm, [prompt], sampler, spy, **{"stop_at_eos": False, "seed": 0} | options)
    return [forward[0] for forward in spy.log], result
