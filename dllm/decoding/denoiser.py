"""One denoiser forward: the plan of the cache, the backbone, and the requested logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from dllm.cache.base import CacheRun, Plan
from dllm.cache.selection import Selection, Store
from dllm.decoding.branches import Attention, Branches
from dllm.decoding.canvas import Canvas
from dllm.decoding.drift import Meter
from dllm.decoding.encoded import Encoded
from dllm.decoding.flags import flagged
from dllm.decoding.gate import Gate
from dllm.decoding.graphs import FixedStore, Forward
from dllm.decoding.layout import OVERHEAD, Layout, by_width, pack, span
from dllm.decoding.nonfinite import Broken, not_finite, reason
from dllm.decoding.prediction import Part, Prediction, Sampling
from dllm.decoding.question import Question, about_drafts, about_shadows, about_window
from dllm.decoding.recent import Recent
from dllm.decoding.transfer import put, send
from dllm.decoding.window import Edit, Unforeseen, Window
from dllm.models.transformer import KVStore


@dataclass(frozen=True)
class _Placed:
    """Where the columns of a forward over A sequences are.

    Attributes:
        selection: the columns, for the store.
        source: the sequence of the question that each one is; None for all, in order.
        start: place of the first column of each sequence of the question.
        within: (A, L) place of each computed column in its sequence.
        read: columns of the canvas from which tokens are read.
        positions: of the columns.
        mask: attention mask.
        slots: slot of each sequence; of those that are not asked about, perhaps one without a row.
    """

    selection: Selection
    source: Int[Tensor, " A"] | None
    start: NDArray[np.int64]
    within: NDArray[np.int64]
    read: Int[Tensor, "A C"]
    positions: Int[Tensor, "A C"]
    mask: Tensor | None
    slots: Int[Tensor, " A"]


@dataclass
class Account:
    """What the predictions for one window took, and the last of them.

    Attributes:
        forwards: (B,) forwards of each entry of the window.
        computed: (B,) columns computed for each entry; padding of any kind is not counted.
        refreshes: (B,) forwards in which a cache recomputed every position.
        reused: (B,) columns that entries took from earlier requests.
        looked: columns computed in each forward, as (slots, (A, L) columns).
        last: the latest prediction and its columns, of every draft.
        broken: entries with non-finite logits in some forward; None before any.
    """

    forwards: NDArray[np.int64]
    computed: NDArray[np.int64]
    refreshes: NDArray[np.int64]
    reused: NDArray[np.int64]
    looked: list[tuple[NDArray[np.int64], NDArray[np.bool_]]] = field(default_factory=list)
    last: tuple[Prediction, Tensor] | None = None
    broken: Bool[Tensor, " B"] | None = None

    def shown(self, window: Window, edit: Edit) -> tuple[Prediction, Tensor] | None:
        """The prediction that an edit was made by and its columns, (B, K), without drafts; None without one."""
        if edit.prediction is not None:
            return edit.prediction, window.columns
        if self.last is None or self.last[0].asked.ndim == 2:
            return self.last
        prediction, columns = self.last
        columns = (columns if columns.ndim == 3 else columns[:, None]).expand(prediction.asked.shape)
        if edit.source is None:  # the first draft, which is the canvas
            return prediction.arranged(lambda values: values[:, 0]), columns[:, 0]
        drafts = torch.arange(columns.shape[1], device=columns.device)[:, None]
        own = edit.source[:, None].expand(-1, columns.shape[1], -1).gather(2, columns) == drafts
        shown = prediction.within(prediction.asked & own).arranged(lambda values: values.flatten(1))
        return shown, columns.flatten(1)


class Denoiser:
    """Computes the predictions that a sampler requests for one window at a time, and counts their cost.

    Args:
        forward: the backbone.
        canvas: its input.
        cache: plans each forward.
        cfg_scale: classifier-free guidance; 0 is off. A guided forward computes a second row with
            the prompt masked and counts as one.
        meter: measures the approximation error of some forwards.
        gate: excludes tokens that would leave the format of an answer.

    Attributes:
        account: of the current window.
    """

    def __init__(
        self,
        forward: Forward,
        canvas: Canvas,
        cache: CacheRun,
        cfg_scale: float,
        meter: Meter,
        gate: Gate,
    ) -> None:
        self._run, self.backbone = forward, forward.backbone
        self._overhead = OVERHEAD.get(self.backbone.device.type, OVERHEAD["cpu"])
        self.canvas, self.cache, self.meter, self.cfg_scale = canvas, cache, meter, cfg_scale
        self._gate = gate
        self._recent: Recent[_Placed] = Recent()
        self._encoded = Encoded(self.backbone, canvas) if self.backbone.uniform else None

    def bind(self, window: Window, foreseen: bool = False) -> Account:
        """Switch to a new window.

        Args:
            window: of the next predictions.
            foreseen: it is that of `Canvas.foreseen`, so that only the device knows which of its positions are masked;
                calls that need to know raise `Unforeseen`.
        """
        self.window, self._foreseen = window, foreseen
        self.account = Account(*np.zeros((4, len(window.rows)), dtype=np.int64))
        if self._encoded is not None:
            self._encoded.begin()
        return self.account

    def broken(self, account: Account) -> Broken | None:
        """Entries of a window with non-finite logits in some forward; None where nothing was predicted."""
        if account.broken is None:
            return None
        return Broken(account.broken, reason("the model", self.backbone.dtype, "dtype="))

    def __call__(
        self,
        asked: Bool[Tensor, "*B K"] | None = None,
        columns: Int[Tensor, "*B K"] | None = None,
        tokens: Int[Tensor, "B D L"] | None = None,
        attention: Attention = "apart",
        decided: bool = False,
        ahead: bool = False,
        temperature: Float[Tensor, " B"] | None = None,
    ) -> Prediction:
        """Predict tokens; see `dllm.samplers.base.Denoise`."""
        window = self.window
        shift = self.backbone.logits_shift
        own = asked is None and columns is None and tokens is None
        if self._foreseen and (attention != "apart" or not own):
            raise Unforeseen("it asks about positions of its own")
        if own and attention == "shadow":
            asked, columns, tokens = self._shadows()
            question = about_shadows(self.canvas, tokens, shift)
        elif own:
            asked, columns = window.inside if decided else window.masked, window.columns
            if ahead:
                columns = torch.arange(self.canvas.length, device=columns.device).expand_as(window.tokens)
                asked = window.region & (decided | (window.tokens == self.canvas.mask_token_id))
            question = about_window(self.canvas, window, decided, ahead, shift)
        else:
            asked = window.masked if asked is None else asked
            columns = window.columns if columns is None else columns
            tokens = window.tokens[:, None] if tokens is None else tokens
            question = about_drafts(self.canvas, asked, columns, tokens, attention, shift)
        self.account.forwards[np.unique(question.slots)] += 1
        if self._encoded is not None:
            question = self._encoded.shown(question, temperature)
        logits = self._logits(question)
        if temperature is not None and self._encoded is None:
            logits = logits / temperature[self._put(question.slots[question.places[0]])][:, None]
        logits = self._gate.exclude(logits, question, asked, columns)
        # The indices of the window's masks are on the device already.
        known = asked is window.masked and columns is window.columns and not self._foreseen
        prediction = self._predict(logits, asked, self.canvas.index if known else self._put(question.index), question)
        if self._foreseen:  # more was requested than is masked
            prediction = prediction.foreseen()
        self._flag(prediction.broken.flatten(1).any(1))
        self.account.last = prediction, columns
        return prediction

    def _flag(self, broken: Bool[Tensor, " B"]) -> None:
        before = self.account.broken
        self.account.broken = broken if before is None else before | broken

    def _shadows(self) -> tuple[Bool[Tensor, "B 2 K"], Int[Tensor, "B 2 K"], Int[Tensor, "B 2 L"]]:
        """The masked positions of the window and, in rows with decided ones, a shadow of each."""
        window = self.window
        decided = (window.inside & ~window.masked).any(-1, keepdim=True)
        masks = torch.full_like(window.columns, self.canvas.mask_token_id)
        hidden = Edit(window.columns, masks, window.inside).on(window.tokens)
        return (
            torch.stack((window.masked, window.inside & decided), dim=1),
            torch.stack((window.columns, window.columns), dim=1),
            torch.stack((window.tokens, hidden), dim=1),
        )

    def _logits(self, question: Question) -> Float[Tensor, "N V"]:
        """Logits of the requested positions."""
        plan, visible = self.cache.plan(question), question.visible
        if plan.compute is not None and plan.store is not None:
            compute = plan.compute & visible
            self.account.looked.append((question.slots, compute))
            return self._reusing(question, replace(plan, compute=compute))
        self.meter.trust(question, self.meter.due(question))
        compute = question.together(visible)
        self.account.looked.append((question.slots, compute))
        cost = compute.sum(1)
        np.add.at(self.account.computed, question.slots, question.count(compute))
        if question.joined > 1:
            return self._in_forwards(question, cost, lambda some, group: self._joined(some, None, compute[group]))
        return self._in_forwards(question, cost, lambda some, group: self._whole(some))

    def _in_forwards(
        self,
        question: Question,
        cost: NDArray[np.int64],
        forward: Callable[[Question, NDArray[np.int64]], Float[Tensor, "N V"]],
    ) -> Float[Tensor, "N V"]:
        """Logits of the requested positions, split into forwards by the number of columns of each sequence."""
        groups = by_width(cost, question.slots, self._overhead)
        if self._foreseen and len(groups) > 1:  # before any of them is launched
            raise Unforeseen("it takes several forwards")
        parts = [forward(question.some(group), group) for group in groups]
        if len(parts) == 1:
            return parts[0]
        order = np.concatenate([np.flatnonzero(np.isin(question.places[0], group)) for group in groups])
        return torch.cat(parts)[self._put(np.argsort(order))]

    def _whole(self, question: Question, store: KVStore | None = None) -> Float[Tensor, "N V"]:
        """Logits of the requested positions, with every attended column computed."""
        if self._encoded is not None:
            return self._encoded.logits(question, question.visible, None)
        tokens, visible = question.tokens, question.visible
        low, high = span(visible)
        sequence, column = question.places
        select, first = send(tokens.device, sequence * (high - low) + column - low, self.canvas.padding[question.rows])
        positions = (torch.arange(low, high, device=tokens.device) - first[:, None]).clamp(min=0)
        joint = self._joint(question)
        mask = self._mask(self._attention_mask(visible[:, low:high]), positions, positions, joint)
        given = ~self.window.region[self._put(question.slots), low:high] if self.cfg_scale > 0 else None
        return self._forward(tokens[:, low:high], positions, mask, store, select, given)

    def _reusing(self, question: Question, plan: Plan) -> Float[Tensor, "N V"]:
        """Logits of the requested positions by the plan of the cache, split into forwards by width."""
        assert plan.compute is not None
        assert plan.store is not None
        store, asked = plan.store, len(question.places[0])
        question = question if store.joinable else replace(question, joined=1)
        np.add.at(self.account.refreshes, question.slots[plan.whole(question.visible) & question.first], 1)
        if plan.taken is not None:
            np.add.at(self.account.reused, question.slots, plan.taken)
        compute = question.together(plan.compute)
        cost = compute.sum(1) if plan.cost is None else plan.cost
        np.add.at(self.account.computed, question.slots, question.count(compute) if plan.cost is None else cost)
        wanted = question if plan.probe is None else question.and_about(plan.probe.read)
        logits = self._in_forwards(wanted, cost, lambda some, group: self._part(some, store, compute[group]))
        if plan.more is not None:
            more = plan.more()
            np.add.at(self.account.computed, question.slots, more)
            everything = (more > 0) & (cost + more >= question.visible.sum(1))
            np.add.at(self.account.refreshes, question.slots[everything & question.first], 1)
        if plan.probe is not None:
            read = plan.probe.read
            plan.probe.tell(read, _top_probability(logits[asked:], read, self.canvas.mask_token_id))
            logits = logits[:asked].clone()  # a slice would keep all logits alive
        return self._measured(question, plan, logits)

    def _part(self, question: Question, store: Store, compute: NDArray[np.bool_]) -> Float[Tensor, "N V"]:
        """Logits of the requested positions, in one forward that computes some columns of each sequence."""
        if self._encoded is not None:
            return self._encoded.logits(question, compute, store)
        if question.joined > 1:
            return self._joined(question, store, compute)
        placed = self._placed(question, store, compute)
        sequence, column = question.places
        select = placed.start[sequence] + placed.within[sequence, column]
        tokens = question.tokens if placed.source is None else question.tokens[placed.source]
        bound = store.bind(placed.selection)
        if self._foreseen:
            bound = self._harmless(bound, placed, store.spare)
        return self._forward(tokens.gather(1, placed.read), placed.positions, placed.mask, bound, self._put(select))

    def _harmless(self, bound: KVStore, placed: _Placed, spare: int) -> KVStore:
        """The same, but rows without masks in their block, which leave it, write after the end of the canvas."""
        if not (spare and isinstance(bound, FixedStore)):
            raise Unforeseen("what it writes has no fixed place")
        stays = self.window.masked.any(-1)[placed.slots.clamp(max=len(self.window.rows) - 1)]
        after = self.canvas.length - placed.selection.span[0]
        return bound.through(torch.where(stays[:, None], bound.index, after))

    def _placed(self, question: Question, store: Store, compute: NDArray[np.bool_]) -> _Placed:
        """Where the columns of a forward are: most often where they were in the last one."""
        padding, joint = self.canvas.padding[question.rows], question.joint(self.backbone.logits_shift)
        inputs = question.rows, question.slots, question.first, padding, compute, question.visible
        extra = () if joint is None else (joint,)
        return self._recent((*inputs, *extra), lambda: self._place(question, store, compute))

    def _place(self, question: Question, store: Store, compute: NDArray[np.bool_]) -> _Placed:
        """Lay out the columns of a forward."""
        layout, within = self._layout(question, store, compute)
        low, high = layout.span
        source = np.maximum(layout.source, 0)
        rows, tokens = question.rows[source], question.tokens
        columns, first, of, at = send(tokens.device, layout.host, self.canvas.padding[rows], source, layout.slots)
        positions = (columns - first[:, None]).clamp(min=0)
        keys = torch.arange(low, high, device=tokens.device) - first[:, None]
        mask = self._attention_mask(layout.visible[:, low:high])
        return _Placed(
            selection=Selection(rows, layout.slots, question.first[source], layout.host, columns, layout.span),
            source=of if len(source) > len(tokens) else None,
            start=layout.place * layout.host.shape[1],
            within=within,
            read=columns.clamp(max=tokens.shape[1] - 1),
            positions=positions,
            mask=self._mask(mask, positions, keys, self._joint(question, source)),
            slots=at,
        )

    def _layout(self, question: Question, store: Store, compute: NDArray[np.bool_]) -> tuple[Layout, NDArray[np.int64]]:
        """The layout of a forward, and (A, L) the index of each computed column in its sequence."""
        host, within = pack(compute)
        visible = question.visible
        layout = Layout(host, visible, question.slots, np.arange(len(host)), span(visible))
        if self._run.widest and store.spare and question.first.all():
            layout = layout.recurring(self.canvas.slots, self._run.widest)
        return layout, within

    def _joined(self, question: Question, store: Store | None, compute: NDArray[np.bool_]) -> Float[Tensor, "N V"]:
        """Logits of the requested positions, with the drafts of each row concatenated to one sequence."""
        tokens, drafts, visible = question.tokens, question.joined, question.visible[question.first]
        low, high = span(visible)
        packed = [pack(compute[draft::drafts]) for draft in range(drafts)]
        widths = np.array([host.shape[1] for host, _ in packed])
        host = np.concatenate([host for host, _ in packed], axis=1)
        fresh = np.concatenate([np.diff(host, axis=1, prepend=-1) != 0 for host, _ in packed], axis=1)
        sequence, column = question.places
        row, draft = np.divmod(sequence, drafts)
        slot = np.stack([slots for _, slots in packed])[draft, row, column] + (widths.cumsum() - widths)[draft]
        columns, branch, select, first, fresh_at, real = send(
            tokens.device, host, np.repeat(np.arange(drafts), widths), row * host.shape[1] + slot,
            self.canvas.padding[question.rows[question.first]], fresh, visible[:, low:high],
        )  # fmt: skip
        positions = (columns - first[:, None]).clamp(min=0)
        branches = Branches(
            question.attention,
            columns,
            branch,
            fresh_at.bool(),
            (low, high),
            real.bool(),
            store is not None,
            int(widths[0]),
            self.backbone.logits_shift,
        )
        keys, bound = positions, None
        if store is not None:
            keys = torch.cat((torch.arange(low, high, device=tokens.device) - first[:, None], positions), dim=1)
            own = question.rows[question.first], question.slots[question.first], np.ones(len(host), dtype=bool)
            width = int(widths[0])
            bound = store.bind(Selection(*own, host[:, :width], columns[:, :width], (low, high), drafts))
        given = None
        if self.cfg_scale > 0:
            given = ~self.window.region[self._put(question.slots[question.first])].gather(1, columns)
        tokens = rearrange(tokens, "(a d) l -> a (d l)", d=drafts).gather(1, branch * tokens.shape[1] + columns)
        return self._forward(tokens, positions, self._mask(branches.mask(), positions, keys), bound, select, given)

    def _mask(
        self,
        mask: Bool[Tensor, "A S"] | Bool[Tensor, "A 1 C S"] | None,
        positions: Int[Tensor, "A C"],
        keys: Int[Tensor, "A S"],
        joint: Int[Tensor, "A 2"] | None = None,
    ) -> Bool[Tensor, "A S"] | Bool[Tensor, "A 1 C S"] | None:
        """The attention mask with the pattern of the model, and those positions that attend to each other."""
        if self.canvas.pattern is None:
            return mask
        own = self.canvas.pattern(positions, keys)
        if joint is not None:
            asking, asked = (((at >= joint[:, :1]) & (at < joint[:, 1:])) for at in (positions, keys))
            own = own | (asking[:, :, None] & asked[:, None])[:, None]
        return own if mask is None else own & (mask if mask.ndim == 4 else mask[:, None, None])

    def _joint(self, question: Question, source: NDArray[np.int64] | None = None) -> Int[Tensor, "A 2"] | None:
        """The positions of each sequence, or of these, that attend to each other; None for none."""
        columns = question.joint(self.backbone.logits_shift)
        if columns is None or self.canvas.pattern is None:
            return None
        positions = columns - self.canvas.padding[question.rows][:, None]
        return self._put(positions if source is None else positions[source])

    def _measured(self, question: Question, plan: Plan, logits: Float[Tensor, "N V"]) -> Float[Tensor, "N V"]:
        """The logits, after comparing them with exact ones where a measurement is due."""
        meter = self.meter

        def exact(sequences: NDArray[np.int64], comparison: KVStore) -> Float[Tensor, "N V"]:
            some = replace(question, joined=1).some(sequences)
            if meter.above is not None:  # a measurement that may change the result is counted
                self.account.forwards[some.slots] += 1
                np.add.at(self.account.computed, some.slots, some.visible.sum(1))
            logits = self._whole(some, comparison)
            asking = self._put(some.slots[some.places[0]])
            none = torch.zeros_like(self.window.rows, dtype=torch.bool)
            self._flag(flagged(none[None], asking[None], not_finite(logits)[None])[0])
            return logits

        logits, off = meter.measure(question, plan, logits, exact)
        if off.size:
            self.cache.expire(off)
        return logits

    def _forward(
        self,
        tokens: Int[Tensor, "A C"],
        positions: Int[Tensor, "A C"],
        mask: Tensor | None,
        store: KVStore | None,
        select: Int[Tensor, " N"],
        given: Bool[Tensor, "A C"] | None = None,
    ) -> Float[Tensor, "N V"]:
        """Run the backbone and project the selected positions; two passes with guidance."""
        if given is None:
            return self._run(tokens, mask, positions, store, select)
        both = torch.cat((select, select + tokens.numel()))
        mask = None if mask is None else torch.cat((mask, mask))
        blind = tokens.masked_fill(given, self.canvas.mask_token_id)
        logits = self._run(torch.cat((tokens, blind)), mask, torch.cat((positions, positions)), None, both)
        conditional, unconditional = logits.chunk(2)
        return unconditional + (self.cfg_scale + 1) * (conditional - unconditional)

    def _predict(
        self, logits: Float[Tensor, "N V"], asked: Bool[Tensor, "*B K"], index: Int[Tensor, " N"], question: Question
    ) -> Prediction:
        """Choose tokens by the sampling options of each row's request."""
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
        """The generator of each run of requested positions; none at temperature 0."""
        if sampling.temperature == 0:
            return []
        found, counts = np.unique(slots, return_counts=True)
        sources = (self.canvas.generators[row] for row in self.canvas.rows[found])
        return [(source, int(count)) for source, count in zip(sources, counts, strict=True) if source is not None]

    def _attention_mask(self, visible: NDArray[np.bool_]) -> Bool[Tensor, "A S"] | None:
        """The attention mask on the device; None where everything is visible."""
        return None if visible.all() else self._put(visible)

    def _put(self, array: NDArray[np.generic]) -> Tensor:
        return put(self.canvas.device, array)


def _top_probability(logits: Float[Tensor, "N V"], read: NDArray[np.bool_], mask_token_id: int) -> Float[Tensor, "A L"]:
    """Probability of the most probable token other than [MASK] at the columns that were read; 0 elsewhere."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    best = logits.index_fill(-1, torch.tensor([mask_token_id], device=logits.device), -torch.inf).amax(-1)
    confidence = torch.zeros(read.shape, dtype=logits.dtype, device=logits.device)
    confidence[put(logits.device, read)] = (best - logits.logsumexp(-1)).exp()
    return confidence
