"""The approximation error of a cache: some forwards of a row are repeated without it and compared."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from dllm.cache.base import Plan, Question
from dllm.cache.selection import Store
from dllm.decoding.layout import span
from dllm.decoding.setup import undivided


@dataclass(frozen=True)
class Measurement:
    """Approximation error of one forward of M requests.

    Attributes:
        ids: (M,) the requests.
        kv_error: (M,) Frobenius norm of the error of keys and values, relative to that of the exact ones, over all
            layers and all columns that are attended to.
        kl: (M,) KL divergence of the cached predictions from the exact ones, in nats, summed over the requested
            positions.
        flips: (M,) requested positions whose most probable token differs.
        asked: (M,) requested positions.
    """

    ids: NDArray[np.int64]
    kv_error: NDArray[np.float64]
    kl: NDArray[np.float64]
    flips: NDArray[np.int64]
    asked: NDArray[np.int64]

    def where(self, keep: NDArray[np.bool_]) -> Measurement:
        """Those of some of the requests."""
        return Measurement(self.ids[keep], self.kv_error[keep], self.kl[keep], self.flips[keep], self.asked[keep])


@dataclass(frozen=True)
class Drift:
    """Approximation error of a cache over a run.

    Attributes:
        measured: measured forwards, over all rows, including those that recomputed every position (error 0).
        kv_error: mean relative error of keys and values.
        worst_kv_error: the maximum.
        kl: mean KL divergence of the cached prediction of a position from the exact one, in nats.
        flips: share of the positions whose most probable token differs.
        seconds: wall time of measuring; part of the run's only with `refresh_above`.
    """

    measured: int
    kv_error: float
    worst_kv_error: float
    kl: float
    flips: float
    seconds: float


def summarise(measurements: Sequence[Measurement], seconds: float) -> Drift | None:
    """The approximation error of a run; None where nothing was measured."""
    if not measurements:
        return None
    errors, kl, flips, asked = (
        np.concatenate([getattr(each, name) for each in measurements]) for name in ("kv_error", "kl", "flips", "asked")
    )
    positions = max(1, int(asked.sum()))
    return Drift(
        measured=len(errors),
        kv_error=float(errors.mean()),
        worst_kv_error=float(errors.max()),
        kl=float(kl.sum() / positions),
        flips=float(flips.sum() / positions),
        seconds=seconds,
    )


Exact = Callable[[NDArray[np.int64], "Comparison"], Float[Tensor, "N V"]]


class Meter:
    """Measures the approximation error of the rows of one engine.

    Args:
        slots: rows measured at a time.
        every: measure every this many forwards of a row; None for never.
        above: relative error of keys and values above which a row's exact predictions are used and its cache
            is refreshed; None for never.
        mask_token_id: never predicted.
        all_heads: as in `Setup`.

    Attributes:
        seconds: wall time spent so far.
    """

    def __init__(
        self,
        slots: int,
        every: int | None,
        above: float | None,
        mask_token_id: int,
        all_heads: Callable[[Tensor, int], Tensor] = undivided,
    ) -> None:
        self.every, self.above, self.mask_token_id, self.all_heads = every, above, mask_token_id, all_heads
        self.seconds = 0.0
        self._fresh: list[Measurement] = []
        self._forwards = np.zeros(slots, dtype=np.int64)

    def enter(self, rows: NDArray[np.int64]) -> None:
        """Begin rows."""
        self._forwards[rows] = 0

    def take(self, without: NDArray[np.int64], ids: NDArray[np.int64]) -> tuple[Measurement, ...]:
        """The measurements since the last call, without those of some rows.

        Args:
            without: numbers of these.
            ids: the request of each row.
        """
        fresh, self._fresh = self._fresh, []
        kept = (each.where(~np.isin(each.ids, without)) for each in fresh)
        return tuple(replace(each, ids=ids[each.ids]) for each in kept if each.ids.size)

    def due(self, question: Question) -> NDArray[np.int64]:
        """Sequences to measure: those of the current canvas (not drafts), of rows with a measurement due."""
        if self.every is None:
            return np.zeros(0, dtype=np.int64)
        rows = question.rows[question.first]
        self._forwards[rows] += 1
        return np.flatnonzero(question.first & (self._forwards[question.rows] % self.every == 0))

    def trust(self, question: Question, sequences: NDArray[np.int64]) -> None:
        """Record error 0 for sequences that recomputed every position."""
        if sequences.size:
            zero = np.zeros(len(sequences))
            asked = np.bincount(question.places[0], minlength=len(question.rows))[sequences]
            self._fresh.append(
                Measurement(question.rows[sequences], zero, zero.copy(), zero.astype(np.int64), asked.astype(np.int64))
            )

    def measure(
        self, question: Question, plan: Plan, logits: Float[Tensor, "N V"], exact: Exact
    ) -> tuple[Float[Tensor, "N V"], NDArray[np.int64]]:
        """Compare a forward with an exact one, where a measurement is due.

        Args:
            question: the requested predictions.
            plan: of the cache.
            logits: cached logits.
            exact: recomputes every position for some sequences, passing the keys and values of each layer to a
                comparison, and returns the logits of their requested positions.

        Returns:
            The logits to use, and the rows whose error is above the bound.
        """
        assert plan.store is not None
        sequences = self.due(question)
        whole = plan.whole(question.visible)[sequences]
        self.trust(question, sequences[whole])
        sequences = sequences[~whole]
        if not sequences.size:
            return logits, sequences
        if logits.is_cuda:
            torch.cuda.synchronize(logits.device)  # pending work is not part of measuring
        started = time.perf_counter()
        rows = question.rows[sequences]
        comparison = Comparison(plan.store, question.slots[sequences], question.visible[sequences], logits.device)
        true = exact(sequences, comparison)
        of = question.places[0]
        mine = np.flatnonzero(np.isin(of, sequences))
        at = torch.as_tensor(mine, device=logits.device)
        kl, flips = self._compare(true, logits[at])
        entry = np.searchsorted(sequences, of[mine])
        count = len(sequences)
        errors = comparison.errors(self.all_heads)
        asked = np.bincount(entry, minlength=count)
        measurement = Measurement(
            rows,
            errors,
            np.bincount(entry, weights=kl, minlength=count).astype(np.float64),
            np.bincount(entry, weights=flips, minlength=count).astype(np.int64),
            asked.astype(np.int64),
        )
        self._fresh.append(measurement)
        off = np.zeros(count, dtype=bool) if self.above is None else errors > self.above
        if off.any():
            use = torch.as_tensor(off[entry], device=logits.device)
            logits = logits.index_copy(0, at[use], true[use])
        self.seconds += time.perf_counter() - started
        return logits, rows[off]

    def _compare(self, exact: Float[Tensor, "N V"], cached: Float[Tensor, "N V"]) -> tuple[NDArray[np.float64], ...]:
        """KL divergence and whether the most probable token differs, of each position."""
        wide = torch.promote_types(exact.dtype, torch.float32)
        p, q = (logits.to(wide).log_softmax(-1) for logits in (exact, cached))
        kl = (p.exp() * (p - q)).masked_fill(p == -torch.inf, 0).sum(-1)
        mask = torch.tensor([self.mask_token_id], device=p.device)
        best = [each.index_fill(-1, mask, -torch.inf).argmax(-1) for each in (p, q)]
        return kl.double().cpu().numpy(), (best[0] != best[1]).double().cpu().numpy()


class Comparison:
    """A store that only compares: accumulates the error of cached keys and values against exact ones.

    Args:
        store: the cached ones.
        slots: (M,) of the computed rows.
        visible: (M, L) columns that are compared.
        device: of the keys and values.
    """

    def __init__(
        self, store: Store, slots: NDArray[np.int64], visible: NDArray[np.bool_], device: torch.device
    ) -> None:
        self.store, self.span = store, slice(*span(visible))
        self.slots: Int[Tensor, " M"] = torch.as_tensor(slots, device=device)
        self.visible: Bool[Tensor, "M 1 C 1"] = torch.as_tensor(visible[:, self.span], device=device)[:, None, :, None]
        self.off = self.size = torch.zeros(len(slots), dtype=torch.float64, device=device)

    def update(
        self, layer: int, keys: Float[Tensor, "M H C D"], values: Float[Tensor, "M H C D"]
    ) -> tuple[Float[Tensor, "M H C D"], Float[Tensor, "M H C D"]]:
        """Compare, and attend to the exact ones."""
        for exact, held in zip((keys, values), self.store.held(layer, self.slots), strict=True):
            held = held[:, :, self.span]
            self.off = self.off + ((held - exact) * self.visible).double().square().sum((1, 2, 3))
            self.size = self.size + (exact * self.visible).double().square().sum((1, 2, 3))
        return keys, values

    def errors(self, all_heads: Callable[[Tensor, int], Tensor] = undivided) -> NDArray[np.float64]:
        """(M,) relative errors over the layers seen, and the heads of all processes."""
        off, size = (all_heads(each[:, None], 1).sum(1) for each in (self.off, self.size))
        return np.asarray((off / size.clamp(min=1e-300)).sqrt().cpu().numpy())
