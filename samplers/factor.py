"""Fast-dLLM's factor rule (arXiv 2505.22618, section 3.3, theorem 1).

Rule:

    commit the n - 1 most confident positions, at least one,  n the smallest with  (n + 1) (1 - c_n) >= factor

Per step, with the confidences of the block's masked positions sorted c_1 >= c_2 >= .... If no n satisfies it, all but
the least confident are committed, as in d2Cache's implementation; Fast-dLLM's commits that one, too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dllm.checks import number
from dllm.decoding.window import Edit, Window
from dllm.samplers.base import Denoise, Knob, Policy, commit
from dllm.samplers.selection import ranks, top


@dataclass(frozen=True)
class Factor(Policy):
    """Commit the largest n with (n + 1)(1 - c_n) < factor.

    Args:
        factor: the bound on (n + 1)(1 - c_n); larger commits more.

    Raises:
        ValueError: a factor that is not positive.
    """

    knob = Knob("factor", (0.001, 0.003, 0.01, 0.03, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5))
    single_forward = True

    factor: float = 1.0

    def __post_init__(self) -> None:
        number("factor", self.factor, "a positive number (1.0 is published)", above=0)

    def step(self, window: Window, denoise: Denoise, state: None) -> Edit:
        """Commit the longest prefix of the sorted confidences that satisfies the bound."""
        prediction = denoise()
        confidence = prediction.confidence.masked_fill(~window.masked, -torch.inf)
        n = ranks(confidence) + 1
        # Unmasked positions rank last and count as failing, so the smallest failing n is at most masks + 1.
        fails = ((n + 1) * (1 - confidence) >= self.factor) & window.masked
        masks = window.masked.sum(-1)
        first = torch.where(fails, n, masks[:, None]).amin(-1)
        return commit(window, prediction, top(confidence, (first - 1).clamp(min=1), window.masked))
