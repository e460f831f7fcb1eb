"""Results and statistics of a run."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from numpy.typing import DTypeLike, NDArray
from torch import Tensor

from dllm.decoding import html
from dllm.decoding.drift import Drift, Measurement, summarise
from dllm.decoding.request import Request
from dllm.decoding.step import Answer, Step

_STATUS, _FORGET_PEAK = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Stats:
    """Statistics of a run.

    Attributes:
        seconds: wall time of decoding; excludes decoding in advance, as for the oracle, and measuring the
            approximation error of a cache, unless that may refresh the cache.
        tokens: generated tokens up to and including the end of each row's text: its first end-of-text, or the token
            that completes a stop string. Prompt tokens and tokens after the end are not counted.
        tokens_per_second: `tokens` over `seconds`.
        tpf: tokens per forward: `tokens` over the forwards of all rows.
        computed_share: computed columns, relative to computing in each forward every position that the canvas then has.
        computed_columns: columns computed by the denoiser, over all rows and drafts.
        extra_columns: those beyond one canvas per forward, for drafts; negative where a cache saved some, a policy hid
            positions, or later blocks of a block-causal model were not needed.
        guide_seconds: wall time of the guide's forwards, part of `seconds`.
        cache_refreshes: full refreshes of a cache, over all rows.
        reused_columns: columns of prompts taken from earlier requests of the run that begin alike, over all rows.
        drift: approximation error of the cache, if measured (`measure_every`); None otherwise.
        slots_busy: mean share of busy row slots, over all steps; there are `batch_size` of them, or one per prompt
            if these are fewer.
        peak_memory: bytes; of the device on CUDA, of the process elsewhere, during the run if the system supports it.
        constraint_seconds: wall time of holding answers to their `response_format`, part of `seconds`.
        constraint_refusals: tokens that a sampler chose and that were not written for that reason, over all rows.
    """

    seconds: float
    tokens: int
    tokens_per_second: float
    tpf: float
    computed_share: float
    computed_columns: int
    extra_columns: int
    guide_seconds: float
    cache_refreshes: int
    reused_columns: int
    drift: Drift | None
    slots_busy: float
    peak_memory: int
    constraint_seconds: float = 0.0
    constraint_refusals: int = 0


@dataclass(frozen=True)
class Generation:
    """The result for a batch of B prompts, P prompt columns and G generated ones.

    Regions of unequal length, those of infilled texts and of `gen_length="auto"`, are padded on the left with
    end-of-text, as prompts are: that of a row ends each of its lists.

    Attributes:
        sequences: (B, P + G) left-padded prompts and generated tokens.
        completions: (B, G) the generated region.
        texts: decoded completions before end-of-text or a stop string, for `infill` the whole text; None without a
            tokenizer, and for failed rows.
        nfe: (B,) denoiser forwards of each row.
        guide_nfe: (B,) forwards of a guide model, for policies with one.
        commit_step: (B, G) the row's forward, counted from 0, after which a position had its final token; -1 where
            an early end of the text filled it, and before a shorter region.
        stats: statistics of the run.
        attention_mask: (B, P + G) 1 at prompts and at generated tokens up to and including the end of the text, 0 at
            the padding, after the end, and after the prompt (or at remaining masks) of a failed row:
            `generate(lm, out.sequences, attention_mask=out.attention_mask)` continues.
        lengths: (B,) positions of each generated region: `completions[i, -lengths[i]:]`, the end of `sequences[i]`;
            None where they are unknown.
        errors: reason of each failed row; None for others. A failed row has the tokens decoded so far and [MASK]
            elsewhere, and none of them count as generated.
        vocabulary: how notebooks show the tokens; None for numbers.
    """

    sequences: Int[Tensor, "B L"]
    completions: Int[Tensor, "B G"]
    texts: list[str | None]
    nfe: Int[Tensor, " B"]
    guide_nfe: Int[Tensor, " B"]
    commit_step: Int[Tensor, "B G"]
    stats: Stats
    attention_mask: Int[Tensor, "B L"]
    errors: tuple[str | None, ...] = ()
    vocabulary: html.Vocabulary | None = field(default=None, repr=False, compare=False)
    lengths: Int[Tensor, " B"] | None = None

    def _repr_html_(self) -> str:
        return html.generation(self)


def now(device: torch.device) -> float:
    """Seconds on a clock, once the device's pending work is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class Clock:
    """Wall time and peak memory of a run."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        else:
            with suppress(OSError):  # only Linux can reset the peak
                _FORGET_PEAK.write_text("5")
        self._started = time.perf_counter()

    def seconds(self) -> float:
        """Seconds since the start, including pending work of the device."""
        return now(self._device) - self._started

    def peak_memory(self) -> int:
        """Bytes at the peak."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        with suppress(OSError, ValueError, StopIteration):
            peak = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
            return int(peak.split()[1]) * 1024
        # The peak since the process started. Linux counts in KiB, macOS in bytes.
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class Tally:
    """Accumulates the statistics of a run; create it at the start.

    Args:
        device: of the run.

    Attributes:
        answers: by request number.
    """

    def __init__(self, device: torch.device) -> None:
        self.answers: dict[int, Answer] = {}
        self.measurements: list[Measurement] = []
        self.clock, self.uncounted_seconds, self.guide_seconds = Clock(device), 0.0, 0.0
        self.rows = self.slots = self.constraint_refusals = 0
        self.constraint_seconds = 0.0

    def update(self, step: Step) -> None:
        """Add one step."""
        self.answers |= step.answers
        self.measurements += step.drift
        self.uncounted_seconds += step.uncounted_seconds
        self.guide_seconds += step.edit.guide_seconds
        self.rows, self.slots = self.rows + len(step), self.slots + step.slots
        self.constraint_seconds += step.constraint_seconds
        self.constraint_refusals += step.constraint_refusals


