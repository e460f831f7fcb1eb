"""FreeDave: lossless draft and verify (arXiv 2510.00294, section 3, algorithm 1).

Rule:

    d_j = the canvas after j more steps of the base policy by the predictions of the last forward,  j < draft_steps
    from d_i  go on to d_j, the largest j > i with  d_j = t_i,  while there is one;  then to t_i

The denoiser both drafts and verifies (`dllm.samplers.drafting`): one forward over the canvas d_0 and its drafts gives
t_i, the canvas that the base policy makes of d_i by its own predictions.

Differences from the reference:
- It accepts a draft that is a subset of t_i. With one token per step that is the same rule; with a
  threshold base it is lossy, because the base would have committed the remaining tokens in the same step.
- It uses a forward only to initialize the predictions of a block; here that forward commits tokens too.
  Drafts that are complete, or have no predictions to start from, are not computed.
- `eager`: a draft that completes its block is verified on the next block, under the base's own rule for
  it, so it stays lossless; the reference verifies by stale predictions.
- Its tree shares prefix and suffix among the drafts: exact only where a cache froze them, as attention is
  bidirectional. `draft_mode=tree` shares cached keys and values; without a cache it saves nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dllm.checks import choice, number
from dllm.decoding.prediction import Prediction
from dllm.decoding.window import Edit, Window
from dllm.samplers.base import Denoise, Sampler, constant_denoiser
from dllm.samplers.drafting import DraftAndVerify, DraftState


@dataclass(frozen=True)
class FreeDave(DraftAndVerify):
    """Run several steps of another policy in one forward, losslessly.

    Args:
        draft_steps: canvases D verified per forward, including the current one; 1 is the base itself.
        base: the policy whose result is reproduced: a name of conf/sampler or an object; any stateless
            policy with one forward per step.
        draft_mode: compute a row's drafts as sequences of the batch, or joined into one sequence ("tree").
        eager: verify a draft that completes its block on the next block.

    Raises:
        ValueError: a number below 1, an unknown mode or name, or a base of another kind.
    """

    draft_steps: int = 4
    base: str | Sampler = "vanilla"
    draft_mode: Literal["batch", "tree"] = "batch"
    eager: bool = False

    def __post_init__(self) -> None:
        number("draft_steps", self.draft_steps, "a whole number of at least 1 (published: 4, 8)", low=1, whole=True)
        choice("draft_mode", self.draft_mode, ("batch", "tree"))
        choice("eager", self.eager, (True, False))
        self._check_base("be drafted", whole_canvas=True)

    @property
    def canvases(self) -> int:  # type: ignore[override]
        """As many as `draft_steps`."""
        return self.draft_steps

    def step(self, window: Window, denoise: Denoise, state: DraftState) -> Edit:
        """Verify the base's next steps."""

        def draft(view: Window, stale: Prediction) -> Edit:
            edit: Edit = state.base.step(view, constant_denoiser(stale), state.state)
            return edit

        return self.verified(window, denoise, state, draft)
