"""Rejection sampling of drafts: a token drawn from one distribution becomes one of another.

Speculative decoding (arXiv 2211.17192, appendix A.1): accept y ~ q with probability min(1, p(y) / q(y)), and else draw
from max(0, p - q), normalized. The result is distributed as p.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def accepted(
    p: Float[Tensor, "N V"], q: Float[Tensor, "N V"], draft: Int[Tensor, " N"], uniform: Float[Tensor, " N"]
) -> Bool[Tensor, " N"]:
    """Which drafts are accepted.

    Args:
        p: wanted distributions.
        q: those that the drafts were drawn from.
        draft: tokens.
        uniform: numbers in [0, 1).
    """
    wanted, own = (each.gather(-1, draft[:, None])[:, 0] for each in (p, q))
    return uniform * own < wanted


def remainder(p: Float[Tensor, "N V"], q: Float[Tensor, "N V"], uniform: Float[Tensor, " N"]) -> Int[Tensor, " N"]:
    """A token for each rejected draft.

    Args:
        p: wanted distributions.
        q: those that the drafts were drawn from.
        uniform: numbers in [0, 1).
    """
    left = (p - q).clamp(min=0)
    # Equal distributions reject nothing but by rounding.
    mass = torch.where(left.sum(-1, keepdim=True) > 0, left, p).cumsum(-1)
    total = mass[:, -1:]
    # Never past the last token with any probability, should the product round up.
    return (mass <= uniform[:, None] * total).sum(-1).minimum((mass < total).sum(-1))
