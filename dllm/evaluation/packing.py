"""Packing the arrays of many samples into few small ones, and deterministic safetensors files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray


def joined(parts: Iterable[NDArray[Any]]) -> NDArray[Any]:
    """Arrays of any shape, flattened and concatenated."""
    flat = [np.asarray(part).reshape(-1) for part in parts]
    return np.concatenate(flat) if flat else np.zeros(0, np.int16)


def split(values: NDArray[Any], counts: Sequence[int]) -> list[NDArray[Any]]:
    """Inverse of `joined`.

    Raises:
        ValueError: the counts do not add up.
    """
    ends = np.cumsum([0, *counts])
    if ends[-1] != len(values) or min(counts, default=0) < 0:
        raise ValueError(f"{len(values)} values where {ends[-1]} belong")
    return [values[start:end] for start, end in pairwise(ends)]


def small(values: NDArray[Any]) -> NDArray[Any]:
    """Integers as int16 if possible, else as int32."""
    fits = values.size == 0 or (values.min() >= -(2**15) and values.max() < 2**15)
    return values.astype(np.int16 if fits else np.int32)


def flags(packed: NDArray[np.uint8], shape: tuple[int, int]) -> NDArray[np.bool_]:
    """Inverse of `np.packbits`."""
    return np.unpackbits(packed, count=shape[0] * shape[1]).reshape(shape).astype(bool)


def spread(values: NDArray[Any], where: NDArray[np.bool_], fill: float, kind: Any) -> NDArray[Any]:
    """Values scattered to the True positions of a mask."""
    table = np.full(where.shape, fill, dtype=kind)
    table[where] = values
    return table


def held(values: NDArray[Any], changed: NDArray[np.bool_]) -> NDArray[Any]:
    """Each row where it changed, and the previous row elsewhere."""
    steps = np.arange(len(values))[:, None]
    latest = np.maximum.accumulate(np.where(changed, steps, 0), axis=0) if len(values) else np.zeros(values.shape, int)
    return np.take_along_axis(values, latest, axis=0)


def compact_json(value: Any) -> str:
    """Valid UTF-8 JSON: lone surrogates are replaced."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return text.encode("utf-8", "replace").decode("utf-8")
