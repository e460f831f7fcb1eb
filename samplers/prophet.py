"""Prophet: decode everything at once when the answer is decided (arXiv 2508.19982).

Rule:

    commit all masks  if  mean gap of the answer's positions  >=  early, mid or late,
    otherwise the k most confident positions of the block

k is that of LLaDA's uniform schedule (see `vanilla`). The gap of a position is the difference of its two highest
logits. All masks are those of the row, in later blocks too. The bound is that of the row's progress: `early` where the
number of this step over that of all steps is below 0.33, `mid` below 0.67, and `late` from there on. The answer's
positions are `answer_length` ones from `answer_start` on, counted from the prompt's end, decided or not; without
`answer_start` they are all that is generated.

Every step predicts the whole generated region, as the published code does, so that a cache saves little.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dllm.checks import number
from dllm.decoding.flags import flagged
from dllm.decoding.prediction import Prediction
from dllm.decoding.request import Request
from dllm.decoding.setup import Setup
from dllm.decoding.window import Edit, Window
from dllm.samplers.base import Denoise, Knob, Policy
from dllm.samplers.schedule import check_steps, steps_around_block, uniform_quota
from dllm.samplers.selection import top


@dataclass(frozen=True)
class Prophet(Policy):
    """Follow a schedule until the answer's logits are far apart, then commit everything.

    Args:
        steps: denoising steps for the whole generated region; None for one token per step.
        early: mean gap that ends the decoding in the first third of the steps.
        mid: the same, in the second third.
        late: the same, in the last third.
        answer_start: first position of the answer, from the prompt's end; None for all positions.
        answer_length: positions of the answer; None for 5, or all that follow.

    Raises:
        ValueError: a number out of range, or an answer length without a start.
    """

    knob = Knob("late", (20.0, 15.0, 12.0, 10.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.5, 2.0))

    steps: int | None = None
    early: float = 7.5
    mid: float = 5.0
    late: float = 2.5
    answer_start: int | None = None
    answer_length: int | None = None

    def __post_init__(self) -> None:
        if self.steps is not None:
            number(
                "steps", self.steps, "a whole number of at least 1, or null for one token per step", low=1, whole=True
            )
        for name, published in (("early", 7.5), ("mid", 5.0), ("late", 2.5)):
            number(name, getattr(self, name), f"0 or more ({published} is published)", low=0)
        if self.answer_start is not None:
            use = "a whole number of at least 0, or null for all positions"
            number("answer_start", self.answer_start, use, low=0, whole=True)
        if self.answer_length is not None:
            use = "a whole number of at least 1, or null for 5"
            number("answer_length", self.answer_length, use, low=1, whole=True)
            if self.answer_start is None:
                raise ValueError(f"answer_length={self.answer_length} has no effect without answer_start; set it, too")

    def start(self, setup: Setup) -> int:
        """The id of [MASK]."""
        return setup.mask_token_id

    def check(self, state: Any, request: Request) -> None:
        """Reject steps that cannot be divided among the blocks, and an answer beyond the end."""
        if self.steps is not None:
            check_steps(self.steps, request)
        if self.answer_start is not None and self.answer_start >= request.span:
            use = f"0 to {request.span - 1} (the last position to generate)"
            raise ValueError(f"answer_start={self.answer_start} is out of range; use {use}")

    def step(self, window: Window, denoise: Denoise, state: int) -> Edit:
        """Commit everything where the answer is decided, and what is scheduled elsewhere."""
        prediction = denoise(decided=True, ahead=True)
        steps = window.span if self.steps is None else self.steps
        before, _ = steps_around_block(steps, window)
        confidence = prediction.arranged(lambda values: values.gather(1, window.columns)).confidence
        scheduled = top(confidence, uniform_quota(steps, window), window.masked)
        decided = self._decided(window, prediction, (before + window.step + 1).double() / steps)
        everything = (window.tokens == state) & window.region & decided[:, None]
        columns = torch.arange(window.tokens.shape[1], device=decided.device).expand_as(window.tokens)
        return Edit(columns, prediction.tokens, flagged(everything, window.columns, scheduled))

    def _decided(self, window: Window, prediction: Prediction, progress: Float[Tensor, " B"]) -> Bool[Tensor, " B"]:
        """Whether the answer's mean gap is wide enough for the progress of each row."""
        gap = prediction.aligned(_gap(prediction.given), 0.0)
        answer = window.region
        if self.answer_start is not None:
            place = torch.arange(gap.shape[1], device=gap.device) - window.start[:, None]
            after = place - min(self.answer_start, gap.shape[1])
            answer = answer & (after >= 0) & (after < min(self.answer_length or 5, gap.shape[1]))
        mean = gap.where(answer, 0).sum(-1) / answer.sum(-1)
        bound = torch.where(progress < 0.33, self.early, torch.where(progress < 0.67, self.mid, self.late))
        return mean >= bound


def _gap(logits: Float[Tensor, "N V"]) -> Float[Tensor, " N"]:
    highest = logits.topk(2, dim=-1).values
    return highest[:, 0] - highest[:, 1]
