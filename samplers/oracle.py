"""The oracle: a policy that knows which predictions are already final.

Rule:

    commit i  if  the predicted token at i  =  the token at i in the result of the base policy

First the base policy decodes the canvas; these forwards are not counted. Then each step commits exactly the masked
positions of the block that fulfil this (the "extremely greedy" process of Learn2PD, arXiv 2509.25188, section 3.2).
Where none does, the most confident position gets its final token, so that the result is always that of the base.

It is a reference that knows the result, not a method: its NFE says how few forwards a policy that reproduces the result
of the base may take. That is an estimate, not a bound: the more is committed at once, the more the next predictions
change, so that a policy that waits, such as the base, can take fewer.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from dllm.decoding.request import Request
from dllm.decoding.setup import Rehearsal, Setup
from dllm.decoding.window import Edit, Window
from dllm.resolve import resolve
from dllm.samplers.base import Denoise, Policy, Sampler, become
from dllm.samplers.selection import stopped, top


@dataclass(frozen=True)
class Known:
    """State of an engine.

    Attributes:
        result: final tokens of the base, for every row.
        rehearsal: decodes them.
        mask_token_id: id of [MASK].
    """

    result: Int[Tensor, "rows L"]
    rehearsal: Rehearsal
    mask_token_id: int


@dataclass(frozen=True)
class Oracle(Policy):
    """Commit exactly the predictions that equal the result of another policy.

    Args:
        base: the policy whose result is reproduced: a name of conf/sampler or an object.

    Raises:
        ValueError: an unknown name.
    """

    kind = "lossless"
    single_forward = True
    whole_canvas = True

    base: str | Sampler = "vanilla"

    def __post_init__(self) -> None:
        self._base  # noqa: B018  # rejects an unknown name

    @cached_property
    def _base(self) -> Sampler:
        return resolve("sampler", self.base, Sampler, "base")

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """Requirements for the cache (`dllm.decoding.compatibility`): those of the base."""
        return self._base.needs

    def files(self) -> Iterable[Path]:
        """The files of the base."""
        return self._base.files()

    def start(self, setup: Setup) -> Known:
        """Allocate the results."""
        result = torch.zeros((setup.slots, setup.length), dtype=torch.long, device=setup.device)
        return Known(result, setup.rehearsal(self._base), setup.mask_token_id)

    def check(self, state: Known, request: Request) -> None:
        """Reject what the base rejects."""
        state.rehearsal.check(request)

    def enter(self, state: Known, row: int, request: Request) -> None:
        """Decode the result to reproduce."""
        state.result[row, -len(request.tokens) :] = state.rehearsal(request)

    def step(self, window: Window, denoise: Denoise, state: Known) -> Edit:
        """Commit every correct prediction."""
        prediction = denoise()
        result = state.result[window.rows]
        final = result.gather(1, window.columns)
        right = (prediction.tokens == final) & window.masked
        stuck = ~right.any(-1, keepdim=True)
        edit = Edit(window.columns, final, right | (stuck & top(prediction.confidence, 1, window.masked)))
        # The base may have decoded tokens after its end-of-text; masks it left are filled the same way for both.
        after = edit.on(window.tokens)
        done = stopped(replace(window, tokens=after), state.mask_token_id)
        rest = done[:, None] & (result != window.ends[:, :1]) & window.region
        return become(window, torch.where(rest, result, after))
