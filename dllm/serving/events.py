"""What one step changed in a request, as JSON.

Positions count from the first generated one; of an infilled text from its first token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from dllm.decoding.step import Event, Step


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
            self._known[token] = f" {token}" if self.tokenizer is None else str(self.tokenizer.decode([token]))
        return self._known[token]


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
        offset: characters of the tokens before them.
    """

    tokens: Sequence[TokenLogprob]
    offset: int = 0


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
    return {int(at) - origin: TokenLogprob(int(row[at]), *found.get(int(at), nothing)) for at in committed}


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
