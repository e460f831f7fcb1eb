"""Anchored: what another policy commits, and always the first mask of the block.

Rule:

    commit i  if  the base policy commits i,  or  i is the leftmost masked position of the block

Both per step, by the predictions of one forward; the leftmost whatever its confidence.

Where a text can go on in several ways, the predictions of its masks are mixtures of them: none is confident, and a
policy that waits for confidence decides around them first. The first mask is the one of which everything to the left
is decided. Its prediction is that of a causal model that sees the decided tokens to the right as well, so it can be
committed unsure, and it tells the other masks which way the text goes. A base that commits nothing else decodes from
left to right, one token per step.

Not published; related are the order from left to right within parts of a block (Fast-dLLM v2, `sub_blocks`) and the
preference for positions next to decoded ones (d2Cache, `certainty`), neither of which commits beyond the first masks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from dllm.decoding.prediction import Prediction
from dllm.decoding.setup import Setup
from dllm.decoding.window import Edit, Window
from dllm.samplers.base import Denoise, OverPolicy, Sampler
from dllm.samplers.selection import leftmost


@dataclass(frozen=True)
class Inner:
    """State of an engine: the base policy and its state."""

    base: Sampler
    state: Any


@dataclass(frozen=True)
class Anchored(OverPolicy):
    """Commit the first mask beside what another policy commits.

    Args:
        base: the policy that commits the others: a name of conf/sampler or an object; any stateless policy with one
            forward per step.

    Raises:
        ValueError: an unknown name, or a base of another kind.
    """

    single_forward = True

    base: str | Sampler = "threshold"

    def __post_init__(self) -> None:
        self._check_base()

    def start(self, setup: Setup) -> Inner:
        """Start the base."""
        base = self._base
        return Inner(base, base.start(setup))

    def step(self, window: Window, denoise: Denoise, state: Inner) -> Edit:
        """Commit both in one forward."""
        seen: list[Prediction] = []

        def judge(*args: Any, **options: Any) -> Prediction:
            seen.append(denoise(*args, **options))
            return seen[-1]

        edit = state.base.step(window, judge, state.state)
        first = leftmost(window.masked)
        return replace(edit, tokens=seen[-1].tokens.where(first, edit.tokens), write=edit.write | first)
