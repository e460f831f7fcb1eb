"""The record of a run: final tokens, when each was decoded, and the first few samples step by step.

One safetensors file. Samples of different lengths stand one behind another in each tensor; what is no number stands
as JSON in the file's metadata. Token ids and steps are stored as small as they fit, confidences of single steps as
float16, computed columns as bits.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as serialise

FORMAT, VERSION = "dllm-trace", 1
_TOKENS = ("canvas", "predicted", "drafted")


@dataclass(frozen=True)
class Frames:
    """Decoding of one sample, step by step: S steps, P prompt tokens, G generated positions.

    Attributes:
        id: the sample's.
        prompt: (P,) its tokens.
        canvas: (S, G) tokens after each step; [MASK] where open.
        predicted: (S, G) what the step's latest forward predicted; [MASK] where not asked.
        confidence: (S, G) of the prediction; NaN where not asked. A file keeps three digits of it.
        drafted: (S, G) token proposed as a draft in this step; [MASK] where none. The draft is accepted where the
            canvas holds it after the step, else rejected.
        computed: (S, P + G) columns the step computed anew; the others were read from the cache.
        nfe: (S,) forwards so far.
    """

    id: str
    prompt: NDArray[np.int64]
    canvas: NDArray[np.int64]
    predicted: NDArray[np.int64]
    confidence: NDArray[np.float32]
    drafted: NDArray[np.int64]
    computed: NDArray[np.bool_]
    nfe: NDArray[np.int64]


@dataclass(frozen=True)
class Trace:
    """A run of N samples and at most G generated positions.

    Attributes:
        ids: of the N samples.
        tokens: (N, G) final tokens; shorter rows are padded with end-of-text at the right.
        commit_step: (N, G) when each was decoded; -1 where never.
        confidence: (N, G) when committed; NaN where unknown.
        frames: the first few samples, step by step.
        words: text of each token id that occurs; {} without a tokenizer.
        mask_token_id: [MASK].
        eos_token_ids: end of text.
        lengths: generated positions of each row; () where all have G.
    """

    ids: tuple[str, ...]
    tokens: NDArray[np.int64]
    commit_step: NDArray[np.int64]
    confidence: NDArray[np.float32]
    frames: tuple[Frames, ...]
    words: dict[int, str]
    mask_token_id: int
    eos_token_ids: tuple[int, ...]
    lengths: tuple[int, ...] = ()

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all; equal content gives equal bytes.

        Raises:
            ValueError: shapes that do not belong together.
        """
        data = _with_sorted_header(serialise(_tensors(self), _metadata(self)))
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            unfinished.write_bytes(data)
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)

    @staticmethod
    def load(path: Path) -> Trace:
        """Read a file that `save` wrote.

        Raises:
            ValueError: it is not there, no trace, damaged, or of another version.
        """
        if not path.is_file():
            raise ValueError(f"{path} is not there; give a trace, which a run leaves as trace.safetensors")
        try:
            with safe_open(path, framework="numpy") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path} is no trace or damaged ({error}); make it again") from None
        if metadata.get("format") != FORMAT:
            raise ValueError(f"{path} is no trace; give the trace.safetensors of a run")
        if metadata.get("version") != str(VERSION):
            raise ValueError(
                f"{path} is a trace of version {metadata.get('version')}, this dllm reads version {VERSION}; "
                "make it again, or use the dllm that wrote it"
            )
        try:
            return _trace(metadata, tensors)
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise ValueError(f"{path} is damaged ({type(error).__name__}: {error}); make it again") from None


def _metadata(trace: Trace) -> dict[str, str]:
    fields = {
        "ids": trace.ids,
        "lengths": _lengths(trace),
        "width": trace.tokens.shape[1],
        "words": {str(token): trace.words[token] for token in sorted(trace.words)},
        "mask_token_id": trace.mask_token_id,
        "eos_token_ids": trace.eos_token_ids,
        # Steps, prompt tokens and generated positions of each sample with frames.
        "frames": [(each.id, len(each.canvas), len(each.prompt), each.canvas.shape[1]) for each in trace.frames],
    }
    return {"format": FORMAT, "version": str(VERSION)} | {name: _json(value) for name, value in fields.items()}


def _tensors(trace: Trace) -> dict[str, NDArray[Any]]:
    if {trace.tokens.shape, trace.commit_step.shape, trace.confidence.shape} != {(len(trace.ids), _width(trace))}:
        raise ValueError(
            f"a trace of {len(trace.ids)} ids has tokens {trace.tokens.shape}, commit_step {trace.commit_step.shape}, "
            f"confidence {trace.confidence.shape}; give (N, G) arrays"
        )
    rows = list(enumerate(_lengths(trace)))
    tensors: dict[str, NDArray[Any]] = {
        "tokens": _small(_joined(trace.tokens[row, :length] for row, length in rows)),
        "commit_step": _small(_joined(trace.commit_step[row, :length] for row, length in rows)),
        "confidence": _joined(trace.confidence[row, :length] for row, length in rows).astype(np.float32),
    }
    for each in trace.frames:
        _check(each)
    tensors["frames.prompt"] = _small(_joined(each.prompt for each in trace.frames))
    tensors["frames.nfe"] = _small(_joined(each.nfe for each in trace.frames))
    tensors["frames.confidence"] = _joined(each.confidence for each in trace.frames).astype(np.float16)
    tensors["frames.computed"] = _joined(np.packbits(each.computed) for each in trace.frames).astype(np.uint8)
    for name in _TOKENS:
        tensors[f"frames.{name}"] = _small(_joined(getattr(each, name) for each in trace.frames))
    return tensors


