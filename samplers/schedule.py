"""How a budget of denoising steps is shared out among the blocks of each row."""

from __future__ import annotations

from jaxtyping import Int
from torch import Tensor

from dllm.decoding.request import Request
from dllm.decoding.window import Window


def check_steps(steps: int, request: Request) -> None:
    """Refuse a number of steps that the blocks of a request cannot share.

    Args:
        steps: for all that the request generates.
        request: what is decoded.

    Raises:
        ValueError: fewer steps than there are blocks, or more than positions to generate.
    """
    blocks = -(-request.span // request.block_length)
    if not blocks <= steps <= request.span:
        raise ValueError(
            f"steps={steps} is out of range; use between {blocks} (one per block) "
            f"and {request.span} (one per generated position)"
        )


def steps_of_block(steps: int, window: Window) -> Int[Tensor, " B"]:
    """Steps of each row's active block, in proportion to its length."""
    before = window.columns[:, 0] - window.start
    through = (before + window.block_length).minimum(window.span)
    return through * steps // window.span - before * steps // window.span
