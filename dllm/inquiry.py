"""What a sampler asks of a forward, as the host knows it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Bool, Int
from numpy.typing import NDArray
from torch import Tensor

from dllm.canvas import Canvas, Window


@dataclass(frozen=True)
class Inquiry:
    """What is asked of one forward, about A sequences, as the host knows it.

    Attributes:
        slots: (A,) slot of each sequence's row, ascending.
        draft: (A,) number of the sequence among the drafts of its row.
        tokens: of the sequences.
        index: (N,) flat indices of what is asked, into the tensor that asks.
        sequence: (N,) what sequence that is about.
        column: (N,) what canvas column.
        joined: sequences of a row that become one.
    """

    slots: NDArray[np.int64]
    draft: NDArray[np.int64]
    tokens: Int[Tensor, "A L"]
    index: NDArray[np.int64]
    sequence: NDArray[np.int64]
    column: NDArray[np.int64]
    joined: int = 1


def about_window(canvas: Canvas, window: Window, decided: bool) -> Inquiry:
    """What the host knows without asking: the masked positions of the window, or all of them."""
    columns, inside, masked = canvas.active
    grid, slots = inside if decided else masked, np.arange(len(columns))
    sequence, k = np.nonzero(grid)
    index = sequence * grid.shape[1] + k
    return Inquiry(slots, np.zeros_like(slots), window.tokens, index, sequence, columns[sequence, k])


def read(
    asked: Bool[Tensor, "*B K"], columns: Int[Tensor, "*C K"], tokens: Int[Tensor, "B D L"], joined: bool
) -> Inquiry:
    """What a policy asks for that asks for something special, which only the device knows."""
    rows, drafts = tokens.shape[:2]
    flat = torch.cat((asked.flatten(), columns.flatten())).cpu().numpy()  # reads the device
    grid = flat[: asked.numel()].astype(bool).reshape(rows, drafts, -1)
    where = np.broadcast_to(flat[asked.numel() :].reshape(rows, -1, grid.shape[2]), grid.shape)
    wanted: NDArray[np.bool_] = np.any(grid, axis=2)
    joined = joined and bool(wanted[:, 1:].any())
    if joined:  # a row's drafts are computed together or not at all
        wanted = np.broadcast_to(wanted.any(1, keepdims=True), wanted.shape)
    slots, draft = np.nonzero(wanted)
    number = (wanted.ravel().cumsum() - 1).reshape(wanted.shape)
    row, d, k = np.nonzero(grid)
    flat_tokens = rearrange(tokens, "b d l -> (b d) l")
    if len(slots) < len(flat_tokens):
        flat_tokens = flat_tokens[torch.as_tensor(slots * drafts + draft, device=tokens.device)]
    index = np.flatnonzero(grid)
    return Inquiry(slots, draft, flat_tokens, index, number[row, d], where[row, d, k], drafts if joined else 1)
