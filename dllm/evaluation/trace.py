"""The trace of a run: final tokens, when each was decoded, and the first samples step by step.

One safetensors file. Samples of different lengths are concatenated in each tensor; other data is JSON in the file's
metadata. Steps are stored sparsely, as values with a bit mask: changed canvas tokens, predictions (confidences as
float16), drafts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as serialise
from transformers import PreTrainedTokenizerBase

from dllm.decoding.result import padded
from dllm.evaluation import trace_html
from dllm.evaluation.packing import compact_json, flags, held, joined, small, split, spread
from dllm.files import parse_json, with_sorted_header, write_whole
from dllm.models.tokenizers import text_of
from dllm.stored import misfit

FORMAT, VERSION = "dllm-trace", 1
# Stored arrays of frames and their dtypes; None for the smallest integer type.
_FRAMES: dict[str, Any] = {
    "prompt": None, "nfe": None, "canvas": None, "predicted": None, "drafted": None, "confidence": np.float16,
    "changed": np.uint8, "asked": np.uint8, "drafts": np.uint8, "computed": np.uint8,
}  # fmt: skip


_LARGEST = 1.01  # probability, with rounding in half precision
_MOST = 1 << 27  # maximum size of a table, including padding; limits allocation for invalid files
_PADDED, _TIMES = 1 << 23, 32  # if it is larger than the first, it is at most so many times its rows


class _Metadata(TypedDict):
    """The JSON metadata."""

    ids: list[str]
    lengths: list[int]
    width: int
    words: dict[str, str]
    mask_token_id: int
    eos_token_ids: list[int]
    frames: list[tuple[str, int, int, int]]


@dataclass(frozen=True)
class Frames:
    """Decoding of one sample, step by step: S steps, P prompt tokens, G generated positions.

    Attributes:
        id: of the sample.
        prompt: (P,) its tokens.
        canvas: (S, G) tokens after each step, including [MASK].
        predicted: (S, G) prediction of the step's latest forward; [MASK] where not requested.
        confidence: (S, G) of the prediction; NaN where not requested. Stored with three digits.
        drafted: (S, G) token proposed as a draft in this step; [MASK] where none. The draft is accepted where the
            canvas has it after the step, else rejected.
        computed: (S, P + G) positions computed in the step; the others were read from the cache.
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
        commit_step: (N, G) forward after which each was decoded; -1 where never.
        confidence: (N, G) when committed; NaN where unknown.
        frames: the first samples, step by step.
        words: text of each token id that occurs; {} without a tokenizer.
        mask_token_id: id of [MASK].
        eos_token_ids: end-of-text ids.
        lengths: generated positions of each row; () if all have G.
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

    def _repr_html_(self) -> str:
        return trace_html.table(self)

    def save(self, path: Path) -> None:
        """Write the file atomically; equal content gives equal bytes.

        Raises:
            ValueError: inconsistent shapes.
        """
        data = with_sorted_header(serialise(_tensors(self), _metadata(self)))
        write_whole(path, data)

    @staticmethod
    def load(path: Path) -> Trace:
        """Read a file that `save` wrote.

        Raises:
            ValueError: the file is missing, not a trace, damaged, or of another version.
        """
        results, again = path.with_name("results.json"), "make it again"
        if results.is_file():  # a finished run is not repeated
            again = f"remove {results} to run that setting again"
        if not path.is_file():
            raise ValueError(f"{path} is not there; give a trace, which a run leaves as trace.safetensors")
        try:
            with safe_open(path, framework="numpy") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path} is not a trace or damaged ({error}); {again}") from None
        if metadata.get("format") != FORMAT:
            raise ValueError(f"{path} is not a trace; {again}, or give the trace.safetensors of a run")
        if metadata.get("version") != str(VERSION):
            raise ValueError(
                f"{path} is a trace of version {metadata.get('version')}, this dllm reads version {VERSION}; "
                f"{again}, or use the dllm that wrote it"
            )
        try:
            return _trace(metadata, tensors)
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError) as error:
            raise ValueError(f"{path} is damaged ({type(error).__name__}: {error}); {again}") from None


