"""What one denoising step did: the only thing that recorders, displays and traces look at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from dllm.canvas import Canvas, Change, Edit
from dllm.denoiser import Denoiser
from dllm.drift import Measurement
from dllm.prediction import Prediction


@dataclass(frozen=True)
class Step:
    """One denoising step, for the B rows that took part.

    Attributes:
        change: rows, and what was committed, revoked and filled.
        edit: what the sampler asked for.
        forwards: (B,) denoiser forwards of each row.
        rehearsal_seconds: wall time of what the sampler had decoded beforehand, over all steps so far.
        drift: how far the cache was off in forwards of this step that were compared with exact ones.
        canvas: the canvas after the step; it moves on with the run.
        denoiser: whose latest prediction is still provisional.
    """

    change: Change
    edit: Edit
    forwards: NDArray[np.int64]
    rehearsal_seconds: float
    drift: tuple[Measurement, ...]
    canvas: Canvas
    denoiser: Denoiser

    @property
    def finished(self) -> int:
        """Number of rows that this step finished."""
        return len(self.change.finished)

    @cached_property
    def provisional(self) -> NDArray[np.int64]:
        """(B, L) tokens predicted in this step where nothing is committed yet; [MASK] elsewhere."""
        still = self.canvas.host[self.change.rows] == self.canvas.mask_token_id
        return np.where(still, self.predicted, self.canvas.mask_token_id)

    @cached_property
    def predicted(self) -> NDArray[np.int64]:
        """(B, L) tokens of the latest prediction; [MASK] where nothing was asked."""
        return self._spread(lambda prediction: prediction.tokens, self.canvas.mask_token_id)

    @cached_property
    def confidence(self) -> NDArray[np.float64]:
        """(B, L) probability of the predicted tokens; NaN where nothing was asked."""
        return self._spread(lambda prediction: prediction.confidence, np.nan)

    @cached_property
    def drafted(self) -> NDArray[np.int64]:
        """(B, L) tokens the sampler had judged as drafts; [MASK] elsewhere."""
        drafted = np.full((len(self.change.rows), self.canvas.length), self.canvas.mask_token_id)
        if self.edit.drafted is not None:
            np.put_along_axis(drafted, self.edit.columns.cpu().numpy(), self.edit.drafted.cpu().numpy(), 1)
        return drafted

    @cached_property
    def recomputed(self) -> NDArray[np.bool_]:
        """(B, L) columns that some forward of this step computed; the others were read from the cache."""
        computed = np.zeros(self.canvas.host.shape, dtype=bool)
        for rows, columns in self.denoiser.looked:
            np.logical_or.at(computed, rows, columns)
        return computed[self.change.rows]

    def _spread(self, values: Callable[[Prediction], Tensor], fill: float) -> NDArray[Any]:
        """Values of the latest prediction at the columns it is about."""
        out = np.full((len(self.change.rows), self.canvas.length), fill)
        if self.denoiser.last is not None:
            prediction, columns = self.denoiser.last
            entry, k = np.nonzero(prediction.asked.cpu().numpy())
            out[entry, columns.cpu().numpy()[entry, k]] = values(prediction).cpu().numpy()[entry, k]
        return out
