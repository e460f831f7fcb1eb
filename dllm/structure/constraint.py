"""Which tokens a partly masked row may take so that it can still become a word of a language.

A row of n positions is a path of n steps through an automaton over tokens: a decided position follows its token, a mask
any token. With F_i the states that lie i steps after the start, B_i those from which n - i steps lead to a final one,

    F_0 = {start},  F_{i+1} = {d(s, t): s in F_i},  B_n = final,  B_i = {s: d(s, t) in B_{i+1}},

t ranging over what position i may be, token t may stand at position i if and only if

    d(s, t) in B_{i+1}  for some s in F_i

(arXiv 2508.10111). Tokens that may each stand alone may conflict with each other, so `accepted` takes them one after
another. A text is followed by end-of-text up to the last position.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import Any, ClassVar, TypeAlias
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from dllm.structure.formats import ResponseFormat
from dllm.structure.tokens import END, NOTHING, NOWHERE, TokenAutomaton, lift, token_bytes

MASK = -1  # class of a mask
_KEPT = 16  # formats of a tokenizer

_Words: TypeAlias = tuple[Sequence[bytes | None], Sequence[bytes | None]]
_lock = Lock()
_words: WeakKeyDictionary[PreTrainedTokenizerBase, dict[tuple[Any, ...], _Words]] = WeakKeyDictionary()
_built: WeakKeyDictionary[PreTrainedTokenizerBase, OrderedDict[tuple[Any, ...], Constraint]] = WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class Constraint:
    """A language in the tokens of a model.

    Attributes:
        automaton: over classes of tokens.
        classes: (V,) class of each token; end-of-text has its own.
        special: ids whose text is not part of an answer.
        key: of the format; equal for equal languages.
        on_device: copies of `classes`, by device.
    """

    automaton: TokenAutomaton
    classes: NDArray[np.int64]
    special: frozenset[int]
    key: str = ""
    on_device: dict[Any, Any] = field(default_factory=dict)

    def __reduce__(self) -> tuple[Any, ...]:
        """For other processes (tensor parallelism), which have devices of their own."""
        return type(self), (self.automaton, self.classes, self.special, self.key)

    @classmethod
    def build(
        cls, form: ResponseFormat, tokenizer: PreTrainedTokenizerBase, size: int, ends: Sequence[int]
    ) -> Constraint:
        """The constraint of a format; built once for each tokenizer.

        Args:
            form: the format.
            tokenizer: of the model.
            size: entries of the logits.
            ends: ids that end a text.

        Raises:
            ValueError: a format or a tokenizer that is not supported.
        """
        key = form.key, size, tuple(ends), len(tokenizer), _special(tokenizer)
        with _lock:
            kept = _built.setdefault(tokenizer, OrderedDict())
            if key not in kept:
                kept[key] = cls._made(form, tokenizer, size, ends)
                if len(kept) > _KEPT:
                    kept.popitem(last=False)
            kept.move_to_end(key)
            return kept[key]

    @classmethod
    def _made(
        cls, form: ResponseFormat, tokenizer: PreTrainedTokenizerBase, size: int, ends: Sequence[int]
    ) -> Constraint:
        sizes, key = _words.setdefault(tokenizer, {}), (size, len(tokenizer), _special(tokenizer))
        if key not in sizes:
            sizes[key] = token_bytes(tokenizer, size)
        words, first = ([None if n in ends else word for n, word in enumerate(each)] for each in sizes[key])
        lifted = lift(form.compiled.automaton, words, first, form.name)
        classes = lifted.classes.copy()
        classes[[number for number in ends if number < size]] = END
        return cls(lifted, classes, _special(tokenizer), form.key)

    def read(self, tokens: NDArray[np.int64], mask_token_id: int, silent: NDArray[np.bool_]) -> NDArray[np.int64]:
        """The class of each of some tokens.

        Args:
            tokens: of a row.
            mask_token_id: id of a mask.
            silent: tokens that write nothing: special ones that were given.
        """
        known = (tokens >= 0) & (tokens < len(self.classes))
        found = np.where(known, self.classes[np.where(known, tokens, 0)], NOWHERE)
        return np.where(tokens == mask_token_id, MASK, np.where(silent, NOTHING, found))

    end: ClassVar[int] = END

    @property
    def shortest(self) -> int:
        """Tokens of the shortest text."""
        return int(self.automaton.distance[self.automaton.start])


class Tracker:
    """The sets F and B of one row, extended where they are asked for and dropped where a change makes them stale.

    Args:
        automaton: the language.
        length: positions of the row, all masked.
    """

    def __init__(self, automaton: TokenAutomaton, length: int) -> None:
        self._automaton = automaton
        self.classes = np.full(length, MASK)
        self._forward = np.zeros((length + 1, len(automaton.final)), dtype=bool)
        self._forward[0, automaton.start] = True
        # After a masked position end-of-text may fill what a shorter text leaves.
        left = np.arange(length, -1, -1)
        self._backward = automaton.distance <= left[:, None]
        self._backward[:, 0] = False
        self._known, self._since = 0, 0  # F up to the one, B from the other

    def read(self, classes: NDArray[np.int64]) -> None:
        """Take over the classes of all positions."""
        changed = np.flatnonzero(classes != self.classes)
        if changed.size:
            self.classes = classes.copy()
            self._known, self._since = min(self._known, int(changed[0])), max(self._since, int(changed[-1]) + 1)

    def fork(self, classes: NDArray[np.int64]) -> Tracker:
        """A tracker of the same row with other tokens."""
        other = object.__new__(Tracker)
        other._automaton, other.classes = self._automaton, self.classes
        other._forward, other._backward = self._forward.copy(), self._backward.copy()
        other._known, other._since = self._known, self._since
        other.read(classes)
        return other

    def _before(self, place: int) -> NDArray[np.bool_]:
        while self._known < place:
            at = self._known
            self._forward[at + 1] = self._automaton.step(self._forward[at], int(self.classes[at]))
            self._known += 1
        return self._forward[place]

    def _after(self, place: int) -> NDArray[np.bool_]:
        while self._since > place:
            at = self._since - 1
            self._backward[at] = self._automaton.back(self._backward[at + 1], int(self.classes[at]))
            self._since -= 1
        return self._backward[place]

    def fits(self, row: NDArray[np.int64]) -> bool:
        """Whether the masks of a row with other classes can be filled to a word."""
        changed = np.flatnonzero(row != self.classes)
        return not changed.size or self._fits(row, int(changed[0]), int(changed[-1]) + 1)

    @property
    def satisfiable(self) -> bool:
        """Whether the masks can be filled to a word."""
        return bool((self._before(self._since) & self._after(self._since)).any())

    def allowed(self, place: int) -> NDArray[np.bool_]:
        """(C,) the classes that may stand at a position, whatever stands there now."""
        return self._automaton.between(self._before(place), self._after(place + 1))

    def accepted(self, places: NDArray[np.int64], classes: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which of some changes may be made, in this order, each given those before it.

        Args:
            places: distinct positions.
            classes: of the tokens to write there.
        """
        taken = np.ones(len(places), dtype=bool)
        if not len(places):
            return taken
        low, high = int(places.min()), int(places.max()) + 1
        row = self.classes.copy()
        row[places] = classes
        if self._fits(row, low, high):
            return taken
        row = self.classes.copy()
        for number, (place, token) in enumerate(zip(places.tolist(), classes.tolist(), strict=True)):
            before, row[place] = row[place], token
            if not self._fits(row, low, high):
                row[place], taken[number] = before, False
        return taken

    def _fits(self, row: NDArray[np.int64], low: int, high: int) -> bool:
        """Whether a row that differs between two positions only can be filled to a word."""
        states = self._before(low)
        for at in range(low, high):
            states = self._automaton.step(states, int(row[at]))
            if not states.any():
                return False
        return bool((states & self._after(high)).any())


def _special(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids whose text is not part of an answer."""
    added = tokenizer.added_tokens_decoder
    return frozenset({number for number, token in added.items() if token.special} | set(tokenizer.all_special_ids))
