"""The predictions that a sampler requests from one forward, on the host."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Bool, Int
from numpy.typing import NDArray
from torch import Tensor

from dllm.decoding.branches import Attention
from dllm.decoding.canvas import Canvas
from dllm.decoding.transfer import put
from dllm.decoding.window import Window

Places = tuple[NDArray[np.int64], NDArray[np.int64]]


@dataclass(frozen=True)
class Question:
    """The predictions requested from one forward, over A sequences.

    Attributes:
        canvas: the current canvas. Never write to it.
        slots: (A,) slot of each sequence's row, ascending; repeated for the drafts of a row.
        draft: (A,) index of the sequence among the drafts of its row. The first one is the current canvas; only
            these update the state of a cache.
        tokens: of the sequences.
        index: (N,) flat indices of the requested positions, into the `asked` tensor.
        places: the requested hidden states, as (N,) sequences and (N,) columns.
        horizon: (A,) first column that no requested position attends to, directly or through others.
        joined: sequences of a row that are computed as one.
        attention: how these attend to each other.
    """

    canvas: Canvas
    slots: NDArray[np.int64]
    draft: NDArray[np.int64]
    tokens: Int[Tensor, "A L"]
    index: NDArray[np.int64]
    places: Places
    horizon: NDArray[np.int64]
    joined: int = 1
    attention: Attention = "apart"

    @cached_property
    def rows(self) -> NDArray[np.int64]:
        """(A,) number of the row of each sequence."""
        return np.asarray(self.canvas.rows[self.slots])

    @property
    def first(self) -> NDArray[np.bool_]:
        """(A,) True where a sequence is the current canvas."""
        return np.asarray(self.draft == 0)

    @cached_property
    def drafted(self) -> NDArray[np.bool_]:
        """(A, L) where a sequence differs from the current canvas; synchronizes if there are drafts.

        Nothing of the canvas attends to shadows, so they count as equal to it.
        """
        if self.attention == "shadow" or not self.draft.any():
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
        """(A, L) columns that requested positions attend to, directly or through others."""
        visible = self.canvas.visible(self.rows)
        return visible & ~self.since(self.horizon)

    def joint(self, shift: int) -> NDArray[np.int64] | None:
        """(A, 2) the columns, from and up to, that attend to each other whatever the model's pattern; None for none.

        Args:
            shift: the prediction for column i is read at column i - shift.
        """
        if self.attention != "joint":
            return None
        low = np.full(len(self.slots), self.canvas.length)
        high = np.zeros_like(low)
        np.minimum.at(low, self.places[0], self.places[1] + shift)
        np.maximum.at(high, self.places[0], self.places[1] + 1)
        return np.stack((low, high), axis=1)

    def together(self, compute: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """(A, L) what is computed of sequences that are joined, where these columns of each are to be."""
        if self.joined == 1:
            return compute
        if self.attention == "tree":  # each draft the same columns
            every = rearrange(compute, "(a d) l -> a d l", d=self.joined).any(1)
            return np.repeat(every, self.joined, axis=0)
        canvas = compute[self.first]
        least = canvas & (canvas.cumsum(1) == 1)  # a draft without requested positions computes one column
        shadows = np.where(self.read.any(1, keepdims=True), self.read, np.repeat(least, self.joined, axis=0))
        return np.where(self.first[:, None], compute, shadows)

    def count(self, compute: NDArray[np.bool_]) -> NDArray[np.int64]:
        """(A,) columns of `together`, without the one that fills a draft of shadows without requested positions."""
        count = compute.sum(1)
        if self.joined == 1 or self.attention == "tree":
            return np.asarray(count)
        return np.asarray(count * (self.first | self.read.any(1)))

    def some(self, sequences: NDArray[np.int64]) -> Question:
        """The same for some of the sequences, in ascending order."""
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
        """The same, with the hidden states of some columns, (A, L), appended."""
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
        return np.asarray(np.minimum(self.canvas.high, self.canvas.end)[self.rows])

    @property
    def masked(self) -> NDArray[np.bool_]:
        """(A, L) masked positions."""
        return (self.canvas.host[self.rows] == self.canvas.mask_token_id) & self.canvas.region[self.rows]

    def since(self, column: NDArray[np.int64]) -> NDArray[np.bool_]:
        """(A, L) the columns from a given column of each sequence on."""
        return np.arange(self.canvas.length) >= column[:, None]


def about_window(canvas: Canvas, window: Window, decided: bool, ahead: bool, shift: int) -> Question:
    """A request for the masked positions of the window, or all of them, which the host knows without synchronization.

    Args:
        canvas: the canvas.
        window: its active blocks.
        decided: also request predictions for unmasked positions.
        ahead: also request predictions for later blocks.
        shift: the prediction for column i is read at column i - shift.
    """
    columns, inside, masked = canvas.active
    if ahead:
        inside = canvas.region[canvas.rows]
        masked = inside & (canvas.host[canvas.rows] == canvas.mask_token_id)
        columns = np.broadcast_to(np.arange(canvas.length), inside.shape)
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
    attention: Attention,
    shift: int,
) -> Question:
    """A request with positions or tokens of the policy's own, which are on the device."""
    rows, drafts = tokens.shape[:2]
    flat = torch.cat((asked.flatten(), columns.flatten())).cpu().numpy()  # synchronizes
    grid = flat[: asked.numel()].astype(bool).reshape(rows, drafts, -1)
    where = np.broadcast_to(flat[asked.numel() :].reshape(rows, -1, grid.shape[2]), grid.shape)
    return _about_grid(canvas, grid, where, tokens, attention, shift)


def about_shadows(canvas: Canvas, tokens: Int[Tensor, "B D L"], shift: int) -> Question:
    """A request for the masked positions of the window and, in rows with decided ones, for shadows of all of them.

    Args:
        canvas: the canvas.
        tokens: the canvases, and the same with masks at the positions of the window.
        shift: the prediction for column i is read at column i - shift.
    """
    columns, inside, masked = canvas.active
    decided = (inside & ~masked).any(1, keepdims=True)
    grid = np.stack((masked, inside & decided), axis=1)
    return _about_grid(canvas, grid, np.stack((columns, columns), axis=1), tokens, "shadow", shift)


def _about_grid(
    canvas: Canvas,
    grid: NDArray[np.bool_],
    where: NDArray[np.int64],
    tokens: Int[Tensor, "B D L"],
    attention: Attention,
    shift: int,
) -> Question:
    """A request for positions known to the host: (B, D, K) of them, and their columns."""
    drafts = tokens.shape[1]
    wanted: NDArray[np.bool_] = np.any(grid, axis=2)
    joined = attention in ("tree", "shadow") and bool(wanted[:, 1:].any())
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
    return Question(canvas, slots, draft, flat_tokens, np.flatnonzero(grid), places, horizon, together, attention)


def _read_at(
    canvas: Canvas, slots: NDArray[np.int64], sequence: NDArray[np.int64], column: NDArray[np.int64], shift: int
) -> Places:
    """The columns at which predictions are read: `shift` to the left, but never in the padding."""
    return sequence, np.maximum(column - shift, canvas.padding[canvas.rows[slots[sequence]]])


def _horizon(canvas: Canvas, slots: NDArray[np.int64], places: Places) -> NDArray[np.int64]:
    """(A,) the column from which on nothing is attended to by what is read of each sequence."""
    sequence, column = places
    last = canvas.padding[canvas.rows[slots]]
    np.maximum.at(last, sequence, column)
    return canvas.horizon(canvas.rows[slots], last)
