"""Expressions of JSON Schema and of Lark in the syntax of Rust's regex, which reads some of their syntax otherwise.

There `[` opens a class within a class, `--`, `&&` and `~~` are operations on classes, a backslash before `<` is a
word boundary, and `a*+` is a repetition of `a*`. Classes that differ by dialect are written out, or made smaller.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

# What marks the way to go on that Python tries first, and the one after it.
FIRST, SECOND = "\x01", "\x02"
# Letters that parts of an expression may tell apart, the readable ones first: all of the first two planes, and of those
# beyond, whose letters have no case and differ in little, one of `_STRIDE`.
_READABLE = "abcdefghijklmnopqrstuvwxyz0123456789!\"#$%&'()*+,-./:;<=>?@ABCDEFGHIJKLMNOPQRSTUVWXYZ[\\]^_`{|}~ \n\t"
_LAST, _STRIDE = 0x20000, 0x100
_QUANTIFIER = re.compile(r"(?:[*+?]|\{(\d+)(?:(,)(\d*))?\})(\??)")
_GROUP = re.compile(r"\((?:\?(?:P<\w+>|(?P<on>[a-zA-Z]*)(?:-(?P<off>[a-zA-Z]+))?(?P<end>[:)])))?(?!\?)")
_ANCHOR = re.compile(r"[$^]|\\[AbBZ]")
_CODE = re.compile(r"\\(?:x[0-9A-Fa-f]{2}|u[0-9A-Fa-f]{4}|U[0-9A-Fa-f]{8}|.)", re.DOTALL)
_SINGLE = re.compile(r"\\(?:x\{?[0-9A-Fa-f]+\}?|[uU][0-9A-Fa-f]+|[afnrtv])")


@dataclass(frozen=True)
class Dialect:
    """How the metacharacters of a dialect are written in Rust's syntax.

    Attributes:
        fewer: for a letter that stands for a class after a backslash, the members of a class that holds no more.
        more: the members of a class that holds no less, for use where they are excluded.
        excluded: what a negated class and a complement exclude beside what they say.
        dot: the class that `.` stands for.
        every: the same with the flag s.
        closing: whether a `]` at the beginning of a class is one of its members.
        anchors: whether there may be any; without, what is a word does not depend on what is beside it.
    """

    fewer: Mapping[str, str]
    more: Mapping[str, str]
    excluded: str = ""
    dot: str = "[^\\n]"
    every: str = "[\\s\\S]"
    closing: bool = True
    anchors: bool = True


def translated(pattern: str, dialect: Dialect) -> str:
    """The same expression in the syntax of Rust's regex, without flags: case is folded as Python folds it.

    Args:
        pattern: that Python's `re` compiles.
        dialect: how it is to be read.

    Raises:
        ValueError: it cannot be expressed, with the reason.
    """

    def letter(text: str, given: str, flags: str) -> str:
        return _folded(text, given) if "i" in flags else text

    return _written(pattern, dialect, letter)


def sampled(patterns: Mapping[str, str], dialect: Dialect) -> dict[str, tuple[str, str]]:
    """Expressions over few letters, one of all that they never tell apart: what is true of these words is of all.

    Args:
        patterns: that Python's `re` compiles, by name.
        dialect: how they are to be read.

    Returns:
        For each: its expression in Rust's syntax, and one whose words say how Python reads them, with `FIRST` or
        `SECOND` wherever there are two ways to go on.
    """
    parts: dict[str, str] = {}

    def noted(text: str, given: str, flags: str) -> str:
        parts[f"(?{flags}:{given})"] = ""
        return text

    def sample(text: str, given: str, flags: str) -> str:
        return parts[f"(?{flags}:{given})"]

    for pattern in patterns.values():
        _written(pattern, dialect, noted)
    kinds = _kinds(list(parts))
    for place, part in enumerate(parts):
        parts[part] = f"[{''.join(_literal(each) for kind, each in kinds.items() if kind[place])}]"
    return {
        name: (_written(pattern, dialect, sample), _written(pattern, dialect, sample, choices=True))
        for name, pattern in patterns.items()
    }


def _kinds(parts: list[str]) -> dict[tuple[bool, ...], str]:
    """A letter for each set of parts, expressions of single letters, that match some letter."""
    letters = _letters()
    edges = {0}
    for part in parts:
        edges.update(edge for run in re.finditer(f"{part}+", letters) for edge in run.span())
    matches = [re.compile(part).match for part in parts]
    found: dict[tuple[bool, ...], str] = {}
    for edge in sorted(edges - {len(letters)}):
        found.setdefault(tuple(match(letters, edge) is not None for match in matches), letters[edge])
    return found


@cache
def _letters() -> str:
    others = (chr(each) for each in (*range(3, _LAST), *range(_LAST, 0x110000, _STRIDE)) if not 0xD800 <= each < 0xE000)
    return _READABLE + "".join(others)


def _written(pattern: str, dialect: Dialect, letter: Callable[[str, str, str], str], choices: bool = False) -> str:
    """An expression in Rust's syntax.

    Args:
        pattern: that Python's `re` compiles.
        dialect: how it is to be read.
        letter: what to write for a part that matches a single letter, or for an anchor, of what it is in Rust's
            syntax, in Python's, and its flags.
        choices: mark them.
    """
    flags, at, last = frozenset[str](), 0, 0
    groups: list[tuple[int, frozenset[str], int]] = []  # where each began, and what was true outside
    tried = 0  # alternatives before this one
    found = [FIRST if choices else ""]
    while at < len(pattern):
        begin = at
        if pattern.startswith("{,", at):
            raise ValueError("'{,' is read in several ways; write '{0,' or '\\{,'")
        if (count := _QUANTIFIER.match(pattern, at)) is not None:
            at = count.end()
            if (another := _QUANTIFIER.match(pattern, at)) is not None:
                raise ValueError(f"{another[0]!r} after another count is not supported; leave it out")
            part = "".join(found[last:])
            found[last:] = [_either_way(part, count) if choices else part + count[0]]
        elif pattern[at] == "(":
            group = _group(pattern, at)
            at = group.end()
            if group["end"] != ")":
                groups.append((len(found), flags, tried))
                found.append(f"(?:{FIRST if choices else ''}")
                tried = 0
            flags = flags.union(group["on"] or "").difference(group["off"] or "")
        elif pattern[at] == ")":
            last, flags, tried = groups.pop()
            found.append(")")
            at += 1
        elif pattern[at] == "|":
            tried += 1
            found.append(f"|{SECOND * tried}{FIRST}" if choices else "|")
            at += 1
        else:
            text, at = _letter(pattern, at, dialect, flags)
            last = len(found)
            found.append(letter(text, pattern[begin:at], "".join(sorted(flags))))
    return "".join(found)


def _either_way(part: str, count: re.Match[str]) -> str:
    """A repetition that says before each part, and at its end, which of the two Python tries first."""
    low, high = {"*": (0, None), "+": (1, None), "?": (0, 1)}.get(count[0][0], (int(count[1] or 0), None))
    if count[1] and not (count[2] and not count[3]):
        high = int(count[3] or low)
    again, end = (SECOND, FIRST) if count[4] else (FIRST, SECOND)
    least = "" if low == 0 else part if low == 1 else f"{part}{{{low}}}"
    return f"(?:{least}(?:{again}{part}){'*' if high is None else f'{{0,{high - low}}}'}{end})"


def _group(pattern: str, at: int) -> re.Match[str]:
    """The beginning of a group."""
    group = _GROUP.match(pattern, at)
    if group is None:
        raise ValueError(
            f"{pattern[at : at + 3]!r} is not supported, as automata have no lookaround and no back-references; "
            "leave it out"
        )
    for flag in (group["on"] or "") + (group["off"] or ""):
        if flag not in "imsu":
            raise ValueError(f"it has the flag {flag}, which is not supported; leave it out")
    return group


def _letter(pattern: str, at: int, dialect: Dialect, flags: frozenset[str]) -> tuple[str, int]:
    """What matches a single letter, or an anchor, and where it ends."""
    if not dialect.anchors and (anchor := _ANCHOR.match(pattern, at)) is not None:
        raise ValueError(f"{anchor[0]!r} depends on what is beside it, which is not supported; leave it out")
    if pattern[at] == "[":
        return _class(pattern, at, dialect)
    if pattern[at] == "\\":
        return _escape(pattern, at, dialect)
    if pattern[at] == ".":
        return dialect.every if "s" in flags else dialect.dot, at + 1
    return pattern[at] if pattern[at] in "^$" else _literal(pattern[at]), at + 1


def _folded(text: str, given: str) -> str:
    """What matches a letter without regard to case, as Python does; `given` in its own syntax."""
    found = {each: set(re.findall(f"(?{each}:{given})", _cased())) for each in ("i", "-i")}
    more, fewer = ("".join(sorted(found[one] - found[other])) for one, other in (("i", "-i"), ("-i", "i")))
    return f"[{text}{more}]" if more else f"[{text}--[{fewer}]]" if fewer else text


@cache
def _cased() -> str:
    """All letters that have another case."""
    return "".join(each for each in _letters() if each.lower() != each.upper())


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
