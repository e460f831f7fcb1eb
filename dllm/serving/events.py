"""What one step changed in a request, as JSON.

Positions count from the first generated one; of an infilled text from its first token.
"""

from __future__ import annotations

import codecs
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from dllm.decoding.step import Event, Step
from dllm.models.tokenizers import text_of
from dllm.structure.tokens import token_bytes


class Pieces:
    """The text of single tokens, kept once decoded.

    Args:
        tokenizer: None shows ids.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None) -> None:
        self.tokenizer = tokenizer
        self._known: dict[int, str] = {}

    def __getitem__(self, token: int) -> str:
        if token not in self._known:
            self._known[token] = f" {token}" if self.tokenizer is None else text_of(self.tokenizer, [token])
        return self._known[token]

    @cached_property
    def _bytes(self) -> tuple[Sequence[bytes | None], Sequence[bytes | None]]:
        """What each token writes into a text, and what at its begin; nothing if unknown."""
        if self.tokenizer is None:
            return (), ()
        try:
            return token_bytes(self.tokenizer, max(self.tokenizer.get_vocab().values()) + 1)
        except ValueError:
            return (), ()

    def written(self, token: int) -> bytes:
        """The bytes of a token; of a special one, those of its name."""
        known = self._bytes[0][token] if token < len(self._bytes[0]) else None
        return self[token].encode("utf-8", "replace") if known is None else known

    def shown(self, token: int) -> str:
        """The text of a token, or where it is part of a character, its bytes as OpenAI's completions write them."""
        written = self.written(token)
        try:
            written.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in written)
        return self[token]

    def offsets(self, tokens: Sequence[int]) -> list[int]:
        """The characters of the text that are complete before each of its tokens."""
        words, known = self._bytes[1], len(self._bytes[0])
        decoder, found, length = codecs.getincrementaldecoder("utf-8")("replace"), list[int](), 0
        for token in tokens:
            found.append(length)
            written = words[token] if token < known else self.written(token)
            if written is not None:  # special tokens are in no text
                words = self._bytes[0]
                length += len(decoder.decode(written))
        return found


@dataclass(frozen=True)
class TokenLogprob:
    """The log-probability of a committed token in the prediction that it was committed from.

    Attributes:
        token: its id.
        logprob: natural logarithm; None if it was not predicted there, such as a draft's or a guide's token.
        top: the most probable tokens and their log-probabilities, best first.
    """

    token: int
    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class TextLogprobs:
    """The log-probabilities of consecutive tokens of a text.

    Attributes:
        tokens: in the order of the text.
        offsets: characters of the text before each.
    """

    tokens: Sequence[TokenLogprob]
    offsets: Sequence[int]


def begun(event: Event, origin: int, infill: bool, pieces: Pieces) -> dict[str, Any]:
    """The first event of a request.

    Args:
        event: its first step.
        origin: column of position 0.
        infill: tell the given tokens, which lie between the masks.
        pieces: texts of tokens.
    """
    step, entry = event.step, event.entry
    row, change = step.tokens[entry, origin:], step.change
    given = ~(change.committed | change.filled | change.revoked)[entry, origin:] & (row != step.mask_token_id)
    shown = [[int(place), pieces[int(row[place])]] for place in np.flatnonzero(given)] if infill else []
    return {"begin": {"length": len(row), "given": shown}}


def changed(event: Event, origin: int, pieces: Pieces, brief: bool = False) -> dict[str, Any]:
    """What a step changed.

    Args:
        event: the step.
        origin: column of position 0.
        pieces: texts of tokens.
        brief: leave out what is provisional, and confidences.
    """
    step, entry = event.step, event.entry
    row, change = step.tokens[entry, origin:], step.change
    places = {
        name: np.flatnonzero(table[entry, origin:])
        for name, table in (("committed", change.committed), ("revoked", change.revoked), ("filled", change.filled))
    }
    provisional: list[list[Any]] = []
    sure: list[float | None] = [None] * len(places["committed"])
    if not brief:
        guesses, confidence = step.predicted[entry, origin:], step.confidence[entry, origin:]
        at = np.flatnonzero((row == step.mask_token_id) & (guesses != step.mask_token_id))
        provisional = [[int(p), pieces[int(guesses[p])], _share(confidence[p])] for p in at]
        sure = [_share(confidence[p]) if guesses[p] == row[p] else None for p in places["committed"]]
    return {
        "nfe": int(step.nfe[entry]),
        "masked": int((row == step.mask_token_id).sum()),
        "provisional": provisional,
        "committed": [[int(place), pieces[int(row[place])]] for place in places["committed"]],
        "confidence": sure,
        "revoked": places["revoked"].tolist(),
        "filled": places["filled"].tolist(),
    }


def _share(confidence: float) -> float | None:
    return round(float(confidence), 4) if np.isfinite(confidence) else None


def logprobs(event: Event, origin: int, top: int) -> dict[int, TokenLogprob]:
    """The log-probabilities of the tokens that a step committed, by position.

    Args:
        event: the step.
        origin: column of position 0.
        top: number of the most probable tokens to tell beside.
    """
    step, entry = event.step, event.entry
    row = step.tokens[entry]
    committed = np.flatnonzero(step.change.committed[entry])
    found = _predicted(step, entry, top)
    nothing: tuple[float | None, tuple[tuple[int, float], ...]] = (None, ())
    # Others are of a guide or a draft, or an insertion moved them.
    own = {int(at) for at in committed if step.predicted[entry, at] == row[at]}
    return {
        int(at) - origin: TokenLogprob(int(row[at]), *(found.get(int(at), nothing) if int(at) in own else nothing))
        for at in committed
    }


def _predicted(step: Step, entry: int, top: int) -> Mapping[int, tuple[float | None, tuple[tuple[int, float], ...]]]:
    """Log-probabilities by column, of the requested ones in the step's latest prediction."""
    if step.last is None:
        return {}
    prediction, columns = step.last
    with torch.inference_mode():
        at = columns.cpu()
        now = torch.from_numpy(step.tokens).gather(1, at)
        own = prediction.probability(now.to(columns.device))[entry].log().tolist()
        values, tokens = (each[entry].tolist() for each in prediction.ranked(top))
    asked = prediction.asked[entry].tolist()
    return {
        column: (
            value if value > -torch.inf else None,
            tuple((token, share) for token, share in zip(best, shares, strict=True) if share > -torch.inf),
        )
        for column, value, shares, best, wanted in zip(at[entry].tolist(), own, values, tokens, asked, strict=True)
        if wanted
    }
