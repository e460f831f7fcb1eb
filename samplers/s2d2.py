"""S2D2: a block-diffusion model drafts in blocks and verifies one position after the other (arXiv 2603.25702).

Rule:

    draft    d_i ~ p(. | text before m_1, masks at all m that attend to each other), as in a block of that length
    verify   v_i ~ p(. | text before m_i, with d_j at m_j for j < i), one position after the other
    commit   v_1, ..., v_i up to the first i with d_i != v_i

A model whose attention is causal over blocks is a causal model at block length 1, and that is what the engine decodes
with (`block_length=1`). A step takes two forwards about the first `draft_length` masks m_1 < m_2 < ... of a row: the
drafts d_i are drawn (~) from the predictions p of the first, the tokens v_i from those of the second. Every committed
token is the one that the causal mode gives after the tokens before it, so the result is that of `vanilla` at block
length 1, in fewer forwards than tokens as soon as two drafts or more are right; above temperature 0 it has the same
distribution.

Differences: the paper verifies within a block whose prefix was computed in blocks, and accepts by rejection sampling
between both distributions; here the whole text is causal, so the result does not depend on the drafts, and a draft is
accepted where it equals the token that is drawn.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dllm.checks import number
from dllm.decoding.setup import Setup
from dllm.decoding.window import Edit, Window
from dllm.samplers.base import Denoise, Policy


@dataclass(frozen=True)
class S2D2(Policy):
    """Verify drafts of a whole block by the same model at block length 1, losslessly.

    Args:
        draft_length: positions that are drafted together; 1 is one token per step.

    Raises:
        ValueError: a length below 1; at the start of a run: blocks of more than one position.
    """

    kind: ClassVar[str] = "lossless"
    needs = frozenset({"causal", "repeatable", "shadows"})

    draft_length: int = 8

    def __post_init__(self) -> None:
        use = "a whole number of at least 1 (the block length that the model was trained with is a good one)"
        number("draft_length", self.draft_length, use, low=1, whole=True)

    def start(self, setup: Setup) -> Setup:
        """Reject other blocks."""
        length = None if setup.pattern is None else setup.pattern.length
        if length != 1:
            raise ValueError(f"s2d2 verifies at block length 1, and this is {length}; set block_length=1")
        return setup

    def step(self, window: Window, denoise: Denoise, state: Setup) -> Edit:
        """Draft, verify, commit up to the first draft that is wrong."""
        masked = window.region & (window.tokens == state.mask_token_id)
        columns = masked.long().argsort(dim=-1, descending=True, stable=True)[:, : self.draft_length]
        asked = masked.gather(1, columns)
        if self.draft_length == 1:  # nothing to verify
            draft = torch.full_like(columns, state.mask_token_id)
        else:
            draft = denoise(asked, columns, attention="joint").tokens.masked_fill(~asked, state.mask_token_id)
        proposed = Edit(columns, draft, asked).on(window.tokens)
        target = self._verify(proposed, columns, asked, denoise, state)
        wrong = (draft != target) & asked
        chosen = asked & (wrong.cumsum(-1) - wrong.long() == 0)
        ended = chosen & (target[..., None] == window.ends[:, None]).any(-1)
        after = ended.cumsum(-1) - ended.long() > 0
        source = None
        if not state.logits_shift:
            shadows = torch.arange(1, columns.shape[1] + 1, device=columns.device).expand_as(columns)
            source = torch.zeros_like(window.tokens).scatter(1, columns, shadows)
        return Edit(columns, target, chosen & ~(after & window.stop_at_eos[:, None]), drafted=draft, source=source)

    def _verify(self, proposed: Tensor, columns: Tensor, asked: Tensor, denoise: Denoise, state: Setup) -> Tensor:
        """(B, K) the tokens of the causal mode after the proposed ones before them."""
        if state.logits_shift:  # they are read at the position before
            return denoise(asked, columns, proposed[:, None]).tokens
        # A shadow for each position: a mask that attends to the proposed text before it.
        count = columns.shape[1]
        one = torch.eye(count, dtype=torch.bool, device=columns.device)
        masks = torch.full_like(columns, state.mask_token_id)
        shadows = [Edit(columns, masks, one[k].expand_as(asked)).on(proposed) for k in range(count)]
        wanted = torch.cat((asked[:, None], asked[:, None] & one), dim=1)
        about = columns[:, None].expand_as(wanted)
        found = denoise(wanted, about, torch.stack((proposed, *shadows), dim=1), "shadow").tokens
        return found[:, 1:].diagonal(dim1=1, dim2=2)
