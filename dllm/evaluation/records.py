"""Results and costs of single requests, stored one by one so that a run can be resumed."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dllm.decoding import request as decoding
from dllm.decoding.ending import cut
from dllm.decoding.engine import Engine
from dllm.decoding.result import Clock
from dllm.decoding.step import Answer, Step
from dllm.evaluation.trace import Frames


def sample_of(name: str) -> str:
    """The sample that an answer is to: its id without the number of the answer (`TASK/3#0`, `TASK/3#0.1`)."""
    return re.sub(r"#\d+(?:\.\d+)?$", "", name)


@dataclass(frozen=True)
class Query:
    """A request of an evaluation.

    Attributes:
        id: unique within a run.
        prompt: token ids.
        until: stop strings; tokens after them are neither kept nor counted.
        seed: of this request.
        length: positions that its task would generate: those of its baselines, where `gen_length` is auto.
    """

    id: str
    prompt: Sequence[int]
    until: tuple[str, ...] = ()
    seed: int = 0
    length: int = 128


@dataclass(frozen=True)
class Record:
    """One answered request.

    Attributes:
        id: of the request.
        text: decoded answer up to end-of-text and stop strings; None without a tokenizer.
        completion: (G,) the generated region.
        commit_step: (G,) the row's forward after which each position had its final token; -1 where never decoded.
        confidence: (G,) probability of the token in the prediction that committed it; None where that predicted
            another token or none.
        tokens: generated tokens up to and including end-of-text or the token that completes a stop string.
        nfe: denoiser forwards.
        guide_nfe: guide forwards.
        seconds: its share of the wall time: that of each step, divided by the number of rows.
        latency: wall time from its first step to its last.
        guide_seconds: its share of the guide's wall time, part of `seconds`.
        positions: computed positions.
        canvas: positions of its canvas without padding, the mean over its forwards.
        refreshes: forwards in which a cache recomputed every position.
        peak_memory: bytes, since decoding began.
        drift: of each measured forward: relative error of keys and values, summed KL divergence in nats, positions
            whose best token differed, requested positions (`dllm.decoding.drift.Measurement`).
    """

    id: str
    text: str | None
    completion: list[int]
    commit_step: list[int]
    confidence: list[float | None]
    tokens: int
    nfe: int
    guide_nfe: int
    seconds: float
    latency: float
    guide_seconds: float
    positions: int
    canvas: float
    refreshes: int
    peak_memory: int
    drift: list[list[float]]

    def misfit(self) -> str | None:
        """What is invalid in a stored record; None if nothing is."""
        if not len(self.completion) == len(self.commit_step) == len(self.confidence) > 0:
            return "completion, commit_step and confidence differ in length"
        costs = ("tokens", "guide_nfe", "latency", "guide_seconds", "positions", "canvas", "refreshes", "peak_memory")
        finite = {name: getattr(self, name) for name in (*costs, "nfe", "seconds")}
        least = {"nfe": 1, "seconds": 1e-12}
        for name, value in finite.items():
            if not least.get(name, 0) <= value < float("inf"):
                return f"{name}={value} is out of range"
        if min(self.commit_step) < -1:
            return f"commit_step={min(self.commit_step)} is out of range"
        if not all(len(forward) == 4 and all(0 <= each < 2**31 for each in forward[2:]) for forward in self.drift):
            return "drift holds something other than measurements"
        return None


def follow(
    prepared: Sequence[decoding.Request], engine: Engine, requests: Sequence[Query], traced: frozenset[str]
) -> Iterator[tuple[Record, Frames | None]]:
    """Decode, yielding each request's record as soon as it is finished.

    Args:
        prepared: the requests of the engine.
        engine: with these queued, as 0, 1, 2, ...
        requests: the same, as queries.
        traced: ids of those whose steps are recorded.

    Raises:
        ValueError: a request fails.
    """
    clock, notes = Clock(engine.lm.device), {number: Notes() for number in range(len(requests))}
    for step in _steps(engine):
        written = step.tokens == step.predicted
        sure = np.where(written, step.confidence, np.nan)  # not the probability of another token
        for event in step:
            request, note, own = requests[event.id], notes[event.id], slice(int(step.padding[event.entry]), None)
            note.confidence(step, event.entry, own, sure)
            if request.id in traced:
                note.trace(step, event.entry, own, len(request.prompt))
            if event.answer is None:
                continue
            if event.answer.error is not None:
                raise ValueError(f"{request.id} has no answer: {event.answer.error}")
            record = note.record(event.answer, request, prepared[event.id], clock)
            yield record, notes.pop(event.id).frames(request)


def _steps(engine: Engine) -> Iterator[Step]:
    with engine:
        yield from engine.steps()


class Notes:
    """Data of a request beyond its answer."""

    def __init__(self) -> None:
        self._confidence: NDArray[np.float64] | None = None
        self._drift: list[list[float]] = []
        self._trace: list[dict[str, Any]] = []

    def confidence(self, step: Step, entry: int, own: slice, sure: NDArray[np.float64]) -> None:
        """Record the confidence of committed tokens, and the approximation error of the cache."""
        change, before = step.change, self._confidence
        known = np.where(change.committed[entry, own], sure[entry, own], np.nan if before is None else before)
        self._confidence = np.where((change.revoked | change.filled)[entry, own], np.nan, known)
        for each in step.drift:
            for name, *values in zip(each.ids, each.kv_error, each.kl, each.flips, each.asked, strict=True):
                if name == step.ids[entry]:
                    self._drift.append([float(value) for value in values])

    def confidences(self, length: int) -> list[float | None]:
        """The confidence of each token of an answer; None where unknown."""
        assert self._confidence is not None
        return [None if np.isnan(value) else round(float(value), 6) for value in self._confidence[-length:]]

    def trace(self, step: Step, entry: int, own: slice, prompt: int) -> None:
        """Record a step."""
        generated = slice(own.start + prompt, None)
        self._trace.append(
            {
                "canvas": step.tokens[entry, generated],
                "predicted": step.predicted[entry, generated],
                "confidence": step.confidence[entry, generated].astype(np.float32),
                "drafted": step.drafted[entry, generated],
                "computed": step.recomputed[entry, own],
                "nfe": step.nfe[entry],
            }
        )

    def record(self, answer: Answer, request: Query, decoded: decoding.Request, clock: Clock) -> Record:
        """The record of a finished request."""
        stops, ends = (*request.until, *decoded.stops), decoded.eos_token_ids
        text, tokens = cut(decoded.tokenizer, np.array(answer.completion), stops, ends)
        same = {name: value for name, value in vars(answer).items() if name in Record.__dataclass_fields__}
        return Record(
            **same | {"text": text, "tokens": tokens, "canvas": answer.full / max(1, answer.nfe)},
            id=request.id,
            confidence=self.confidences(len(answer.completion)),
            peak_memory=clock.peak_memory(),
            drift=self._drift,
        )

    def frames(self, request: Query) -> Frames | None:
        """The recorded steps; None without any."""
        if not self._trace:
            return None
        stacked = {name: np.stack([each[name] for each in self._trace]) for name in self._trace[0]}
        return Frames(id=request.id, prompt=np.asarray(request.prompt, dtype=np.int64), **stacked)
