"""Gathering flags that several entries set."""

from __future__ import annotations

from jaxtyping import Bool, Int
from torch import Tensor


def flagged(flags: Bool[Tensor, "B L"], index: Int[Tensor, "B N"], values: Bool[Tensor, "B N"]) -> Bool[Tensor, "B L"]:
    """The flags, with those set as well that one of the values at their index sets."""
    # In integers: on CUDA no reduction of booleans into places that occur more than once is implemented.
    return flags.int().scatter_reduce(1, index, values.int(), "amax").bool()
