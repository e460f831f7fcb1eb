"""Choosing a setting with a guarantee: Learn-then-Test (arXiv 2110.01052), as CALM does for early exits (2207.07061).

Every setting has a risk, the mean over problems of what it loses against one token per step. Hypothesis i says that the
risk of setting i exceeds the limit. Settings are tested from safe to fast, each at level delta, up to the first one
that is not rejected (fixed-sequence testing); further ones would need other problems. The probability that any rejected
hypothesis is true is then at most delta, so that every certified setting may be used, whatever their order was worth.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from decimal import ROUND_CEILING, Decimal
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

_HALVINGS = 50


@dataclass(frozen=True)
class Test:
    """The test of one setting.

    Attributes:
        setting: as given.
        n: problems.
        mean: mean loss.
        p_value: of the hypothesis that the risk exceeds the limit.
        bound: upper confidence bound on the risk, at level 1 - delta.
        certified: whether the hypothesis is rejected.
    """

    setting: Any
    n: int
    mean: float
    p_value: float
    bound: float
    certified: bool


def fixed_sequence(
    settings: Iterable[Any], losses: Callable[[Any], NDArray[np.float64]], limit: float, delta: float
) -> Iterator[Test]:
    """Test settings in order, up to the first one that is not certified.

    Args:
        settings: from safe to fast; chosen without looking at the losses.
        losses: the loss of a setting on each problem, (n,) in [0, 1]; problems are drawn independently.
        limit: of the risk.
        delta: probability of a false certificate, over all settings.
    """
    for setting in settings:
        found = losses(setting)
        p = p_value(found, limit)
        yield Test(setting, len(found), float(np.mean(found)), p, upper_bound(found, delta), p <= delta)
        if p > delta:
            return


def losses_of(base: Float[np.ndarray, " n"], other: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """What a setting loses on each problem: the score of one token per step less its own, and 0 where it gains.

    The mean is over all problems, also those that one token per step has wrong; of answers that are right or wrong it
    is the share of problems that only one token per step has right. It is at least the loss of accuracy, since gains do
    not make up for losses.
    """
    return np.maximum(base - other, 0.0)


def p_value(losses: NDArray[np.float64], limit: float) -> float:
    """A valid p-value of "the mean exceeds `limit`": P(p <= u) <= u for every u where it does.

    Of losses that are 0 or 1 it is exact: the binomial tail P(Bin(n, limit) <= number of losses). Of others in [0, 1]
    it is the Hoeffding-Bentkus p-value (arXiv 2110.01052, proposition 3).
    """
    n, total = len(losses), float(np.sum(losses))
    if np.isin(losses, (0.0, 1.0)).all():
        return binomial_tail(round(total), n, limit)
    mean = total / n
    hoeffding = math.exp(-n * _divergence(min(mean, limit), limit))
    bentkus = math.e * binomial_tail(math.ceil(total), n, limit)
    return min(hoeffding, bentkus, 1.0)


def upper_bound(losses: NDArray[np.float64], delta: float) -> float:
    """The smallest limit that is certified at level `delta`: an upper confidence bound on the mean."""
    low, high = 0.0, 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if p_value(losses, middle) <= delta else (middle, high)
    return high


def at_most(bound: float) -> str:
    """An upper bound in percent, rounded up: what is said of it holds, too."""
    return f"{Decimal(repr(bound)).quantize(Decimal('0.0001'), ROUND_CEILING):.2%}"


def binomial_tail(most: int, n: int, p: float) -> float:
    """P(Bin(n, p) <= most)."""
    if most >= n or p <= 0:
        return 1.0
    if p >= 1:
        return 0.0
    count = np.arange(most + 1)
    ways = math.lgamma(n + 1) - np.array([math.lgamma(k + 1) + math.lgamma(n - k + 1) for k in count.tolist()])
    return float(min(np.exp(ways + count * math.log(p) + (n - count) * math.log1p(-p)).sum(), 1.0))


def _divergence(a: float, b: float) -> float:
    """Kullback-Leibler divergence of Bernoulli distributions, in nats."""
    first = a * math.log(a / b) if a > 0 else 0.0
    return first + ((1 - a) * math.log((1 - a) / (1 - b)) if a < 1 else 0.0)
