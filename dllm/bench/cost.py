"""What the steps of a setting took, summed up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median, quantiles


@dataclass(frozen=True)
class Timing:
    """One denoising step.

    Attributes:
        seconds: of the whole step: the plan, the forward, the choice, the edit.
        bare: of the backbone alone, called as often and for as many columns and projected positions, while all
            columns are attended to; None where nobody asked.
        columns: computed, over all rows.
        committed: tokens, over all rows.
        refreshed: whether some row was computed anew.
        store_bytes: of the keys and values kept.
    """

    seconds: float
    bare: float | None
    columns: int
    committed: int
    refreshed: bool = False
    store_bytes: int = 0


@dataclass(frozen=True)
class Cost:
    """What the steps of one setting cost.

    Attributes:
        steps: how many a repeat had, which is the forwards of a row.
        columns: mean columns computed per step and row.
        step: median seconds.
        tokens_per_second: committed over the sum of the steps; the median of the repeats.
        to_bare: median of step over bare, of the steps that reuse something; of all where none does. None without bare.
        spread: of `to_bare`, the difference of its quartiles.
        refresh_to_bare: median of step over bare, of the steps that compute some row anew beside others; None
            without any.
        store_bytes: of the keys and values kept.
        peak: bytes at the peak beyond what there was before, weights and all; None where not measured.
        shares: of the time of a step, by section.
        tokens: what was decoded, where it was decoded to the end.
    """

    steps: int
    columns: float
    step: float
    tokens_per_second: float
    to_bare: float | None
    spread: float | None
    refresh_to_bare: float | None
    store_bytes: int
    peak: int | None = None
    shares: Mapping[str, float] | None = None
    tokens: Sequence[Sequence[int]] | None = None


def cost_of(repeats: Sequence[Sequence[Timing]], tokens: Sequence[Sequence[int]] | None, batch: int) -> Cost:
    """Sum up the steps of each repeat of a setting, of `batch` rows."""
    timings = [each for repeat in repeats for each in repeat]
    reusing = [each for each in timings if not each.refreshed] or timings
    ratios = [each.seconds / each.bare for each in reusing if each.bare]
    refreshing = [each.seconds / each.bare for each in timings if each.refreshed and each.bare]
    quartiles = quantiles(ratios, n=4) if len(ratios) > 1 else [*ratios * 3]
    return Cost(
        steps=len(repeats[0]),
        columns=sum(each.columns for each in timings) / len(timings) / batch,
        step=median(each.seconds for each in timings),
        tokens_per_second=median(
            sum(each.committed for each in repeat) / sum(each.seconds for each in repeat) for repeat in repeats
        ),
        to_bare=median(ratios) if ratios else None,
        spread=quartiles[2] - quartiles[0] if ratios else None,
        refresh_to_bare=median(refreshing) if refreshing and len(reusing) < len(timings) else None,
        store_bytes=timings[0].store_bytes,
        tokens=tokens,
    )
