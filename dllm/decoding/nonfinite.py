"""Non-finite logits: a row with such logits fails with a reason."""

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
    """Rows that fail.

    Attributes:
        rows: entries of the window.
        reason: why, and how to fix it.
    """

    rows: Bool[Tensor, " B"]
    reason: str


def not_finite(logits: Float[Tensor, "*N V"]) -> Bool[Tensor, "*N"]:
    """Where logits contain NaN or +inf, or only -inf: they define no probabilities."""
    return ~logits.amax(-1).isfinite()


def reason(whose: str, dtype: torch.dtype, option: str = "") -> str:
    """Why a row has no answer.

    Args:
        whose: name of the model in messages.
        dtype: of its computation.
        option: that sets the dtype, such as "dtype=".
    """
    fix = _WIDER.get(dtype, "use other weights, since these are damaged or do not fit the code").format(option, option)
    return f"{whose} gives logits that are NaN or infinite in {str(dtype).removeprefix('torch.')}; {fix}"
