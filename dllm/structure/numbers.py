"""Bounds of numbers as regular expressions."""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal
from typing import Any

_LISTED = 2000  # multiples that are written out
_DIGITS = "[0-9]"
# Decimals of bounded numbers: few enough that no number is rounded to a bound which it may not reach.
_DECIMALS = 6
_LARGEST_OPEN = 10**9  # beyond, a double has fewer decimals
_LARGEST_EXACT = 2**53  # beyond, a double has none, and a number with decimals may be rounded over a bound


def integers(schema: Mapping[str, Any], at: str) -> str:
    """The integers that bounds and `multipleOf` leave.

    Args:
        schema: with these keywords.
        at: where, in errors.

    Raises:
        ValueError: there are none, or too many to list.
    """
    low, high = _bounds(schema)
    each = schema.get("multipleOf", 1)
    if each != 1:
        if low is None or high is None or high - low > _LISTED or each != int(each):
            raise ValueError(
                f"json_schema has 'multipleOf'{at}, which is supported for whole numbers between bounds that are at "
                f"most {_LISTED} apart; add minimum and maximum, or leave it out"
            )
        found = [str(number) for number in range(low, high + 1) if number % int(each) == 0]
    else:
        found = _parts(low, high)
    if not found:
        raise ValueError(f"json_schema has no whole number{at} between its bounds; correct them")
    return f"(?:{'|'.join(found)})"


def numbers(schema: Mapping[str, Any], at: str) -> str:
    """The numbers between whole bounds, with a few decimals.

    Raises:
        ValueError: bounds that are not whole, or `multipleOf`.
    """
    for name in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"):
        if name in schema and (name == "multipleOf" or schema[name] != int(schema[name])):
            raise ValueError(
                f"json_schema has {name!r}{at} of a number, which is supported for whole bounds only; "
                "round it, use an integer, or leave it out"
            )
    for name in ("exclusiveMinimum", "exclusiveMaximum"):
        if abs(schema.get(name, 0)) > _LARGEST_OPEN:
            raise ValueError(
                f"json_schema has {name!r}{at} of a number, which is supported up to {_LARGEST_OPEN}; "
                f"use {name[9:].lower()}, or an integer"
            )
    low, open_low = _strictest(schema, "minimum", "exclusiveMinimum", max)
    high, open_high = _strictest(schema, "maximum", "exclusiveMaximum", min)
    found = []
    if high is None or high >= 0:
        begins = (low, open_low) if low is not None and low >= 0 else (0, False)
        found += _sizes(*begins, high, open_high)
    if low is None or low < 0:
        begins = (-high, open_high) if high is not None and high <= 0 else (0, False)
        found += [f"-{each}" for each in _sizes(*begins, None if low is None else -low, open_low)]
    if not found:
        raise ValueError(f"json_schema has no number{at} between its bounds; correct them")
    return f"(?:{'|'.join(found)})"


def _sizes(low: int, open_low: bool, high: int | None, open_high: bool) -> list[str]:
    """Numbers without a sign between bounds, of which some are excluded."""
    decimals = f"(?:\\.{_DIGITS}{{1,{_DECIMALS}}})?"
    found = []
    if high is None or low < high:
        if open_low:
            some = "|".join(
                f"{_DIGITS}{{{zeros}}}[1-9]{_DIGITS}{{0,{_DECIMALS - 1 - zeros}}}" for zeros in range(_DECIMALS)
            )
            found.append(f"{low}\\.(?:{some})")
        first, last = low + open_low, None if high is None else high - 1
        if max(low, high or 0) <= _LARGEST_EXACT:
            found += [each + decimals for each in _between(first, last)]
        else:
            with_decimals = _LARGEST_EXACT - 1 if last is None else min(last, _LARGEST_EXACT - 1)
            found += [each + decimals for each in _between(first, with_decimals)]
            found += _between(max(first, _LARGEST_EXACT), last)
    if high is not None and not open_high and (low < high or (low == high and not open_low)):
        found.append(str(high))
    return found


def _strictest(schema: Mapping[str, Any], name: str, exclusive: str, choose: Any) -> tuple[int | None, bool]:
    """The bound of one side, and whether it is excluded."""
    given = [int(schema[each]) for each in (name, exclusive) if each in schema]
    bound = choose(given) if given else None
    return bound, bound is not None and exclusive in schema and int(schema[exclusive]) == bound


def _bounds(schema: Mapping[str, Any]) -> tuple[int | None, int | None]:
    """The smallest and the largest integer within the bounds; None where there is none."""

    def up(value: Any) -> int:
        return -int((-Decimal(str(value))).to_integral_value(rounding="ROUND_FLOOR"))

    def down(value: Any) -> int:
        return int(Decimal(str(value)).to_integral_value(rounding="ROUND_FLOOR"))

    lows = [up(schema["minimum"])] if "minimum" in schema else []
    lows += [down(schema["exclusiveMinimum"]) + 1] if "exclusiveMinimum" in schema else []
    highs = [down(schema["maximum"])] if "maximum" in schema else []
    highs += [up(schema["exclusiveMaximum"]) - 1] if "exclusiveMaximum" in schema else []
    return max(lows, default=None), min(highs, default=None)


def _parts(low: int | None, high: int | None) -> list[str]:
    """Integers between bounds."""
    found = []
    if low is None or low < 0:
        least = 1 if high is None or high >= 0 else -high
        found += [f"-{each}" for each in _between(least, None if low is None else -low)]
    if high is None or high >= 0:
        found += _between(max(low or 0, 0), high)
    return found


def _between(low: int, high: int | None) -> list[str]:
    """Integers of at least 0 between bounds."""
    if high is not None and high < low:
        return []
    if high is None:
        if low == 0:
            return [f"(?:0|[1-9]{_DIGITS}*)"]
        width = len(str(low))
        return [*_between(low, 10**width - 1), f"[1-9]{_DIGITS}{{{width},}}"]
    found = []
    while len(str(low)) < len(str(high)):
        edge = 10 ** len(str(low)) - 1
        found += _same_width(str(low), str(edge))
        low = edge + 1
    return found + _same_width(str(low), str(high))


def _same_width(low: str, high: str) -> list[str]:
    """Integers between two of the same number of digits."""
    if not low:
        return [""]
    if low[0] == high[0]:
        return [low[0] + each for each in _same_width(low[1:], high[1:])]
    rest = len(low) - 1
    first, last = int(low[0]), int(high[0])
    found = []
    if set(low[1:]) - {"0"}:
        found += [low[0] + each for each in _same_width(low[1:], "9" * rest)]
        first += 1
    if set(high[1:]) - {"9"}:
        found += [high[0] + each for each in _same_width("0" * rest, high[1:])]
        last -= 1
    if first <= last:
        digits = str(first) if first == last else f"[{first}-{last}]"
        found.append(digits + (f"{_DIGITS}{{{rest}}}" if rest else ""))
    return found