def words_of(
    tokenizer: PreTrainedTokenizerBase | None,
    completions: Sequence[Sequence[int]],
    frames: Sequence[Frames],
    mask_token_id: int,
) -> dict[int, str]:
    """The text of each token that occurs; {} without a tokenizer."""
    if tokenizer is None:
        return {}
    used = {token for completion in completions for token in completion} | {mask_token_id}
    for each in frames:
        for tokens in (each.prompt, each.canvas, each.predicted, each.drafted):
            used |= set(np.unique(tokens).tolist())
    return {token: text_of(tokenizer, [token]) for token in sorted(used)}


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
    return {"format": FORMAT, "version": str(VERSION)} | {name: compact_json(value) for name, value in fields.items()}


def _tensors(trace: Trace) -> dict[str, NDArray[Any]]:
    if {trace.tokens.shape, trace.commit_step.shape, trace.confidence.shape} != {(len(trace.ids), _width(trace))}:
        raise ValueError(
            f"a trace of {len(trace.ids)} ids has tokens {trace.tokens.shape}, commit_step {trace.commit_step.shape}, "
            f"confidence {trace.confidence.shape}; give (N, G) arrays"
        )
    rows = list(enumerate(_lengths(trace)))
    tensors: dict[str, NDArray[Any]] = {
        "tokens": small(joined(trace.tokens[row, :length] for row, length in rows)),
        "commit_step": small(joined(trace.commit_step[row, :length] for row, length in rows)),
        "confidence": joined(trace.confidence[row, :length] for row, length in rows).astype(np.float32),
    }
    packed = [_pack(each, trace.mask_token_id) for each in trace.frames]
    for name, kind in _FRAMES.items():
        values = joined(each[name] for each in packed)
        tensors[f"frames.{name}"] = small(values) if kind is None else values.astype(kind)
    return tensors


def _pack(frames: Frames, mask: int) -> dict[str, NDArray[Any]]:
    _check(frames)
    before = np.vstack([np.full((1, frames.canvas.shape[1]), mask), frames.canvas[:-1]])[: len(frames.canvas)]
    changed, drafts = frames.canvas != before, frames.drafted != mask
    asked = (frames.predicted != mask) | ~np.isnan(frames.confidence)
    return {
        "prompt": frames.prompt, "nfe": frames.nfe, "computed": np.packbits(frames.computed),
        "canvas": frames.canvas[changed], "changed": np.packbits(changed),
        "predicted": frames.predicted[asked], "confidence": frames.confidence[asked], "asked": np.packbits(asked),
        "drafted": frames.drafted[drafts], "drafts": np.packbits(drafts),
    }  # fmt: skip


def _trace(metadata: Mapping[str, str], tensors: Mapping[str, NDArray[Any]]) -> Trace:
    fields = {name: parse_json(text) for name, text in metadata.items() if name not in ("format", "version")}
    if wrong := misfit(fields, _Metadata):
        raise ValueError(wrong)
    lengths, eos, mask, width = (fields[name] for name in ("lengths", "eos_token_ids", "mask_token_id", "width"))
    if len(fields["ids"]) != len(lengths):
        raise ValueError("ids and lengths differ in number")
    most = min(_MOST, max(_PADDED, _TIMES * sum(lengths)))
    if min((width, *lengths)) < 0 or max(lengths, default=width) > width or width * len(lengths) > most:
        raise ValueError(f"rows of {width} positions hold {lengths[:4]} and so on")
    for name in (
        "tokens",
        "commit_step",
        *(f"frames.{each}" for each in ("prompt", "canvas", "predicted", "drafted", "nfe")),
    ):
        if tensors[name].dtype.kind not in "iu" or tensors[name].ndim != 1:
            raise ValueError(f"{name} holds {tensors[name].dtype}")
    for name in ("confidence", "frames.confidence"):
        shares = tensors[name]
        if shares.dtype.kind != "f" or ((shares < 0) | (shares > _LARGEST)).any():  # NaN: none
            raise ValueError(f"{name} holds what is no probability")
    return Trace(
        ids=tuple(map(str, fields["ids"])),
        tokens=padded(split(tensors["tokens"], lengths), eos[0] if eos else mask, width=width),
        commit_step=padded(split(tensors["commit_step"], lengths), -1, width=width),
        confidence=padded(split(tensors["confidence"], lengths), np.nan, np.float32, width),
        frames=_frames(fields["frames"], tensors, mask),
        words={int(token): str(text) for token, text in fields["words"].items()},
        mask_token_id=mask,
        eos_token_ids=tuple(eos),
        lengths=tuple(lengths) if set(lengths) - {width} else (),
    )