def _trace(metadata: Mapping[str, str], tensors: Mapping[str, NDArray[Any]]) -> Trace:
    fields = {name: json.loads(text) for name, text in metadata.items() if name not in ("format", "version")}
    lengths, eos = [int(length) for length in fields["lengths"]], [int(token) for token in fields["eos_token_ids"]]
    pad = eos[0] if eos else int(fields["mask_token_id"])
    rows = lambda name, fill, kind: _padded(tensors[name], lengths, int(fields["width"]), fill, kind)  # noqa: E731
    if len(fields["ids"]) != len(lengths):
        raise ValueError("ids and lengths differ in number")
    return Trace(
        ids=tuple(map(str, fields["ids"])),
        tokens=rows("tokens", pad, np.int64),
        commit_step=rows("commit_step", -1, np.int64),
        confidence=rows("confidence", np.nan, np.float32),
        frames=_frames(fields["frames"], tensors),
        words={int(token): str(text) for token, text in fields["words"].items()},
        mask_token_id=int(fields["mask_token_id"]),
        eos_token_ids=tuple(eos),
        lengths=tuple(lengths) if set(lengths) - {int(fields["width"])} else (),
    )


def _frames(shapes: Sequence[Any], tensors: Mapping[str, NDArray[Any]]) -> tuple[Frames, ...]:
    counts: dict[str, Callable[[int, int, int], int]] = {
        **dict.fromkeys((*_TOKENS, "confidence"), lambda steps, prompt, generated: steps * generated),
        "prompt": lambda steps, prompt, generated: prompt,
        "nfe": lambda steps, prompt, generated: steps,
        "computed": lambda steps, prompt, generated: -(-steps * (prompt + generated) // 8),
    }
    sizes = [(int(steps), int(prompt), int(generated)) for _, steps, prompt, generated in shapes]
    parts = {
        name: _split(tensors[f"frames.{name}"], [count(*each) for each in sizes]) for name, count in counts.items()
    }
    frames = []
    for number, ((identity, *_), (steps, prompt, generated)) in enumerate(zip(shapes, sizes, strict=True)):
        own = {name: part[number] for name, part in parts.items()}
        columns = prompt + generated
        frames.append(
            Frames(
                id=str(identity),
                prompt=own["prompt"].astype(np.int64),
                **{name: own[name].reshape(steps, generated).astype(np.int64) for name in _TOKENS},
                confidence=own["confidence"].reshape(steps, generated).astype(np.float32),
                computed=np.unpackbits(own["computed"], count=steps * columns).reshape(steps, columns).astype(bool),
                nfe=own["nfe"].astype(np.int64),
            )
        )
    return tuple(frames)


def _check(frames: Frames) -> None:
    steps, generated = frames.canvas.shape
    shapes = {name: getattr(frames, name).shape for name in (*_TOKENS, "confidence", "computed", "nfe")}
    expected: dict[str, tuple[int, ...]] = dict.fromkeys((*_TOKENS, "confidence"), (steps, generated))
    expected |= {"computed": (steps, len(frames.prompt) + generated), "nfe": (steps,)}
    for name, shape in shapes.items():
        if shape != expected[name]:
            raise ValueError(f"frames of {frames.id!r}: {name} is {shape}; give {expected[name]}")


def _width(trace: Trace) -> int:
    return int(trace.tokens.shape[1]) if trace.tokens.ndim == 2 else -1


def _lengths(trace: Trace) -> tuple[int, ...]:
    lengths = trace.lengths or (_width(trace),) * len(trace.ids)
    if len(lengths) != len(trace.ids) or any(not 0 <= length <= _width(trace) for length in lengths):
        raise ValueError(f"lengths={lengths} of {len(trace.ids)} rows; give one of 0 to {_width(trace)} for each")
    return tuple(map(int, lengths))


def _joined(parts: Iterable[NDArray[Any]]) -> NDArray[Any]:
    flat = [np.asarray(part).reshape(-1) for part in parts]
    return np.concatenate(flat) if flat else np.zeros(0, np.int16)


def _split(joined: NDArray[Any], counts: Sequence[int]) -> list[NDArray[Any]]:
    ends = np.cumsum([0, *counts])
    if ends[-1] != len(joined) or min(counts, default=0) < 0:
        raise ValueError(f"{len(joined)} values where {ends[-1]} belong")
    return [joined[start:end] for start, end in pairwise(ends)]


def _padded(joined: NDArray[Any], lengths: Sequence[int], width: int, fill: float, kind: Any) -> NDArray[Any]:
    padded = np.full((len(lengths), width), fill, dtype=kind)
    for row, part in enumerate(_split(joined, lengths)):
        padded[row, : len(part)] = part
    return padded


def _small(values: NDArray[Any]) -> NDArray[Any]:
    """As int16 where that holds all values, else as int32."""
    fits = values.size == 0 or (values.min() >= -(2**15) and values.max() < 2**15)
    return values.astype(np.int16 if fits else np.int32)


def _json(value: Any) -> str:
    # Halves of surrogate pairs, which broken text may hold, are no JSON to the reader of the header.
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return text.encode("utf-8", "replace").decode("utf-8")


def _with_sorted_header(data: bytes) -> bytes:
    """The file with its header in a fixed order: safetensors writes metadata as its hash table happens to lie."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    # Tensors keep the order of their bytes.
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    order = sorted(header, key=lambda name: header[name].get("data_offsets", [-1])[0] if name != "__metadata__" else -1)
    text = json.dumps({name: header[name] for name in order}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[8 + length :]
