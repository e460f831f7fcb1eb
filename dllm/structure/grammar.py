"""A context-free grammar (Lark's EBNF) as a regular expression of texts that it derives.

A rule that repeats itself at its left or right end is a repetition (A: A x | y is y x*); one that contains itself in
between is expanded to a bounded depth. So each text of the expression is one of the grammar's, and those that nest
deeper are left out. Between two terminals, what the grammar ignores may stand once. With terminals of which one text
can begin another, Lark's default lexer may split a text otherwise; `Lark(grammar, lexer="dynamic_complete")` tries all
ways.
"""

from __future__ import annotations

import re
import unicodedata
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dllm.checks import first_line
from dllm.structure.expressions import Dialect, translated
from dllm.structure.language import Automaton, check_closed, compile_regex, escaped, extra

# Lark's own terminals for strings, which looks behind, and for comments, which is lazy; automata do neither.
_COMMON = {
    r'".*?(?<!\\)(\\\\)*?"': r'"(?:[^"\\\n]|\\[^\n])*"',
    "/\\*(.|\n)*?\\*/": r"/\*(?:[^*]|\*+[^*/])*\*+/",
}
# Python's classes, without the letters that are newer than its version of Unicode; Rust's is 16.
_VERSION = min(float(unicodedata.unidata_version.rpartition(".")[0]), 16.0)
_PYTHON = Dialect(
    {"d": f"[\\d&&\\p{{Age={_VERSION}}}]", "w": f"[\\p{{L}}\\p{{Nd}}_&&\\p{{Age={_VERSION}}}]", "s": "\\s\\x1C-\\x1F"},
    {"d": "\\d", "w": "\\w\\p{N}", "s": "\\s\\x1C-\\x1F"},
)
_ORDERED = re.compile(r"\||[*+?}]\?")  # alternatives and lazy repetitions
_ASCII = [*b"abcdefghijklmnopqrstuvwxyz", *b"0123456789", *range(33, 48), *range(58, 97), *range(123, 127), 32, 10, 9]
_TRIED = 3000  # words of a terminal and their beginnings
_LONGEST, _MOST_RULES = 2_000_000, 50_000  # characters of an expression; rules, each within others


def grammar_regex(text: str, depth: int) -> str:
    """The expression of the texts that a grammar derives from its rule `start`.

    Args:
        text: of the grammar.
        depth: how often a rule may contain itself.

    Raises:
        ValueError: an invalid grammar, or one without a text of that depth.
    """
    library = extra("lark", "grammar")
    try:
        grammar = library.Lark(text, parser="earley", maybe_placeholders=False)
    except (library.exceptions.LarkError, re.error, OverflowError) as error:
        raise ValueError(f"grammar is not valid: {first_line(error)}; correct it") from None
    productions: dict[str, list[list[Any]]] = {}
    for rule in grammar.rules:
        productions.setdefault(rule.origin.name, []).append(rule.expansion)
    terminals = {each.name: _terminal(each.name, each.pattern) for each in grammar.terminals}
    ignored = "|".join(terminals[name] for name in grammar.ignore_tokens)
    between = f"(?:{ignored})?" if ignored else ""
    expanded = _Expansion(productions, terminals, between, depth).rule("start", {})
    if expanded is None:
        raise ValueError(f"grammar has no text that ends within depth={depth}; use a larger depth")
    return between + expanded


def _terminal(name: str, pattern: Any) -> str:
    if pattern.type == "str":
        found = escaped(pattern.value)
    else:
        found = pattern.value
        for theirs, ours in _COMMON.items():
            found = found.replace(theirs, ours)
        if "x" in pattern.flags:
            raise ValueError(f"grammar has the flag x at {name}, which is not supported; leave out the spaces")
        try:
            found = translated(found, _PYTHON)
        except ValueError as error:
            raise ValueError(f"grammar has a terminal {name} that cannot be expressed: {error}") from None
        check_closed(found, f"terminal {name}")
    flags = "".join(sorted(pattern.flags))
    found = f"(?{flags}:{found})"
    if pattern.type != "str" and _ORDERED.search(pattern.value):
        _check_first_match(name, re.compile(f"(?{flags}:{pattern.value})"), compile_regex(found, f"terminal {name}"))
    return found


