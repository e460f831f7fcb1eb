"""The oracle: what a policy could reach that knew which predictions are final already.

First the base policy decodes the canvas, uncounted. Then, per step: commit exactly the masked
positions of the block whose predicted token equals that result (the "extremely greedy" process of
Learn2PD, arXiv 2509.25188, section 3.2). Where none does, the most confident position is given its
token of the result, so that the result is always that of the base.

No real policy can do this: its NFE is the bound the others are held against. It is no bound on what
a policy with other results may need.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from jaxtyping import Int
from torch import Tensor

from dllm.canvas import Edit, Window
from dllm.resolve import resolve
from dllm.run import Run
from dllm.samplers.base import Denoise, Sampler, become
from dllm.samplers.selection import stopped, top


@dataclass(frozen=True)
class Known:
    """What a run works with: the result of the base, (rows, L), and the facts."""

    result: Int[Tensor, "rows L"]
    run: Run


@dataclass(frozen=True)
class Oracle:
    """Commit exactly what already equals the result of another policy.

    Args:
        base: the policy whose result is reproduced: a name of conf/sampler or an object.

    Raises:
        ValueError: an unknown name.
    """

    single_forward: ClassVar[bool] = True

    base: str | Sampler = "vanilla"

    def __post_init__(self) -> None:
        resolve("sampler", self.base, Sampler, "base")

    @property
    def needs(self) -> frozenset[str]:
        """What a cache must give (`dllm.compatibility`): what the base needs."""
        return frozenset(getattr(resolve("sampler", self.base, Sampler, "base"), "needs", ()))

    def files(self) -> Iterable[Path]:
        """What the base reads."""
        found: Iterable[Path] = getattr(resolve("sampler", self.base, Sampler, "base"), "files", tuple)()
        return found

    def start(self, run: Run) -> Known:
        """Decode the result that is going to be reproduced."""
        return Known(run.rehearse(resolve("sampler", self.base, Sampler, "base")), run)

    def step(self, window: Window, denoise: Denoise, state: Known) -> Edit:
        """Commit every position that is right."""
        prediction = denoise()
        result = state.result[window.rows]
        final = result.gather(1, window.columns)
        right = (prediction.tokens == final) & window.masked
        stuck = ~right.any(-1, keepdim=True)
        edit = Edit(window.columns, final, right | (stuck & top(prediction.confidence, 1, window.masked)))
        # The base may have decoded something behind its end-of-text; what it left is filled for both alike.
        after = edit.on(window.tokens)
        rest = (stopped(after, window.region, state.run)[:, None]) & (result != state.run.eos_token_ids[0])
        return become(window, torch.where(rest, result, after))
