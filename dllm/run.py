"""The facts of one decode, fixed before its first forward."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Run:
    """What samplers and caches may depend on.

    Attributes:
        rows: canvas rows.
        length: canvas columns L.
        block_length: columns K of a block.
        spans: columns of each row from the first to the last that is generated.
        mask_token_id: id of [MASK].
        eos_token_ids: ids that end a text; the first one fills.
        guided: every forward computes a second row with the prompt masked; a cache that keeps one set
            of keys and values a row must refuse.
        kv_shape: layers, key-value heads and head dimension of the backbone.
        dtype: of the backbone's keys and values.
        device: where the tensors live.
    """

    rows: int
    length: int
    block_length: int
    spans: tuple[int, ...]
    mask_token_id: int
    eos_token_ids: tuple[int, ...]
    guided: bool
    kv_shape: tuple[int, int, int]
    dtype: torch.dtype
    device: torch.device

    @property
    def blocks(self) -> int:
        """Most blocks a row has."""
        return -(-max(self.spans) // self.block_length)
