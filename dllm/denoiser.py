"""One denoiser forward: what the cache plans to compute, the backbone, and the logits that were asked for."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from dllm.backbones.base import MaskedDiffusionModel
from dllm.backbones.transformer import KVStore
from dllm.cache.base import CacheRun, Plan, Question, Selection
from dllm.canvas import Canvas, Window
from dllm.drift import Meter
from dllm.layout import apart, pack
from dllm.prediction import Prediction, Sampling


@dataclass(frozen=True)
class Work:
    """One call of the backbone.

    Attributes:
        tokens: of the computed columns.
        positions: of these.
        given: True where a guided forward masks them.
        real: canvas columns that may be looked at; None for all.
        store: keys and values of the other columns.
        columns: the computed columns; None for all.
        joined: sequences of a row that become one.
    """

    tokens: Int[Tensor, "A C"]
    positions: Int[Tensor, "A C"]
    given: Bool[Tensor, "A C"]
    real: Bool[Tensor, "A L"] | None
    store: KVStore | None = None
    columns: Int[Tensor, "A C"] | None = None
    joined: int = 1


class Denoiser:
    """Answers a sampler's questions about one window at a time, and counts what they cost.

    Args:
        backbone: the denoiser.
        canvas: what it looks at.
        cache: plans each forward.
        sampling: how logits become tokens.
        cfg_scale: classifier-free guidance; 0 is off. A guided forward computes a second row with
            the prompt masked and counts as one.
        meter: compares some forwards with exact ones.

    Attributes:
        forwards: (B,) forwards each entry of the current window took part in.
        last: the latest prediction about the current window and the columns it is about.
        looked: what was computed in each forward of the current window, as (rows, (A, L) columns or None for all).
        computed: (rows,) columns computed so far for each canvas row.
        refreshes: (rows,) forwards so far in which a cache had everything computed anew.
    """

    def __init__(
        self,
        backbone: MaskedDiffusionModel,
        canvas: Canvas,
        cache: CacheRun,
        sampling: Sampling,
        cfg_scale: float,
        meter: Meter,
    ) -> None:
        self.backbone, self.canvas, self.cache, self.meter = backbone, canvas, cache, meter
        self.sampling, self.cfg_scale = sampling, cfg_scale
        column = torch.arange(canvas.length, device=canvas.device)
        self._positions = (column - canvas.first_real[:, None]).clamp(min=0)
        self._given = ~torch.as_tensor(canvas.region, device=canvas.device)
        self.computed, self.refreshes = np.zeros((2, len(canvas.host)), dtype=np.int64)

    def bind(self, window: Window) -> Denoiser:
        """Turn to a new window."""
        self.window = window
        self.forwards: NDArray[np.int64] = np.zeros(len(window.rows), dtype=np.int64)
        self.last: tuple[Prediction, Tensor] | None = None
        self.looked: list[tuple[NDArray[np.int64], NDArray[np.bool_] | None]] = []
        return self

    def __call__(
        self,
        asked: Bool[Tensor, "*B K"] | None = None,
        columns: Int[Tensor, "*B K"] | None = None,
        tokens: Int[Tensor, "B D L"] | None = None,
        joined: bool = False,
    ) -> Prediction:
        """Predict tokens; see `dllm.samplers.base.Denoise`."""
        window = self.window
        if asked is None and columns is not None:
            asked = window.masked
        columns = window.columns if columns is None else columns
        tokens = window.tokens[:, None] if tokens is None else tokens
        drafts = tokens.shape[1]
        if asked is None:
            asked, index, live = window.masked, window.index, None
            entries = np.arange(len(window.rows))
        else:
            # Reads the device: only policies that ask for something special pay for it.
            index = asked.flatten().nonzero()[:, 0]
            wanted = asked.any(-1).view(len(window.rows), -1)
            joined = joined and bool(wanted[:, 1:].any())
            if joined:  # a row's drafts are computed together or not at all
                wanted = wanted.any(-1, keepdim=True).expand(-1, drafts)
            live = wanted.flatten().nonzero()[:, 0]
            entries = live.div(drafts, rounding_mode="floor").unique().cpu().numpy()
        self.forwards[entries] += 1
        if columns.ndim == 2:
            columns = repeat(columns, "b k -> b d k", d=drafts)
        logits = self._logits(tokens, columns, asked, index, live, drafts if joined else 1)
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
        asked: Bool[Tensor, "*B K"],
        index: Tensor,
        live: Tensor | None,
        joined: int,
    ) -> Float[Tensor, "N V"]:
        """Logits of the asked slots, `index` counting over (B, D, K) and `live` over the sequences (B, D)."""
        window, (_, drafts, width) = self.window, columns.shape
        tokens, columns = rearrange(tokens, "b d l -> (b d) l"), rearrange(columns, "b d k -> (b d) k")
        # Read from the device for the policies that ask for something special; the host knows all else.
        sequences = np.arange(len(tokens)) if live is None else live.cpu().numpy()
        rows = self.canvas.rows[sequences // drafts]

        def places() -> tuple[NDArray[np.int64], NDArray[np.int64]]:
            if live is None:
                sequence, column = np.nonzero(self.canvas.active_masks())
            else:
                flags = rearrange(asked, "... k -> (...) k")[live].cpu().numpy()
                sequence, slot = np.nonzero(flags)
                column = columns[live].cpu().numpy()[sequence, slot]
            return sequence, np.maximum(column - self.backbone.logits_shift, self.canvas.padding[rows[sequence]])

        if live is not None:
            tokens = tokens[live]
        shown = None if drafts == 1 else lambda: tokens.cpu().numpy()
        question = Question(self.canvas, rows, sequences % drafts == 0, places, shown)
        plan = self.cache.plan(question)
        self.looked.append((rows, plan.compute))
        if plan.compute is not None and plan.store is not None:
            return self._reusing(question, plan, tokens, joined)
        self.meter.trust(question, self.meter.due(question))
        at = window.rows if live is None else window.rows[live.div(drafts, rounding_mode="floor")]
        sequence, within = index.div(width, rounding_mode="floor"), index % width
        # The prediction for a column is read `logits_shift` to its left, but never in the padding.
        slot = columns[sequence, within] - self.backbone.logits_shift
        if live is not None:
            place = torch.zeros(len(columns), dtype=torch.long, device=live.device)
            sequence = place.index_copy(0, live, torch.arange(len(live), device=live.device))[sequence]
        slot = torch.maximum(slot, self.canvas.first_real[at[sequence]])
        np.add.at(self.computed, rows, self.canvas.length)
        real = self.canvas.real_columns
        work = Work(tokens, self._positions[at], self._given[at], None if real is None else real[at], joined=joined)
        return self._forward(work, sequence * tokens.shape[1] + slot)

    def _reusing(self, question: Question, plan: Plan, tokens: Int[Tensor, "A L"], joined: int) -> Float[Tensor, "N V"]:
        """Logits of what is asked, computed in as many forwards as the plan's widths make worth while."""
        assert plan.compute is not None
        assert plan.store is not None
        sequence, column = question.places()
        asked = len(sequence)
        if plan.probe is not None:
            extra = np.nonzero(plan.probe.read)
            sequence, column = np.concatenate((sequence, extra[0])), np.concatenate((column, extra[1]))
        joined = joined if plan.store.joinable else 1
        whole = plan.whole(self.canvas.visible[question.rows]) & question.first
        np.add.at(self.refreshes, question.rows[whole], 1)
        compute = _together(plan.compute, joined)
        cost = compute.sum(1) if plan.cost is None else plan.cost
        device, real = tokens.device, self.canvas.real_columns
        parts, order = [], []
        for group in apart(cost, question.rows):
            host, slots = pack(compute[group])
            local = np.full(len(compute), -1)
            local[group] = np.arange(len(group))
            mine = np.flatnonzero(local[sequence] >= 0)
            at = local[sequence[mine]]
            select = torch.as_tensor(at * host.shape[1] + slots[at, column[mine]], device=device)
            columns = torch.as_tensor(host, device=device)
            chosen = Selection(question.rows[group], question.first[group], host, columns, joined)
            every = len(group) == len(compute)
            rows = torch.as_tensor(chosen.rows, device=device)
            fed = (tokens if every else tokens[torch.as_tensor(group, device=device)]).gather(1, columns)
            work = Work(
                fed, self._positions[rows].gather(1, columns), self._given[rows].gather(1, columns),
                None if real is None else real[rows], plan.store.bind(chosen), columns, joined,
            )  # fmt: skip
            np.add.at(self.computed, question.rows[group], cost[group].max())
            parts.append(self._forward(work, select))
            order.append(mine)
        logits = parts[0]
        if len(parts) > 1:
            logits = torch.cat(parts)[torch.as_tensor(np.argsort(np.concatenate(order)), device=device)]
        if plan.probe is not None:
            plan.probe.tell(_surest(logits[asked:], plan.probe.read, self.canvas.mask_token_id))
            logits = logits[:asked].clone()  # what is kept of a prediction must not keep the rest
        return self._measured(question, plan, logits, tokens)

    def _measured(
        self, question: Question, plan: Plan, logits: Float[Tensor, "N V"], tokens: Int[Tensor, "A L"]
    ) -> Float[Tensor, "N V"]:
        """The logits, after comparing them with exact ones where that is due."""
        meter, length = self.meter, self.canvas.length

        def exact(sequences: NDArray[np.int64], comparison: KVStore) -> Float[Tensor, "N V"]:
            of, column = question.places()
            mine = np.isin(of, sequences)
            slots = np.searchsorted(sequences, of[mine]) * length + column[mine]
            rows = torch.as_tensor(question.rows[sequences], device=tokens.device)
            fed = tokens[torch.as_tensor(sequences, device=tokens.device)]
            real = self.canvas.real_columns
            work = Work(fed, self._positions[rows], self._given[rows], None if real is None else real[rows], comparison)
            if meter.above is not None:  # what may act on the result counts as part of it
                self.forwards[np.searchsorted(self.canvas.rows, question.rows[sequences])] += 1
                np.add.at(self.computed, question.rows[sequences], length)
            return self._forward(work, torch.as_tensor(slots, device=tokens.device))

        logits, off = meter.measure(question, plan, logits, exact)
        if off.size:
            self.cache.expire(off)
        return logits

    def _forward(self, work: Work, select: Tensor) -> Float[Tensor, "N V"]:
        """Run the backbone and project the selected slots; two passes under guidance."""
        tokens, positions, mask = work.tokens, work.positions, work.real
        blind = tokens.masked_fill(work.given, self.canvas.mask_token_id)
        if work.joined > 1:
            mask = _tree_mask(work, self.canvas.length)
            tokens, positions, blind = (
                rearrange(each, "(a d) c -> a (d c)", d=work.joined) for each in (tokens, positions, blind)
            )
        if self.cfg_scale == 0:
            return self.backbone(tokens, mask, positions, work.store, select).logits
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


