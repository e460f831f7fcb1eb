"""The fixed properties of an engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dllm.decoding.graphs import Replays
from dllm.decoding.prediction import Sampling
from dllm.decoding.request import Request
from dllm.models.attention import BlockCausal


def undivided(values: Tensor, dim: int) -> Tensor:
    """The values of the heads, all of which are in this process."""
    return values


@runtime_checkable
class Rehearsal(Protocol):
    """Decodes requests with another sampler, without counting its cost, whose result the sampler reproduces."""

    def check(self, request: Request) -> None:
        """Reject what the other sampler rejects (ValueError)."""
        ...

    def __call__(self, request: Request) -> Int[Tensor, " n"]:
        """The whole result.

        Raises:
            ValueError: the request fails, with the reason.
        """
        ...


@dataclass(frozen=True)
class Setup:
    """The properties that samplers and caches may depend on.

    Attributes:
        slots: rows decoded at a time; row numbers are less than this.
        length: canvas columns L.
        mask_token_id: id of [MASK].
        logits_shift: the prediction for column i is read at column i - logits_shift.
        kv_shape: layers, key-value heads and head dimension of the backbone, of this process (tensor parallelism).
        pattern: attention pattern of the backbone; None for full attention.
        hidden_size: width of the backbone.
        dtype: of the backbone's keys and values.
        device: of the tensors.
        tokenizer: of the denoiser; None without one.
        vocab_size: entries V of the logits.
        fingerprint: identifies the denoiser by its weights.
        rehearsal: creates a `Rehearsal` for a sampler.
        tensor: allocates zeros by name and shape, in the backbone's dtype; they may outlive the engine.
        query_heads: attention heads of the backbone in this process; None for as many as key-value heads.
        all_heads: joins what every process has of its heads, along a dimension; there, all take the same decisions.
        cache: the engine's cache, for samplers that were measured with one; None if unknown.
        cfg_scale: of the engine's classifier-free guidance, likewise.
        sampling: of requests that leave everything to the model, likewise.
        replays: makes graphs of a sampler's own forwards; None if forwards are not replayed from graphs.
        kept: what a sampler leaves to the next engine, by name; used by one at a time.
        weights: another value once weights, adapters or hooks of the backbone were changed.
        own_block_length: of the blocks that the backbone attends in unless told otherwise; None for full attention.
    """

    slots: int
    length: int
    mask_token_id: int
    logits_shift: int
    kv_shape: tuple[int, int, int]
    pattern: BlockCausal | None
    hidden_size: int
    dtype: torch.dtype
    device: torch.device
    tokenizer: PreTrainedTokenizerBase | None
    vocab_size: int
    fingerprint: Callable[[], str]
    rehearsal: Callable[[Any], Rehearsal]
    tensor: Callable[[str, Sequence[int]], Tensor]
    query_heads: int | None = None
    all_heads: Callable[[Tensor, int], Tensor] = undivided
    cache: Any = None
    cfg_scale: float = 0.0
    sampling: Callable[[], Sampling] = Sampling
    replays: Callable[[], Replays] | None = None
    kept: dict[str, Any] = field(default_factory=dict)
    weights: Callable[[], Any] = tuple
    own_block_length: int | None = None
