"""The attention mask of a row whose drafts are concatenated to one sequence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from jaxtyping import Bool, Int
from torch import Tensor

# How the drafts of a row attend to each other; see `dllm.samplers.base.Denoise`.
Attention: TypeAlias = Literal["apart", "tree", "shadow", "joint"]


@dataclass(frozen=True)
class Branches:
    """The computed columns of R rows, draft after draft.

    Attributes:
        attention: "tree" or "shadow".
        columns: canvas column of each of the Q computed ones.
        branch: the draft each belongs to.
        fresh: False where a draft with fewer columns than that of another row repeats its last.
        span: the first canvas column attended to, and the one after the last.
        real: False at padding.
        stored: whether a store holds the keys and values of columns that are not computed.
        first: number of columns of the first draft.
        shift: a column predicts the token that many to its right.
    """

    attention: Attention
    columns: Int[Tensor, "R Q"]
    branch: Int[Tensor, " Q"]
    fresh: Bool[Tensor, "R Q"]
    span: tuple[int, int]
    real: Bool[Tensor, "R S"]
    stored: bool
    first: int
    shift: int

    def mask(self) -> Bool[Tensor, "R 1 Q K"]:
        """The mask over the stored columns, where there is a store, and then the computed ones."""
        low, high = self.span
        rows, width = self.columns.shape
        among = (self.branch[:, None] == self.branch).expand(rows, -1, -1)
        # Each column is attended to once: fresh where the draft computes it, stored elsewhere.
        kept = self.real.scatter(1, self.columns[:, : self.first] - low, False)[:, None].expand(-1, width, -1)
        if self.attention == "shadow":
            canvas, shadow = self.branch == 0, (self.branch > 0)[:, None]
            among = among | (shadow & canvas & ~self._hides(self.columns[:, None]))
            kept = kept & ~(shadow & self._hides(torch.arange(low, high, device=canvas.device)))
        among = among & (self.fresh & self.real.gather(1, self.columns - low))[:, None]
        return (torch.cat((kept, among), dim=-1) if self.stored else among)[:, None]

    def _hides(self, columns: Int[Tensor, "... K"]) -> Bool[Tensor, "R Q K"]:
        """Columns of the canvas that a shadow does not attend to."""
        own = self.columns[..., None]
        return (columns == own) | (columns == own + self.shift)
