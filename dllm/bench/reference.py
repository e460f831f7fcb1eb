"""Reference implementations: the published decode loops on the same weights, for benchmarks only.

    straightforward   LLaDA's generate (arXiv 2502.09992): every step computes the whole canvas, projects all of it to
                      the vocabulary and takes a softmax in float64
    dual              Fast-dLLM's dual cache (arXiv 2505.22618): after a block's first step only the block is
                      computed; keys are cached before their rotary embedding, and all of them are rotated at each
                      call

Both commit a fixed number of the most confident positions of the block per step.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from dllm.models.base import MaskedDiffusionModel
from dllm.models.transformer import Rotation, rotary_embedding


def straightforward(
    backbone: MaskedDiffusionModel, tokens: Int[Tensor, "B L"], generated: int, block_length: int, commits: int
) -> Iterator[Int[Tensor, "B L"]]:
    """Decode a canvas, yielding it after each step; `tokens` is not modified."""
    tokens = tokens.clone()
    for start, end in _blocks(tokens, generated, block_length):
        while (tokens[:, start:end] == backbone.mask_token_id).any():
            logits = backbone(tokens).logits
            if backbone.logits_shift:
                logits = torch.cat((logits[:, :1], logits[:, :-1]), dim=1)
            _commit(tokens, logits, 0, end, commits, backbone.mask_token_id)
            yield tokens


def dual(
    backbone: MaskedDiffusionModel, tokens: Int[Tensor, "B L"], generated: int, block_length: int, commits: int
) -> Iterator[Int[Tensor, "B L"]]:
    """Decode a canvas, yielding it after each step; `tokens` is not modified."""
    tokens = tokens.clone()
    forward = _Rerotating(backbone, tokens.shape[1])
    shift = backbone.logits_shift
    for start, end in _blocks(tokens, generated, block_length):
        low, high = 0, tokens.shape[1]
        while (tokens[:, start:end] == backbone.mask_token_id).any():
            logits = forward(tokens[:, low:high], low)
            if low == 0 and shift:
                logits = torch.cat((logits[:, :1], logits[:, :-1]), dim=1)
            _commit(tokens, logits, low + (shift if low else 0), end, commits, backbone.mask_token_id)
            low, high = start - shift, end - shift
            yield tokens


def _blocks(tokens: Tensor, generated: int, block_length: int) -> list[tuple[int, int]]:
    length = tokens.shape[1]
    return [(start, min(start + block_length, length)) for start in range(length - generated, length, block_length)]


def _commit(tokens: Tensor, logits: Float[Tensor, "B C V"], first: int, end: int, commits: int, mask: int) -> None:
    """Commit the most confident tokens before column `end`; the logits are those of the columns from `first` on."""
    window = tokens[:, first : first + logits.shape[1]]
    probabilities = F.softmax(logits.to(torch.float64), dim=-1)
    logits[..., mask] = -torch.inf
    best = logits.argmax(-1)
    confidence = probabilities.gather(-1, best[..., None])[..., 0]
    masked = window == mask
    masked[:, end - first :] = False
    confidence = confidence.where(masked, -torch.inf)
    chosen = torch.zeros_like(masked)
    for row in range(len(tokens)):
        count = min(commits, int(masked[row].sum()))
        chosen[row, confidence[row].topk(count).indices] = True
    window[chosen] = best[chosen]


class _Rerotating:
    """The backbone with a KV cache of keys before their rotary embedding."""

    def __init__(self, backbone: MaskedDiffusionModel, length: int) -> None:
        self.backbone = backbone
        self.head_dim = backbone.kv_shape[2]
        positions = torch.arange(length, device=backbone.device)[None]
        self.rotation = rotary_embedding(positions, self.head_dim, backbone.config.rope_theta, backbone.dtype)
        self.kept: list[tuple[Tensor, Tensor]] = []

    def __call__(self, tokens: Int[Tensor, "B C"], first: int) -> Float[Tensor, "B C V"]:
        backbone, end = self.backbone, first + tokens.shape[1]
        if tokens.shape[1] == self.rotation.cos.shape[2]:
            self.kept = []
        own = Rotation(self.rotation.cos[:, :, first:end], self.rotation.sin[:, :, first:end])
        hidden = backbone.get_input_embeddings()(tokens)
        for layer, block in enumerate(backbone.blocks):
            parts: Any = block.parts
            h = parts.attention_norm(hidden)
            heads = parts.query(h), parts.key(h), parts.value(h)
            q, k, v = (rearrange(each, "b c (h d) -> b h c d", d=self.head_dim) for each in heads)
            if len(self.kept) == layer:
                self.kept.append((k, v))
            else:
                keys, values = self.kept[layer]
                keys[:, :, first:end], values[:, :, first:end] = k, v
                k, v = keys, values
            attended = F.scaled_dot_product_attention(own(q), self.rotation(k), v, enable_gqa=q.shape[1] != k.shape[1])
            hidden = hidden + parts.output(rearrange(attended, "b h c d -> b c (h d)"))
            hidden = hidden + parts.feed_forward(parts.feed_forward_norm(hidden))
        return backbone.get_output_embeddings()(backbone.final_norm(hidden))