def _check_first_match(name: str, pattern: re.Pattern[str], automaton: Automaton) -> None:
    """Reject a terminal of which Lark takes less than a whole word: Python tries alternatives in their order.

    Short words are tried, of all states that they lead through.
    """
    waiting = deque([(automaton.start, b"")])
    for _ in range(_TRIED):
        if not waiting:
            return
        state, word = waiting.popleft()
        taken = pattern.match(word.decode()) if automaton.accepting[state] else None
        if taken is not None and taken.end() < len(word):
            raise ValueError(
                f"grammar has a terminal {name} of which Lark takes {taken[0]!r} where {word.decode()!r} stands; put "
                "longer alternatives first, and write what a lazy repetition must not hold ([^...]*)"
            )
        _, first = np.unique(automaton.follow[state, _ASCII], return_index=True)
        letters = [_ASCII[place] for place in sorted(first) if automaton.follow[state, _ASCII[place]]]
        waiting.extend((int(automaton.follow[state, letter]), word + bytes([letter])) for letter in letters)


@dataclass
class _Expansion:
    """Expands rules.

    Attributes:
        productions: what each rule may become.
        terminals: their expressions.
        between: what may follow each terminal.
        depth: how often a rule may contain itself.
        known: expanded rules, by what they are within.
    """

    productions: Mapping[str, list[list[Any]]]
    terminals: Mapping[str, str]
    between: str
    depth: int
    known: dict[tuple[Any, ...], str | None] = field(default_factory=dict)

    def rule(self, name: str, within: Mapping[str, int]) -> str | None:
        """The expression of a rule; None where it has no text."""
        if within.get(name, 0) > self.depth:
            return None
        key = name, *sorted(within.items())
        if key not in self.known:
            self.known[key] = self._expanded(name, {**within, name: within.get(name, 0) + 1})
            self._check(len(self.known[key] or ""))
        return self.known[key]

    def _check(self, length: int) -> None:
        """Reject (ValueError) a text that is too long, or too many of them."""
        if length > _LONGEST or len(self.known) > _MOST_RULES:
            raise ValueError(f"grammar is too large with depth={self.depth}; use a smaller depth")

    def _expanded(self, name: str, within: Mapping[str, int]) -> str | None:
        productions = [each for each in self.productions[name] if [symbol.name for symbol in each] != [name]]
        own = [[symbol.name == name for symbol in each] for each in productions]
        for end in (0, -1):
            # All of its recursion is at one end.
            if any(map(any, own)) and all(sum(each) <= 1 and any(each) == (any(each) and each[end]) for each in own):
                others = [each for each, at in zip(productions, own, strict=True) if not any(at)]
                repeated = [
                    each[1:] if end == 0 else each[:-1] for each, at in zip(productions, own, strict=True) if any(at)
                ]
                base, again = self._either(others, within), self._either(repeated, within)
                if base is None or again is None:
                    return base
                return f"{base}{again}*" if end == 0 else f"{again}*{base}"
        return self._either(productions, within)

    def _either(self, productions: list[list[Any]], within: Mapping[str, int]) -> str | None:
        found = [self._sequence(each, within) for each in productions]
        texts = [each for each in dict.fromkeys(found) if each is not None]
        return f"(?:{'|'.join(texts)})" if texts else None

    def _sequence(self, symbols: list[Any], within: Mapping[str, int]) -> str | None:
        text = ""
        for symbol in symbols:
            if symbol.is_term:
                if symbol.name not in self.terminals:
                    raise ValueError(f"grammar declares {symbol.name} without saying what it matches; define it")
                text += self.terminals[symbol.name] + self.between
            else:
                found = self.rule(symbol.name, within)
                if found is None:
                    return None
                text += found
            self._check(len(text))
        return text
