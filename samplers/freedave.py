"""FreeDave: draft and verify without loss (arXiv 2510.00294, section 3, algorithm 1).

The denoiser drafts and judges at once. A step has the canvas d_0 and the predictions of the last
forward, which are one edit old. Drafts d_1, d_2, ... are what the base policy would do next if those
predictions still held. One forward looks at d_0, ..., d_(D-1) together and gives each draft the base
policy's next canvas t_i, from that draft's own predictions. d_0 is certain; from d_i go on

    to d_j, the largest j > i with d_j = t_i,

as often as there is one; where there is none, t_i is the new canvas. Every canvas passed on the way is
one the base policy passes too, so without a cache tokens equal those of the base, whatever the base:
the drafts only decide how many of its steps one forward carries. At temperature 0 that is the same
text, above it the same distribution.

Differences from the reference:
- It accepts a draft that is a subset of t_i. Over one token per step that is the same rule; over a
  thresholded base it is lossy there, because the base would have committed the rest at once too.
- It spends a forward on the block's first predictions alone; here they commit as well. Drafts that
  are complete are not computed, and a row without fresh predictions computes no drafts.
- `eager`: a draft that completes its block is judged on the next block, under the base's own rule for
  it, so it stays lossless; the reference's form judges by stale predictions.
- Batches of any size; each row has its own chain.
- The tree of the reference shares prefix and suffix among the drafts, which is exact only where a
  cache froze them: attention is bidirectional. Without one, `draft_mode=tree` puts whole canvases into
  one sequence, computes what `batch` does and gives the same.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Int
from torch import Tensor

from dllm.canvas import Edit, Window
from dllm.checks import choice, number
from dllm.prediction import Prediction
from dllm.resolve import resolve
from dllm.run import Run
from dllm.samplers.base import Denoise, Sampler
from dllm.samplers.selection import stopped


@dataclass
class Memory:
    """What a run remembers.

    Attributes:
        base: the policy that drafts and judges.
        state: its own state.
        run: the facts of the run.
        rows: rows of the last step.
        block: block that the predictions kept of each are about.
        kept: their predictions for the accepted draft.
    """

    base: Sampler
    state: Any
    run: Run
    rows: Int[Tensor, " B"] | None = None
    block: Int[Tensor, " B"] | None = None
    kept: Prediction | None = None


@dataclass(frozen=True)
class FreeDave:
    """Run several steps of another policy in one forward, without changing what they do.

    Args:
        draft_steps: canvases D judged per forward, the current one among them; 1 is the base itself.
        base: the policy whose result is reproduced: a name of conf/sampler or an object; any that takes
            one forward a step and remembers nothing.
        draft_mode: compute a row's drafts as sequences of the batch, or joined to one sequence ("tree").
        eager: judge a draft that completes its block on the next block.

    Raises:
        ValueError: a number below 1, an unknown mode or name, or a base of another kind.
    """

    single_forward: ClassVar[bool] = False

    draft_steps: int = 4
    base: str | Sampler = "vanilla"
    draft_mode: Literal["batch", "tree"] = "batch"
    eager: bool = False

    def __post_init__(self) -> None:
        number("draft_steps", self.draft_steps, "a whole number of at least 1 (4 and 8 are published)", low=1, whole=True)
        choice("draft_mode", self.draft_mode, ("batch", "tree"))
        choice("eager", self.eager, (True, False))
        base = resolve("sampler", self.base, Sampler)
        if not getattr(base, "single_forward", False):
            raise ValueError(f"base={self.base!r} cannot be drafted: it takes several forwards a step or remembers earlier ones")

    def start(self, run: Run) -> Memory:
        """Start the base."""
        base = resolve("sampler", self.base, Sampler)
        return Memory(base, base.start(run), run)

    def step(self, window: Window, denoise: Denoise, state: Memory) -> Edit:
        """Draft, judge all drafts in one forward, follow the chain."""
        drafts, new = self._draft(window, state)
        views = _views(window, drafts, new, state.run)
        if self.eager:
            views = _enter_next_blocks(views, state.run)
        asked: list[Prediction] = []

        def judge(asking: Bool[Tensor, "*B K"] | None = None, *_: Any) -> Prediction:
            split = "(b d) k -> b d k"
            wanted = rearrange(views.masked if asking is None else asking, split, d=self.draft_steps)
            columns = rearrange(views.columns, split, d=self.draft_steps)
            prediction = denoise(wanted, columns, drafts, self.draft_mode == "tree")
            asked.append(prediction.arranged(lambda values: values.flatten(0, 1)))
            return asked[0]

        target = state.base.step(views, judge, state.state).on(views.tokens).view_as(drafts)
        at = _follow(drafts, target, new)
        entry = torch.arange(len(at), device=at.device)
        state.rows, state.block = window.rows, views.block.view_as(new)[entry, at]
        state.kept = asked[0].kept(lambda values: values[entry * self.draft_steps + at])
        final = target[entry, at]
        columns = torch.arange(final.shape[1], device=final.device).expand_as(final)
        return Edit(columns, final, final != window.tokens)

    def _draft(self, window: Window, state: Memory) -> tuple[Int[Tensor, "B D L"], Bool[Tensor, "B D"]]:
        """The canvas and what the base would make of it, step by step; and which of them differ from the one before."""
        drafts = [window.tokens] * self.draft_steps
        new = window.tokens.new_zeros((len(window.rows), self.draft_steps), dtype=torch.bool)
        new[:, 0] = True
        if state.kept is None or state.rows is None or state.block is None:
            return torch.stack(drafts, dim=1), new
        entry = torch.searchsorted(state.rows, window.rows).clamp(max=len(state.rows) - 1)
        known = (state.rows[entry] == window.rows) & (state.block[entry] == window.block)
        stale = state.kept.kept(lambda values: values[entry])
        view = replace(window, inside=window.inside & known[:, None], masked=window.masked & known[:, None])
        for k in range(1, self.draft_steps):
            drafts[k] = state.base.step(view, lambda *_: stale, state.state).on(view.tokens)
            new[:, k] = (drafts[k] != drafts[k - 1]).any(-1)
            view = _advanced(view, drafts[k], window.step + k, state.run)
        return torch.stack(drafts, dim=1), new


def _advanced(view: Window, tokens: Int[Tensor, "B L"], step: Int[Tensor, " B"], run: Run) -> Window:
    """The same blocks in canvases that are `step` steps into them; a block that is complete stays where it is."""
    masked = view.inside & (tokens.gather(1, view.columns) == run.mask_token_id)
    return replace(view, tokens=tokens, masked=masked, step=step.where(masked.any(-1), view.step))


def _views(window: Window, drafts: Int[Tensor, "B D L"], new: Bool[Tensor, "B D"], run: Run) -> Window:
    """Every draft as an entry of its own; those that need no judging ask nothing."""
    count = drafts.shape[1]
    rows, first, region, columns, inside, masked, block, entry_masks, step = (
        repeat(each, "b ... -> (b d) ...", d=count)
        for each in (
            window.rows, window.first, window.region, window.columns, window.inside, window.masked,
            window.block, window.entry_masks, window.step,
        )
    )  # fmt: skip
    tokens = drafts.flatten(0, 1)
    judged = new.flatten() & ~stopped(tokens, region, run)
    every = replace(
        window, rows=rows, tokens=tokens, first=first, region=region, columns=columns, inside=inside & judged[:, None],
        masked=masked, block=block, entry_masks=entry_masks, step=step,
        uniform=lambda: torch.stack([window.uniform() for _ in range(count)], dim=1).flatten(0, 1),
    )  # fmt: skip
    return _advanced(every, tokens, step + torch.arange(count, device=step.device).repeat(len(new)), run)


def _enter_next_blocks(views: Window, run: Run) -> Window:
    """Where a draft completed its block, look at the block of its next mask instead."""
    masked = (views.tokens == run.mask_token_id) & views.region
    enters = views.inside.any(-1) & ~views.masked.any(-1) & masked.any(-1)
    ahead = (masked.int().argmax(-1) - views.columns[:, 0]).div(run.block_length, rounding_mode="floor")
    ahead = ahead.where(enters, 0)
    length = views.tokens.shape[1]
    columns = views.columns[:, :1] + ahead[:, None] * run.block_length + torch.arange(
        run.block_length, device=ahead.device
    )
    exists = columns < length
    columns = columns.clamp(max=length - 1)
    inside = torch.where(enters[:, None], views.region.gather(1, columns) & exists, views.inside)
    masked = inside & masked.gather(1, columns)
    return replace(
        views,
        columns=columns,
        inside=inside,
        masked=masked,
        block=views.block + ahead,
        entry_masks=masked.sum(-1).where(enters, views.entry_masks),
        step=views.step.masked_fill(enters, 0),
    )


def _follow(
    drafts: Int[Tensor, "B D L"], target: Int[Tensor, "B D L"], new: Bool[Tensor, "B D"]
) -> Int[Tensor, " B"]:
    """The last draft of each row's chain."""
    same = (target[:, :, None] == drafts[:, None]).all(-1)
    count = new.shape[1]
    number = torch.arange(count, device=new.device)
    at = torch.zeros(len(new), dtype=torch.long, device=new.device)
    for _ in range(count - 1):
        onward = same[torch.arange(len(at), device=at.device), at] & new & (number > at[:, None])
        at = torch.where(onward, number, at[:, None]).amax(-1)
    return at
