"""The result of a run, and the recorder that counts it honestly."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dllm.canvas import Canvas
from dllm.drift import Drift, Measurement, summarise
from dllm.ending import cut
from dllm.step import Step

_STATUS, _FORGET_PEAK = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Stats:
    """What a run cost.

    Attributes:
        seconds: wall time of decoding; without what a policy such as the oracle decodes beforehand, and
            without measuring a cache's drift, unless it may refresh the cache.
        tokens: generated tokens up to and including what ends each row's text: its first end-of-text, or the token
            that completes a stop string. Prompt tokens and what stands after it are not counted.
        tokens_per_second: `tokens` over `seconds`.
        tpf: `tokens` over the forwards of all rows.
        computed_share: columns computed, over those that computing everything each time would take.
        computed_columns: columns computed by the denoiser, over all rows and drafts.
        extra_columns: those beyond one canvas per forward, for drafts; negative where a cache saved some.
        guide_seconds: wall time of the guide's forwards, part of `seconds`.
        cache_refreshes: times a cache recomputed everything, over all rows.
        drift: how far the cache was off, where that was measured (`measure_every`); None elsewhere.
        slots_busy: share of the row slots that held a row, over all steps; there are `batch_size` of them, or as many
            as prompts where these are fewer.
        peak_memory: bytes; of the device on CUDA, of the process elsewhere, during the run where the system can tell.
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
    drift: Drift | None
    slots_busy: float
    peak_memory: int


