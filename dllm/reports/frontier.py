"""The Pareto front of quality against cost, and the area under it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """The points on the Pareto front.

    A point dominates another that costs no less and is no better, unless the two are equal.

    Args:
        points: (cost, quality) of each.

    Returns:
        Their indices, by increasing cost.
    """
    kept: list[int] = []
    # Ties in cost: the better one comes first.
    for index in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        if not kept or points[index][1] > points[kept[-1]][1] or points[index] == points[kept[-1]]:
            kept.append(index)
    return kept


def aup(points: Sequence[tuple[float, float]], best: float, alpha: float = 3.0, drop: float = 5.0) -> float | None:
    """Accuracy Under Parallelism: the area under accuracy over tokens per forward (Qian et al., d3LLM, 2025).

        AUP = rho_1 y_1 + sum_{i >= 2} (rho_i - rho_{i-1}) (y_i W(y_i) + y_{i-1} W(y_{i-1})) / 2
        W(y) = min(exp(-alpha (1 - y / best)), 1)

    over points of increasing parallelism rho, without those whose accuracy is below y_1 - drop.

    Difference from the paper: it uses all thresholds of one method. A sweep may contain dominated settings, which
    would reduce the area, so here the area is that under the Pareto front (accuracy against parallelism). y_1 is then
    the best accuracy of the group.

    Args:
        points: (rho, y): generated tokens per forward, and accuracy in percent.
        best: y_max, the best accuracy of any method on the task, in percent.
        alpha: weight of lost accuracy.
        drop: maximum loss of accuracy below y_1, in percent.

    Returns:
        None without points.
    """
    chosen = sorted({points[index] for index in front([(-rho, y) for rho, y in points])})
    chosen = [(rho, y) for rho, y in chosen if y >= chosen[0][1] - drop]
    if not chosen:
        return None
    weigh = lambda y: y * min(math.exp(-alpha * (1 - y / best)), 1.0) if best else 0.0  # noqa: E731
    tail = sum((rho - before) * (weigh(y) + weigh(y_before)) / 2 for (before, y_before), (rho, y) in pairwise(chosen))
    return chosen[0][0] * chosen[0][1] + tail
