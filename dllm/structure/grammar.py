"""A context-free grammar (Lark's EBNF) as a regular expression of texts that it derives.

A rule that repeats itself at its left or right end is a repetition (A: A x | y is y x*); one that contains itself in
between is expanded to a bounded depth. So each text of the expression is one of the grammar's, and those that nest
deeper are left out. Before a terminal, what the grammar ignores may stand once, unless Lark would ignore more than
that: it takes the longest. With terminals of which one text can begin another, Lark's default lexer may split a text
otherwise; `Lark(grammar, lexer="dynamic_complete")` tries all ways, each terminal by Python's first match.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dllm.checks import first_line
from dllm.structure.expressions import FIRST, SECOND, Dialect, sampled, translated
from dllm.structure.language import Automaton, compile_regex, extra

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
    anchors=False,
)
_MARKS = [ord(FIRST), ord(SECOND)]
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
        grammar = library.Lark(text, parser="earley", maybe_placeholders=False, import_paths=[_imported])
    except (library.exceptions.LarkError, re.error, OverflowError) as error:
        raise ValueError(f"grammar is not valid: {first_line(error)}; correct it") from None
    productions: dict[str, list[list[Any]]] = {}
    for rule in grammar.rules:
        productions.setdefault(rule.origin.name, []).append(rule.expansion)
    written = {each.name: _python(each.pattern) for each in grammar.terminals}
    terminals = {name: _terminal(name, text) for name, text in written.items()}
    automata = _checked(written)
    ignored = [name for name in terminals if name in grammar.ignore_tokens]
    between = {
        name: _optional([terminals[each] for each in ignored if not _goes_on(automata[each], automata[name])])
        for name in terminals
    }
    preceded = {name: between[name] + terminal for name, terminal in terminals.items()}
    expanded = _Expansion(productions, preceded, depth).rule("start", {})
    if expanded is None:
        raise ValueError(f"grammar has no text that ends within depth={depth}; use a larger depth")
    return expanded + _optional([terminals[each] for each in ignored])


def _imported(base: Any, path: str) -> Any:
    """One of Lark's own grammars; other files are not part of a format, and may change unnoticed.

    Raises:
        ValueError: another file.
    """
    relative = isinstance(base, str)
    with suppress(OSError):
        if not relative:
            return extra("lark", "grammar").load_grammar.stdlib_loader(base, path)
    name = "." * relative + ".".join(Path(path).with_suffix("").parts)
    raise ValueError(f"grammar imports {name!r}, which is not one of Lark's own; write its rules into the grammar")


def _python(pattern: Any) -> str:
    """The expression of a terminal as Python reads it."""
    text = str(pattern.to_regexp())
    for theirs, ours in _COMMON.items():
        text = text.replace(theirs, ours)
    return text


def _terminal(name: str, text: str) -> str:
    try:
        return f"(?:{translated(text, _PYTHON)})"
    except ValueError as error:
        raise ValueError(f"grammar has a terminal {name} that cannot be expressed: {error}") from None


def _optional(regexes: list[str]) -> str:
    return f"(?:{'|'.join(regexes)})?" if regexes else ""


def _checked(written: Mapping[str, str]) -> dict[str, Automaton]:
    """The automata of terminals, over a sample of their letters.

    Raises:
        ValueError: one of which Lark takes less than a whole word, as Python tries alternatives in their order.
    """
    samples = sampled(written, _PYTHON)
    automata = {}
    for name, (regex, choices) in samples.items():
        automata[name] = compile_regex(regex, f"terminal {name}")
        found = _cut_short(automata[name], compile_regex(choices, f"terminal {name}"))
        if found is not None:
            word, taken = found
            raise ValueError(
                f"grammar has a terminal {name} of which Lark takes {taken!r} where {word!r} stands; put "
                "longer alternatives first, and write what a lazy repetition must not hold ([^...]*)"
            )
    return automata


def _cut_short(automaton: Automaton, choices: Automaton) -> tuple[str, str] | None:
    """The shortest word that is not Python's first match of itself, and that match.

    Args:
        automaton: of the words.
        choices: of the words with marks of how they are read.
    """
    follow = choices.follow

    def ready(states: Iterable[int]) -> tuple[tuple[int, ...], bool]:
        """The states after all choices, the first ones first, up to one that ends; and whether there is one."""
        found: dict[int, None] = {}
        visits = Counter[int]()
        waiting = [*states][::-1]
        while waiting:
            state = waiting.pop()
            visits[state] += 1
            if choices.accepting[state]:
                return tuple(found), True
            ways = [int(each) for each in follow[state, _MARKS] if each]
            if not ways:
                found[state] = None
            elif visits[state] == 1:
                waiting += ways[::-1]
            elif visits[state] == 2:  # a repetition ends after a part without letters
                waiting.append(ways[-1])
        return tuple(found), False

    begin, _ = ready([choices.start])
    waiting, known = deque([(automaton.start, begin, b"", b"")]), {(automaton.start, begin)}
    while waiting:
        state, threads, word, taken = waiting.popleft()
        for byte in np.flatnonzero(automaton.follow[state]).tolist():
            longer = word + bytes([byte])
            following, ends = ready(int(each) for each in follow[list(threads), byte] if each)
            after = int(automaton.follow[state, byte])
            if automaton.accepting[after] and not ends:
                return longer.decode(), taken.decode()
            if (after, following) not in known:
                known.add((after, following))
                waiting.append((after, following, longer, longer if ends else taken))
    return None


def _goes_on(ignored: Automaton, terminal: Automaton) -> bool:
    """Whether a word of an ignored terminal can go on with what another one begins with.

    Lark ignores as much as it can.
    """
    waiting = [(int(state), terminal.start) for state in np.flatnonzero(ignored.accepting)]
    known = {*waiting}
    while waiting:
        one, other = waiting.pop()
        both = np.flatnonzero((ignored.follow[one] > 0) & (terminal.follow[other] > 0))
        for pair in zip(ignored.follow[one, both].tolist(), terminal.follow[other, both].tolist(), strict=True):
            if ignored.accepting[pair[0]] or terminal.accepting[pair[1]]:
                return True
            if pair not in known:
                known.add(pair)
                waiting.append(pair)
    return False


@dataclass
class _Expansion:
    """Expands rules.

    Attributes:
        productions: what each rule may become.
        terminals: their expressions, with what may be ignored before each.
        depth: how often a rule may contain itself.
        known: expanded rules, by what they are within.
    """

    productions: Mapping[str, list[list[Any]]]
    terminals: Mapping[str, str]
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
                text += self.terminals[symbol.name]
            else:
                found = self.rule(symbol.name, within)
                if found is None:
                    return None
                text += found
            self._check(len(text))
        return text
