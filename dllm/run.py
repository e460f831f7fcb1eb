"""The facts of one decode, fixed before its first forward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dllm.backbones.base import MaskedDiffusionModel
from dllm.canvas import Canvas


@dataclass(frozen=True)
class Run:
    """What samplers and caches may depend on.

    Attributes:
        rows: canvas rows.
        slots: rows decoded at a time.
        length: canvas columns L.
        block_length: columns K of a block.
        spans: columns of each row from the first to the last that is generated.
        mask_token_id: id of [MASK].
        eos_token_ids: ids that end a text; the first one fills.
        stop_at_eos: a row is finished once everything up to its first end-of-text is decoded.
        infill: some row has given tokens behind its first mask.
        logits_shift: the prediction for column i is read at column i - logits_shift.
        kv_shape: layers, key-value heads and head dimension of the backbone.
        hidden_size: width of the backbone.
        dtype: of the backbone's keys and values.
        device: where the tensors live.
        tokenizer: of the denoiser; None where it has none.
        vocab_size: entries V of the logits.
        fingerprint: tells which denoiser this is, by its weights.
        given: tokens of all rows before anything is decoded, the column of each row's first token, and the one its
            generated region starts at.
        rehearse: decodes the same canvas with another sampler, uncounted, and returns all rows.
    """

    rows: int
    slots: int
    length: int
    block_length: int
    spans: tuple[int, ...]
    mask_token_id: int
    eos_token_ids: tuple[int, ...]
    stop_at_eos: bool
    infill: bool
    logits_shift: int
    kv_shape: tuple[int, int, int]
    hidden_size: int
    dtype: torch.dtype
    device: torch.device
    tokenizer: PreTrainedTokenizerBase | None
    vocab_size: int
    fingerprint: Callable[[], str]
    given: Callable[[], tuple[Int[Tensor, "rows L"], Int[Tensor, " rows"], Int[Tensor, " rows"]]]
    rehearse: Callable[[Any], Int[Tensor, "rows L"]]

    @property
    def blocks(self) -> int:
        """Most blocks a row has."""
        return -(-max(self.spans) // self.block_length)


def facts(
    backbone: MaskedDiffusionModel,
    canvas: Canvas,
    tokenizer: PreTrainedTokenizerBase | None,
    rehearse: Callable[[Any], Tensor],
) -> Run:
    """The facts of decoding a canvas with a backbone."""
    return Run(
        rows=len(canvas.host),
        slots=canvas.slots,
        length=canvas.length,
        block_length=canvas.block_length,
        spans=tuple(canvas.spans.tolist()),
        mask_token_id=canvas.mask_token_id,
        eos_token_ids=canvas.eos_token_ids,
        stop_at_eos=canvas.stop_at_eos,
        infill=bool((canvas.region.sum(1) < canvas.length - canvas.start).any()),
        logits_shift=backbone.logits_shift,
        kv_shape=backbone.kv_shape,
        hidden_size=backbone.config.hidden_size,
        dtype=backbone.dtype,
        device=canvas.device,
        tokenizer=tokenizer,
        vocab_size=backbone.config.vocab_size,
        fingerprint=backbone.fingerprint,
        given=canvas.given,
        rehearse=rehearse,
    )
