"""The oracle: what a policy could reach that knew which predictions are final already.

First the base policy decodes the canvas, uncounted. Then, per step: commit exactly the masked
positions of the block whose predicted token equals that result (the "extremely greedy" process of
Learn2PD, arXiv 2509.25188, section 3.2). Where none does, the most confident position is given its
token of the result, so that the result is always that of the base.

No real policy can do this: its NFE is the bound the others are held against. It is no bound on what
a policy with other results may need.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Int
from torch import Tensor

from dllm.canvas import Edit, Window
from dllm.resolve import resolve
from dllm.run import Run
from dllm.samplers.base import Denoise, Sampler
from dllm.samplers.selection import top


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
        resolve("sampler", self.base, Sampler)

    def start(self, run: Run) -> Int[Tensor, "rows L"]:
        """Decode the result that is going to be reproduced."""
        return run.rehearse(resolve("sampler", self.base, Sampler))

    def step(self, window: Window, denoise: Denoise, state: Int[Tensor, "rows L"]) -> Edit:
        """Commit every position that is right."""
        prediction = denoise()
        final = state[window.rows].gather(1, window.columns)
        right = (prediction.tokens == final) & window.masked
        stuck = ~right.any(-1, keepdim=True)
        return Edit(window.columns, final, right | (stuck & top(prediction.confidence, 1, window.masked)))
