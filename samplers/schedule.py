"""How a budget of denoising steps is divided among the blocks of each row."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

from jaxtyping import Int
from torch import Tensor

from dllm.checks import number
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


def check_steps_per_block(steps: int | None, others: Mapping[str, int | None]) -> None:
    """Reject a number of steps for each block that is out of range, or beside another option of the same meaning.

    Args:
        steps: for each block; None for none.
        others: the options that it replaces; 1 or None where they are not set.

    Raises:
        ValueError: it is rejected.
    """
    if steps is None:
        return
    number("steps_per_block", steps, "a whole number of at least 1, or null", low=1, whole=True)
    for name, value in others.items():
        if value not in (None, 1):
            raise ValueError(f"steps_per_block={steps} and {name}={value} are mutually exclusive; set one")


def steps_of_blocks(steps: int, request: Request) -> list[int]:
    """Steps of every block of a request; see `steps_of_block`."""
    span, own = request.span, request.block_length
    shared = (request.start - request.origin) % own  # positions of the prompt in the first block
    firsts = [number * own - shared for number in range(request.block_count)]
    shares = [max(min(first + own, span) * steps // span, number) for number, first in enumerate(firsts, start=1)]
    return [after - before for before, after in pairwise([0, *shares])]


def quota_of_step(steps: int, window: Window) -> Int[Tensor, " B"]:
    """Tokens of a step where each block has this many steps: its length divided evenly, the remainder first.

    Tokens of the prompt in the block count as well, so that such a block takes fewer steps.
    """
    length = window.block_length
    return (length // steps + (window.step < length % steps)).clamp(min=1)


def steps_of_block(steps: Int[Tensor, " B"] | int, window: Window) -> Int[Tensor, " B"]:
    """Steps of each row's active block, in proportion to its length, and at least one."""
    before, through = steps_around_block(steps, window)
    return (through - before).clamp(min=1)  # of blocks beyond the end, as views have, there are none


def steps_around_block(steps: Int[Tensor, " B"] | int, window: Window) -> tuple[Int[Tensor, " B"], Int[Tensor, " B"]]:
    """Steps before each row's active block, and those up to its end; see `steps_of_block`."""
    own, first = window.block_length, window.columns[:, 0] - window.start  # negative where the prompt shares the block
    before, through = first.clamp(min=0), (first + own).minimum(window.span)
    blocks = (first + 2 * own - 1) // own  # with this one
    return (before * steps // window.span).maximum(blocks - 1), (through * steps // window.span).maximum(blocks)


def uniform_quota(steps: Int[Tensor, " B"] | int, window: Window) -> Int[Tensor, " B"]:
    """Tokens to commit in this step by LLaDA's schedule: floor(masks / steps), the remainder in the first steps."""
    # With fewer masks than steps, each step commits one until none is left, as do steps that a wrapper takes beyond.
    steps, masks = steps_of_block(steps, window), window.entry_masks
    return (masks // steps + (window.step < masks % steps)).maximum(window.masked.any(-1).long())
