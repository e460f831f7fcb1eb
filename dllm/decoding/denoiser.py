"""One denoiser forward: what the cache plans to compute, the backbone, and the logits that were asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from dllm.cache.base import CacheRun, Plan
from dllm.cache.selection import Selection, Store
from dllm.decoding.canvas import Canvas
from dllm.decoding.drift import Meter
from dllm.decoding.flags import flagged
from dllm.decoding.graphs import Forward
from dllm.decoding.layout import OVERHEAD, apart, pack, span
from dllm.decoding.nonfinite import Broken, not_finite, reason
from dllm.decoding.prediction import Part, Prediction, Sampling
from dllm.decoding.question import Question, about_drafts, about_window
from dllm.decoding.transfer import put, send
from dllm.decoding.window import Window
from dllm.decoding.work import Work
from dllm.models.transformer import KVStore


class Denoiser:
    """Answers a sampler's questions about one window at a time, and counts what they cost.

    Args:
        forward: the denoiser.
        canvas: what it looks at.
        cache: plans each forward.
        cfg_scale: classifier-free guidance; 0 is off. A guided forward computes a second row with
            the prompt masked and counts as one.
        meter: compares some forwards with exact ones.

    Attributes:
        forwards: (B,) forwards each entry of the current window took part in.
        last: the latest prediction about the current window and the columns it is about.
        looked: what was computed in each forward of the current window, as (slots, (A, L) columns).
        computed: (B,) columns computed for each entry of the window; padding, and what fills up a row beside
            others that need more, is nobody's.
        refreshes: (B,) forwards of the current window in which a cache had everything computed anew.
    """

    def __init__(
        self,
        forward: Forward,
        canvas: Canvas,
        cache: CacheRun,
        cfg_scale: float,
        meter: Meter,
    ) -> None:
        self._run, self.backbone = forward, forward.backbone
        self._overhead = OVERHEAD.get(self.backbone.device.type, OVERHEAD["cpu"])
        self.canvas, self.cache, self.meter, self.cfg_scale = canvas, cache, meter, cfg_scale

    def bind(self, window: Window) -> Denoiser:
        """Turn to a new window."""
        self.window = window
        self.forwards, self.computed, self.refreshes = np.zeros((3, len(window.rows)), dtype=np.int64)
        self.last: tuple[Prediction, Tensor] | None = None
        self.looked: list[tuple[NDArray[np.int64], NDArray[np.bool_]]] = []
        self._broken = torch.zeros_like(window.rows, dtype=torch.bool)
        return self

    @property
    def broken(self) -> Broken:
        """Entries of the window for which some forward gave no numbers."""
        return Broken(self._broken, reason("the model", self.backbone.dtype, "dtype="))

    def __call__(
        self,
        asked: Bool[Tensor, "*B K"] | None = None,
        columns: Int[Tensor, "*B K"] | None = None,
        tokens: Int[Tensor, "B D L"] | None = None,
        joined: bool = False,
        decided: bool = False,
    ) -> Prediction:
        """Predict tokens; see `dllm.samplers.base.Denoise`."""
        window = self.window
        shift = self.backbone.logits_shift
        if asked is None and columns is None and tokens is None:
            asked, columns = window.inside if decided else window.masked, window.columns
            question = about_window(self.canvas, window, decided, shift)
        else:
            asked = window.masked if asked is None else asked
            columns = window.columns if columns is None else columns
            tokens = window.tokens[:, None] if tokens is None else tokens
            question = about_drafts(self.canvas, asked, columns, tokens, joined, shift)
        self.forwards[np.unique(question.slots)] += 1
        logits = self._logits(question)
        # The indices of the window's own masks are on the device already.
        index = window.index if asked is window.masked and columns is window.columns else self._put(question.index)
        prediction = self._predict(logits, asked, index, question)
        self._broken = self._broken | prediction.broken.flatten(1).any(1)
        # Of several drafts the first is the canvas as it is.
        shown = prediction if asked.ndim == 2 else prediction.arranged(lambda values: values[:, 0])
        self.last = shown, columns if columns.ndim == 2 else columns[:, 0]
        return prediction

    def _logits(self, question: Question) -> Float[Tensor, "N V"]:
        """Logits of what is asked."""
        plan, visible = self.cache.plan(question), question.visible
        if plan.compute is not None and plan.store is not None:
            compute = plan.compute & visible
            self.looked.append((question.slots, compute))
            return self._reusing(question, replace(plan, compute=compute))
        self.meter.trust(question, self.meter.due(question))
        self.looked.append((question.slots, visible))
        cost = visible.sum(1)
        np.add.at(self.computed, question.slots, cost)
        return self._in_forwards(question, cost, lambda some, group: self._whole(some))

    def _in_forwards(
        self,
        question: Question,
        cost: NDArray[np.int64],
        forward: Callable[[Question, NDArray[np.int64]], Float[Tensor, "N V"]],
    ) -> Float[Tensor, "N V"]:
        """Logits of what is asked, in as many forwards as the columns of each sequence make worth while."""
        groups = apart(cost, question.slots, self._overhead)
        parts = [forward(question.some(group), group) for group in groups]
        if len(parts) == 1:
            return parts[0]
        order = np.concatenate([np.flatnonzero(np.isin(question.places[0], group)) for group in groups])
        return torch.cat(parts)[self._put(np.argsort(order))]

    def _whole(self, question: Question, store: KVStore | None = None) -> Float[Tensor, "N V"]:
        """Logits of what is asked, with every column computed that some sequence attends to."""
        tokens, visible = question.tokens, question.visible
        low, high = span(visible)
        sequence, column = question.places
        padding = self.canvas.padding[question.rows]
        select, first = send(tokens.device, sequence * (high - low) + column - low, padding)
        positions = (torch.arange(low, high, device=tokens.device) - first[:, None]).clamp(min=0)
        given = None
        if self.cfg_scale > 0:
            given = ~self.window.region[self._put(question.slots), low:high]
        work = Work(
            tokens[:, low:high], positions, high - low, self._looks(visible[:, low:high]), given, store,
            joined=question.joined, keys=positions,
        )  # fmt: skip
        return self._forward(work, select)

    def _reusing(self, question: Question, plan: Plan) -> Float[Tensor, "N V"]:
        """Logits of what is asked, computed in as many forwards as the plan's widths make worth while."""
        assert plan.compute is not None
        assert plan.store is not None
        store, asked = plan.store, len(question.places[0])
        question = question if store.joinable else replace(question, joined=1)
        np.add.at(self.refreshes, question.slots[plan.whole(question.visible) & question.first], 1)
        compute = _together(plan.compute, question.joined)
        cost = compute.sum(1) if plan.cost is None else plan.cost
        np.add.at(self.computed, question.slots, cost)
        wanted = question if plan.probe is None else question.and_about(plan.probe.read)
        logits = self._in_forwards(wanted, cost, lambda some, group: self._part(some, store, compute[group]))
        if plan.probe is not None:
            plan.probe.tell(_surest(logits[asked:], plan.probe.read, self.canvas.mask_token_id))
            logits = logits[:asked].clone()  # what is kept of a prediction must not keep the rest
        return self._measured(question, plan, logits)

    def _part(self, question: Question, store: Store, compute: NDArray[np.bool_]) -> Float[Tensor, "N V"]:
        """Logits of what is asked, in one forward that computes some columns of each sequence."""
        tokens, visible = question.tokens, question.visible
        low, high = span(visible)
        host, places = pack(compute)
        sequence, column = question.places
        select = sequence * host.shape[1] + places[sequence, column]
        columns, select_at, first = send(tokens.device, host, select, self.canvas.padding[question.rows])
        selection = Selection(
            question.rows, question.slots, question.first, host, columns, (low, high), question.joined
        )
        work = Work(
            tokens.gather(1, columns), (columns - first[:, None]).clamp(min=0), high - low,
            self._looks(visible[:, low:high]), None, store.bind(selection), columns - low, question.joined,
            None if self.backbone.pattern is None else torch.arange(low, high, device=tokens.device) - first[:, None],
        )  # fmt: skip
        return self._forward(work, select_at)

    def _measured(self, question: Question, plan: Plan, logits: Float[Tensor, "N V"]) -> Float[Tensor, "N V"]:
        """The logits, after comparing them with exact ones where that is due."""
        meter = self.meter

        def exact(sequences: NDArray[np.int64], comparison: KVStore) -> Float[Tensor, "N V"]:
            some = replace(question, joined=1).some(sequences)
            if meter.above is not None:  # what may act on the result counts as part of it
                self.forwards[some.slots] += 1
                np.add.at(self.computed, some.slots, some.visible.sum(1))
            logits = self._whole(some, comparison)
            asking = self._put(some.slots[some.places[0]])
            self._broken = flagged(self._broken[None], asking[None], not_finite(logits)[None])[0]
            return logits

        logits, off = meter.measure(question, plan, logits, exact)
        if off.size:
            self.cache.expire(off)
        return logits

    def _forward(self, work: Work, select: Tensor) -> Float[Tensor, "N V"]:
        """Run the backbone and project the selected places; two passes under guidance."""
        tokens, positions, given, mask = work.tokens, work.positions, work.given, work.mask(self.backbone.pattern)
        if work.joined > 1:
            tokens, positions = (rearrange(each, "(a d) c -> a (d c)", d=work.joined) for each in (tokens, positions))
            given = None if given is None else rearrange(given, "(a d) c -> a (d c)", d=work.joined)
        if given is None:
            return self._run(tokens, mask, positions, work.store, select)
        both = torch.cat((select, select + tokens.numel()))
        mask = None if mask is None else torch.cat((mask, mask))
        blind = tokens.masked_fill(given, self.canvas.mask_token_id)
        logits = self._run(torch.cat((tokens, blind)), mask, torch.cat((positions, positions)), None, both)
        conditional, unconditional = logits.chunk(2)
        return unconditional + (self.cfg_scale + 1) * (conditional - unconditional)

    def _predict(
        self, logits: Float[Tensor, "N V"], asked: Bool[Tensor, "*B K"], index: Int[Tensor, " N"], question: Question
    ) -> Prediction:
        """Choose tokens, as each row's request wants them chosen."""
        canvas, of = self.canvas, question.slots[question.places[0]]
        requests = [canvas.requests[row] for row in canvas.rows]
        samplings = [request.sampling for request in requests if request is not None]
        kinds = list(dict.fromkeys(samplings[slot] for slot in np.unique(of)))
        if len(kinds) == 1:
            return Prediction(logits, asked, index, canvas.mask_token_id, kinds[0], self._sources(kinds[0], of))
        kind = np.array([kinds.index(each) if each in kinds else -1 for each in samplings])[of]
        at = [np.flatnonzero(kind == number) for number in range(len(kinds))]
        parts = [Part(one, self._put(here), self._sources(one, of[here])) for one, here in zip(kinds, at, strict=True)]
        return Prediction.mixed(logits, asked, index, canvas.mask_token_id, parts)

    def _sources(self, sampling: Sampling, slots: NDArray[np.int64]) -> list[tuple[torch.Generator, int]]:
        """Whose randomness each run of asked positions draws from; nothing at temperature 0."""
        if sampling.temperature == 0:
            return []
        found, counts = np.unique(slots, return_counts=True)
        sources = (self.canvas.generators[row] for row in self.canvas.rows[found])
        return [(source, int(count)) for source, count in zip(sources, counts, strict=True) if source is not None]

    def _looks(self, visible: NDArray[np.bool_]) -> Bool[Tensor, "A S"] | None:
        """What may be looked at, on the device; None where that is everything."""
        return None if visible.all() else self._put(visible)

    def _put(self, array: NDArray[np.generic]) -> Tensor:
        return put(self.canvas.device, array)


def _surest(logits: Float[Tensor, "N V"], read: NDArray[np.bool_], mask_token_id: int) -> Float[Tensor, "A L"]:
    """Probability of the most probable token other than [MASK] where it was read; 0 elsewhere."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    best = logits.index_fill(-1, torch.tensor([mask_token_id], device=logits.device), -torch.inf).amax(-1)
    confidence = torch.zeros(read.shape, dtype=logits.dtype, device=logits.device)
    confidence[put(logits.device, read)] = (best - logits.logsumexp(-1)).exp()
    return confidence


def _together(compute: NDArray[np.bool_], joined: int) -> NDArray[np.bool_]:
    """The columns to compute; drafts that are joined compute the same ones."""
    if joined == 1:
        return compute
    return np.repeat(rearrange(compute, "(a d) l -> a d l", d=joined).any(1), joined, axis=0)
