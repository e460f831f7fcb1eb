"""Scattering flags with repeated indices."""

from __future__ import annotations

from jaxtyping import Bool, Int
from torch import Tensor


def flagged(flags: Bool[Tensor, "B L"], index: Int[Tensor, "B N"], values: Bool[Tensor, "B N"]) -> Bool[Tensor, "B L"]:
    """The flags, or'ed with the values at their index."""
    # In integers: CUDA implements no scatter reduction of booleans.
    return flags.int().scatter_reduce(1, index, values.int(), "amax").bool()
