"""Statistics of the requests being decoded."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from dllm.decoding.canvas import Canvas
from dllm.decoding.denoiser import Account
from dllm.decoding.ending import cut
from dllm.decoding.step import Answer
from dllm.decoding.window import Change, Edit


class Recorder:
    """Counts the cost of each row, and the forward that committed each position.

    Args:
        canvas: the rows.
        tokenizer: decodes the answers.

    Attributes:
        nfe: (slots,) denoiser forwards of each row.
    """

    def __init__(self, canvas: Canvas, tokenizer: PreTrainedTokenizerBase | None) -> None:
        self._canvas, self._tokenizer = canvas, tokenizer
        self.nfe, self._guide_nfe, self._positions, self._full, self._refreshes, self._reused = np.zeros(
            (6, canvas.slots), dtype=np.int64
        )
        self._commit_step = np.full((canvas.slots, canvas.length), -1, dtype=np.int64)
        self._seconds, self._guide_seconds, self._started = np.zeros((3, canvas.slots))
        self._elapsed = 0.0

    def enter(self, rows: NDArray[np.int64]) -> None:
        """Reset rows."""
        for counts in (self.nfe, self._guide_nfe, self._positions, self._full, self._refreshes, self._reused):
            counts[rows] = 0
        self._commit_step[rows] = -1
        self._seconds[rows], self._guide_seconds[rows], self._started[rows] = 0, 0, self._elapsed

    def count(self, change: Change, edit: Edit, account: Account) -> None:
        """Count one step."""
        rows = change.rows
        self.nfe[rows] += account.forwards
        self._positions[rows] += account.computed
        canvas = self._canvas
        later = canvas.full[rows] - canvas.end[rows] + change.grown  # what the canvas could still grow by
        self._full[rows] += account.forwards * (canvas.length - canvas.padding[rows] - later)
        self._refreshes[rows] += account.refreshes
        self._reused[rows] += account.reused
        if edit.guide_forwards is not None:
            self._guide_nfe[rows] += edit.guide_forwards
        for unset in (change.revoked, change.filled):
            entry, column = np.nonzero(unset)
            self._commit_step[rows[entry], column] = -1
        entry, column = np.nonzero(change.committed)
        self._commit_step[rows[entry], column] = self.nfe[rows[entry]] - 1

    def charge(self, rows: NDArray[np.int64], seconds: float, guide_seconds: float) -> None:
        """Divide the time of one step among its rows."""
        self._elapsed += seconds
        self._seconds[rows] += seconds / len(rows)
        self._guide_seconds[rows] += guide_seconds / len(rows)

    def answer(self, row: int, index: int) -> Answer:
        """The answer of a finished row."""
        canvas, request = self._canvas, self._canvas.requests[row]
        assert request is not None
        error = canvas.errors.get(row)
        first = canvas.padding[row] + request.answer_start
        completion = canvas.host[row, first:]
        text, tokens = None, int(canvas.region[row].sum())
        try:
            if request.infill:
                text, _ = cut(self._tokenizer, completion)
            else:
                text, tokens = cut(self._tokenizer, completion, request.stops, request.eos_token_ids)
        except ValueError as unreadable:
            error = error or str(unreadable)
        return Answer(
            index=index,
            text=text if error is None else None,
            completion=completion.tolist(),
            tokens=tokens if error is None else 0,
            nfe=int(self.nfe[row]),
            guide_nfe=int(self._guide_nfe[row]),
            error=error,
            commit_step=self._commit_step[row, first:].tolist(),
            seconds=float(self._seconds[row]),
            latency=self._elapsed - float(self._started[row]),
            guide_seconds=float(self._guide_seconds[row]),
            positions=int(self._positions[row]),
            canvas=len(request.tokens),
            full=int(self._full[row]),
            refreshes=int(self._refreshes[row]),
            reused=int(self._reused[row]),
        )
