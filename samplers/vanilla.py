"""Fixed schedules: a given number of steps, each committing its quota of the best positions.

Rule:

    commit the k masked positions of the block with the highest score,  k the quota of this step

LLaDA (arXiv 2502.09992, algorithm 5, semi-autoregressive blocks) and Dream (arXiv 2508.15487). The schedule gives the
quota, and the score is, with p the predicted distribution and H its entropy in nats,

    low_confidence  p(top token)            (Dream: maskgit_plus)
    margin          p(top) - p(second)      (Dream: topk_margin)
    entropy         -H(p)
    random          uniform noise
    left_to_right   the leftmost first (SDAR, arXiv 2510.06303: sequential)

With `alg_temp` above 0 (Dream) the k positions are drawn without replacement, each with a probability proportional to
exp(score / alg_temp). Above temperature 0 Dream's p is softmax(logits / temperature) after top_p and top_k, LLaDA's is
softmax(logits); see `tempered_confidence` of `dllm.Options`.

With `steps_per_block` (SDAR: denoising_steps) k is the length of a block divided evenly over that many steps, the
remainder first. schedule=uniform (LLaDA) gives each step floor(masks / steps), with the remainder in the first steps.
schedule=timestep (Dream) commits int(m (1 - s/t)) of m masks on the grid t = linspace(1, 0.001, steps + 1), and the
remaining masks in the last step.

Differences: a step whose quota is zero is skipped and costs no forward; steps are divided among the blocks in
proportion to their length, so that no divisibility is required of steps or generated length; ties go to the leftmost
position.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from dllm.checks import choice, number
from dllm.decoding.prediction import Prediction
from dllm.decoding.request import Request
from dllm.decoding.setup import Setup
from dllm.decoding.window import Edit, Window
from dllm.samplers.base import Denoise, Knob, Policy, commit
from dllm.samplers.schedule import (
    check_steps,
    check_steps_per_block,
    quota_of_step,
    steps_of_block,
    steps_of_blocks,
    uniform_quota,
)
from dllm.samplers.selection import perturbed, top

ORDERS = ("low_confidence", "margin", "entropy", "random", "left_to_right")
SCHEDULES = ("uniform", "timestep")


@dataclass
class Timetables:
    """Precomputed quotas of schedule=timestep, which are a recurrence.

    Attributes:
        table: entry [n, m, i] is the i-th nonzero quota of a block entered with m masks, for the n-th number of steps
            of a block; the last one is 0.
        kinds: these numbers of steps.
    """

    table: Int[Tensor, "N M S"]
    kinds: list[int] = field(default_factory=list)

    def add(self, steps: int, most: int) -> None:
        """Tabulate blocks with `steps` steps and at most `most` masks, if they are not yet."""
        if steps in self.kinds and most < self.table.shape[1]:
            return
        self.kinds = sorted({*self.kinds, steps})
        most = max(most + 1, self.table.shape[1]) - 1
        tables = [F.pad(_timestep_quotas(most, n), (0, self.kinds[-1] + 1 - n)) for n in self.kinds]
        self.table = torch.stack(tables).to(self.table.device)

    def quota(self, steps: Int[Tensor, " B"], window: Window) -> Int[Tensor, " B"]:
        """Tokens to commit in this step."""
        kind = torch.searchsorted(torch.tensor(self.kinds, device=steps.device), steps)
        # Wrappers may take more steps in a block than it has: then one token each.
        step = window.step.clamp(max=self.table.shape[2] - 1)
        return self.table[kind, window.entry_masks, step].maximum(window.masked.any(-1).long())


@dataclass(frozen=True)
class Vanilla(Policy):
    """Commit a scheduled number of tokens per step.

    Args:
        steps: denoising steps for the whole generated region; None to use `tokens_per_step`.
        tokens_per_step: tokens committed per step where `steps` is None; the last step of a block takes the rest.
        order: score that ranks masked positions: low_confidence, margin, entropy, random or left_to_right.
        schedule: uniform (LLaDA) or timestep (Dream).
        alg_temp: 0 takes the positions with the highest scores; above 0 they are drawn, more evenly at higher values.
        steps_per_block: denoising steps for each block; None to use the others.

    Raises:
        ValueError: an unknown order or schedule, a number out of range, both numbers given, or an `alg_temp` without
            effect.
    """

    knob = Knob("tokens_per_step", (1, 2, 3, 4, 6, 8))
    single_forward = True

    steps: int | None = None
    tokens_per_step: int = 1
    order: Literal["low_confidence", "margin", "entropy", "random", "left_to_right"] = "low_confidence"
    schedule: Literal["uniform", "timestep"] = "uniform"
    alg_temp: float = 0.0
    steps_per_block: int | None = None

    def __post_init__(self) -> None:
        if self.steps is not None:
            use = "a whole number of at least 1, or null to use tokens_per_step"
            number("steps", self.steps, use, low=1, whole=True)
        number("tokens_per_step", self.tokens_per_step, "a whole number of at least 1", low=1, whole=True)
        if self.steps is not None and self.tokens_per_step != 1:
            both = f"steps={self.steps} and tokens_per_step={self.tokens_per_step}"
            raise ValueError(f"{both} are mutually exclusive; set one")
        choice("order", self.order, ORDERS)
        choice("schedule", self.schedule, SCHEDULES)
        if self.schedule == "timestep" and self.steps is None:
            raise ValueError("schedule=timestep needs steps; set steps, or use schedule=uniform")
        number("alg_temp", self.alg_temp, "0 (the highest scores) or a positive number", low=0, high=1e6)
        if self.alg_temp > 0 and self.order in ("random", "left_to_right"):
            raise ValueError(f"alg_temp={self.alg_temp} has no effect with order={self.order}; use another order, or 0")
        check_steps_per_block(self.steps_per_block, {"steps": self.steps, "tokens_per_step": self.tokens_per_step})
        if self.steps_per_block is not None and self.schedule != "uniform":
            raise ValueError("schedule=timestep divides steps, not steps_per_block; use schedule=uniform")

    def start(self, setup: Setup) -> Timetables:
        """Start with an empty table."""
        return Timetables(torch.zeros((0, 0, 0), dtype=torch.long, device=setup.device))

    def check(self, state: Timetables, request: Request) -> None:
        """Reject steps that cannot be divided among the blocks."""
        if self.steps is not None:
            check_steps(self.steps, request)

    def enter(self, state: Timetables, row: int, request: Request) -> None:
        """Tabulate the quotas of its blocks."""
        if self.steps is not None and self.schedule == "timestep":
            for steps in set(steps_of_blocks(self.steps, request)):
                state.add(steps, request.block_length)

    def step(self, window: Window, denoise: Denoise, state: Timetables) -> Edit:
        """Commit the scheduled number of the best positions."""
        prediction = denoise()
        score = self._score(window, prediction)
        if self.alg_temp > 0:
            score = perturbed(score, self.alg_temp, window.uniform())
        return commit(window, prediction, top(score, self._quota(window, state), window.masked))

    def _quota(self, window: Window, state: Timetables) -> Int[Tensor, " B"] | int:
        if self.steps_per_block is not None:
            return quota_of_step(self.steps_per_block, window)
        if self.steps is None:
            return self.tokens_per_step
        if self.schedule == "timestep":
            return state.quota(steps_of_block(self.steps, window), window)
        return uniform_quota(self.steps, window)

    def _score(self, window: Window, prediction: Prediction) -> Float[Tensor, "B K"]:
        match self.order:
            case "low_confidence":
                return prediction.confidence
            case "margin":
                return prediction.margin
            case "entropy":
                return -prediction.entropy
            case "left_to_right":
                return torch.zeros_like(prediction.confidence)  # ties go to the leftmost
            case _:
                return window.uniform()


def _timestep_quotas(most: int, steps: int) -> Int[Tensor, "M S"]:
    # float32 as in the reference: its rounding decides int() at whole numbers.
    times = torch.linspace(1, 1e-3, steps + 1, dtype=torch.float32)
    left = torch.arange(most + 1, dtype=torch.float32)
    quotas = []
    for i in range(steps):
        taken = left if i == steps - 1 else (left * (1 - times[i + 1] / times[i])).floor()
        quotas.append(taken)
        left = left - taken
    table = torch.stack(quotas, dim=1).long()
    # Steps that commit nothing are skipped: the nonzero quotas move to the front, in order.
    return table.gather(1, (table == 0).long().argsort(dim=1, stable=True))
