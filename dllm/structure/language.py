"""A regular expression as a minimal deterministic automaton over bytes.

outlines-core compiles the expression (Rust's regex-automata, which knows Unicode and UTF-8): its `Index` over a
vocabulary of single bytes is the automaton itself. It is minimized here by partition refinement, so that what is built
from it does not depend on how the expression was written.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dllm.checks import first_line

# States of an automaton over bytes before it is minimized, and the positions that counted repetitions may stand for
# before it is compiled: they bound the memory.
_MOST_STATES, _MOST_REPEATED, _MOST_NESTED = 100_000, 5_000, 100_000
_LONGEST = 2_000_000  # characters of an expression
_BYTES = 256
# Escapes, classes, groups, counts of repetitions, and other letters.
_COUNTED = re.compile(r"\\(?:[xuUpP]\{[^}]*\}|.)|\[\^?\]?(?:\\.|[^\]\\])*\]|\{(\d+)(?:,(\d*))?\}|.", re.DOTALL)

# Anchors, and what makes them hold at lines, too.
_ANCHORS = ("^", "$", "\\A", "\\Z", "\\z")
_LINES = re.compile(r"\(\?[a-zA-Z]*m")


@dataclass(frozen=True, eq=False)
class Automaton:
    """A deterministic automaton over bytes whose states can all lead to acceptance; state 0 is the dead one.

    Attributes:
        follow: (S, 256) the next state of each.
        start: the first state.
        accepting: (S,) whether the bytes so far are a word.
    """

    follow: NDArray[np.int64]
    start: int
    accepting: NDArray[np.bool_]

    def __reduce__(self) -> tuple[Any, ...]:
        """For other processes: most bytes lead where others do."""
        columns, of_byte = distinct_columns(self.follow)
        return _widened, (self.follow[:, columns].astype(np.int32), of_byte, self.start, self.accepting)

    def accepts(self, word: bytes) -> bool:
        """Whether these bytes are a word of the language."""
        state = self.start
        for byte in word:
            state = int(self.follow[state, byte])
        return bool(self.accepting[state])


def _widened(
    follow: NDArray[np.int32], of_byte: NDArray[np.int64], start: int, accepting: NDArray[np.bool_]
) -> Automaton:
    return Automaton(follow.astype(np.int64)[:, of_byte], start, accepting)


def extra(module: str, name: str) -> Any:
    """A module of the extra `structure`.

    Args:
        module: its name.
        name: of the format in errors.

    Raises:
        ValueError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        raise ValueError(
            f"{name} needs {module.partition('.')[0]}; install it with pip install 'dllm-samplers[structure]'"
        ) from None


def compile_regex(regex: str, name: str) -> Automaton:
    """The automaton of all texts that match an expression as a whole.

    Args:
        regex: in the syntax of Rust's regex crate, which has no lookaround and no back-references.
        name: of the format in errors.

    Raises:
        ValueError: a syntax error, or more states than are kept.
    """
    library = extra("outlines_core", name)
    _check_size(regex, name)
    vocabulary = library.Vocabulary(_BYTES, {bytes([byte]): [byte] for byte in range(_BYTES)})
    try:
        # Between two bytes that no answer holds: a match may then neither begin elsewhere, nor end at the first of
        # several alternatives.
        index = library.Index(f"\\x00(?:{regex})\\x00", vocabulary)
        edges: Mapping[int, Mapping[int, int]] = index.get_transitions()
    except Exception as error:  # noqa: BLE001  # the library raises several kinds, of which some are private
        raise ValueError(f"{name} cannot be compiled: {_why(str(error))}") from None
    if len(edges) > _MOST_STATES:
        raise ValueError(
            f"{name} has {len(edges)} states, and {_MOST_STATES} are the most; use shorter bounds or a smaller depth"
        )
    numbers = {state: number for number, state in enumerate(edges, start=1)}
    follow = np.zeros((len(numbers) + 1, _BYTES + 1), dtype=np.int64)  # the last one ends a text
    for state, targets in edges.items():
        follow[numbers[state], list(targets)] = [numbers[target] for target in targets.values()]
    follow = follow[:, :_BYTES]
    ended = np.zeros(len(follow), dtype=bool)
    ended[[numbers[state] for state in index.get_final_states()]] = True
    start = int(follow[numbers[index.get_initial_state()], 0])
    accepting = ended[follow[:, 0]]
    follow[:, 0] = 0
    kept = _reached(follow, start)
    if not (kept & accepting).any():
        raise ValueError(
            f"{name} matches no text; leave out null characters, anchors and word boundaries, as the whole answer has "
            "to match"
        )
    number = np.where(kept, np.cumsum(kept), 0)
    follow = np.concatenate((np.zeros((1, _BYTES), dtype=np.int64), number[follow[kept]]))
    return minimal(Automaton(follow, int(number[start]), np.append(False, accepting[kept])))


