"""AdaBlock: a block ends where the model ends a step of its text (arXiv 2509.26432, algorithm 1).

Rule:

    a block ends right after d  if  p(d) >= delimiter_threshold,  and after `block_length` positions otherwise
    commit i                    if  p(top token at i) >= threshold,  and always the best

p is the probability of a predicted token. When a block begins, at the first mask, d is the predicted delimiter with the
highest p of the first floor(share * generated length) positions. Every step commits masks of the block, the first one
included. The prediction that chooses the end of a block costs no forward of its own.

Of models that are causal over blocks, a block ends at the latest with the block of attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dllm.checks import number
from dllm.decoding.request import Request
from dllm.decoding.setup import Setup
from dllm.decoding.window import Edit, Window
from dllm.models.tokenizers import tokens_after
from dllm.samplers.base import CONFIDENCES, Denoise, Knob, Policy
from dllm.samplers.selection import top


@dataclass(frozen=True)
class Delimiters:
    """State of an engine: the ids of the delimiters, and the block length of each row's request."""

    ids: Int[Tensor, " D"]
    length: Int[Tensor, " rows"]


@dataclass(frozen=True)
class AdaBlock(Policy):
    """Commit confident predictions in blocks that end at delimiters.

    Args:
        threshold: minimum probability of a committed token; above 1 no token qualifies.
        delimiters: ids, or texts of one token each; None for the line break, where the tokenizer has it as a token.
        delimiter_threshold: minimum probability of a delimiter that ends a block; above 1 none does.
        share: of the generated length, in which a delimiter is looked for.

    Raises:
        ValueError: a value out of range; at the start of a run: a delimiter that is not one token of the model.
    """

    knob = Knob("threshold", CONFIDENCES)

    threshold: float = 0.9
    delimiters: Sequence[int | str] | None = None
    delimiter_threshold: float = 0.3
    share: float = 0.25

    def __post_init__(self) -> None:
        number("threshold", self.threshold, "0 or more (0.9 is published)", low=0)
        if self.delimiters is not None:
            given = self.delimiters
            if isinstance(given, str) or not isinstance(given, Sequence):
                raise ValueError(f"delimiters={given!r} is of the wrong type; use a list of ids or texts, or null")
            object.__setattr__(self, "delimiters", tuple(given))
            for each in given:
                if not isinstance(each, str):
                    number("delimiters", each, "ids of the model, or texts of one token each", low=0, whole=True)
        use = "0 or more (published: 0.3 for LLaDA, 0.5 for Dream)"
        number("delimiter_threshold", self.delimiter_threshold, use, low=0)
        number("share", self.share, "a number from 0 to 1 (0.25 is published)", low=0, high=1)

    def reach(self, request: Request) -> int:
        """The positions in which a delimiter is looked for, and those of a block without one."""
        return max(request.block_length, int(request.span * self.share))

    def start(self, setup: Setup) -> Delimiters:
        """Find the ids of the delimiters."""
        ids = torch.tensor(_ids(self.delimiters, setup), dtype=torch.long, device=setup.device)
        return Delimiters(ids, torch.zeros(setup.slots, dtype=torch.long, device=setup.device))

    def enter(self, state: Delimiters, row: int, request: Request) -> None:
        """Keep the length of a block without a delimiter."""
        state.length[row] = request.block_length

    def step(self, window: Window, denoise: Denoise, state: Delimiters) -> Edit:
        """Choose the end of a block that begins; commit confident predictions before it, and always the best."""
        prediction = denoise()
        offset = torch.arange(window.columns.shape[1], device=window.columns.device)
        near = offset < (window.span.double() * self.share).floor()[:, None]
        ends = torch.isin(prediction.tokens, state.ids) & window.masked & near
        score = prediction.confidence.masked_fill(~ends, -torch.inf)
        found = score.amax(-1) >= self.delimiter_threshold
        length = torch.where(found & ends.any(-1), score.argmax(-1) + 1, state.length[window.rows])
        length = torch.where(window.step == 0, length, window.block_length)
        masked = window.masked & (offset < length[:, None])
        chosen = (prediction.confidence >= self.threshold) & masked
        chosen |= top(prediction.confidence, 1, masked)
        return Edit(window.columns, prediction.tokens, chosen, block_length=length)


def _ids(delimiters: Sequence[int | str] | None, setup: Setup) -> list[int]:
    """The ids of the delimiters.

    Raises:
        ValueError: one that is not a token of the model.
    """
    if delimiters is None:
        found = [] if setup.tokenizer is None else _tokens(setup.tokenizer, "\n")
        return found if len(found) == 1 else []
    ids = []
    for each in delimiters:
        if isinstance(each, str):
            if setup.tokenizer is None:
                raise ValueError(f"delimiters={each!r} is text, and this model has no tokenizer; give ids")
            found = _tokens(setup.tokenizer, each)
            if len(found) != 1:
                raise ValueError(f"delimiters={each!r} is {len(found)} tokens of this model; give texts of one, or ids")
            ids += found
        elif each >= setup.vocab_size:
            raise ValueError(f"delimiters={each} is out of range; use ids from 0 to {setup.vocab_size - 1}")
        else:
            ids.append(int(each))
    return ids


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The known tokens of a text."""
    ids = tokens_after(tokenizer, text, f"delimiters={text!r}")
    return [token for token in ids if token != tokenizer.unk_token_id]
