"""One call of the backbone, and its attention mask."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Int
from torch import Tensor

from dllm.models.attention import BlockCausal
from dllm.models.transformer import KVStore


@dataclass(frozen=True)
class Work:
    """One call of the backbone.

    Attributes:
        tokens: of the computed columns.
        positions: of these.
        attended: S, columns attended to.
        real: attention mask over these; None for all.
        given: True at tokens that classifier-free guidance masks; None without guidance.
        store: keys and values of the other columns.
        columns: indices of the computed columns among those attended to; None for all.
        joined: sequences of a row that are joined into one.
        keys: positions of the columns attended to.
    """

    tokens: Int[Tensor, "A C"]
    positions: Int[Tensor, "A C"]
    attended: int
    real: Bool[Tensor, "A S"] | None
    given: Bool[Tensor, "A C"] | None = None
    store: KVStore | None = None
    columns: Int[Tensor, "A C"] | None = None
    joined: int = 1
    keys: Int[Tensor, "A S"] | None = None

    def mask(self, pattern: BlockCausal | None) -> Bool[Tensor, "A S"] | Bool[Tensor, "B 1 Q S"] | None:
        """The attention mask for a model with this pattern, shared or per query; None for full attention."""
        tree = tree_mask(self) if self.joined > 1 else None
        if pattern is None or self.keys is None:
            return self.real if tree is None else tree
        if tree is None:
            own = pattern(self.positions, self.keys)
            return own if self.real is None else own & self.real[:, None, None]
        queries = rearrange(self.positions, "(a d) c -> a (d c)", d=self.joined)
        stored = self.keys[:: self.joined]
        return tree & pattern(queries, queries if self.columns is None else torch.cat((stored, queries), dim=1))


def tree_mask(work: Work) -> Bool[Tensor, "B 1 Q S"]:
    """The attention mask of a row's joined drafts: each attends to stored columns and those of its own draft."""
    width, device = work.tokens.shape[1], work.tokens.device
    branch = torch.arange(work.joined, device=device).repeat_interleave(width)
    own = (branch[:, None] == branch)[None, None]
    split = {"d": work.joined}
    if work.columns is None:
        if work.real is None:
            return own.expand(len(work.tokens) // work.joined, -1, -1, -1)
        return own & rearrange(work.real, "(a d) s -> a 1 1 (d s)", **split)
    # Each column is attended to once: fresh where the draft computes it, stored elsewhere; padding is excluded.
    fresh = torch.ones_like(work.columns, dtype=torch.bool)
    fresh[:, 1:] = work.columns[:, 1:] != work.columns[:, :-1]
    shape = len(work.tokens), work.attended
    real = torch.ones(shape, dtype=torch.bool, device=device) if work.real is None else work.real
    stored = real.scatter(1, work.columns, False)
    own = own & rearrange(fresh & real.gather(1, work.columns), "(a d) c -> a 1 1 (d c)", **split)
    stored = repeat(stored, "(a d) s -> a 1 (d c) s", c=width, **split)
    return torch.cat((stored, own), dim=-1)