def _reached(follow: NDArray[np.int64], start: int) -> NDArray[np.bool_]:
    """The states that some bytes lead to, without the dead one."""
    reached, new = np.zeros(len(follow), dtype=bool), np.array([start])
    while new.size:
        reached[new] = True
        new = np.unique(follow[new])
        new = new[~reached[new] & (new > 0)]
    return reached


def minimal(automaton: Automaton) -> Automaton:
    """The smallest automaton of the same language.

    Partition refinement as of Hopcroft: of a class that splits the largest part keeps its label, and only states before
    those with new labels are compared again. Moore's compares all in each round, and a chain takes a round for each
    state.

    Raises:
        AssertionError: two different states were merged, by a collision of hashes.
    """
    columns, of_byte = distinct_columns(automaton.follow)
    follow = automaton.follow[:, columns]
    _, representative, label = np.unique(_classes(follow, automaton.accepting), return_index=True, return_inverse=True)
    merged, count = label[follow], len(representative)
    assert (merged == merged[representative][label]).all()
    assert (automaton.accepting == automaton.accepting[representative][label]).all()
    # The dead state comes first.
    order = np.full(count, -1)
    order[label[0]] = 0
    order[order < 0] = np.arange(1, count)
    table = np.zeros((count, follow.shape[1]), dtype=np.int64)
    table[order] = order[merged[representative]]
    accepting = np.zeros(count, dtype=bool)
    accepting[order] = automaton.accepting[representative]
    return Automaton(table[:, of_byte], int(order[label[automaton.start]]), accepting)


def _classes(follow: NDArray[np.int64], accepting: NDArray[np.bool_]) -> NDArray[np.int64]:
    """(S,) labels, equal for states from which the same words are accepted."""
    generator = np.random.default_rng(0)
    names = generator.integers(1, 2**63, size=len(follow) + 2, dtype=np.uint64)
    factors = generator.integers(1, 2**63, size=follow.shape[1], dtype=np.uint64) | np.uint64(1)
    edges = follow.ravel().argsort(kind="stable")
    before, begin = edges // follow.shape[1], np.searchsorted(follow.ravel()[edges], np.arange(len(follow) + 1))
    label = accepting.astype(np.int64)
    sizes, count = np.bincount(label, minlength=len(follow) + 2), 2
    states = np.arange(len(follow))
    while states.size:
        with np.errstate(over="ignore"):
            keys = (names[label[follow[states]]] * factors).sum(1, dtype=np.uint64)
        order = np.lexsort((keys, label[states]))
        states, keys, old = states[order], keys[order], label[states[order]]
        parts = np.flatnonzero(np.append(True, (old[1:] != old[:-1]) | (keys[1:] != keys[:-1])))
        of, lengths = old[parts], np.diff(np.append(parts, len(states)))
        # The states of a class that are not compared keep its label; if there are none, its largest part does.
        last = np.flatnonzero(np.append(of[1:] != of[:-1], True))
        compared = np.diff(np.append(0, lengths.cumsum()[last]))
        moved = np.ones(len(parts), dtype=bool)
        moved[np.lexsort((lengths, of))[last[compared == sizes[of[last]]]]] = False
        np.subtract.at(sizes, of[moved], lengths[moved])
        of[moved] = np.arange(count, count + moved.sum())
        sizes[of[moved]] = lengths[moved]
        count += int(moved.sum())
        label[states] = np.repeat(of, lengths)
        changed = states[np.repeat(moved, lengths)]
        entering = begin[changed + 1] - begin[changed]
        offset = np.repeat(begin[changed] - (entering.cumsum() - entering), entering)
        states = np.unique(before[offset + np.arange(len(offset))])
    return label


