"""What answering one request gave and cost, row by row, so that a run can be interrupted and put together again."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dllm.ending import cut
from dllm.generation import Clock, Recorder
from dllm.plan import Plan
from dllm.step import Step
from dllm.trace import Frames


@dataclass(frozen=True)
class Request:
    """Something to answer.

    Attributes:
        id: unique within a run.
        prompt: token ids.
        until: strings before which the answer ends; what comes from there on is neither kept nor counted.
        seed: of this request alone.
    """

    id: str
    prompt: Sequence[int]
    until: tuple[str, ...] = ()
    seed: int = 0


@dataclass(frozen=True)
class Record:
    """One answered request.

    Attributes:
        id: the request's.
        text: decoded answer up to end-of-text and stop strings; None without a tokenizer.
        completion: (G,) the generated region.
        commit_step: (G,) the row's own forward after which each position had its final token; -1 where never decoded.
        confidence: (G,) probability of the token in the prediction of the step that committed it, about the canvas as
            it was before; None where that predicted another token or none.
        tokens: generated tokens up to and including end-of-text or the token that completes a stop string.
        nfe: denoiser forwards.
        guide_nfe: guide forwards.
        seconds: its share of the wall time: that of each step, divided by the rows that took part.
        latency: wall time from its first step to its last.
        guide_seconds: its share of the guide's wall time, part of `seconds`.
        positions: columns computed.
        canvas: columns of its canvas, without padding.
        refreshes: forwards in which a cache had everything computed anew.
        peak_memory: bytes, since decoding began.
        drift: of each forward that was compared with an exact one: relative error of keys and values, summed divergence
            in nats, positions whose best token differed, positions asked about (`dllm.drift.Measurement`).
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
    canvas: int
    refreshes: int
    peak_memory: int
    drift: list[list[float]]

    def misfit(self) -> str | None:
        """What is impossible about a record that was read from a file; None where nothing is."""
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


def follow(plan: Plan, requests: Sequence[Request], filmed: frozenset[str]) -> Iterator[tuple[Record, Frames | None]]:
    """Carry a plan out, yielding each request's record as soon as its row is finished.

    Raises:
        ValueError: the model has no answer for a request.

    Args:
        plan: made of the requests' prompts, in this order.
        requests: what is answered.
        filmed: ids of those whose steps are kept.
    """
    steps, clock, batch = plan.steps(partial=True), Clock(plan.lm.device), None
    left = list(requests)
    while True:
        started = time.perf_counter()
        found = next(steps, None)
        seconds = time.perf_counter() - started
        if found is None:
            return
        recorder, step = found
        if batch is None or batch.recorder is not recorder:
            rows = len(recorder.canvas.host)
            batch, left = _Batch(recorder, left[:rows], plan, clock, filmed), left[rows:]
        batch.update(step, seconds)
        for row in step.change.failed:
            raise ValueError(f"{batch.requests[row].id} has no answer: {recorder.canvas.errors[row]}")
        for row in step.change.finished:
            yield batch.record(int(row)), batch.frames(int(row))


@dataclass
class _Batch:
    """The rows of one canvas."""

    recorder: Recorder
    requests: Sequence[Request]
    plan: Plan
    clock: Clock
    filmed: frozenset[str]

    def __post_init__(self) -> None:
        shape = self.recorder.canvas.host.shape
        self.confidence = np.full(shape, np.nan)
        self.seconds, self.guide_seconds = np.zeros((2, shape[0]))
        self.started = np.full(shape[0], np.nan)
        self.drift: list[list[list[float]]] = [[] for _ in range(shape[0])]
        self.elapsed = self.uncounted = 0.0
        films = [row for row, request in enumerate(self.requests) if request.id in self.filmed]
        self.films: dict[int, list[dict[str, Any]]] = {row: [] for row in films}

    def update(self, step: Step, seconds: float) -> None:
        """Charge the rows of a step with it."""
        rows, change = step.change.rows, step.change
        counted = seconds - (self.recorder.uncounted_seconds - self.uncounted)
        self.uncounted = self.recorder.uncounted_seconds
        self.started[rows] = np.where(np.isnan(self.started[rows]), self.elapsed, self.started[rows])
        self.elapsed += counted
        self.seconds[rows] += counted / len(rows)
        self.guide_seconds[rows] += step.edit.guide_seconds / len(rows)
        written = step.canvas.host[rows] == step.predicted
        sure = np.where(written, step.confidence, np.nan)  # another token's probability says nothing
        known = np.where(change.committed, sure, self.confidence[rows])
        self.confidence[rows] = np.where(change.revoked | change.filled, np.nan, known)
        for each in step.drift:
            for row, *values in zip(each.rows, each.kv_error, each.kl, each.flips, each.asked, strict=True):
                self.drift[row].append([float(value) for value in values])
        for row in set(self.films) & set(rows.tolist()):
            self._film(int(row), int(np.flatnonzero(rows == row)[0]), step)

    def record(self, row: int) -> Record:
        """What a finished row gave and cost."""
        recorder, request, generated = self.recorder, self.requests[row], self.plan.options.gen_length
        completion = recorder.canvas.host[row, -generated:]
        stops = *request.until, *self.plan.stops
        text, count = cut(self.plan.lm.tokenizer, completion, stops, recorder.canvas.eos_token_ids)
        confidence = self.confidence[row, -generated:]
        return Record(
            id=request.id,
            text=text,
            completion=completion.tolist(),
            commit_step=recorder.commit_step[row, -generated:].tolist(),
            confidence=[None if np.isnan(value) else round(float(value), 6) for value in confidence],
            tokens=count,
            nfe=int(recorder.nfe[row]),
            guide_nfe=int(recorder.guide_nfe[row]),
            seconds=float(self.seconds[row]),
            latency=self.elapsed - float(self.started[row]),
            guide_seconds=float(self.guide_seconds[row]),
            positions=int(recorder.computed_columns[row]),
            canvas=int(recorder.canvas.lengths[row]),
            refreshes=int(recorder.refreshes[row]),
            peak_memory=self.clock.peak_memory(),
            drift=self.drift[row],
        )

    def frames(self, row: int) -> Frames | None:
        """A finished row's steps; None where they were not kept."""
        if row not in self.films:
            return None
        film, request = self.films.pop(row), self.requests[row]
        stacked = {name: np.stack([each[name] for each in film]) for name in film[0]}
        return Frames(id=request.id, prompt=np.asarray(request.prompt, dtype=np.int64), **stacked)

    def _film(self, row: int, entry: int, step: Step) -> None:
        generated, padding = self.plan.options.gen_length, self.recorder.canvas.padding[row]
        self.films[row].append(
            {
                "canvas": step.canvas.host[row, -generated:].copy(),
                "predicted": step.predicted[entry, -generated:],
                "confidence": step.confidence[entry, -generated:].astype(np.float32),
                "drafted": step.drafted[entry, -generated:],
                "computed": step.recomputed[entry, padding:],
                "nfe": np.int64(self.recorder.nfe[row]),
            }
        )
