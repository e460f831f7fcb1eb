"""Several blocks at once: a block begins before the one before it is complete (D2F, arXiv 2508.09192; d3LLM).

Rule:

    the next block is open    if the one before it is open and d >= add of that,
    and it decodes like any   if d >= activate; before that, only tokens with p(top token) > threshold are committed

Of the active block and those that follow it, at most `blocks` are open; d is the decided share of the block before, and
p the probability of a predicted token.

One forward predicts the masks of all open blocks, and in each the base policy chooses what to commit, as in a block
that it enters. The active block always decodes as under the base, so every forward commits what that would, or more.

The sources decode so with models trained for it; of others it commits tokens ahead that see less context. D2F's blocks
are causal; here every position sees what the model lets it see.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool
from torch import Tensor

from dllm.checks import number
from dllm.decoding.prediction import Prediction
from dllm.decoding.setup import Setup
from dllm.decoding.window import Edit, Window
from dllm.samplers.base import CONFIDENCES, Denoise, Knob, OverPolicy, Sampler


@dataclass(frozen=True)
class Inner:
    """State of an engine: the base policy, its state, and the id of [MASK]."""

    base: Sampler
    state: Any
    mask_token_id: int


@dataclass(frozen=True)
class MultiBlock(OverPolicy):
    """Decode several blocks at once under another policy.

    Args:
        base: the policy that chooses in each block: a name of conf/sampler or an object; any stateless policy with one
            forward per step.
        blocks: open at a time; 1 is the base itself.
        add: decided share of a block at which the next one opens.
        activate: decided share of a block at which the next one decodes like any other.
        threshold: minimum probability, exclusive, of a token committed before that.

    Raises:
        ValueError: a value out of range, an unknown name, or a base of another kind.
    """

    knob = Knob("threshold", CONFIDENCES)

    base: str | Sampler = "threshold"
    blocks: int = 4
    add: float = 0.1
    activate: float = 0.95
    threshold: float = 0.9

    def __post_init__(self) -> None:
        number("blocks", self.blocks, "a whole number from 1 to 64", low=1, high=64, whole=True)
        number("add", self.add, "a number from 0 to 1 (0.1 is published)", low=0, high=1)
        number("activate", self.activate, "a number from 0 to 1 (0.95 is published)", low=0, high=1)
        number("threshold", self.threshold, "0 or more (0.9 is published)", low=0)
        self._check_base("decode several blocks")

    def start(self, setup: Setup) -> Inner:
        """Start the base."""
        base = self._base
        return Inner(base, base.start(setup), setup.mask_token_id)

    def step(self, window: Window, denoise: Denoise, state: Inner) -> Edit:
        """Open blocks, and let the base choose in each."""
        if self.blocks == 1:
            return state.base.step(window, denoise, state.state)
        views = self._views(window, state.mask_token_id)
        views, usual = self._opened(views)
        judged: list[Prediction] = []
        apart, together = "(b m) k -> b (m k)", "b (m k) -> (b m) k"

        def judge(*_: Any, decided: bool = False, **__: Any) -> Prediction:
            wanted = rearrange(views.inside if decided else views.masked, apart, m=self.blocks)
            prediction = denoise(wanted, rearrange(views.columns, apart, m=self.blocks))
            judged.append(prediction.arranged(lambda values: rearrange(values, together, m=self.blocks)))
            return judged[0]

        edit = state.base.step(views, judge, state.state)
        write = edit.write & (usual[:, None] | (judged[0].confidence > self.threshold))
        columns, tokens, write = (rearrange(each, apart, m=self.blocks) for each in (edit.columns, edit.tokens, write))
        return Edit(columns, tokens, write)

    def _views(self, window: Window, mask_token_id: int) -> Window:
        """The active block of each row, and those that follow it, as entries of their own."""
        rows, width = window.columns.shape
        device = window.columns.device
        number = torch.arange(self.blocks, device=device).repeat(rows)
        every = window.taken(torch.arange(rows, device=device).repeat_interleave(self.blocks))
        ahead, offset = number > 0, torch.arange(width, device=device)
        columns = every.columns[:, :1] + (number * every.block_length)[:, None] + offset
        exists = (columns < window.tokens.shape[1]) & (offset < every.block_length[:, None])
        columns = columns.clamp(max=window.tokens.shape[1] - 1)
        inside = every.region.gather(1, columns) & exists
        masked = inside & (every.tokens.gather(1, columns) == mask_token_id)
        return replace(
            every,
            columns=columns,
            inside=inside,
            masked=masked,
            block=every.block + number,
            entry_masks=torch.where(ahead, masked.sum(-1), every.entry_masks),
            step=every.step.masked_fill(ahead, 0),
            uniform=lambda: torch.stack([window.uniform() for _ in range(self.blocks)], dim=1).flatten(0, 1),
        )

    def _opened(self, views: Window) -> tuple[Window, Bool[Tensor, " E"]]:
        """The blocks without those that are not open, and which of them decode as under the base."""
        total, left = (rearrange(each.sum(-1), "(b m) -> b m", m=self.blocks) for each in (views.inside, views.masked))
        share = torch.where(total > 0, (total - left) / total.clamp(min=1), 1.0)  # given text is complete
        before = share.roll(1, dims=1)
        before[:, 0] = 1.0
        opened = (before >= self.add).long().cumprod(1).bool().flatten()
        usual = (before >= self.activate).flatten()
        return replace(views, inside=views.inside & opened[:, None], masked=views.masked & opened[:, None]), usual
