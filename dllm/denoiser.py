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
        self._real = column >= canvas.first_real[:, None] if canvas.padded else None
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
        columns: Int[Tensor, "B K"] | None = None,
        tokens: Int[Tensor, "*B L"] | None = None,
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
            live = rearrange(asked, "b ... -> b (...)").any(-1).nonzero()[:, 0]
            entries = live.cpu().numpy()
        self.forwards[entries] += 1
        logits = self._logits(tokens if tokens.ndim == 3 else tokens[:, None], columns, index, live, drafts)
        prediction = Prediction(
            logits, asked, index, self.canvas.mask_token_id, self.sampling, self._generators(asked, entries)
        )
        self.last = prediction, columns
        return prediction

    def _logits(
        self, tokens: Int[Tensor, "B D L"], columns: Tensor, index: Tensor, live: Tensor | None, drafts: int
    ) -> Float[Tensor, "N V"]:
        """Logits of the asked slots, `index` counting over (B, D, K)."""
        window, width = self.window, columns.shape[1]
        rows = window.rows if live is None else window.rows[live]
        # The prediction for a column is read `logits_shift` to its left, but never in the padding.
        read = torch.maximum(columns - self.backbone.logits_shift, self.canvas.first_real[window.rows, None])
        plan = self.cache.plan(window, live, read if live is None else read[live])
        entry, within = index.div(drafts * width, rounding_mode="floor"), index % width
        draft = index.div(width, rounding_mode="floor") % drafts
        slot = read[entry, within]
        if live is not None:
            tokens = tokens[live]
            place = torch.zeros(len(window.rows), dtype=torch.long, device=live.device)
            entry = place.index_copy(0, live, torch.arange(len(live), device=live.device))[entry]
        if plan.columns is not None:
            tokens = tokens.gather(2, repeat(plan.columns, "b c -> b d c", d=drafts))
            # A column that is read but not planned has no slot: indexing with this fails instead of reading another.
            slots = torch.full((len(rows), self.canvas.length), 2**40, device=tokens.device)
            order = torch.arange(plan.columns.shape[1], device=tokens.device).expand_as(plan.columns)
            slot = slots.scatter(1, plan.columns, order)[entry, slot]
        select = (entry * drafts + draft) * tokens.shape[2] + slot
        return self._forward(rows, tokens, plan, select)

    def _forward(self, rows: Tensor, tokens: Int[Tensor, "B D C"], plan: Plan, select: Tensor) -> Tensor:
        """Run the backbone on the planned columns and project the selected slots; two passes under guidance."""
        drafts = tokens.shape[1]
        positions = self._positions[rows]
        given = self._given[rows]
        if plan.columns is not None:
            positions, given = positions.gather(1, plan.columns), given.gather(1, plan.columns)
        positions = repeat(positions, "b c -> (b d) c", d=drafts)
        mask = None if self._real is None else repeat(self._real[rows], "b s -> (b d) s", d=drafts)
        flat = rearrange(tokens, "b d c -> (b d) c")
        self.computed += flat.numel()
        if self.cfg_scale == 0:
            return self.backbone(flat, mask, positions, plan.store, select).logits
        blind = flat.masked_fill(repeat(given, "b c -> (b d) c", d=drafts), self.canvas.mask_token_id)
        both = torch.cat((select, select + flat.numel()))
        mask = None if mask is None else torch.cat((mask, mask))
        logits = self.backbone(torch.cat((flat, blind)), mask, torch.cat((positions, positions)), None, both).logits
        conditional, unconditional = logits.chunk(2)
        return unconditional + (self.cfg_scale + 1) * (conditional - unconditional)

    def _generators(self, asked: Tensor, entries: NDArray[np.int64]) -> list[tuple[torch.Generator, int]]:
        """Whose randomness each run of asked positions draws from; nothing at temperature 0."""
        if self.sampling.temperature == 0:
            return []
        counts = rearrange(asked, "b ... -> b (...)").sum(-1).tolist()
        return [(self.canvas.generators[self.canvas.rows[entry]], counts[entry]) for entry in entries]
