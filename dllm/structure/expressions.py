"""Expressions of JSON Schema and of Lark in the syntax of Rust's regex, which reads some of their syntax otherwise.

There `[` opens a class within a class, `--`, `&&` and `~~` are operations on classes, a backslash before `<` is a
word boundary, and `a*+` is a repetition of `a*`. Classes that differ by dialect are written out, or made smaller.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

_QUANTIFIER = re.compile(r"[*+?]|\{\d+(?:,\d*)?\}")
_CODE = re.compile(r"\\(?:x[0-9A-Fa-f]{2}|u[0-9A-Fa-f]{4}|U[0-9A-Fa-f]{8}|.)", re.DOTALL)
_SINGLE = re.compile(r"\\(?:x\{?[0-9A-Fa-f]+\}?|[uU][0-9A-Fa-f]+|[afnrtv])")


@dataclass(frozen=True)
class Dialect:
    """How the metacharacters of a dialect are written in Rust's syntax.

    Attributes:
        fewer: for a letter that stands for a class after a backslash, the members of a class that holds no more.
        more: the members of a class that holds no less, for use where they are excluded.
        excluded: what a negated class and a complement exclude beside what they say.
        dot: what `.` stands for.
        closing: whether a `]` at the beginning of a class is one of its members.
    """

    fewer: Mapping[str, str]
    more: Mapping[str, str]
    excluded: str = ""
    dot: str = "."
    closing: bool = True


def translated(pattern: str, dialect: Dialect) -> str:
    """The same expression in the syntax of Rust's regex.

    Args:
        pattern: that Python's `re` compiles.
        dialect: how it is to be read.

    Raises:
        ValueError: it cannot be expressed, with the reason.
    """
    found, at, counts = [], 0, 0  # how many counts were read in a row
    while at < len(pattern):
        quantifier = _QUANTIFIER.match(pattern, at)
        if quantifier is not None:
            if counts > 1 or (counts and quantifier[0] != "?"):
                raise ValueError(f"{quantifier[0]!r} after another count is not supported; leave it out")
            found.append(quantifier[0])
            at, counts = quantifier.end(), counts + 1
            continue
        counts = 0
        if pattern.startswith("{,", at):
            raise ValueError("'{,' is read in several ways; write '{0,' or '\\{,'")
        if pattern[at] == "{":  # no count: Rust would read one with spaces
            text, at = _literal("{"), at + 1
        elif pattern[at] == "[":
            text, at = _class(pattern, at, dialect)
        elif pattern[at] == "\\":
            text, at = _escape(pattern, at, dialect)
        else:
            text, at = dialect.dot if pattern[at] == "." else pattern[at], at + 1
        found.append(text)
    return "".join(found)


def _escape(pattern: str, at: int, dialect: Dialect) -> tuple[str, int]:
    letter = pattern[at + 1 : at + 2]
    if letter in dialect.fewer:
        return f"[{dialect.fewer[letter]}]", at + 2
    if letter.lower() in dialect.more:
        return f"[^{dialect.excluded}{dialect.more[letter.lower()]}]", at + 2
    return _code(pattern, at)


def _code(pattern: str, at: int) -> tuple[str, int]:
    """What a backslash and a letter stand for where that is no class, and where it ends."""
    code = _CODE.match(pattern, at)
    assert code is not None  # Python's `re` has read the pattern before
    return code[0] if code[0][1:].isalnum() else _literal(code[0][1:]), code.end()


def _class(pattern: str, at: int, dialect: Dialect) -> tuple[str, int]:
    """A class, and where it ends."""
    at += 1
    negated = pattern.startswith("^", at)
    at += negated
    if pattern.startswith("]", at) and not dialect.closing:
        raise ValueError("a class that begins with ']' is read in several ways; write '\\]'")
    found = ["[^", dialect.excluded] if negated else ["["]
    first = at
    while not pattern.startswith("]", at) or at == first:
        text, at = _member(pattern, at, dialect, negated)
        if pattern.startswith("-", at) and at + 1 < len(pattern) and pattern[at + 1] != "]":
            last, at = _member(pattern, at + 1, dialect, negated)
            if not (_single(text) and _single(last)):
                raise ValueError("a range between classes is not supported; write its '-' as '\\-'")
            text += f"-{last}"
        found.append(text)
    return "".join([*found, "]"]), at + 1


def _member(pattern: str, at: int, dialect: Dialect, negated: bool) -> tuple[str, int]:
    """A member of a class, and where the next one begins."""
    if pattern[at] != "\\":
        return _literal(pattern[at]), at + 1
    letter = pattern[at + 1 : at + 2]
    if letter in (dialect.more if negated else dialect.fewer):
        return (dialect.more if negated else dialect.fewer)[letter], at + 2
    if letter.lower() in dialect.more:
        if dialect.excluded:
            raise ValueError(f"'\\{letter}' within a class is not supported; list what it holds")
        return f"[^{(dialect.fewer if negated else dialect.more)[letter.lower()]}]", at + 2
    return _code(pattern, at)


def _single(member: str) -> bool:
    return len(member) == 1 or _SINGLE.fullmatch(member) is not None


def _literal(letter: str) -> str:
    plain = (letter.isalnum() and letter.isascii()) or not letter.isascii()
    return letter if plain else f"\\x{{{ord(letter):X}}}"
