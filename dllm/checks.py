"""One way to refuse a value: name it, say what it was, say what to use."""

from __future__ import annotations

from math import inf
from numbers import Integral, Real
from typing import Any


class Notice(UserWarning):
    """Something to know about what was asked for; commands print it in one line."""


def number(
    name: str, value: Any, use: str, *, low: float = -inf, high: float = inf, above: float = -inf, whole: bool = False
) -> None:
    """Refuse anything but a number with low <= value <= high and value > above.

    Args:
        name: of the parameter.
        value: what was given.
        use: what to give, as the end of the sentence "... is out of range; use".
        low: smallest value allowed.
        high: largest value allowed.
        above: the value must be larger than this.
        whole: refuse fractions.

    Raises:
        ValueError: the value is refused.
    """
    kinds = Integral if whole else Real
    of_kind = isinstance(value, kinds) and not isinstance(value, bool)
    if not of_kind or not (low <= value <= high and value > above):
        raise ValueError(f"{name}={value!r} is out of range; use {use}")


def choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    """Refuse anything but one of the choices.

    Raises:
        ValueError: the value is refused.
    """
    if value not in choices:
        words = ", ".join("null" if one is None else str(one) for one in choices)
        raise ValueError(f"{name}={value!r} is unknown; use one of {words}")
