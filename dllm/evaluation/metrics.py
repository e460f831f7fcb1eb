"""Metrics of a run: quality with confidence interval, cost, and speed-up over the baselines."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from dllm.decoding.drift import Measurement, summarise
from dllm.evaluation.records import Record, sample_of


def quality(values: Sequence[float]) -> dict[str, Any]:
    """A score's mean with a 95% interval.

    Args:
        values: one per sample. If all are from 0 to 1 the interval is Wilson's, otherwise the mean +- 1.96 standard
            errors, or None for a single sample.
    """
    mean = float(np.mean(values))
    interval = None  # for a single sample
    if 0 <= min(values) <= max(values) <= 1:
        interval = [*wilson(math.fsum(values), len(values))]
    elif len(values) > 1:
        error = 1.959964 * float(np.std(values, ddof=1)) / math.sqrt(len(values))
        interval = [mean - error, mean + error]
    return {"value": mean, "interval": interval, "n": len(values)}


def not_a_share(metric: str, shares: Iterable[str]) -> str:
    """The error of a score that cannot be the accuracy."""
    known = ", ".join(shares) or "null: it has no share of right answers"
    return f"task.metric={metric!r} is not a share of right answers of this task; use one of {known}"


def cost(records: Sequence[Record]) -> dict[str, Any]:
    """Cost of the answers; every entry is None if nothing was generated.

    Means are over samples, as those of the scores: several answers to a sample (`repeats` of a task) are one cost,
    their sum. `tokens` and `seconds` are sums, excluding prompt tokens and tokens after end-of-text or a stop string.
    `tokens_per_second` is over the wall time of decoding, latencies are from an answer's first step to its last. Times
    of an interrupted run are summed over its sessions.
    """
    if not records:
        return dict.fromkeys(COSTS)
    sums = Counter[str]()
    for record in records:
        sums[sample_of(record.id)] += record.nfe
    nfe = np.array([*sums.values()], dtype=float)
    tokens, seconds = sum(record.tokens for record in records), sum(record.seconds for record in records)
    computed, full = sum(r.positions for r in records), sum(r.nfe * r.canvas for r in records)
    latency = np.percentile([record.latency for record in records], [50, 95])
    count = len(nfe)
    return {
        "nfe": float(nfe.mean()),
        "nfe_error": float(nfe.std(ddof=1) / math.sqrt(count)) if count > 1 else None,
        "tpf": tokens / max(1.0, float(nfe.sum())),
        "tokens": tokens,
        "tokens_per_sample": tokens / count,
        "tokens_per_second": tokens / seconds,
        "seconds": seconds,
        "latency_p50": float(latency[0]),
        "latency_p95": float(latency[1]),
        "guide_nfe": sum(record.guide_nfe for record in records) / count,
        "guide_seconds": sum(record.guide_seconds for record in records),
        "positions": computed / count,
        "computed_share": computed / max(1, full),
        "refreshes": sum(record.refreshes for record in records) / count,
        "drift": _drift(records),
        "peak_memory": max(record.peak_memory for record in records),
    }


def speedup(records: Sequence[Record], baselines: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any] | None:
    """Speed-up over each baseline on the same samples, in time and in forwards.

    Args:
        records: of the run.
        baselines: per baseline and session: ids, tokens, seconds and nfe.

    Returns:
        None without baselines. `time` compares tokens per second, `forwards` tokens per forward, so that short answers
        do not count as fast. `nfe` is per sample, with as many answers as samples have in the run.
    """
    if not (baselines and all(baselines.values())):
        return None
    names = {name for rows in baselines.values() for row in rows for name in row["ids"]}
    mine = [record for record in records if record.id in names]
    tokens, seconds, nfe = (sum(getattr(r, name) for r in mine) for name in ("tokens", "seconds", "nfe"))
    answers = len(records) / len({sample_of(record.id) for record in records})  # of a sample
    found: dict[str, Any] = {"samples": len({sample_of(record.id) for record in mine})}
    for name, rows in baselines.items():
        theirs = {key: sum(row[key] for row in rows) for key in ("tokens", "seconds", "nfe")}
        found[name] = {
            "tokens_per_second": theirs["tokens"] / theirs["seconds"],
            "nfe": theirs["nfe"] / len(mine) * answers,
            "time": (tokens / seconds) / (theirs["tokens"] / theirs["seconds"]),
            "forwards": (tokens / nfe) / (theirs["tokens"] / theirs["nfe"]),
        }
    return found


def wilson(right: float, n: int, z: float = 1.959964) -> tuple[float, float]:
    """95% Wilson score interval of a share, within [0, 1] (Wilson, J. Am. Stat. Assoc. 22, 1927).

    It is the set of means m with |right / n - m| <= z sqrt(m (1 - m) / n). For the mean of other values from 0 to 1 it
    is conservative: no distribution on [0, 1] with mean m has a variance above m (1 - m) (Bhatia and Davis, Am. Math.
    Monthly 107, 2000). It needs no estimate of the variance, which few or equal values do not give.

    Args:
        right: number of right answers, or the sum of scores from 0 to 1.
        n: number of answers.
        z: quantile of the normal distribution.
    """
    share = right / n
    centre = share + z * z / (2 * n)
    spread = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


COSTS = (
    "nfe", "nfe_error", "tpf", "tokens", "tokens_per_sample", "tokens_per_second", "seconds", "latency_p50",
    "latency_p95", "guide_nfe", "guide_seconds", "positions", "computed_share", "refreshes", "drift", "peak_memory",
)  # fmt: skip
_ROUNDING = 1e-9  # of the ends of an interval
_LARGEST = 1e100  # end of an interval, which no plot can show


def impossible(metrics: Mapping[str, Any]) -> str | None:
    """The first number of stored metrics that no run has; None if there is none."""
    for name in ("n", *COSTS):
        if isinstance(value := metrics.get(name), (int, float)) and value < 0:
            return f"{name}={value!r}"
    named = {name: (score["value"], score["interval"]) for name, score in metrics["scores"].items()}
    named["accuracy"] = (metrics.get("accuracy"), metrics.get("accuracy_interval"))
    for name, (value, interval) in named.items():
        if not all(end is None or abs(end) < _LARGEST for end in interval or ()):
            return f"the interval {list(interval)} of {name}"
        low, high = interval or (-math.inf, math.inf)
        if None not in (value, low, high) and not low - _ROUNDING <= value <= high + _ROUNDING:
            return f"{name}={value!r}, outside its interval {[low, high]}"
    return None


def _drift(records: Sequence[Record]) -> dict[str, Any] | None:
    forwards = np.array([forward for record in records for forward in record.drift])
    if not forwards.size:
        return None
    kv_error, kl, flips, asked = forwards.T
    rows = np.zeros(len(forwards), dtype=np.int64)  # ids are not used
    drift = summarise([Measurement(rows, kv_error, kl, flips.astype(np.int64), asked.astype(np.int64))], seconds=0.0)
    assert drift is not None
    return {name: value for name, value in asdict(drift).items() if name != "seconds"}
