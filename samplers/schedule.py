"""How a budget of denoising steps is shared out among the blocks of each row."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from dllm.run import Run


def share_steps(steps: int, run: Run) -> Int[Tensor, "rows blocks"]:
    """Steps of every block of every row, in proportion to the block's length; 0 past a row's last block.

    Args:
        steps: for the whole generated region of a row.
        run: says how long that region is in each row.

    Raises:
        ValueError: fewer steps than a row has blocks, or more than it has columns to generate.
    """
    shares = []
    for span in run.spans:
        blocks = -(-span // run.block_length)
        if not blocks <= steps <= span:
            raise ValueError(
                f"steps={steps} is out of range; use between {blocks} (one per block) "
                f"and {span} (one per generated position)"
            )
        ends = torch.arange(run.blocks + 1).mul(run.block_length).clamp(max=span) * steps // span
        shares.append(ends.diff())
    return torch.stack(shares)
