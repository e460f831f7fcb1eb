"""d2Cache: computes the masks about to be decoded and the most attended tokens (arXiv 2509.23094, section 4).

Rule:

    masks    the `current_k` masked positions j with the highest certainty prior
                 confidence_j * density_j,   density_j = sum_(known i) exp(-(i - j)^2 / (2 sigma^2)) / sum_(all i) ...
             those of the active block first, then those up to the end of the block that contains the
             current_k-th mask; tokens to the left of the generated region count as known, those to the
             right if its last token is
    new      masks at the last forward that have been decoded since
    attended of the others the most attended ones, which together have a share `rollout_p` of the attention
             rollout: column sums of the product over layers of (A + I) / 2, where A are the attention
             weights averaged over the heads, and the identity where a position was not computed

These are computed; the first forward computes every position. I is the identity matrix. A gap between two selected
positions that are at most `inflate_w` apart is computed as well. Families with shifted logits compute, instead of a
mask, the position at which its prediction is read.

Differences from the reference: confidences are updated by every forward that computes them, as in the paper (the
reference keeps the first ones); rows of a batch are not padded to a common number. It needs the confidences of masks
outside the block, hence their logits; and the attention weights, hence eager attention.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from dllm.cache.base import Flags, Metered, Plan, Probe, Question
from dllm.cache.selection import Selection
from dllm.cache.store import KeyValues, PerRow, Reuse, moved
from dllm.checks import number
from dllm.decoding.setup import Setup
from dllm.models.transformer import KVStore


@dataclass(frozen=True)
class D2Cache(Metered):
    """Compute the masks about to be decoded and the most attended tokens.

    Args:
        current_k: masked positions selected per forward, those of the active block first; requested positions
            are always computed.
        sigma: standard deviation of the Gaussian of the certainty density, in positions.
        rollout_p: share of the attention rollout whose positions are computed.
        inflate_w: maximum distance of two selected positions between which all are computed; 0 for none.

    Raises:
        ValueError: an option out of range.
    """

    current_k: int = 32
    sigma: float = 10.0
    rollout_p: float = 0.1
    inflate_w: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        number("current_k", self.current_k, "a whole number of at least 1", low=1, whole=True)
        number("sigma", self.sigma, "a number from 0.1 to 1000", low=0.1, high=1000)
        number("rollout_p", self.rollout_p, "a number from 0 to 1", low=0, high=1)
        number("inflate_w", self.inflate_w, "a whole number of at least 0", low=0, whole=True)

    @property
    def refuses(self) -> Mapping[str, str]:
        """Requirements of samplers that this cache does not meet, with the reason."""
        return {
            **super().refuses,
            "graphs": "it reads the attention weights of other positions in each forward",
            "shadows": "it accumulates the attention that a position receives",
        }

    def start(self, setup: Setup) -> Reuse:
        """Allocate keys and values for every position."""
        store = Watched(setup)
        return Reuse(setup, _ByCertaintyAndRollout(self, setup, store), store)


class _ByCertaintyAndRollout(PerRow):
    def __init__(self, options: D2Cache, setup: Setup, store: Watched) -> None:
        super().__init__(setup)
        self.options, self.store = options, store
        self.masked = self.per_row(False, setup.length, dtype=bool)
        self.confidence = self.per_row(0, setup.length, dtype=float)

    def plan(self, question: Question, due: Flags, stale: Flags) -> Plan:
        canvas, rows, masked = question.canvas, question.rows, question.masked
        # The column at which the prediction for each column is read.
        at = np.maximum(np.arange(canvas.length) - self.setup.logits_shift, canvas.padding[rows, None])
        compute = moved(self._certain(question, masked), at) | (self.masked[rows] & ~masked)
        compute |= question.drafted
        compute |= nucleus(self.store.influence[rows], self.options.rollout_p, ~compute & question.visible)
        compute = inflate(compute, self.options.inflate_w) | question.read
        probe = moved(masked, at) & (compute | due[:, None]) & question.visible
        self.masked[rows[question.first]] = masked[question.first]
        self.store.visible[rows] = question.visible
        return Plan(compute, probe=Probe(probe, partial(self._learn, question, at)))

    def _certain(self, question: Question, masked: Flags) -> Flags:
        """The masked positions with the highest certainty prior."""
        canvas, rows, k = question.canvas, question.rows, self.options.current_k
        start, length = canvas.origin[rows], canvas.block_length[rows]
        enough = masked.cumsum(1) >= k
        last = np.where(enough.any(1), enough.argmax(1), canvas.end[rows] - 1)
        end = start + ((last - start) // length + 1) * length
        score = self.confidence[rows] * density(~masked, canvas.end[rows], self.options.sigma)
        score += np.where(question.since(question.low) & ~question.since(question.high), score.max(1)[:, None], 0)
        score[~masked | question.since(end)] = -1
        best = np.argsort(-score, axis=1, kind="stable")[:, :k]
        chosen = np.zeros_like(masked)
        np.put_along_axis(chosen, best, True, axis=1)
        return chosen & (score >= 0)

    def _learn(self, question: Question, at: NDArray[np.int64], probe: Flags, confidence: Tensor) -> None:
        """Update the confidences that a forward computed on the current canvas (not on drafts)."""
        # Synchronizes: the next plan depends on it.
        first, fresh = question.first, confidence.double().cpu().numpy()
        rows, at = question.rows[first], at[first]
        known, fresh = (np.take_along_axis(each[first], at, axis=1) for each in (probe, fresh))
        self.confidence[rows] = np.where(known, fresh, self.confidence[rows])


def density(known: Flags, end: NDArray[np.int64], sigma: float) -> NDArray[np.float64]:
    """Share of known tokens around each column, as a Gaussian-weighted mean.

    Args:
        known: (A, L) decoded, given or padding; everything to the left of the canvas counts as known.
        end: (A,) the column after the last generated one; columns from there on count like that one.
        sigma: of the Gaussian, in positions.
    """
    reach = int(np.ceil(6 * sigma))
    kernel = np.exp(-(np.arange(-reach, reach + 1) ** 2) / (2 * sigma**2))
    last = np.take_along_axis(known, end[:, None] - 1, axis=1)
    known = np.where(np.arange(known.shape[1]) >= end[:, None], last, known)
    around = np.concatenate((np.ones((len(known), reach)), known, np.repeat(last, reach, axis=1)), axis=1)
    # A loop over sequences on the host, over a few hundred numbers each.
    return np.stack([np.convolve(row, kernel, mode="valid") for row in around]) / kernel.sum()


def nucleus(scores: NDArray[np.float64], share: float, among: Flags) -> Flags:
    """The highest scores of each row whose sum is at most a share of the total, and always the highest.

    Args:
        scores: (A, L), not negative.
        share: of their sum.
        among: (A, L) columns to select from.
    """
    scores = np.where(among, scores, 0.0)
    order = np.argsort(-scores, axis=1, kind="stable")
    ranked = np.take_along_axis(scores, order, axis=1)
    summed = ranked.cumsum(1)
    taken = summed <= share * summed[:, -1:]  # all of them at a share of 1, whatever the rounding
    taken[:, 0] = True
    chosen = np.zeros_like(among)
    np.put_along_axis(chosen, order, taken, axis=1)
    return chosen & among


def inflate(chosen: Flags, width: int) -> Flags:
    """Fill the gaps between selected columns that are at most `width` apart."""
    width = min(width, chosen.shape[1])
    column, far = np.arange(chosen.shape[1]), chosen.shape[1] + width
    before = np.maximum.accumulate(np.where(chosen, column, -far), axis=1)
    after = np.minimum.accumulate(np.where(chosen, column, 2 * far)[:, ::-1], axis=1)[:, ::-1]
    return np.asarray(chosen | (after - before <= width))


class Watched(KeyValues):
    """Keys and values, and the attention rollout of each column.

    A forward also holds the attention weights of all layers until its end: layers * A * C * L numbers.

    Attributes:
        influence: (rows, L) column sums of the attention rollout of the last forward.
        visible: (rows, L) columns that are attended to.
    """

    joinable = False
    spare = 0

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.layers = setup.kv_shape[0]
        self.influence = np.zeros((setup.slots, setup.length))
        self.visible = np.ones((setup.slots, setup.length), dtype=bool)

    def bind(self, selection: Selection) -> KVStore:
        """Access for a forward that records its attention weights."""
        return _Watching(self, super().bind(selection), selection)


class _Watching:
    def __init__(self, store: Watched, inner: KVStore, selection: Selection) -> None:
        self.store, self.inner, self.selection = store, inner, selection
        self.weights: list[Tensor] = []

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write to and read from the store."""
        return self.inner.update(layer, keys, values)

    def attended(self, layer: int, weights: Float[Tensor, "B C S"]) -> None:
        """Keep the weights; after the last layer, compute the rollout."""
        self.weights.append(self.store.all_heads(weights[:, None], 1).mean(1))
        if layer + 1 < self.store.layers:
            return
        rows, columns, host = self.selection.rows, self.selection.columns, self.selection.host
        # Neither padding nor the repeated columns of a short sequence are queries.
        own = self.store.visible[rows[:, None], host] & self.selection.own
        queries = torch.as_tensor(own, device=columns.device)
        low, high = self.selection.span
        columns = columns - low
        influence = torch.as_tensor(self.store.visible[rows, low:high], device=weights.device).to(weights.dtype)
        # From the last layer to the first: 1^T R_n ... R_1, with R = (A + I) / 2 in the rows that were computed.
        for each in reversed(self.weights):
            half = (influence.gather(1, columns) / 2).masked_fill(~queries, 0)
            influence = influence.scatter_add(1, columns, -half) + (half[:, None] @ each)[:, 0]
        # Synchronizes: the next plan depends on it.
        first = self.selection.first
        self.store.influence[rows[first]] = 0
        self.store.influence[rows[first], low:high] = influence.double().cpu().numpy()[first]
