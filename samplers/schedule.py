"""How a budget of denoising steps is divided among the blocks of each row."""

from __future__ import annotations

from jaxtyping import Int
from torch import Tensor

from dllm.decoding.request import Request
from dllm.decoding.window import Window


def check_steps(steps: int, request: Request) -> None:
    """Reject a number of steps that cannot be divided among the blocks of a request.

    Args:
        steps: for all that the request generates.
        request: what is decoded.

    Raises:
        ValueError: fewer steps than there are blocks, or more than positions to generate.
    """
    blocks = request.block_count
    if not blocks <= steps <= request.span:
        raise ValueError(
            f"steps={steps} is out of range; use between {blocks} (one per block) "
            f"and {request.span} (one per generated position)"
        )


def steps_of_block(steps: int, window: Window) -> Int[Tensor, " B"]:
    """Steps of each row's active block, in proportion to its length, and at least one."""
    own, first = window.block_length, window.columns[:, 0] - window.start  # negative where the prompt shares the block
    before, through = first.clamp(min=0), (first + own).minimum(window.span)
    blocks = (first + 2 * own - 1) // own  # with this one
    return (through * steps // window.span).maximum(blocks) - (before * steps // window.span).maximum(blocks - 1)
