"""An automaton over bytes, lifted to the tokens of a tokenizer.

A token is a map from states to states: that of its bytes, one after another. Tokens with the same map are one class,
and there are few of them (all tokens of four letters, say), so that a vocabulary of 150,000 tokens takes a table of
states x classes. Maps are computed for the prefixes of all tokens at once, byte by byte; what leads nowhere is dropped
on the way. Characters that are split across tokens need no care, since states lie between bytes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from dllm.checks import telling_panics
from dllm.structure.language import Automaton, distinct_columns

# Classes that every table has: tokens that fit nowhere, given tokens that write nothing, and end-of-text.
NOWHERE, NOTHING, END = 0, 1, 2
_MOST_ENTRIES = 2**27  # of a table, in two or four bytes each
_REMEMBERED = 512  # sets of allowed classes
_CHUNK = 2048
# Decoders that write one token after another, up to a letter that begins the text.
_READABLE = re.compile(
    "(Replace |Metaspace )*ByteLevel (Strip )?|(Replace |Metaspace |ByteFallback )*((Fuse )+(Replace )*(Strip )?)?"
)
_SINGLE = re.compile(r"\[([^\\^\[\]&-])\]")  # a class of one letter
_BYTE = re.compile(rb"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True, eq=False)
class TokenAutomaton:
    """A deterministic automaton over classes of tokens; state 0 is the dead one, and the last one follows end-of-text.

    Attributes:
        table: (S, C) the next state of each.
        classes: (V,) class of each token, without end-of-text.
        start: the first state.
        final: (S,) whether a text may end there.
        distance: (S,) the fewest tokens to such a state.
        source: (E,) state before each pair of states that some token connects, ascending.
        target: (E,) state after it.
        remembered: allowed classes by what is before and after a position.
    """

    table: NDArray[np.integer[Any]]
    classes: NDArray[np.int64]
    start: int
    final: NDArray[np.bool_]
    distance: NDArray[np.int64]
    source: NDArray[np.int64]
    target: NDArray[np.int64]
    remembered: dict[tuple[bytes, bytes], NDArray[np.bool_]] = field(default_factory=dict)

    def step(self, states: NDArray[np.bool_], token: int) -> NDArray[np.bool_]:
        """The states after a class of tokens; after any token where it is negative."""
        after = np.zeros_like(states)
        after[self.target[states[self.source]] if token < 0 else self.table[states, token]] = True
        after[0] = False
        return after

    def back(self, states: NDArray[np.bool_], token: int) -> NDArray[np.bool_]:
        """The states before a class of tokens; before any token where it is negative."""
        if token >= 0:
            return np.asarray(states[self.table[:, token]])
        before = np.zeros_like(states)
        before[self.source[states[self.target]]] = True
        return before

    def between(self, before: NDArray[np.bool_], after: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """(C,) the classes that lead from one of the states before to one of those after."""
        key = before.tobytes(), after.tobytes()
        if (found := self.remembered.get(key)) is None:
            found = after[self.table[before]].any(0)
            found[[NOWHERE, NOTHING]] = False
            if len(self.remembered) >= _REMEMBERED:
                self.remembered.clear()
            self.remembered[key] = found
        return found


def lift(
    automaton: Automaton, words: Sequence[bytes | None], first: Sequence[bytes | None], name: str
) -> TokenAutomaton:
    """The automaton over the tokens of a vocabulary.

    Args:
        automaton: over bytes.
        words: bytes of each token after another one; None where it may not be written.
        first: those of each token that begins a text.
        name: of the format in errors.

    Raises:
        ValueError: the tokens cannot write any word, or the table would be too large.
    """
    after, begin = _after(automaton, first), len(automaton.follow)  # a state to which nothing leads back
    automaton = Automaton(
        np.concatenate((automaton.follow, automaton.follow[automaton.start][None])),
        begin,
        np.append(automaton.accepting, automaton.accepting[automaton.start]),
    )
    maps, classes = _maps(automaton, words, name)
    # Tokens that begin a text otherwise are of other classes; maps of prefixes are dropped.
    kinds, classes = np.unique(classes * (begin + 1) + after, return_inverse=True)
    used, after = np.divmod(kinds, begin + 1)
    table, classes = maps[used].T, classes.ravel()
    table[begin] = after
    kept = _useful(automaton, table)
    if not kept[begin]:
        raise ValueError(
            f"{name} cannot be written with the tokens of this model; use other characters, or another model"
        )
    kept[0] = True
    number = np.cumsum(kept) - 1
    number[~kept] = 0
    table = number[table[kept]]
    last = len(table)
    columns, inverse = distinct_columns(table)
    classes = np.where(table.any(0)[classes], inverse[classes] + 3, NOWHERE)
    final = np.append(automaton.accepting[kept], True)
    whole = np.zeros((last + 1, len(columns) + 3), dtype=np.uint16 if last < 2**16 - 1 else np.uint32)
    whole[:last, 3:] = table[:, columns]
    whole[:, NOTHING] = np.arange(last + 1)
    whole[final, END] = last
    source, target = _edges(np.delete(whole, NOTHING, axis=1))
    distance = _distance(final, source, target)
    return TokenAutomaton(whole, classes, int(number[begin]), final, distance, source, target)


def _after(automaton: Automaton, words: Sequence[bytes | None]) -> NDArray[np.int64]:
    """(V,) the state after each token at the start, the same after one that writes nothing."""
    flat, begin, lengths = _flat(words)
    states = np.array([0 if word is None else automaton.start for word in words], dtype=np.int64)
    for at in range(lengths.max(initial=0)):
        alive = np.flatnonzero((states > 0) & (lengths > at))
        states[alive] = automaton.follow[states[alive], flat[begin[alive] + at]]
    return states


def _flat(words: Sequence[bytes | None]) -> tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.int64]]:
    """The bytes of all tokens, where each begins, and how many it has."""
    lengths = np.array([len(word or b"") for word in words], dtype=np.int64)
    return np.frombuffer(b"".join(word or b"" for word in words), dtype=np.uint8), lengths.cumsum() - lengths, lengths


def _maps(
    automaton: Automaton, words: Sequence[bytes | None], name: str
) -> tuple[NDArray[np.integer[Any]], NDArray[np.int64]]:
    """The (C, S) maps of all tokens, and the map of each; the first leads nowhere."""
    columns, kind = distinct_columns(automaton.follow)
    states = len(automaton.follow)
    follow = automaton.follow[:, columns].astype(np.uint16 if states < 2**16 else np.uint32)
    flat, begin, lengths = _flat(words)
    maps = [np.zeros(states, dtype=follow.dtype), np.arange(states, dtype=follow.dtype)]
    known = {each.tobytes(): number for number, each in enumerate(maps)}
    classes = (lengths > 0).astype(np.int64)
    alive, at = np.flatnonzero(lengths), 0
    while alive.size:
        keys, inverse = np.unique(classes[alive] * follow.shape[1] + kind[flat[begin[alive] + at]], return_inverse=True)
        made = np.empty(len(keys), dtype=np.int64)
        for low in range(0, len(keys), _CHUNK):
            of, byte = np.divmod(keys[low : low + _CHUNK], follow.shape[1])
            rows = follow[np.stack([maps[each] for each in of]), byte[:, None]]
            for place, row in enumerate(rows, start=low):
                made[place] = known.setdefault(row.tobytes(), len(maps))
                if made[place] == len(maps):
                    maps.append(row)
            if len(maps) * states > _MOST_ENTRIES:
                raise ValueError(
                    f"{name} has {states} states, too many for the tokens of this model; use shorter bounds"
                )
        classes[alive] = made[inverse]
        at += 1
        alive = alive[(classes[alive] > 0) & (lengths[alive] > at)]
    return np.stack(maps), classes


def _useful(automaton: Automaton, table: NDArray[np.integer[Any]]) -> NDArray[np.bool_]:
    """The states that tokens reach, and from which they reach an accepting one."""
    source, target = _edges(table)
    reached = np.zeros(len(table), dtype=bool)
    reached[automaton.start] = True
    while True:
        more = reached.copy()
        more[target[reached[source]]] = True
        if (more == reached).all():
            break
        reached = more
    return np.asarray(reached & (_distance(automaton.accepting, source, target) < len(table)))


def _edges(table: NDArray[np.integer[Any]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The pairs of live states that some class connects."""
    targets = [np.unique(row) for row in table]
    targets = [row[row > 0].astype(np.int64) for row in targets]
    return np.repeat(np.arange(len(table)), [len(row) for row in targets]), np.concatenate(targets)


