"""A transformer of one row in plain torch, with full attention maps, for methods that are spelt out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import dllm


class Naive:
    """The layers of a model without packing, stores or fused kernels.

    Args:
        lm: a LLaDA or a Dream.
    """

    def __init__(self, lm: dllm.LanguageModel) -> None:
        self.backbone: Any = lm.backbone
        config = self.backbone.config
        self.blocks = [block.parts for block in self.backbone.blocks]
        self.size, self.theta, self.shift = self.backbone.head_dim, config.rope_theta, self.backbone.logits_shift
        self.mask_token_id: int = self.backbone.mask_token_id

    def embed(self, tokens: Tensor) -> Tensor:
        found: Tensor = self.backbone.get_input_embeddings()(tokens)
        return found

    def projected(self, layer: int, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (H, C, D) and the keys and values of each query head's own, with positions rotated in."""
        parts = self.blocks[layer]
        h = parts.attention_norm(x)
        q, k, v = (
            each(h).view(len(x), -1, self.size).transpose(0, 1) for each in (parts.query, parts.key, parts.value)
        )
        half = self.size // 2
        angle = positions[:, None].double() / self.theta ** (torch.arange(half).double() * 2 / self.size)
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        q, k = (
            torch.cat((t[..., :half] * cos - t[..., half:] * sin, t[..., half:] * cos + t[..., :half] * sin), -1)
            for t in (q, k)
        )
        group = len(q) // len(k)
        return q, k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)

    def weights(self, q: Tensor, k: Tensor) -> Tensor:
        """The attention map (H, C, S)."""
        return (q @ k.transpose(1, 2) / self.size**0.5).softmax(-1)

    def finished(self, layer: int, x: Tensor, attended: Tensor) -> Tensor:
        """The output of a layer, given what its heads attended to (H, C, D)."""
        parts = self.blocks[layer]
        x = x + parts.output(attended.transpose(0, 1).reshape(len(x), -1))
        feed = parts.feed_forward
        h = parts.feed_forward_norm(x)
        gate = feed.gate(h)
        added: Tensor = feed.down(gate * gate.sigmoid() * feed.up(h))
        return x + added

    def probabilities(self, x: Tensor) -> Tensor:
        """Of the tokens; that of [MASK], which is never chosen, is set to 0."""
        logits = self.backbone.get_output_embeddings()(self.backbone.final_norm(x))
        found: Tensor = logits[:, : self.backbone.config.vocab_size].softmax(-1)
        found[:, self.mask_token_id] = 0
        return found


@torch.inference_mode()
def decoded(
    naive: Naive,
    row: list[int],
    block_length: int,
    threshold: float,
    forward: Callable[[Tensor, tuple[int, int], int], tuple[list[int], Tensor]],
) -> tuple[list[int], int]:
    """A row with its masks filled block by block, and the number of forwards.

    Args:
        naive: the model.
        row: tokens and masks.
        block_length: blocks are counted from the first mask.
        threshold: commits what is as probable, and the most probable position in any case.
        forward: maps the tokens, the active block and the number of its forwards so far to the columns computed and
            their last hidden states.
    """
    tokens, forwards, before, steps = torch.tensor(row), 0, -1, 0
    masked = (tokens == naive.mask_token_id).nonzero()[:, 0].tolist()
    origin, end = masked[0], masked[-1] + 1
    while masked:
        number = (masked[0] - origin) // block_length
        steps = steps + 1 if number == before else 0
        before = number
        low = origin + number * block_length
        block = low, min(low + block_length, end)
        columns, hidden = forward(tokens.clone(), block, steps)
        forwards += 1
        asked = [column for column in masked if column < block[1]]
        at = [columns.index(max(column - naive.shift, 0)) for column in asked]
        best, chosen = naive.probabilities(hidden[at]).max(-1)
        for place, column in enumerate(asked):
            if best[place] >= threshold or place == int(best.argmax()):
                tokens[column] = chosen[place]
        masked = (tokens == naive.mask_token_id).nonzero()[:, 0].tolist()
    return tokens.tolist(), forwards
