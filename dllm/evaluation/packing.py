"""Arrays of many samples in few and small ones, and safetensors files whose bytes their content decides."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dllm.files import parse_json


def joined(parts: Iterable[NDArray[Any]]) -> NDArray[Any]:
    """Arrays of any shape, one behind another."""
    flat = [np.asarray(part).reshape(-1) for part in parts]
    return np.concatenate(flat) if flat else np.zeros(0, np.int16)


def split(values: NDArray[Any], counts: Sequence[int]) -> list[NDArray[Any]]:
    """What `joined` put together.

    Raises:
        ValueError: the counts do not add up.
    """
    ends = np.cumsum([0, *counts])
    if ends[-1] != len(values) or min(counts, default=0) < 0:
        raise ValueError(f"{len(values)} values where {ends[-1]} belong")
    return [values[start:end] for start, end in pairwise(ends)]


def small(values: NDArray[Any]) -> NDArray[Any]:
    """Whole numbers as int16 where that holds all of them, else as int32."""
    fits = values.size == 0 or (values.min() >= -(2**15) and values.max() < 2**15)
    return values.astype(np.int16 if fits else np.int32)


def flags(packed: NDArray[np.uint8], shape: tuple[int, int]) -> NDArray[np.bool_]:
    """What `np.packbits` packed."""
    return np.unpackbits(packed, count=shape[0] * shape[1]).reshape(shape).astype(bool)


def spread(values: NDArray[Any], where: NDArray[np.bool_], fill: float, kind: Any) -> NDArray[Any]:
    """Values put back to their places."""
    table = np.full(where.shape, fill, dtype=kind)
    table[where] = values
    return table


def held(values: NDArray[Any], changed: NDArray[np.bool_]) -> NDArray[Any]:
    """Each row where it changed, and as the row before it elsewhere."""
    steps = np.arange(len(values))[:, None]
    latest = np.maximum.accumulate(np.where(changed, steps, 0), axis=0) if len(values) else np.zeros(values.shape, int)
    return np.take_along_axis(values, latest, axis=0)


def compact_json(value: Any) -> str:
    """JSON that every reader takes: halves of surrogate pairs, which broken text may hold, are replaced."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return text.encode("utf-8", "replace").decode("utf-8")


def with_sorted_header(data: bytes) -> bytes:
    """A safetensors file with its metadata in order: safetensors writes them as its hash table happens to lie."""
    length = int.from_bytes(data[:8], "little")
    header = parse_json(data[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[8 + length :]
