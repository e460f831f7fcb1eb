"""One denoiser forward: what the cache plans to compute, the backbone, and the logits that were asked for."""

from __future__ import annotations

import numpy as np
import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from dllm.backbones.base import MaskedDiffusionModel
from dllm.cache.base import CacheRun, Plan
from dllm.canvas import Canvas, Window
from dllm.prediction import Prediction, Sampling


class Denoiser:
    """Answers a sampler's questions about one window at a time, and counts what they cost.

    Args:
        backbone: the denoiser.
        canvas: what it looks at.
        cache: plans each forward.
        sampling: how logits become tokens.
        cfg_scale: classifier-free guidance; 0 is off. A guided forward computes a second row with
            the prompt masked and counts as one.

    Attributes:
        forwards: (B,) forwards each entry of the current window took part in.
        last: the latest prediction about the current window and the columns it is about.
        computed: columns computed so far, over all rows.
    """

    def __init__(
        self,
        backbone: MaskedDiffusionModel,
        canvas: Canvas,
        cache: CacheRun,
        sampling: Sampling,
        cfg_scale: float,
    ) -> None:
        self.backbone, self.canvas, self.cache = backbone, canvas, cache
        self.sampling, self.cfg_scale = sampling, cfg_scale
        column = torch.arange(canvas.length, device=canvas.device)
        self._positions = (column - canvas.first_real[:, None]).clamp(min=0)
        self._given = ~torch.as_tensor(canvas.region, device=canvas.device)
        self.computed = 0

    def bind(self, window: Window) -> Denoiser:
        """Turn to a new window."""
        self.window = window
        self.forwards: NDArray[np.int64] = np.zeros(len(window.rows), dtype=np.int64)
        self.last: tuple[Prediction, Tensor] | None = None
        return self

    def __call__(
        self,
        asked: Bool[Tensor, "*B K"] | None = None,
        columns: Int[Tensor, "*B K"] | None = None,
        tokens: Int[Tensor, "*B L"] | None = None,
        joined: bool = False,
    ) -> Prediction:
        """Predict tokens; see `dllm.samplers.base.Denoise`."""
        window = self.window
        columns = window.columns if columns is None else columns
        tokens = window.tokens if tokens is None else tokens
        drafts = tokens.shape[1] if tokens.ndim == 3 else 1
        if asked is None:
            asked, index, live = window.masked, window.index, None
            entries = np.arange(len(window.rows))
        else:
            # Reads the device: only policies that ask for something special pay for it.
            index = asked.flatten().nonzero()[:, 0]
            wanted = asked.any(-1).view(len(window.rows), -1)
            if joined:  # a row's drafts are computed together or not at all
                wanted = wanted.any(-1, keepdim=True).expand(-1, drafts)
            live = wanted.flatten().nonzero()[:, 0]
            entries = live.div(drafts, rounding_mode="floor").unique().cpu().numpy()
        self.forwards[entries] += 1
        if columns.ndim == 2:
            columns = repeat(columns, "b k -> b d k", d=drafts)
        logits = self._logits(
            tokens if tokens.ndim == 3 else tokens[:, None], columns, index, live, drafts if joined else 1
        )
        prediction = Prediction(
            logits, asked, index, self.canvas.mask_token_id, self.sampling, self._generators(asked, entries)
        )
        # Of several drafts the first is the canvas as it is.
        shown = prediction if asked.ndim == 2 else prediction.arranged(lambda values: values[:, 0])
        self.last = shown, columns[:, 0]
        return prediction

    def _logits(
        self,
        tokens: Int[Tensor, "B D L"],
        columns: Int[Tensor, "B D K"],
        index: Tensor,
        live: Tensor | None,
        joined: int,
    ) -> Float[Tensor, "N V"]:
        """Logits of the asked slots, `index` counting over (B, D, K) and `live` over the sequences (B, D)."""
        window, (_, drafts, width) = self.window, columns.shape
        tokens, columns = rearrange(tokens, "b d l -> (b d) l"), rearrange(columns, "b d k -> (b d) k")
        entries = torch.arange(len(tokens), device=tokens.device).div(drafts, rounding_mode="floor")
        rows = window.rows[entries]
        sequence, within = index.div(width, rounding_mode="floor"), index % width
        # The prediction for a column is read `logits_shift` to its left, but never in the padding.
        read = torch.maximum(columns - self.backbone.logits_shift, self.canvas.first_real[rows, None])
        slot = read[sequence, within]
        if live is not None:
            tokens, rows, read, entries = tokens[live], rows[live], read[live], entries[live]
            place = torch.zeros(len(columns), dtype=torch.long, device=live.device)
            sequence = place.index_copy(0, live, torch.arange(len(live), device=live.device))[sequence]
        plan = self.cache.plan(window, None if live is None and drafts == 1 else entries, read)
        if plan.columns is not None:
            tokens = tokens.gather(1, plan.columns)
            # A column that is read but not planned has no slot: indexing with this fails instead of reading another.
            slots = torch.full((len(rows), self.canvas.length), 2**40, device=tokens.device)
            order = torch.arange(plan.columns.shape[1], device=tokens.device).expand_as(plan.columns)
            slot = slots.scatter(1, plan.columns, order)[sequence, slot]
        return self._forward(rows, tokens, plan, sequence * tokens.shape[1] + slot, joined)

    def _forward(
        self, rows: Tensor, tokens: Int[Tensor, "A C"], plan: Plan, select: Tensor, joined: int
    ) -> Float[Tensor, "N V"]:
        """Run the backbone on the planned columns and project the selected slots; two passes under guidance."""
        positions, given = self._positions[rows], self._given[rows]
        if plan.columns is not None:
            positions, given = positions.gather(1, plan.columns), given.gather(1, plan.columns)
        real = self.canvas.real_columns
        mask = None if real is None else real[rows]
        blind = tokens.masked_fill(given, self.canvas.mask_token_id)
        if joined > 1:
            mask = _tree_mask(mask, joined, tokens)
            tokens, positions, blind = (
                rearrange(each, "(a d) c -> a (d c)", d=joined) for each in (tokens, positions, blind)
            )
        self.computed += tokens.numel()
        if self.cfg_scale == 0:
            return self.backbone(tokens, mask, positions, plan.store, select).logits
        both = torch.cat((select, select + tokens.numel()))
        mask = None if mask is None else torch.cat((mask, mask))
        logits = self.backbone(torch.cat((tokens, blind)), mask, torch.cat((positions, positions)), None, both).logits
        conditional, unconditional = logits.chunk(2)
        return unconditional + (self.cfg_scale + 1) * (conditional - unconditional)

    def _generators(self, asked: Tensor, entries: NDArray[np.int64]) -> list[tuple[torch.Generator, int]]:
        """Whose randomness each run of asked positions draws from; nothing at temperature 0."""
        if self.sampling.temperature == 0:
            return []
        counts = rearrange(asked, "b ... -> b (...)").sum(-1).tolist()
        return [(self.canvas.generators[self.canvas.rows[entry]], counts[entry]) for entry in entries]


def _tree_mask(real: Bool[Tensor, "A S"] | None, drafts: int, tokens: Int[Tensor, "A C"]) -> Bool[Tensor, "B 1 Q Q"]:
    """Which columns each column of a row's joined drafts may look at: those of its own draft."""
    branch = torch.arange(drafts, device=tokens.device).repeat_interleave(tokens.shape[1])
    mask = (branch[:, None] == branch)[None, None]
    if real is None:
        return mask.expand(len(tokens) // drafts, -1, -1, -1)
    return mask & rearrange(real, "(a d) s -> a 1 1 (d s)", d=drafts)
