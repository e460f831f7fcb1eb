"""KLASS: KL-adaptive stability sampling (arXiv 2511.05664).

Rule:

    commit i  if  KL(p_t || p_(t-1)) < kl_threshold  in each of the last `history` steps,
              and  p_t(top token at i) >= threshold;  where none qualifies, the `at_least` most confident

Per step, over the masked positions of the block, with p_t the distribution at i in this forward, p_(t-1) that in the
one before, and KL the Kullback-Leibler divergence in nats. A position has no distribution before its first forward, so
it qualifies after history + 1 forwards at the earliest.

With ahead=true, as in d2Cache's implementation, the positions of later blocks are predicted, too, so that a block
begins with a history. With ahead=false each block begins without: a cache then has fewer positions to compute, and a
forward fewer to project to the vocabulary. The distributions that are compared take several times the memory of a
step's logits, which with ahead=true are those of all masks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dllm.checks import choice, number
from dllm.decoding.prediction import Prediction
from dllm.decoding.request import Request
from dllm.decoding.setup import Setup
from dllm.decoding.window import Edit, Window
from dllm.samplers.base import CONFIDENCES, Denoise, Knob, Policy, commit
from dllm.samplers.selection import top

EPSILON = 1e-12  # inside the logarithms, as in the reference


@dataclass
class History:
    """State of an engine.

    Attributes:
        stable: consecutive steps in which the KL divergence of each column was below the threshold.
        entry: index of each column's distribution in `last`; -1 without one.
        last: distributions of the last forward.
    """

    stable: Int[Tensor, "rows L"]
    entry: Int[Tensor, "rows L"]
    last: Float[Tensor, "N V"] | None = None


@dataclass(frozen=True)
class KLASS(Policy):
    """Commit confident predictions whose distribution no longer changes.

    Args:
        threshold: minimum probability of a committed token; above 1 no token qualifies.
        kl_threshold: divergence, in nats, below which a distribution counts as unchanged.
        history: consecutive steps that a distribution must be unchanged.
        at_least: tokens committed per step where no position qualifies.
        ahead: track the positions of later blocks, too.

    Raises:
        ValueError: an option out of range.
    """

    knob = Knob("threshold", CONFIDENCES)

    threshold: float = 0.9
    kl_threshold: float = 0.01
    history: int = 2
    at_least: int = 1
    ahead: bool = True

    def __post_init__(self) -> None:
        number("threshold", self.threshold, "0 or more (0.9 is published)", low=0)
        number("kl_threshold", self.kl_threshold, "a positive number of nats (0.01 is published)", above=0)
        number("history", self.history, "a whole number of at least 1 (2 is published)", low=1, whole=True)
        number("at_least", self.at_least, "a whole number of at least 1", low=1, whole=True)
        choice("ahead", self.ahead, (True, False))

    def start(self, setup: Setup) -> History:
        """Start without distributions."""
        stable = torch.zeros((setup.slots, setup.length), dtype=torch.long, device=setup.device)
        return History(stable, torch.full_like(stable, -1))

    def enter(self, state: History, row: int, request: Request) -> None:
        """Forget what this row number held."""
        state.stable[row], state.entry[row] = 0, -1

    def step(self, window: Window, denoise: Denoise, state: History) -> Edit:
        """Commit stable and confident positions; where a row has none, the best."""
        prediction = denoise(ahead=self.ahead)
        rows, columns = window.rows[:, None], window.columns
        if self.ahead:
            self._follow(prediction, rows, torch.arange(window.tokens.shape[1], device=rows.device)[None], state)
            prediction = prediction.arranged(lambda values: values.gather(1, columns))
        else:
            self._follow(prediction, rows, columns, state)
        stable = state.stable[rows, columns] >= self.history
        sure = stable & (prediction.confidence >= self.threshold) & window.masked
        best = top(prediction.confidence, self.at_least, window.masked)
        return commit(window, prediction, torch.where(sure.any(-1, keepdim=True), sure, best))

    def _follow(
        self, prediction: Prediction, rows: Int[Tensor, "B 1"], columns: Int[Tensor, "#B K"], state: History
    ) -> None:
        """Compare with the distributions of the last forward, and keep these for the next."""
        rows, columns = (each.expand(prediction.asked.shape).flatten()[prediction.index] for each in (rows, columns))
        new, entry = prediction.logits.softmax(-1), state.entry[rows, columns]
        unchanged = torch.zeros_like(entry, dtype=torch.bool)
        if state.last is not None:
            old = state.last[entry.clamp(min=0)]
            divergence = (new * ((new + EPSILON).log() - (old + EPSILON).log())).sum(-1)
            unchanged = (divergence < self.kl_threshold) & (entry >= 0)
        state.stable[rows, columns] = (state.stable[rows, columns] + 1).where(unchanged, 0)
        state.entry.fill_(-1)
        state.entry[rows, columns] = torch.arange(len(entry), device=entry.device)
        state.last = new
