"""Token editing: committed tokens of the active block are replaced while it is decoded (LLaDA2.1, arXiv 2602.08676).

Rule:

    commit i   if  i is masked, and the base policy commits it
    replace i  if  i was decided before, another token is predicted there, and p(that token) > editing_threshold

Per step, with the predictions of one forward for the whole block; p is the predicted probability.

When no mask is left, the block is denoised again, up to `max_post_steps` times and until nothing is replaced; only then
does the row go on to its next block, or end. The prompt is never edited.

Differences: any base with one forward a step (the published one is a threshold); a row that may stop ends with the
block of its first end-of-text, whether `stop_at_eos` is checked while decoding or afterwards.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from dllm.checks import number
from dllm.decoding.request import Request
from dllm.decoding.setup import Setup
from dllm.decoding.window import Edit, Window
from dllm.samplers.base import Denoise, OverPolicy, Sampler, constant_denoiser

_PER_POSITION = 12  # steps after the last mask, of the engine's budget


@dataclass(frozen=True)
class EditState:
    """State of an engine.

    Attributes:
        base: the policy that commits.
        state: its state.
        post: steps of each row since its block has no mask.
    """

    base: Sampler
    state: Any
    post: Int[Tensor, " rows"]


@dataclass(frozen=True)
class Editing(OverPolicy):
    """Let another policy commit, and replace what it committed where the model has changed its mind.

    Args:
        editing_threshold: probability that a token must exceed to replace another.
        max_post_steps: steps of a block after its last mask is gone; 0 for none.
        base: the policy that commits: a name of conf/sampler or an object; any stateless policy with one forward per
            step.

    Raises:
        ValueError: a number out of range, an unknown name, or a base of another kind.
    """

    kind = "revising"

    editing_threshold: float = 0.9
    max_post_steps: int = 16
    base: str | Sampler = "threshold"

    def __post_init__(self) -> None:
        use = "a number of at least 0 (published: 0 to 0.9); 1 edits nothing"
        number("editing_threshold", self.editing_threshold, use, low=0)
        use = "a whole number of at least 0 (16 is published)"
        number("max_post_steps", self.max_post_steps, use, low=0, whole=True)
        self._check_base()

    def start(self, setup: Setup) -> EditState:
        """Start the base."""
        base = self._base
        return EditState(base, base.start(setup), torch.zeros(setup.slots, dtype=torch.long, device=setup.device))

    def check(self, state: EditState, request: Request) -> None:
        """Reject what the base rejects, and more steps than a row may take."""
        state.base.check(state.state, request)
        most = _PER_POSITION * request.span // request.block_count
        if self.max_post_steps > max(most, 16):
            raise ValueError(
                f"max_post_steps={self.max_post_steps} is out of range; use at most {max(most, 16)} "
                f"({_PER_POSITION} steps per generated position)"
            )

    def step(self, window: Window, denoise: Denoise, state: EditState) -> Edit:
        """Commit and replace in one forward; stay in a block while it may change."""
        prediction = denoise(decided=True)
        asked = constant_denoiser(prediction.within(window.masked))
        edit = state.base.step(window, asked, state.state)
        other = prediction.tokens != window.tokens.gather(1, window.columns)
        replaced = window.inside & ~window.masked & other & (prediction.confidence > self.editing_threshold)
        masked = window.masked.any(-1)
        post = (state.post[window.rows] + 1).masked_fill(masked, 0)
        state.post[window.rows] = post
        left = (window.masked & ~edit.write).any(-1)
        again = (masked | replaced.any(-1)) & (post < self.max_post_steps)
        tokens = prediction.tokens.where(replaced, edit.tokens)
        return replace(edit, tokens=tokens, write=edit.write | replaced, held=left | again)