def distinct_columns(table: NDArray[np.integer[Any]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The first of each kind of equal columns, and the kind of each column."""
    known: dict[bytes, int] = {}
    first: list[int] = []
    kind = np.empty(table.shape[1], dtype=np.int64)
    for place, column in enumerate(np.ascontiguousarray(table.T)):
        kind[place] = known.setdefault(column.tobytes(), len(first))
        if kind[place] == len(first):
            first.append(place)
    return np.array(first), kind


def check_closed(regex: str, name: str) -> None:
    """Reject (ValueError) an expression that closes a group which it did not open: it is put into one."""
    if any(depth < 0 for _, depth in _signs(regex)):
        raise ValueError(f"{name} has a ')' without a '('; add it, or write \\)")


def without_anchors(regex: str) -> str:
    """An expression without the anchors around it, which are true of whole answers.

    Raises:
        ValueError: they are of one of several alternatives, or within the expression, where they do not hold.
    """
    whole = regex.removeprefix("^")
    if [*_signs(whole)][-1:] == [("$", 0)]:
        whole = whole[:-1]
    signs = {*_signs(whole)}
    if whole != regex and ("|", 0) in signs:
        raise ValueError("it has anchors beside alternatives; leave them out, as the whole answer has to match")
    if not _LINES.search(whole) and (inner := sorted({sign for sign, _ in signs if sign in _ANCHORS})):
        raise ValueError(f"it has {inner[0]!r} within; leave it out, as the whole answer has to match")
    return whole


def _signs(regex: str) -> Iterator[tuple[str, int]]:
    """The signs and escapes of an expression without those in classes, and how many groups each is in."""
    depth, at, classes = 0, 0, 0
    while at < len(regex):
        letter = regex[at]
        if letter == "\\":
            at += 2
            if not classes:
                yield regex[at - 2 : at], depth
            continue
        if letter == "[":
            classes += 1
            at += regex[at + 1 : at + 2] == "^"
            at += regex[at + 1 : at + 2] == "]"
        elif classes:
            classes -= letter == "]"
        else:
            depth += (letter == "(") - (letter == ")")
            yield letter, depth
        at += 1


def escaped(text: str) -> str:
    """The expression of a text."""
    return "".join(letter if letter.isalnum() and letter.isascii() else f"\\x{{{ord(letter):X}}}" for letter in text)


def _check_size(regex: str, name: str) -> None:
    """Reject (ValueError) an expression whose automaton could be too large to be compiled at all."""
    flat, nested = _repeated(regex)
    for total, most in ((flat, _MOST_REPEATED), (nested, _MOST_NESTED)):
        if total > most:
            raise ValueError(f"{name} repeats parts {total} times in all, and {most} is the most; use smaller bounds")
    if len(regex) > _LONGEST:
        raise ValueError(f"{name} is too large; use a smaller one, or a smaller depth")


def _repeated(regex: str) -> tuple[int, int]:
    """The sum of all counts of repetitions, and that of each times those of the groups that it is in."""
    flat, groups, closed = 0, [0], 0
    for part in _COUNTED.finditer(regex):
        if part[0] == "(":
            groups.append(0)
        elif part[0] == ")" and len(groups) > 1:
            closed = groups.pop()
            groups[-1] += closed
            continue
        elif part[1] is not None:
            times = max(int(part[1]), int(part[2] or 0))
            flat += times
            groups[-1] += times + closed * max(0, times - 1)
        closed = 0
    return flat, sum(groups)


def _why(message: str) -> str:
    if "incompatible" in message:
        return "an anchor or a word boundary never holds; leave it out, as the whole answer has to match"
    if "NFA" in message:
        return (
            "it is not valid in the syntax of Rust's regex, which has no lookaround and no back-references; correct it"
        )
    lines = [line.strip(" ^") for line in message.splitlines() if line.strip(" ^")]
    last = lines[-1].removeprefix("error: ") if lines else message
    return f"{first_line(ValueError(last))}; use the syntax of Rust's regex (no lookaround, no back-references)"
