"""Fixed schedules: a given number of steps, each committing its share of the best positions.

LLaDA (arXiv 2502.09992, algorithm 5, semi-autoregressive blocks) and Dream (arXiv 2508.15487).
Per step, with quota k of the schedule: commit the k masked positions of the block with the highest
score, where score is

    low_confidence  p(top token)            (Dream: maskgit_plus)
    margin          p(top) - p(second)      (Dream: topk_margin)
    entropy         -H(p)
    random          uniform noise

With `alg_temp` above 0 (Dream) the k positions are drawn, one after another and none twice, each with a
probability proportional to exp(score / alg_temp). Above temperature 0 Dream's p is that of softmax(logits /
temperature) after top_p and top_k, LLaDA's that of softmax(logits); see `tempered_confidence` of `dllm.Options`.

schedule=uniform (LLaDA) gives each step floor(masks / steps), the remainder going to the first
steps. schedule=timestep (Dream) commits int(m (1 - s/t)) of m masks on the grid
t = linspace(1, 0.001, steps + 1), the last step the rest.

Differences: a step whose quota is zero is skipped and costs no forward; steps are shared out among
the blocks in proportion to their length, so that neither steps nor the generated length need be a
multiple of anything; ties go to the leftmost position.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from dllm.canvas import Edit, Window
from dllm.checks import choice, number
from dllm.prediction import Prediction
from dllm.run import Run
from dllm.samplers.base import Denoise, commit
from dllm.samplers.schedule import share_steps
from dllm.samplers.selection import perturbed, top

ORDERS = ("low_confidence", "margin", "entropy", "random")
SCHEDULES = ("uniform", "timestep")


@dataclass(frozen=True)
class Quotas:
    """How many tokens a step commits.

    Attributes:
        table: entry [n, m, i] is the i-th nonzero quota of a block entered with m masks, for each of
            the N numbers of steps that a block may have.
        kind: which n each block of each row has.
    """

    table: Int[Tensor, "N M S"]
    kind: Int[Tensor, "rows blocks"]


@dataclass(frozen=True)
class Vanilla:
    """Commit a scheduled number of tokens per step.

    Args:
        steps: denoising steps for the whole generated region; None to go by `tokens_per_step`.
        tokens_per_step: tokens each step commits where `steps` is None; the last of a block takes the rest.
        order: which masked positions come first: low_confidence, margin, entropy or random.
        schedule: uniform (LLaDA) or timestep (Dream).
        alg_temp: 0 takes the positions with the highest scores; above, they are drawn, the more evenly the higher.

    Raises:
        ValueError: an unknown order or schedule, a number out of range, both numbers given, or an `alg_temp` without
            effect.
    """

    single_forward: ClassVar[bool] = True

    steps: int | None = None
    tokens_per_step: int = 1
    order: Literal["low_confidence", "margin", "entropy", "random"] = "low_confidence"
    schedule: Literal["uniform", "timestep"] = "uniform"
    alg_temp: float = 0.0

    def __post_init__(self) -> None:
        if self.steps is not None:
            use = "a whole number of at least 1, or null to go by tokens_per_step"
            number("steps", self.steps, use, low=1, whole=True)
        number("tokens_per_step", self.tokens_per_step, "a whole number of at least 1", low=1, whole=True)
        if self.steps is not None and self.tokens_per_step != 1:
            both = f"steps={self.steps} and tokens_per_step={self.tokens_per_step}"
            raise ValueError(f"{both} exclude each other; set one")
        choice("order", self.order, ORDERS)
        choice("schedule", self.schedule, SCHEDULES)
        if self.schedule == "timestep" and self.steps is None:
            raise ValueError("schedule=timestep needs steps; set steps, or use schedule=uniform")
        number("alg_temp", self.alg_temp, "0 (the highest scores) or a positive number", low=0, high=1e6)
        if self.alg_temp > 0 and self.order == "random":
            raise ValueError(f"alg_temp={self.alg_temp} has no effect with order=random; use another order, or 0")

    def start(self, run: Run) -> Quotas:
        """Tabulate how many tokens each step of a block commits."""
        if self.steps is None:
            table = _constant_quotas(run.block_length, self.tokens_per_step)[None]
            kind = torch.zeros(len(run.spans), run.blocks, dtype=torch.long)
            return Quotas(table.to(run.device), kind.to(run.device))
        share = share_steps(self.steps, run)
        tabulate = _uniform_quotas if self.schedule == "uniform" else _timestep_quotas
        kinds, kind = share.unique(return_inverse=True)
        tables = [F.pad(tabulate(run.block_length, n), (0, int(kinds[-1]) - n)) for n in kinds.tolist()]
        return Quotas(torch.stack(tables).to(run.device), kind.to(run.device))

    def step(self, window: Window, denoise: Denoise, state: Quotas) -> Edit:
        """Commit the scheduled number of the best positions."""
        prediction = denoise()
        quota = state.table[state.kind[window.rows, window.block], window.entry_masks, window.step]
        score = self._score(window, prediction)
        if self.alg_temp > 0:
            score = perturbed(score, self.alg_temp, window.uniform())
        return commit(window, prediction, top(score, quota, window.masked))

    def _score(self, window: Window, prediction: Prediction) -> Float[Tensor, "B K"]:
        match self.order:
            case "low_confidence":
                return prediction.confidence
            case "margin":
                return prediction.margin
            case "entropy":
                return -prediction.entropy
            case _:
                return window.uniform()


def _constant_quotas(most: int, tokens: int) -> Int[Tensor, "M S"]:
    tokens = min(tokens, max(most, 1))
    taken = tokens * torch.arange(-(-most // tokens))
    return (torch.arange(most + 1)[:, None] - taken).clamp(0, tokens)


def _uniform_quotas(most: int, steps: int) -> Int[Tensor, "M S"]:
    masks = torch.arange(most + 1)[:, None]
    if steps == 0:  # past the last block of a row
        return masks[:, :0]
    return masks // steps + (torch.arange(steps) < masks % steps)


def _timestep_quotas(most: int, steps: int) -> Int[Tensor, "M S"]:
    if steps == 0:  # past the last block of a row
        return torch.zeros((most + 1, 0), dtype=torch.long)
    # float32 like the reference, whose rounding decides int() at whole numbers.
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
