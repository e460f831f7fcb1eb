"""One way to refuse a value: name it, say what it was, say what to use."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from decimal import Decimal
from math import inf
from numbers import Integral, Real
from typing import Any

from dllm.escape import brief

SEEDS = 2**62  # a seed that is counted up from is below


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
        whole: refuse fractions, and what does not fit 64 bits; otherwise what does not fit a float.

    Raises:
        ValueError: the value is refused.
    """
    kinds = Integral if whole else Real
    of_kind = isinstance(value, kinds) and not isinstance(value, bool)
    largest = 2**63 if whole else 2**1023  # as tensors hold it
    fits = not isinstance(value, Integral) or -largest <= int(value) < largest
    if not of_kind or not fits or not (low <= value <= high and value > above):
        raise ValueError(f"{name}={_shown(value)} is out of range; use {use}")


def choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    """Refuse anything but one of the choices.

    Raises:
        ValueError: the value is refused.
    """
    if getattr(value, "ndim", 0) or value not in choices:  # an array equals nothing as a whole
        words = ", ".join("null" if one is None else str(one) for one in choices)
        raise ValueError(f"{name}={_shown(value)} is unknown; use one of {words}")


def _shown(value: Any) -> str:
    """A value as messages show it: not at length, nor by Python's own `str`, which refuses thousands of digits."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    return brief(str(Decimal(value)) if whole else repr(value))


def known(given: Iterable[Any], names: Iterable[str], prefix: str = "") -> None:
    """Refuse options of other names.

    Args:
        given: names.
        names: those there are.
        prefix: what errors put before a name.

    Raises:
        ValueError: the first name that is none of them.
    """
    expected = list(names)
    if strange := sorted(str(name) for name in given if name not in expected):
        raise ValueError(f"unknown option {prefix + strange[0]!r}; expected one of {', '.join(expected) or 'none'}")


def seed(name: str, value: Any, low: int = 0, use: str = "") -> None:
    """Refuse what is no seed; it is counted up from.

    Args:
        name: of the parameter.
        value: what was given.
        low: smallest value allowed.
        use: what else there is to say.

    Raises:
        ValueError: the value is refused.
    """
    number(name, value, f"a whole number from {low} to 2**62 - 1{use}", low=low, high=SEEDS - 1, whole=True)


def threads(value: Any) -> None:
    """Refuse a number of threads that no machine has.

    Raises:
        ValueError: the value is refused.
    """
    if value is not None:
        number("threads", value, "1 to 1024, or null", low=1, high=1024, whole=True)


def is_text(value: Any) -> bool:
    """Whether it is text that can be written, without halves of characters."""
    return isinstance(value, str) and not any("\ud800" <= character <= "\udfff" for character in value)


def first_line(error: BaseException) -> str:
    """What an error says, in one line; its kind where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


@contextmanager
def naming(options: Mapping[str, str]) -> Iterator[None]:
    """Let errors about parameters name the options that the user wrote.

    Args:
        options: per parameter the option its value came from.

    Raises:
        ValueError: what was raised within, in those words.
    """
    try:
        yield
    except ValueError as error:
        raise ValueError(renamed(str(error), options)) from error


def renamed(text: str, options: Mapping[str, str]) -> str:
    """An error's text with `PARAMETER=` as `OPTION=`, where it stands by itself and is not what a JSON file says."""
    if not options:
        return text
    known = "|".join(map(re.escape, options))
    return re.sub(rf"(?<![\w.('\"\]])(?<!\.json: )({known})=", lambda found: f"{options[found[1]]}=", text)