def _surest(logits: Float[Tensor, "N V"], read: NDArray[np.bool_], mask_token_id: int) -> Float[Tensor, "A L"]:
    """Probability of the most probable token other than [MASK] where it was read; 0 elsewhere."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    best = logits.index_fill(-1, torch.tensor([mask_token_id], device=logits.device), -torch.inf).amax(-1)
    confidence = torch.zeros(read.shape, dtype=logits.dtype, device=logits.device)
    confidence[torch.as_tensor(read, device=logits.device)] = (best - logits.logsumexp(-1)).exp()
    return confidence


def _together(compute: NDArray[np.bool_], joined: int) -> NDArray[np.bool_]:
    """The columns to compute; drafts that are joined compute the same ones."""
    if joined == 1:
        return compute
    return np.repeat(rearrange(compute, "(a d) l -> a d l", d=joined).any(1), joined, axis=0)


def _tree_mask(work: Work, length: int) -> Bool[Tensor, "B 1 Q S"]:
    """Which columns each column of a row's joined drafts may look at: stored ones, and those of its own draft."""
    width, device = work.tokens.shape[1], work.tokens.device
    branch = torch.arange(work.joined, device=device).repeat_interleave(width)
    own = (branch[:, None] == branch)[None, None]
    split = {"d": work.joined}
    if work.columns is None:
        if work.real is None:
            return own.expand(len(work.tokens) // work.joined, -1, -1, -1)
        return own & rearrange(work.real, "(a d) s -> a 1 1 (d s)", **split)
    # A column is seen once: fresh where the draft computes it, stored elsewhere; what fills up a short draft is not.
    fresh = torch.ones_like(work.columns, dtype=torch.bool)
    fresh[:, 1:] = work.columns[:, 1:] != work.columns[:, :-1]
    stored = torch.ones((len(work.tokens), length), dtype=torch.bool, device=device)
    stored.scatter_(1, work.columns, False)
    if work.real is not None:
        fresh, stored = fresh & work.real.gather(1, work.columns), stored & work.real
    own = own & rearrange(fresh, "(a d) c -> a 1 1 (d c)", **split)
    stored = repeat(stored, "(a d) s -> a 1 (d c) s", c=width, **split)
    return torch.cat((stored, own), dim=-1)
