"""How a budget of denoising steps is divided among the blocks of each row."""

from __future__ import annotations

from itertools import pairwise

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


def steps_of_blocks(steps: int, request: Request) -> list[int]:
    """Steps of every block of a request; see `steps_of_block`."""
    span, own = request.span, request.block_length
    shared = (request.start - request.origin) % own  # positions of the prompt in the first block
    firsts = [number * own - shared for number in range(request.block_count)]
    shares = [max(min(first + own, span) * steps // span, number) for number, first in enumerate(firsts, start=1)]
    return [after - before for before, after in pairwise([0, *shares])]


def steps_of_block(steps: Int[Tensor, " B"] | int, window: Window) -> Int[Tensor, " B"]:
    """Steps of each row's active block, in proportion to its length, and at least one."""
    before, through = steps_around_block(steps, window)
    return through - before


def steps_around_block(steps: Int[Tensor, " B"] | int, window: Window) -> tuple[Int[Tensor, " B"], Int[Tensor, " B"]]:
    """Steps before each row's active block, and those up to its end; see `steps_of_block`."""
    own, first = window.block_length, window.columns[:, 0] - window.start  # negative where the prompt shares the block
    before, through = first.clamp(min=0), (first + own).minimum(window.span)
    blocks = (first + 2 * own - 1) // own  # with this one
    return (before * steps // window.span).maximum(blocks - 1), (through * steps // window.span).maximum(blocks)


def uniform_quota(steps: Int[Tensor, " B"] | int, window: Window) -> Int[Tensor, " B"]:
    """Tokens to commit in this step by LLaDA's schedule: floor(masks / steps), the remainder in the first steps."""
    # With fewer masks than steps, each step commits one until none is left.
    steps, masks = steps_of_block(steps, window), window.entry_masks
    return masks // steps + (window.step < masks % steps)