def _distance(final: NDArray[np.bool_], source: NDArray[np.int64], target: NDArray[np.int64]) -> NDArray[np.int64]:
    """The fewest edges from each state to a final one; the number of states where there is no way."""
    distance = np.where(final, 0, len(final))
    step = 0
    while True:
        near = source[distance[target] == step]
        near = near[distance[near] > step + 1]
        if not near.size:
            return distance
        step += 1
        distance[near] = step


def token_bytes(tokenizer: PreTrainedTokenizerBase, size: int) -> tuple[Sequence[bytes | None], Sequence[bytes | None]]:
    """What each token writes after another one, and what at the begin of a text; None for special ones.

    Args:
        tokenizer: of the model.
        size: entries of the logits.

    Raises:
        ValueError: a tokenizer whose tokens do not simply write bytes.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise _unknown("it has no tokenizer.json")
    steps = _steps(json.loads(backend.to_str())["decoder"])
    special = set(tokenizer.all_special_ids)
    special |= {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    words: list[bytes | None] = [None] * size
    first = words.copy()
    for piece, number in tokenizer.get_vocab().items():
        if number < size and number not in special:
            words[number], first[number] = _written(piece, steps, begins=False), _written(piece, steps, begins=True)
    _probe(tokenizer, words, first)
    return words, first


def _steps(decoder: Any) -> list[tuple[str, bytes, bytes]]:
    """The steps of a decoder: their kinds, what they look for, and what they write for it.

    Raises:
        ValueError: one that does not write one token after another.
    """
    decoders = [each for each in _decoders(decoder) if each["type"] != "Strip" or each["start"] or each["stop"]]
    kinds = "".join(f"{each['type']} " for each in decoders)
    if not kinds or not _READABLE.fullmatch(kinds):
        raise _unknown(f"its decoder is {', '.join(kinds.split()) or 'null'}")
    steps: list[tuple[str, bytes, bytes]] = []
    for each in decoders:
        kind, old, new = each["type"], "", " "
        match kind:
            case "Replace":
                (old,), new = each["pattern"].values(), each["content"]
                if "Regex" in each["pattern"] and (single := _SINGLE.fullmatch(old)):
                    old = single[1]
                fused = any(kind == "Fuse" for kind, _, _ in steps)  # else each token is looked at alone
                if not old or (fused and len(old) > 1) or ("Regex" in each["pattern"] and re.escape(old) != old):
                    raise _unknown(f"its decoder replaces {old!r}")
            case "Metaspace":
                old = each["replacement"]
                kind = "Replace" if each["prepend_scheme"] == "never" else kind
            case "Strip":
                old = each["content"] * each["start"]
                if len(old) > 1 or each["stop"]:
                    raise _unknown(f"its decoder strips {each['start']} and {each['stop']} of {each['content']!r}")
        steps.append((kind, old.encode(), new.encode()))
    return steps


def _decoders(decoder: Any) -> list[dict[str, Any]]:
    if decoder is None:
        return []
    if decoder["type"] == "Sequence":
        return [inner for each in decoder["decoders"] for inner in _decoders(each)]
    return [decoder]


def _byte_alphabet() -> dict[str, int]:
    """The byte that each letter of a byte-level vocabulary stands for (GPT-2)."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + place): byte for place, byte in enumerate(hidden)}