@dataclass(frozen=True)
class Generation:
    """The result for a batch of B prompts, P prompt columns and G generated ones.

    Attributes:
        sequences: (B, P + G) prompts, left-padded, and what was generated.
        completions: (B, G) the generated region.
        texts: decoded completions before end-of-text or a stop string, of `infill` the whole; None without a
            tokenizer, and of rows that failed.
        nfe: (B,) denoiser forwards each row took part in.
        guide_nfe: (B,) forwards of a guide model, for policies that have one.
        commit_step: (B, G) the row's own forward, counted from 0, after which a position had its
            final token; -1 where an early end of the text filled it.
        stats: what the run cost.
        attention_mask: (B, P + G) 1 at prompts and at generated tokens up to and including what ended the text, 0 at
            the padding, after the end, and after the prompt of a row that failed:
            `generate(lm, out.sequences, attention_mask=out.attention_mask)` goes on.
        errors: why a row failed; None where it did not. A row that failed stands as far as it came, [MASK] elsewhere,
            and nothing of it counts as generated.
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


class Recorder:
    """Follows one canvas: forwards per row, and the forward that settled each position."""

    def __init__(self, canvas: Canvas) -> None:
        self.canvas = canvas
        self.nfe = np.zeros(len(canvas.host), dtype=np.int64)
        self.guide_nfe = np.zeros(len(canvas.host), dtype=np.int64)
        self.guide_seconds = 0.0
        self.commit_step = np.full(canvas.host.shape, -1, dtype=np.int64)
        self.computed_columns, self.refreshes = np.zeros((2, len(canvas.host)), dtype=np.int64)
        self.measurements: list[Measurement] = []
        self.measuring_seconds = 0.0
        self.uncounted_seconds = 0.0
        self.steps = self.row_steps = 0

    def update(self, step: Step) -> None:
        """Count one step."""
        rows, change = step.change.rows, step.change
        self.steps, self.row_steps = self.steps + 1, self.row_steps + len(rows)
        self.nfe[rows] += step.forwards
        if step.edit.guide_forwards is not None:
            self.guide_nfe[rows] += step.edit.guide_forwards
            self.guide_seconds += step.edit.guide_seconds
        settled = self.commit_step[rows]
        settled[change.revoked | change.filled] = -1
        self.commit_step[rows] = np.where(change.committed, self.nfe[rows, None] - 1, settled)
        self.measurements += step.drift
        meter = step.denoiser.meter
        self.measuring_seconds = meter.seconds
        self.uncounted_seconds = step.rehearsal_seconds + (meter.seconds if meter.above is None else 0.0)
        self.computed_columns, self.refreshes = step.denoiser.computed, step.denoiser.refreshes


class Clock:
    """Wall time and peak memory of a run."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        else:
            with suppress(OSError):  # Linux alone can forget the peak of what ran before
                _FORGET_PEAK.write_text("5")
        self._started = time.perf_counter()

    def seconds(self) -> float:
        """Seconds since the start, the device's pending work included."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter() - self._started

    def peak_memory(self) -> int:
        """Bytes at the peak."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        with suppress(OSError, ValueError, StopIteration):
            peak = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
            return int(peak.split()[1]) * 1024
        # The peak of the process's whole life. Linux counts in KiB, macOS in bytes.
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def assemble(
    recorders: Sequence[Recorder],
    generated: int | None,
    tokenizer: PreTrainedTokenizerBase | None,
    clock: Clock,
    stops: Sequence[str] = (),
) -> Generation:
    """Join the recorded canvases into one result.

    Args:
        recorders: one per canvas, finished, in the order of the prompts.
        generated: columns G at the end of every canvas that were generated; None where masks stood
            anywhere: then everything is the completion and only former masks are counted.
        tokenizer: decodes the completions.
        clock: started with the run.
        stops: stop strings.
    """
    eos = recorders[0].canvas.eos_token_ids
    seconds = clock.seconds() - sum(r.uncounted_seconds for r in recorders)
    peak = clock.peak_memory()
    sequences = _stack([r.canvas.host for r in recorders], eos[0])
    commit_step = _stack([r.commit_step for r in recorders], -1)
    nfe = np.concatenate([r.nfe for r in recorders])
    errors = [r.canvas.errors.get(row) for r in recorders for row in range(len(r.canvas.host))]
    real = _stack([r.canvas.real for r in recorders], False)
    if generated is None:
        completions, settled = sequences, commit_step
        counts = np.concatenate([r.canvas.region.sum(1) for r in recorders])
        tokens = sum(int(count) for count, error in zip(counts, errors, strict=True) if error is None)
        texts = [cut(tokenizer, row[keep])[0] for row, keep in zip(sequences, real, strict=True)]
    else:
        completions, settled = sequences[:, -generated:], commit_step[:, -generated:]
        ends = [cut(tokenizer, row, stops, eos) for row in completions]
        texts = [text for text, _ in ends]
        counts = np.array([count if error is None else 0 for (_, count), error in zip(ends, errors, strict=True)])
        tokens = int(counts.sum())
        real[:, -generated:] = np.arange(generated) < counts[:, None]
    computed = sum(int(r.computed_columns.sum()) for r in recorders)
    full = sum(int((r.nfe * r.canvas.lengths).sum()) for r in recorders)
    stats = Stats(
        seconds=seconds,
        tokens=tokens,
        tokens_per_second=tokens / seconds,
        tpf=tokens / max(1, int(nfe.sum())),
        computed_columns=computed,
        extra_columns=computed - full,
        guide_seconds=sum(r.guide_seconds for r in recorders),
        computed_share=computed / max(1, full),
        cache_refreshes=sum(int(r.refreshes.sum()) for r in recorders),
        drift=summarise(
            [each for r in recorders for each in r.measurements], sum(r.measuring_seconds for r in recorders)
        ),
        slots_busy=sum(r.row_steps for r in recorders) / max(1, sum(r.steps * r.canvas.slots for r in recorders)),
        peak_memory=peak,
    )
    return Generation(
        sequences=torch.from_numpy(sequences),
        completions=torch.from_numpy(completions),
        texts=[text if error is None else None for text, error in zip(texts, errors, strict=True)],
        nfe=torch.from_numpy(nfe),
        guide_nfe=torch.from_numpy(np.concatenate([r.guide_nfe for r in recorders])),
        commit_step=torch.from_numpy(settled),
        stats=stats,
        attention_mask=torch.from_numpy(real.astype(np.int64)),
        errors=tuple(errors),
    )


def _stack(parts: Sequence[NDArray[Any]], fill: int | bool) -> NDArray[Any]:
    """Stack (B, L) arrays of unequal L, padded on the left."""
    width = max(part.shape[1] for part in parts)
    padded = [np.pad(part, ((0, 0), (width - part.shape[1], 0)), constant_values=fill) for part in parts]
    return np.concatenate(padded)
