"""Logits that are no numbers: a row that gets such has no answer, and is told why."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

_WIDER = {
    torch.float16: "use {}bfloat16 or {}float32, which have a wider range",
    torch.bfloat16: "use {}float32, which is more precise",
}


@dataclass(frozen=True)
class Broken:
    """Rows that cannot be answered.

    Attributes:
        rows: which of the window's.
        reason: why, with what to do.
    """

    rows: Bool[Tensor, " B"]
    reason: str


def not_finite(logits: Float[Tensor, "*N V"]) -> Bool[Tensor, "*N"]:
    """Where logits hold NaN or +inf, or nothing but -inf: no probabilities follow from them."""
    return ~logits.amax(-1).isfinite()


def reason(whose: str, dtype: torch.dtype, option: str = "") -> str:
    """Why there is no answer.

    Args:
        whose: the model, as a message calls it.
        dtype: it computes in.
        option: what a dtype is chosen with, such as "dtype=".
    """
    fix = _WIDER.get(dtype, "use other weights, since these are damaged or do not fit the code").format(option, option)
    return f"{whose} gives logits that are NaN or infinite in {str(dtype).removeprefix('torch.')}; {fix}"