def _frames(shapes: Sequence[Any], tensors: Mapping[str, NDArray[Any]], mask: int) -> tuple[Frames, ...]:
    sizes = [(int(steps), int(prompt), int(generated)) for _, steps, prompt, generated in shapes]
    cut = lambda name, counts: split(tensors[f"frames.{name}"], counts)  # noqa: E731
    canvases, columns = [(s, g) for s, _, g in sizes], [(s, p + g) for s, p, g in sizes]
    bytes_of = lambda tables: [-(-rows * width // 8) for rows, width in tables]  # noqa: E731
    where = {
        name: [flags(part, size) for part, size in zip(cut(name, bytes_of(tables)), tables, strict=True)]
        for name, tables in (("changed", canvases), ("asked", canvases), ("drafts", canvases), ("computed", columns))
    }
    places = {"canvas": "changed", "predicted": "asked", "confidence": "asked", "drafted": "drafts"}
    found = {name: cut(name, [int(each.sum()) for each in where[place]]) for name, place in places.items()}
    found |= {"prompt": cut("prompt", [p for _, p, _ in sizes]), "nfe": cut("nfe", [s for s, _, _ in sizes])}
    frames = []
    for number, (identity, *_) in enumerate(shapes):
        at = {name: each[number] for name, each in where.items()}
        own = {name: each[number] for name, each in found.items()}
        frames.append(
            Frames(
                id=str(identity),
                prompt=own["prompt"].astype(np.int64),
                canvas=held(spread(own["canvas"], at["changed"], mask, np.int64), at["changed"]),
                predicted=spread(own["predicted"], at["asked"], mask, np.int64),
                confidence=spread(own["confidence"], at["asked"], np.nan, np.float32),
                drafted=spread(own["drafted"], at["drafts"], mask, np.int64),
                computed=at["computed"],
                nfe=own["nfe"].astype(np.int64),
            )
        )
    return tuple(frames)


def _check(frames: Frames) -> None:
    steps, generated = frames.canvas.shape
    names = ("canvas", "predicted", "drafted", "confidence")
    expected: dict[str, tuple[int, ...]] = dict.fromkeys(names, (steps, generated))
    expected |= {"computed": (steps, len(frames.prompt) + generated), "nfe": (steps,)}
    for name, shape in expected.items():
        if getattr(frames, name).shape != shape:
            raise ValueError(f"frames of {frames.id!r}: {name} is {getattr(frames, name).shape}; give {shape}")


def _width(trace: Trace) -> int:
    return int(trace.tokens.shape[1]) if trace.tokens.ndim == 2 else -1


def _lengths(trace: Trace) -> tuple[int, ...]:
    lengths = trace.lengths or (_width(trace),) * len(trace.ids)
    if len(lengths) != len(trace.ids) or any(not 0 <= length <= _width(trace) for length in lengths):
        raise ValueError(f"lengths={lengths} of {len(trace.ids)} rows; give one of 0 to {_width(trace)} for each")
    return tuple(map(int, lengths))
