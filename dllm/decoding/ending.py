"""Where a generated text ends: at an end-of-text token, or before a stop string.

A text ends before its first end-of-text token, whatever the tokenizer calls that token, and before the first complete
stop string; of several that one token completes, before the one that begins first. So the text is the same whether
decoding continued after the stop string or not. The tokens that end the text count as generated.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from dllm.models.tokenizers import text_of

_PARTIAL = "\ufffd"  # decoded from tokens that hold part of a character


def count_tokens(completions: NDArray[np.int64], eos_token_ids: Sequence[int]) -> NDArray[np.int64]:
    """Tokens of each row up to and including its first end-of-text."""
    ended = (completions[..., None] == np.asarray(eos_token_ids)).any(-1)
    return np.where(ended.any(1), ended.argmax(1) + 1, completions.shape[1])


def decode_text(tokenizer: PreTrainedTokenizerBase | None, tokens: NDArray[np.int64]) -> str | None:
    """The text of some tokens without special ones; None without a tokenizer."""
    return None if tokenizer is None else text_of(tokenizer, tokens.tolist(), skip_special_tokens=True)


def cut(
    tokenizer: PreTrainedTokenizerBase | None,
    tokens: NDArray[np.int64],
    until: Sequence[str] = (),
    eos_token_ids: Sequence[int] = (),
) -> tuple[str | None, int]:
    """The text before its end, and the number of tokens up to and including the end.

    Args:
        tokenizer: None gives no text, and only end-of-text ends it.
        tokens: the generated tokens.
        until: stop strings; empty ones have no effect.
        eos_token_ids: ids that end a text.
    """
    count = int(count_tokens(tokens[None], eos_token_ids)[0])
    if tokenizer is None:
        return None, count
    before = tokens[: count - int(np.isin(tokens[count - 1], eos_token_ids))]
    stops = [stop for stop in until if stop]
    needed = StopStrings(tokenizer, stops, eos_token_ids).find(tokens) if stops else None
    if needed is None:
        return decode_text(tokenizer, before), count
    text = _written(tokenizer, tokens[:needed])
    place = min(found for stop in stops if (found := text.find(stop)) >= 0)
    if needed == count and place >= len(_written(tokenizer, before)):  # within the token that is end-of-text
        return decode_text(tokenizer, before), needed
    return _without_special(tokenizer, tokens[:needed], text, place), needed


def without_beginning(
    tokenizer: PreTrainedTokenizerBase, tokens: NDArray[np.int64], until: Sequence[str], eos_token_ids: Sequence[int]
) -> str | None:
    """The text of some tokens without a part at its end that may begin a stop string; None if there is no such part.

    There is none once the text has ended.
    """
    if np.isin(tokens, eos_token_ids).any():
        return None
    text = _written(tokenizer, tokens)
    sizes = (n for stop in until for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n]))
    begun = max(sizes, default=0)
    return _without_special(tokenizer, tokens, text, len(text) - begun) if begun else None


class StopStrings:
    """Finds the token of a growing text that completes a stop string, token by token.

    So the result does not depend on how many tokens a step commits, also where the text becomes shorter by a token, as
    with bytes that are no character. Only the last tokens that a stop string can span are decoded again, so that the
    cost is linear in the length of the text, not quadratic.

    Args:
        tokenizer: decodes tokens, including special ones.
        strings: non-empty stop strings.
        eos_token_ids: ids that end a text; nothing after them is searched.

    Attributes:
        read: tokens of the text searched so far; 0 to search again from the start.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, strings: Sequence[str], eos_token_ids: Sequence[int]
    ) -> None:
        self._tokenizer, self._strings, self._eos = tokenizer, strings, eos_token_ids
        self.read = self._first = 0
        # Characters. The first four of a part may decode differently than in the whole text.
        self._reach = max(map(len, strings)) + 4

    def find(self, text: NDArray[np.int64]) -> int | None:
        """Number of tokens up to a complete stop string; None without one.

        Args:
            text: all its tokens so far, at least one.
        """
        if not self.read:
            self._first = 0
        begun, self.read = self.read, len(text)
        end = int(count_tokens(text[None], self._eos)[0])
        return next((count for count in range(begun + 1, end + 1) if self._ends(text[:count])), None)

    def _ends(self, text: NDArray[np.int64]) -> bool:
        """Whether a text has a stop string; the text without its last token has none."""
        recent = _written(self._tokenizer, text[self._first :])
        if any(stop in recent for stop in self._strings):
            whole = recent if self._first == 0 else _written(self._tokenizer, text)
            if any(stop in whole for stop in self._strings):
                return True
        while len(recent) > 2 * self._reach:
            middle = (self._first + len(text) + 1) // 2
            recent = _written(self._tokenizer, text[middle:])
            if len(recent) >= self._reach:
                self._first = middle
        return False


def _without_special(tokenizer: PreTrainedTokenizerBase, tokens: NDArray[np.int64], text: str, length: int) -> str:
    """The first characters of the decoded tokens, without special tokens; ordinary text that looks like one is kept."""
    names = {number: token.content for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    kept, at = "", 0
    for place in np.flatnonzero(np.isin(tokens, list(names))):
        name = names[int(tokens[place])]
        begins = text.find(name, max(at, len(_written(tokenizer, tokens[:place]))))
        if not 0 <= begins < length:
            break
        kept, at = kept + text[at:begins], begins + len(name)
    return kept + text[at:length]


def _written(tokenizer: PreTrainedTokenizerBase, tokens: NDArray[np.int64]) -> str:
    """The text of some tokens, including special ones, without an incomplete last character."""
    return text_of(tokenizer, tokens.tolist()).rstrip(_PARTIAL)