_ALPHABET = _byte_alphabet()


def _written(piece: str, steps: list[tuple[str, bytes, bytes]], *, begins: bool) -> bytes | None:
    """What a token writes, at the begin of a text or after others; None where other tokens decide that."""
    found, part = piece.encode(), False
    for kind, old, new in steps:
        match kind:
            case "ByteLevel":
                letters = found.decode()
                found = bytes(_ALPHABET[each] for each in letters) if _ALPHABET.keys() >= set(letters) else found
            case "ByteFallback":
                if code := _BYTE.fullmatch(found):
                    found, part = bytes([int(code[1], 16)]), True
            case "Replace" | "Metaspace" if part and found in old:  # with the bytes after it, it may be replaced
                return None
            case "Replace":
                found = found.replace(old, new)
            case "Metaspace":  # drops all of the first token, wherever they are in it
                found = found.replace(old, b"" if begins else new)
            case "Strip" if begins:
                found = found.removeprefix(old)
    return found


def _probe(tokenizer: PreTrainedTokenizerBase, words: Sequence[bytes | None], first: Sequence[bytes | None]) -> None:
    """Reject a tokenizer that writes some texts otherwise."""
    numbers = [number for number, word in enumerate(words) if word]
    every = max(1, len(numbers) // 64)
    texts = [[*pair] for pair in zip(numbers[::every], numbers[1::every], strict=False)]
    number = {words[number]: number for number in numbers}
    # What `clean_up_tokenization_spaces` would change.
    for mark in (b".", b"?", b"!", b","):
        texts += [
            [numbers[0], *map(number.__getitem__, tail)]
            for tail in ([b" " + mark], [b" ", mark])
            if number.keys() >= set(tail)
        ]
    for text in texts:
        written = [first[text[0]], *(words[each] for each in text[1:])]
        expected = b"".join(each or b"" for each in written).decode(errors="replace")
        with telling_panics("response_format: tokens cannot be decoded", "use the tokenizer of the published model"):
            found = str(tokenizer.decode(text, skip_special_tokens=True))
        if "\ufffd" not in expected + found and found != expected:  # parts of characters are shown in different ways
            raise _unknown(f"it writes {found!r} for {expected!r}")


def _unknown(why: str) -> ValueError:
    return ValueError(f"response_format does not support the tokenizer of this model ({why}); use a byte-level one")
