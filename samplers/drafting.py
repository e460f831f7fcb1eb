"""Lossless draft and verify: several steps of another policy in one forward of the same model.

`freedave` and `ssd` differ only in how they draft. A step has the canvas d_0 and the predictions of the last forward,
which are one edit old. Drafts d_1, d_2, ... are what the canvas may become if those predictions did not change. One
forward over d_0, ..., d_n gives for each draft the base policy's next canvas t_i, from that draft's own predictions.
d_0 is accepted; from d_i continue

    to d_j, the largest j > i with d_j = t_i,

while there is one; otherwise t_i is the new canvas. Every accepted canvas is one that the base policy also reaches, so
the tokens equal those of the base, whatever the drafts: these only decide how many of its steps one forward covers.
With a cache they equal those of the base with that cache, if the cached keys and values do not depend on the order in
which a block is decoded; other caches are rejected. Where the base draws (temperature above 0, `order=random`) it draws
others, and only the distribution is the same: tokens for each draft, and an order once for the n-th step that one
forward covers, so that a draft is made by the numbers that it is verified by. Rounding may decide near ties: drafts are
computed in batches of another shape.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal, TypeAlias

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Int
from torch import Tensor

from dllm.decoding.numbers import Numbers
from dllm.decoding.prediction import Prediction
from dllm.decoding.request import Request
from dllm.decoding.setup import Setup
from dllm.decoding.window import Edit, Window
from dllm.samplers.base import Denoise, OverPolicy, Sampler, become, constant_denoiser, permitted
from dllm.samplers.selection import enter_next_blocks, stopped

Draft: TypeAlias = Callable[[Window, Prediction], Edit]


@dataclass
class DraftState:
    """State of an engine: the base policy, and the progress of the base in every row.

    Attributes:
        base: the policy that drafts and verifies.
        state: its state.
        mask_token_id: id of [MASK].
        block: block of the last accepted draft; -1 before the first.
        step: steps the base has spent in that block.
        entry_masks: masked positions the row had when the base entered it.
        entry: index of the row's entry in `kept`.
        deepest: maximum number of distinct drafts of any row so far.
        kept: predictions for the accepted drafts of the last step.
        held: whether these were for rows of which some have a format.
        sampled: whether any row so far draws tokens, from the generator that orders are drawn from as well.
    """

    base: Sampler
    state: Any
    mask_token_id: int
    block: Int[Tensor, " rows"]
    step: Int[Tensor, " rows"]
    entry_masks: Int[Tensor, " rows"]
    entry: Int[Tensor, " rows"]
    deepest: int = 1
    kept: Prediction | None = None
    held: bool = False
    sampled: bool = False


class DraftAndVerify(OverPolicy):
    """A policy that reproduces its base in fewer forwards; subclasses draft in their `step`.

    Attributes:
        canvases: verified per forward, the current one included.
        draft_mode: compute a row's drafts as sequences of the batch, or joined into one sequence ("tree").
        eager: verify a draft that completes its block on the next block.
        reads: properties of a prediction that drafts are made by, beside those that the base reads.
    """

    kind = "lossless"
    knob = None  # what it reproduces is the base's

    canvases: int
    draft_mode: Literal["batch", "tree"] = "batch"
    eager: bool = False
    reads: ClassVar[tuple[str, ...]] = ()

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """Requirements for the cache (`dllm.decoding.compatibility`)."""
        own = ["repeatable", *["next_block"] * bool(self.eager)] if self.canvases > 1 else []  # 1 is the base itself
        return frozenset(own) | self._base.needs

    def start(self, setup: Setup) -> DraftState:
        """Start the base."""
        base = self._base
        block, *zeros = torch.zeros((4, setup.slots), dtype=torch.long, device=setup.device)
        return DraftState(base, base.start(setup), setup.mask_token_id, block - 1, *zeros)

    def enter(self, state: DraftState, row: int, request: Request) -> None:
        """Reset the row: there are no predictions to draft from."""
        state.base.enter(state.state, row, request)
        state.block[row], state.entry[row] = -1, 0
        # Each draft that differs from the previous one has at least one more token.
        state.deepest = max(state.deepest, request.span + 1)
        state.sampled |= request.sampling.temperature > 0

    def verified(self, window: Window, denoise: Denoise, state: DraftState, draft: Draft) -> Edit:
        """Draft, verify all drafts in one forward, follow the chain of accepted drafts.

        Args:
            window: the rows.
            denoise: for that forward.
            state: the engine's.
            draft: takes a draft to the next, by the predictions of the last forward.
        """
        known = state.block[window.rows] == window.block
        # The engine counts its own steps; the base has taken more.
        window = replace(
            window,
            step=state.step[window.rows].where(known, 0),
            entry_masks=state.entry_masks[window.rows].where(known, window.entry_masks),
        )
        numbers = Numbers(window, self.canvases)
        if state.sampled:  # before any tokens, also where nothing is drafted
            numbers.draw()
        drafts = self._drafts(window, known, state, draft, numbers)
        new = F.pad((drafts[:, 1:] != drafts[:, :-1]).any(-1), (1, 0), value=True)
        views = _views(window, drafts, new, state.mask_token_id, numbers)
        if self.eager:
            views = enter_next_blocks(views, state.mask_token_id)
        views = replace(views, inside=views.inside & views.masked.any(-1, keepdim=True))
        judged: list[Prediction] = []

        def judge(*_: Any, decided: bool = False, **__: Any) -> Prediction:
            split = "(b d) k -> b d k"
            wanted = rearrange(views.inside if decided else views.masked, split, d=drafts.shape[1])
            about = rearrange(views.columns, split, d=drafts.shape[1])
            prediction = denoise(wanted, about, drafts, "tree" if self.draft_mode == "tree" else "apart")
            judged.append(prediction.arranged(lambda values: values.flatten(0, 1)))
            return judged[0]

        edit = permitted(views, state.base.step(views, judge, state.state), judged)
        targets = edit.on(views.tokens).view_as(drafts)
        at, step, final, source = self._follow(window, drafts, new, views, judged[0], targets[:, 0], state, numbers)
        state.block[window.rows], state.step[window.rows] = views.block[at], step + 1
        state.entry_masks[window.rows] = views.entry_masks[at]
        state.entry[window.rows] = torch.arange(len(at), device=at.device)
        state.held = window.permit is not None
        reads = (*self.reads, "tokens", "confidence") if state.held else self.reads
        state.kept = judged[0].kept(lambda values: values[at], reads)
        mask = state.mask_token_id
        # The last draft contains the tokens of all the others.
        drafted = drafts[:, -1].where(window.tokens == mask, mask)
        return replace(become(window, final), drafted=drafted, source=source)

    def _drafts(
        self, window: Window, known: Bool[Tensor, " B"], state: DraftState, draft: Draft, numbers: Numbers
    ) -> Int[Tensor, "B D L"]:
        """The canvas, and draft after draft, each made from the one before by the last predictions."""
        drafts = [window.tokens] * min(self.canvases, state.deepest)
        if state.kept is not None:
            # The window is as wide as the longest block in it, which may have been another row's then.
            at, width = state.entry[window.rows], window.masked.shape[1]
            stale = state.kept.kept(lambda values: F.pad(values[at], (0, width - values.shape[1])))
            view = replace(
                window,
                inside=window.inside & known[:, None],
                masked=window.masked & known[:, None],
                permit=window.permit if state.held else None,  # a row with a format is not known otherwise
            )
            entries = torch.arange(len(at), device=at.device)
            for k in range(1, len(drafts)):
                view = replace(view, uniform=numbers.of(torch.full_like(at, k - 1), entries))
                after = permitted(view, draft(view, stale), [stale]).on(view.tokens)
                drafts[k] = after.where(known[:, None], view.tokens)  # the format of another row would be given a token
                view = _advanced(view, drafts[k], window.step + k, state.mask_token_id)
        return torch.stack(drafts, dim=1)

    def _follow(
        self,
        window: Window,
        drafts: Int[Tensor, "B D L"],
        new: Bool[Tensor, "B D"],
        views: Window,
        judged: Prediction,
        target: Int[Tensor, "B L"],
        state: DraftState,
        numbers: Numbers,
    ) -> tuple[Int[Tensor, " B"], Int[Tensor, " B"], Int[Tensor, "B L"], Int[Tensor, "B L"]]:
        """Follow the chain of accepted drafts.

        Args:
            window: the rows.
            drafts: their canvases.
            new: drafts that differ from the previous one.
            views: the drafts as entries, as the base saw them.
            judged: predictions for those.
            target: the base's next canvas of the first draft.
            state: the engine's.
            numbers: random ones.

        Returns:
            The last draft of each chain, as an entry of `views`; the steps the base has taken in its block by
            then; the base's next canvas after it; and the draft of whose prediction each of its tokens is.
        """
        entries = torch.arange(new.numel(), device=drafts.device).view_as(new)
        at, step, source = entries[:, 0], window.step, torch.zeros_like(target)
        for _ in range(new.shape[1] - 1):
            equal = (drafts == target[:, None]).all(-1) & new & (entries > at[:, None])
            onward = torch.where(equal, entries, at[:, None]).amax(-1)
            source = (at % new.shape[1])[:, None].where(views.tokens[onward] != views.tokens[at], source)
            moved, stays = onward > at, views.block[onward] == views.block[at]
            # Where drafts are skipped, the base took fewer steps than drafting did; its schedule counts its own.
            step, at = torch.where(moved, (step + 1).where(stays, 0), step), onward
            view = views.taken(at)
            drawn = numbers.of(at % new.shape[1], entries[:, 0] // new.shape[1])
            view = replace(view, step=step.where(view.masked.any(-1), 0), uniform=drawn)
            known = judged.kept(partial(torch.index_select, dim=0, index=at))
            edit = state.base.step(view, constant_denoiser(known), state.state)
            after = permitted(view, edit, [known]).on(view.tokens)
            target = after.where(moved[:, None], target)
        own = (target != views.tokens[at]) | (views.tokens[at] == state.mask_token_id)
        return at, step, target, (at % new.shape[1])[:, None].where(own, source)


def _advanced(view: Window, tokens: Int[Tensor, "B L"], step: Int[Tensor, " B"], mask_token_id: int) -> Window:
    """The same blocks in canvases that are `step` steps into them; a complete block keeps its step."""
    masked = view.inside & (tokens.gather(1, view.columns) == mask_token_id)
    return replace(view, tokens=tokens, masked=masked, step=step.where(masked.any(-1), view.step))


def _views(
    window: Window, drafts: Int[Tensor, "B D L"], new: Bool[Tensor, "B D"], mask_token_id: int, numbers: Numbers
) -> Window:
    """Every draft as an entry of its own; those that need no verification request nothing."""
    rows, depth = new.shape
    number = torch.arange(depth, device=new.device).repeat(rows)
    entry = torch.arange(rows, device=new.device).repeat_interleave(depth)
    every = window.taken(entry)
    every = replace(every, tokens=drafts.flatten(0, 1))
    judged = new.flatten() & ~stopped(every, mask_token_id)
    every = replace(
        every,
        inside=every.inside & judged[:, None],
        uniform=numbers.of(number, entry),
    )
    return _advanced(every, every.tokens, every.step + number, mask_token_id)
