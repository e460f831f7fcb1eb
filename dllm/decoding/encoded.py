"""Forwards of models that encode finished text, and denoise an open block of uniformly random tokens.

The canvas has [MASK] at undecided positions for every model; such a model is shown random tokens there, redrawn for
each forward from the row's generator, unless the policy gives other tokens. Each forward of a block is conditioned on
the last prediction for it (`dllm/models/encoder.py`), which is kept here, row by row, until the row leaves the block.
Where predictions for earlier blocks are requested, these are part of the open one.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from dllm.cache.selection import Selection, Store
from dllm.decoding.canvas import Canvas
from dllm.decoding.question import Question
from dllm.decoding.transfer import put, send
from dllm.models.base import MaskedDiffusionModel
from dllm.models.encoder import Encoder, Finished, Open


class Encoded:
    """Computes the predictions that are requested from such a model.

    Args:
        backbone: the model.
        canvas: its input.
    """

    def __init__(self, backbone: MaskedDiffusionModel, canvas: Canvas) -> None:
        assert isinstance(backbone, Encoder)
        self._encoder: Encoder = backbone
        self._vocabulary, self._width, self._dtype = backbone.mask_token_id, backbone.embedding_size, backbone.dtype
        self._canvas = canvas
        # By row, with the column of the first; and those of the current forward.
        self._signals: dict[int, tuple[int, Float[Tensor, "K d"]]] = {}
        self._given: dict[int, tuple[int, Float[Tensor, "K d"]]] = {}
        self._temperature: Float[Tensor, " B"] | None = None

    def begin(self) -> None:
        """Forget the predictions of rows that have left the block they were made for."""
        canvas = self._canvas
        stay = set(canvas.rows[canvas.step[canvas.rows] > 0].tolist())
        self._signals = {row: signal for row, signal in self._signals.items() if row in stay}

    def shown(self, question: Question, temperature: Float[Tensor, " B"] | None) -> Question:
        """The question with random tokens at masks, for a forward whose logits are divided by the temperature."""
        self._given, self._temperature = dict(self._signals), temperature
        canvas, tokens = self._canvas, question.tokens
        end = np.full(len(canvas.rows), 0)
        np.maximum.at(end, question.slots, question.horizon)
        noise = torch.zeros((len(canvas.rows), canvas.length), dtype=tokens.dtype, device=tokens.device)
        for slot in np.unique(question.slots).tolist():  # a row's draws must not depend on the others
            row = int(canvas.rows[slot])
            low, source = int(canvas.low[row]), canvas.generators[row]
            size = (int(end[slot]) - low,)
            drawn = torch.randint(self._vocabulary, size, generator=source, device=tokens.device)
            noise[slot, low : low + size[0]] = drawn
        masked = tokens == canvas.mask_token_id
        return replace(question, tokens=noise[put(tokens.device, question.slots)].where(masked, tokens))

    def logits(self, question: Question, compute: NDArray[np.bool_], store: Store | None) -> Float[Tensor, "N V"]:
        """Logits of the requested positions; finished text is encoded where it is to be computed.

        Args:
            question: the requested predictions.
            compute: (A, L) columns to compute; the open block always is.
            store: keys and values of the other finished columns; None if all are computed.
        """
        canvas, rows, device = self._canvas, question.rows, question.tokens.device
        sequence, column = question.places
        low, visible = canvas.low[rows], question.visible
        np.minimum.at(low, sequence, column)
        finished = np.arange(canvas.length) < low[:, None]
        context = self._context(question, visible & finished, compute & finished, store)
        widths = (visible & ~finished).sum(1)
        offset = np.arange(int(widths.max()))
        columns = np.minimum(low[:, None] + offset, canvas.length - 1)
        place = sequence * len(offset) + column - low[sequence]
        at, first, real, select = send(device, columns, canvas.padding[rows], offset < widths[:, None], place)
        block = Open(
            question.tokens.gather(1, at), at - first[:, None], real.bool(), self._signal(rows, low, len(offset))
        )
        logits = self._encoder.decode(context, block)
        if self._temperature is not None:
            logits = logits / self._temperature[put(device, question.slots)][:, None, None]
        for entry in np.flatnonzero(question.first).tolist():
            own = logits[entry : entry + 1, : int(widths[entry])]
            self._signals[int(rows[entry])] = int(low[entry]), self._encoder.signal(own)[0]
        return logits.flatten(0, 1)[select]

    def _signal(self, rows: NDArray[np.int64], low: NDArray[np.int64], width: int) -> Float[Tensor, "A K d"]:
        signal = torch.zeros((len(rows), width, self._width), dtype=self._dtype, device=self._canvas.device)
        for entry, row in enumerate(rows.tolist()):
            first, given = self._given.get(row, (0, signal[entry, :0]))
            first -= int(low[entry])
            low_k, high_k = max(first, 0), min(first + len(given), width)
            if low_k < high_k:
                signal[entry, low_k:high_k] = given[low_k - first : high_k - first]
        return signal

    def _context(
        self, question: Question, visible: NDArray[np.bool_], compute: NDArray[np.bool_], store: Store | None
    ) -> Finished:
        """The finished text, of which some columns are encoded now."""
        canvas, rows, device = self._canvas, question.rows, question.tokens.device
        counts = compute.sum(1)
        sequence, column = np.nonzero(compute)
        # What only fills the forward is written after the canvas.
        host = np.full((len(rows), int(counts.max())), canvas.length)
        host[sequence, np.arange(len(column)) - np.repeat(counts.cumsum() - counts, counts)] = column
        columns, first, real = send(device, host, canvas.padding[rows], host < canvas.length)
        tokens = question.tokens.gather(1, columns.clamp(max=canvas.length - 1))
        positions = (columns - first[:, None]).masked_fill(~real.bool(), 0)
        if store is None or not visible.any():
            return Finished(tokens, positions, real.bool(), positions, real.bool(), None)
        if not host.shape[1]:
            host = np.full((len(rows), 1), canvas.length)
            columns = put(device, host)
        seen = np.flatnonzero(visible.any(0))
        span = int(seen[0]), int(seen[-1]) + 1
        bound = store.bind(Selection(rows, question.slots, question.first, host, columns, span))
        keys = torch.arange(*span, device=device) - first[:, None]
        return Finished(tokens, positions, real.bool(), keys, put(device, visible[:, slice(*span)]), bound)
