"""The decode loop: plan what to compute, denoise, let the sampler choose, edit the canvas, record.

This is the only loop there is. It knows no sampler, no cache and no option of either.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dllm.backbones.base import MaskedDiffusionModel
from dllm.cache.base import Cache
from dllm.canvas import Canvas, Change
from dllm.denoiser import Denoiser
from dllm.drift import Meter
from dllm.prediction import Sampling
from dllm.run import facts
from dllm.samplers.base import Sampler
from dllm.step import Step


def decode(
    backbone: MaskedDiffusionModel,
    canvas: Canvas,
    sampler: Sampler,
    cache: Cache,
    sampling: Sampling,
    cfg_scale: float = 0.0,
    tokenizer: PreTrainedTokenizerBase | None = None,
    cuda_graphs: bool | None = None,
) -> Iterator[Step]:
    """Fill a canvas, yielding after every step.

    Args:
        backbone: the denoiser.
        canvas: rows to fill; edited in place.
        sampler: decides what is written.
        cache: decides what is computed.
        sampling: how logits become tokens.
        cfg_scale: classifier-free guidance scale; 0 is off.
        tokenizer: of the backbone, for samplers that consult a model with another one.
        cuda_graphs: replay the forwards of windows from CUDA graphs; None for where there is a CUDA device.

    Raises:
        ValueError: sampler, cache and canvas do not go together; raised before the first forward.
        RuntimeError: a sampler broke its contract: a row has no fewer masks after a step.
    """
    rehearsed = 0.0

    def rehearse(other: Sampler) -> Tensor:
        nonlocal rehearsed
        started, copy = time.perf_counter(), canvas.fresh()
        deque(decode(backbone, copy, other, cache, sampling, cfg_scale, tokenizer, cuda_graphs), maxlen=0)
        canvas.doomed |= copy.errors  # what has no result cannot be decoded towards it
        rehearsed += time.perf_counter() - started
        return torch.as_tensor(copy.host, device=copy.device)

    run = facts(backbone, canvas, tokenizer, rehearse)
    meter = Meter(run.rows, cache.measure_every, cache.refresh_above, run.mask_token_id)
    with torch.inference_mode():
        with torch.device("cpu"):  # where tables are made before they are moved, whatever the user's default is
            state = sampler.start(run)
        denoiser = Denoiser(backbone, canvas, cache.start(run), sampling, cfg_scale, meter, cuda_graphs)
    while canvas.rows.size:
        with torch.inference_mode():
            window = canvas.window()
            edit = sampler.step(window, denoiser.bind(window), state)
            change = canvas.apply(window, edit, denoiser.broken)
            _check_progress(sampler, change)
            denoiser.cache.observe(change)
        yield Step(change, edit, denoiser.forwards, rehearsed, meter.take(change.failed), canvas, denoiser)


def _check_progress(sampler: Sampler, change: Change) -> None:
    stuck = (change.gained <= 0) & ~np.isin(change.rows, change.failed)
    if stuck.any():
        raise RuntimeError(f"{sampler!r} made no progress in row {change.rows[stuck][0]}: it must leave fewer masks")
