"""What a sampler asks of one forward, as the host knows it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Bool, Int
from numpy.typing import NDArray
from torch import Tensor

from dllm.decoding.canvas import Canvas
from dllm.decoding.transfer import put
from dllm.decoding.window import Window

Places = tuple[NDArray[np.int64], NDArray[np.int64]]


@dataclass(frozen=True)
class Question:
    """What is asked of one forward, about A sequences.

    Attributes:
        canvas: the canvas as it is. Never write to it.
        slots: (A,) slot of each sequence's row, ascending; a row with several drafts comes as often.
        draft: (A,) number of the sequence among the drafts of its row. The first of them is the canvas as it is; what a
            cache remembers of a row between forwards changes with these alone.
        tokens: of the sequences.
        index: (N,) flat indices of what is asked, into the tensor that asks.
        places: what is asked, as (N,) sequences and (N,) columns whose hidden states are needed for it.
        horizon: (A,) column from which on nothing is attended to.
        joined: sequences of a row that are computed as one.
    """

    canvas: Canvas
    slots: NDArray[np.int64]
    draft: NDArray[np.int64]
    tokens: Int[Tensor, "A L"]
    index: NDArray[np.int64]
    places: Places
    horizon: NDArray[np.int64]
    joined: int = 1

    @cached_property
    def rows(self) -> NDArray[np.int64]:
        """(A,) number of the row of each sequence."""
        return np.asarray(self.canvas.rows[self.slots])

    @property
    def first(self) -> NDArray[np.bool_]:
        """(A,) True where a sequence is the canvas as it is."""
        return np.asarray(self.draft == 0)

    @cached_property
    def drafted(self) -> NDArray[np.bool_]:
        """(A, L) where a sequence is not the canvas as it is; reads the device where there are drafts."""
        if not self.draft.any():
            return np.zeros((len(self.slots), self.canvas.length), dtype=bool)
        return np.asarray(self.tokens.cpu().numpy() != self.canvas.host[self.rows])

    @cached_property
    def read(self) -> NDArray[np.bool_]:
        """(A, L) columns whose hidden states the forward must produce."""
        read = np.zeros((len(self.slots), self.canvas.length), dtype=bool)
        read[self.places] = True
        return read

    @cached_property
    def visible(self) -> NDArray[np.bool_]:
        """(A, L) columns that are attended to, by way of others too, by what is asked."""
        visible = self.canvas.visible(self.rows)
        return visible & ~self.since(self.horizon)

    def some(self, sequences: NDArray[np.int64]) -> Question:
        """The same about some of the sequences, in ascending order."""
        if len(sequences) == len(self.slots):
            return self
        of, column = self.places
        mine = np.isin(of, sequences)
        return replace(
            self,
            slots=self.slots[sequences],
            draft=self.draft[sequences],
            tokens=self.tokens[put(self.tokens.device, sequences)],
            places=(np.searchsorted(sequences, of[mine]), column[mine]),
            horizon=self.horizon[sequences],
        )

    def and_about(self, read: NDArray[np.bool_]) -> Question:
        """The same, and after it the hidden states of some columns, (A, L)."""
        (sequence, column), (other, where) = self.places, np.nonzero(read)
        return replace(self, places=(np.concatenate((sequence, other)), np.concatenate((column, where))))

    @property
    def block(self) -> NDArray[np.int64]:
        """(A,) number of the active block."""
        return self.canvas.block[self.rows]

    @property
    def low(self) -> NDArray[np.int64]:
        """(A,) first column of the active block."""
        return self.canvas.low[self.rows]

    @property
    def high(self) -> NDArray[np.int64]:
        """(A,) the column after the active block."""
        return np.asarray(np.minimum(self.low + self.canvas.block_length[self.rows], self.canvas.end[self.rows]))

    @property
    def masked(self) -> NDArray[np.bool_]:
        """(A, L) positions still to be decoded."""
        return (self.canvas.host[self.rows] == self.canvas.mask_token_id) & self.canvas.region[self.rows]

    def since(self, column: NDArray[np.int64]) -> NDArray[np.bool_]:
        """(A, L) the columns from one of each sequence on."""
        return np.arange(self.canvas.length) >= column[:, None]


def about_window(canvas: Canvas, window: Window, decided: bool, shift: int) -> Question:
    """What the host knows without asking: the masked positions of the window, or all of them.

    Args:
        canvas: the canvas.
        window: its active blocks.
        decided: ask about the decided positions as well.
        shift: the prediction for a column is read that much to its left.
    """
    columns, inside, masked = canvas.active
    grid, slots = inside if decided else masked, np.arange(len(columns))
    sequence, k = np.nonzero(grid)
    places = _read_at(canvas, slots, sequence, columns[sequence, k], shift)
    index, horizon = sequence * grid.shape[1] + k, _horizon(canvas, slots, places)
    return Question(canvas, slots, np.zeros_like(slots), window.tokens, index, places, horizon)


def about_drafts(
    canvas: Canvas,
    asked: Bool[Tensor, "*B K"],
    columns: Int[Tensor, "*C K"],
    tokens: Int[Tensor, "B D L"],
    joined: bool,
    shift: int,
) -> Question:
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
        flat_tokens = flat_tokens[put(tokens.device, slots * drafts + draft)]
    places = _read_at(canvas, slots, number[row, d], where[row, d, k], shift)
    horizon, together = _horizon(canvas, slots, places), drafts if joined else 1
    if joined:  # they are computed over the same columns
        horizon = np.repeat(horizon.reshape(-1, drafts).max(1), drafts)
    return Question(canvas, slots, draft, flat_tokens, np.flatnonzero(grid), places, horizon, together)


def _read_at(
    canvas: Canvas, slots: NDArray[np.int64], sequence: NDArray[np.int64], column: NDArray[np.int64], shift: int
) -> Places:
    """Where the predictions for some columns are read: `shift` to their left, but never in the padding."""
    return sequence, np.maximum(column - shift, canvas.padding[canvas.rows[slots[sequence]]])


def _horizon(canvas: Canvas, slots: NDArray[np.int64], places: Places) -> NDArray[np.int64]:
    """(A,) the column from which on nothing is attended to by what is read of each sequence."""
    sequence, column = places
    last = np.zeros(len(slots), dtype=np.int64)
    np.maximum.at(last, sequence, column)
    return canvas.horizon(canvas.rows[slots], last)