def assemble(requests: Sequence[Request], tally: Tally, measuring_seconds: float) -> Generation:
    """Collect the answers to all requests into one result.

    Args:
        requests: all of them, numbered from 0.
        tally: of the whole run.
        measuring_seconds: wall time of measuring the approximation error of a cache.
    """
    seconds, peak = tally.clock.seconds() - tally.uncounted_seconds, tally.clock.peak_memory()
    answers = [tally.answers[number] for number in range(len(requests))]
    completions = [np.array(answer.completion) for answer in answers]
    starts = [answer.canvas - len(answer.completion) for answer in answers]
    texts = zip(requests, completions, starts, strict=True)
    sequences = [np.concatenate((request.tokens[:start], row)) for request, row, start in texts]
    real = [np.ones(answer.canvas, dtype=np.int64) for answer in answers]
    for request, answer, start, row in zip(requests, answers, starts, real, strict=True):
        if not request.infill:
            row[start + answer.tokens :] = 0
        elif answer.error is not None:
            row[np.array(answer.completion) == request.mask_token_id] = 0
    fill = requests[0].eos_token_ids[0]
    tokens, nfe = sum(answer.tokens for answer in answers), [answer.nfe for answer in answers]
    computed = sum(answer.positions for answer in answers)
    full = sum(answer.full for answer in answers)
    stats = Stats(
        seconds=seconds,
        tokens=tokens,
        tokens_per_second=tokens / seconds,
        tpf=tokens / max(1, sum(nfe)),
        computed_columns=computed,
        extra_columns=computed - full,
        guide_seconds=tally.guide_seconds,
        computed_share=computed / max(1, full),
        cache_refreshes=sum(answer.refreshes for answer in answers),
        reused_columns=sum(answer.reused for answer in answers),
        drift=summarise(tally.measurements, measuring_seconds),
        slots_busy=tally.rows / max(1, tally.slots),
        peak_memory=peak,
        constraint_seconds=tally.constraint_seconds,
        constraint_refusals=tally.constraint_refusals,
    )
    return Generation(
        sequences=torch.from_numpy(padded(sequences, fill, left=True)),
        completions=torch.from_numpy(padded(completions, fill, left=True)),
        texts=[answer.text for answer in answers],
        nfe=torch.from_numpy(np.array(nfe)),
        guide_nfe=torch.from_numpy(np.array([answer.guide_nfe for answer in answers])),
        commit_step=torch.from_numpy(padded([answer.commit_step for answer in answers], -1, left=True)),
        stats=stats,
        attention_mask=torch.from_numpy(padded(real, 0, left=True)),
        lengths=torch.tensor([len(each) for each in completions]),
        errors=tuple(answer.error for answer in answers),
        vocabulary=html.Vocabulary(requests[0].tokenizer, requests[0].mask_token_id, requests[0].eos_token_ids),
    )


def padded(
    rows: Sequence[Sequence[Any] | NDArray[Any]],
    fill: float,
    kind: DTypeLike = np.int64,
    width: int | None = None,
    left: bool = False,
) -> NDArray[Any]:
    """Rows of unequal length as one table, as wide as the longest or `width`, padded on the right or the left."""
    table = np.full((len(rows), max(map(len, rows), default=0) if width is None else width), fill, dtype=kind)
    for place, row in zip(table, rows, strict=True):
        place[len(place) - len(row) if left else 0 :][: len(row)] = np.asarray(row, dtype=kind)
    return table
