"""Statistics of the timed steps of a setting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median, quantiles


@dataclass(frozen=True)
class Timing:
    """One denoising step.

    Attributes:
        seconds: of the whole step: plan, forward, selection, edit.
        bare: of the backbone alone, with the same calls, columns and projected positions, and all columns attended
            to; None if not measured.
        rows: that took part: others have finished.
        columns: computed, over these.
        gained: decrease of the number of masks, over all rows: a token that is written again counts once.
        refreshed: whether a cache recomputed every position of some row.
        store_bytes: of the cached keys and values.
        launched: whether some forward was launched kernel by kernel, not replayed from a CUDA graph.
    """

    seconds: float
    bare: float | None
    rows: int
    columns: int
    gained: int
    refreshed: bool = False
    store_bytes: int = 0
    launched: bool = True


@dataclass(frozen=True)
class Cost:
    """The cost of one setting.

    Attributes:
        steps: steps per repetition, until the last row has finished.
        columns: mean computed columns per step and row.
        step: median seconds.
        tokens_per_second: tokens that stand at the end of the last step, over the time of all steps; the median of the
            repetitions.
        to_bare: median of step over bare, for steps with reuse; for all if none has. None without bare.
        spread: interquartile range of `to_bare`.
        refresh_to_bare: median of step over bare, for steps that refresh some row while others are reused; None
            without any.
        store_bytes: of the cached keys and values.
        first: median seconds of the first step, until tokens are committed.
        launched: steps per repetition of which some forward was launched, the mean.
        whole: tokens per second of decodes whose steps do not wait for each other, the median; None if not measured.
        peak: peak memory in bytes, beyond that before the run (weights etc.); None if not measured.
        shares: share of the time of a step, by section.
        tokens: decoded tokens, if decoded to the end.
    """

    steps: int
    columns: float
    step: float
    tokens_per_second: float
    to_bare: float | None
    spread: float | None
    refresh_to_bare: float | None
    store_bytes: int
    first: float
    launched: float
    whole: float | None = None
    peak: int | None = None
    shares: Mapping[str, float] | None = None
    tokens: Sequence[Sequence[int]] | None = None


def cost_of(repeats: Sequence[Sequence[Timing]], tokens: Sequence[Sequence[int]] | None) -> Cost:
    """Statistics of the steps of each repetition of a setting."""
    timings = [each for repeat in repeats for each in repeat]
    reusing = [each for each in timings if not each.refreshed] or timings
    ratios = [each.seconds / each.bare for each in reusing if each.bare]
    refreshing = [each.seconds / each.bare for each in timings if each.refreshed and each.bare]
    quartiles = quantiles(ratios, n=4) if len(ratios) > 1 else [*ratios * 3]
    return Cost(
        steps=len(repeats[0]),
        columns=sum(each.columns for each in timings) / sum(each.rows for each in timings),
        step=median(each.seconds for each in timings),
        tokens_per_second=median(
            sum(each.gained for each in repeat) / sum(each.seconds for each in repeat) for repeat in repeats
        ),
        to_bare=median(ratios) if ratios else None,
        spread=quartiles[2] - quartiles[0] if ratios else None,
        refresh_to_bare=median(refreshing) if refreshing and len(reusing) < len(timings) else None,
        store_bytes=timings[0].store_bytes,
        first=median(repeat[0].seconds for repeat in repeats),
        launched=sum(each.launched for each in timings) / len(repeats),
        tokens=tokens,
    )
