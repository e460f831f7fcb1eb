"""SSD: self speculative decoding (arXiv 2510.04147, section 3).

Rule:

    d_k = the canvas with its k most probable masks of the last forward filled,  k = 0, ..., draft_length
    from d_i  go on to d_(i+1)  while  d_(i+1) = t_i;  then to t_i

The denoiser both drafts and verifies (`dllm.samplers.drafting`). The drafts d_k of the block, k tokens further each,
are a chain, the paper's greedy verification tree. One forward over the chain gives t_i, what the base makes of d_i in
one step. The longest such prefix is accepted, with the token that its last draft's own predictions add, so every
forward commits at least one token.

Over one token per step in order of confidence this takes the forwards of `freedave` with draft_steps = draft_length +
1. Over another base `freedave` drafts steps by the rule of the base, and this single tokens in order of confidence.

Differences from the paper:
- Its trees that also branch into drafts in another order (mixed order) are left out.
- The first forward of a block has no drafts; it commits a token like any other.
- The paper decodes with Fast-dLLM's dual cache; here any cache whose keys and values do not depend on the order in
  which a block is decoded will do, or none.
"""

from __future__ import annotations

from dataclasses import dataclass

from dllm.checks import number
from dllm.decoding.prediction import Prediction
from dllm.decoding.window import Edit, Window
from dllm.samplers.base import Denoise, Sampler, commit
from dllm.samplers.drafting import DraftAndVerify, DraftState
from dllm.samplers.selection import top


@dataclass(frozen=True)
class SSD(DraftAndVerify):
    """Verify the most confident predictions, token by token, in one forward, losslessly.

    Args:
        draft_length: tokens drafted per forward, each in a canvas of its own beside the current one.
        base: the policy whose result is reproduced: a name of conf/sampler or an object; any stateless
            policy with one forward per step.

    Raises:
        ValueError: a length below 1, an unknown name, or a base of another kind.
    """

    reads = ("tokens", "confidence")

    draft_length: int = 3
    base: str | Sampler = "vanilla"

    def __post_init__(self) -> None:
        use = "a whole number of at least 1 (published: 2 to 4)"
        number("draft_length", self.draft_length, use, low=1, whole=True)
        self._check_base("be drafted", whole_canvas=True)

    @property
    def canvases(self) -> int:  # type: ignore[override]
        """The current one, and one per drafted token."""
        return self.draft_length + 1

    def step(self, window: Window, denoise: Denoise, state: DraftState) -> Edit:
        """Verify the most confident predictions."""

        def draft(view: Window, stale: Prediction) -> Edit:
            return commit(view, stale, top(stale.confidence, 1, view.masked))

        return self.verified(window, denoise, state, draft)
