"""Validation of values: errors name the parameter, the value and the expected range."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from decimal import Decimal
from difflib import get_close_matches
from math import inf
from numbers import Integral, Real
from typing import Any

from dllm.escape import brief

_LARGEST = 3.4028234e38  # of float32
_LONGEST = 100  # characters of a misspelt name that are compared
# PyTorch reports memory by RuntimeErrors, most of them of no class of their own.
_MEMORY = re.compile("allocate|out of memory|ALLOC_FAILED|calculation overflowed|multiplication overflow|buffer size")
SEEDS = 2**62  # base seeds are below, since row i uses seed + i


class Notice(UserWarning):
    """A warning to the user, which commands print in one line."""


def number(
    name: str, value: Any, use: str, *, low: float = -inf, high: float = inf, above: float = -inf, whole: bool = False
) -> None:
    """Reject anything but a number with low <= value <= high and value > above.

    Args:
        name: of the parameter.
        value: what was given.
        use: the expected values, as the end of the sentence "... is out of range; use".
        low: smallest value allowed.
        high: largest value allowed.
        above: the value must be larger than this.
        whole: reject fractions. Integers beyond 64 bits and finite values beyond float32 are rejected always.

    Raises:
        ValueError: the value is rejected.
    """
    kinds = Integral if whole else Real
    of_kind = isinstance(value, kinds) and not isinstance(value, bool)
    # As tensors hold it.
    fits = (
        -(2**63) <= int(value) < 2**63 if isinstance(value, Integral) else of_kind and not _LARGEST < abs(value) < inf
    )
    if not of_kind or not fits or not (low <= value <= high and value > above):
        raise ValueError(f"{name}={_shown(value)} is out of range; use {use}")


def choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    """Reject anything but one of the choices.

    Raises:
        ValueError: the value is rejected.
    """
    plain = value.item() if getattr(value, "ndim", None) == 0 else value
    # An array has no single truth value, and 1.0 == True.
    if getattr(value, "ndim", 0) or not any(one == plain and _is_number(one) == _is_number(plain) for one in choices):
        words = ", ".join("null" if one is None else str(one) for one in choices)
        meant = close(value, [one for one in choices if isinstance(one, str)])
        raise ValueError(f"unknown {name}={_shown(value)}{meant}; expected one of {words}")


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _shown(value: Any) -> str:
    """A value in messages: abbreviated, and not by `str`, which raises an error for thousands of digits."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    return brief(str(Decimal(value)) if whole else repr(value))


def close(value: Any, names: Iterable[str]) -> str:
    """The name that was probably meant, as a question to insert in a message; empty if there is none."""
    text = value if isinstance(value, str) else ""
    found = get_close_matches(text[:_LONGEST], [each for each in names if each != text], 1, 0.8)
    return f" (did you mean {found[0]}?)" if found else ""


def known(given: Iterable[Any], names: Iterable[str], prefix: str = "") -> None:
    """Reject unknown options.

    Args:
        given: names.
        names: known names.
        prefix: of the names in errors.

    Raises:
        ValueError: the first unknown name.
    """
    expected = list(names)
    if strange := sorted(str(name) for name in given if name not in expected):
        meant, listed = close(strange[0], expected), ", ".join(expected) or "none"
        raise ValueError(f"unknown option {prefix + strange[0]!r}{meant}; expected one of {listed}")


def seed(name: str, value: Any, low: int = 0, use: str = "") -> None:
    """Reject an invalid base seed (row i uses seed + i).

    Args:
        name: of the parameter.
        value: what was given.
        low: smallest value allowed.
        use: appended to the expected values in errors.

    Raises:
        ValueError: the value is rejected.
    """
    number(name, value, f"a whole number from {low} to 2**62 - 1{use}", low=low, high=SEEDS - 1, whole=True)


def threads(value: Any) -> None:
    """Reject an unrealistic number of threads.

    Raises:
        ValueError: the value is rejected.
    """
    if value is not None:
        number("threads", value, "1 to 1024, or null", low=1, high=1024, whole=True)


def is_text(value: Any) -> bool:
    """Whether it is text that can be encoded, without lone surrogates."""
    return isinstance(value, str) and not any("\ud800" <= character <= "\udfff" for character in value)


def first_line(error: BaseException) -> str:
    """The first line of an error's message; its type if the message is empty."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def panicked(error: BaseException) -> bool:
    """Whether a library written in Rust gave up, which it tells by no `Exception`."""
    return type(error).__name__ == "PanicException"


@contextmanager
def telling_panics(what: str, use: str) -> Iterator[None]:
    """Raise a ValueError where a tokenizer's library panics, or raises a bare `Exception`.

    Args:
        what: cannot be done.
        use: advice to the user.

    Raises:
        ValueError: it did.
    """
    try:
        yield
    except BaseException as error:
        if type(error) is not Exception and not panicked(error):
            raise
        raise ValueError(f"{what} ({first_line(error)}); {use}") from None


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that something does not fit into memory, or is larger than any: Python's or PyTorch's."""
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and bool(_MEMORY.search(str(error))))


# Before a parameter's name in an error; the same letters in another word, a path or a quoted text are not its name.
NOT_WITHIN = r"""(?<![\w.('"\]/-])"""


@contextmanager
def naming(options: Mapping[str, str]) -> Iterator[None]:
    """Rename parameters in errors to the options that the user wrote.

    Args:
        options: from parameters to the options of their values.

    Raises:
        ValueError: raised within, with the names replaced.
    """
    try:
        yield
    except ValueError as error:
        raise ValueError(renamed(str(error), options)) from error


def renamed(text: str, options: Mapping[str, str]) -> str:
    """An error's text with `PARAMETER=` replaced by `OPTION=`, except inside words, paths and quotes of a JSON file."""
    if not options:
        return text
    known = "|".join(map(re.escape, options))
    return re.sub(rf"{NOT_WITHIN}(?<!\.json: )({known})=", lambda found: f"{options[found[1]]}=", text)
