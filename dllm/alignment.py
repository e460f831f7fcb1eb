"""From a denoiser's canvas to the tokens a guide reads, and back to the columns a verdict is about.

Where both models share a vocabulary, tokens are passed on as they are. Else the text between special
tokens is tokenized anew for the guide, and the two tokenizations are compared by the characters they
cover: a column is accepted when all guide tokens are that lie within the shortest stretch of text that
holds the column and that both tokenizations begin and end with a whole token. Text that one of them
cannot represent exactly is never accepted on a guess.
"""

from __future__ import annotations

import os.path
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dllm.guide import Guide

NEVER = 2**31


@dataclass(frozen=True)
class Aligned:
    """What a guide reads of some rows.

    Attributes:
        ids: its tokens, left-aligned.
        lengths: of each row.
        start: index of the first token that is judged.
        free: tokens that need no judgement, because all their columns are decided.
        upto: how many leading tokens must be accepted for a column of the window to be; NEVER where
            none are enough.
    """

    ids: Int[Tensor, "B T"]
    lengths: Int[Tensor, " B"]
    start: Int[Tensor, " B"]
    free: Bool[Tensor, "B T"]
    upto: Int[Tensor, "B K"]


class Aligner(Protocol):
    """Prepares drafted canvases for a guide."""

    def __call__(
        self,
        tokens: Int[Tensor, "B L"],
        first: Int[Tensor, " B"],
        columns: Int[Tensor, "B K"],
        masked: Bool[Tensor, "B K"],
        inside: Bool[Tensor, "B K"],
    ) -> Aligned:
        """Align rows whose masks in the window hold drafts.

        Args:
            tokens: canvases with the drafts written.
            first: column of each row's first token.
            columns: of the window.
            masked: where the drafts are.
            inside: columns of the window that exist.
        """
        ...


class SameVocabulary:
    """The guide reads the denoiser's token ids."""

    def __call__(
        self,
        tokens: Int[Tensor, "B L"],
        first: Int[Tensor, " B"],
        columns: Int[Tensor, "B K"],
        masked: Bool[Tensor, "B K"],
        inside: Bool[Tensor, "B K"],
    ) -> Aligned:
        """See `Aligner`."""
        length = tokens.shape[1]
        end = columns.masked_fill(~masked, -1).amax(-1) + 1
        start = columns.masked_fill(~masked, length).amin(-1) - first
        index = torch.arange(int((end - first).amax()), device=tokens.device)
        ids = tokens.gather(1, (first[:, None] + index).clamp(max=length - 1))
        drafted = torch.zeros_like(tokens, dtype=torch.bool).scatter_reduce(1, columns, masked, "amax")
        free = ~drafted.gather(1, (first[:, None] + index).clamp(max=length - 1))
        return Aligned(ids, end - first, start, free, columns - first[:, None] + 1)


@dataclass(frozen=True)
class ByText:
    """The guide has another tokenizer and reads the same text.

    Attributes:
        ours: the denoiser's tokenizer.
        theirs: the guide's, a fast one.
        eos_token_ids: what ends a text for the denoiser; the guide reads its own end-of-text there.
    """

    ours: PreTrainedTokenizerBase
    theirs: PreTrainedTokenizerBase
    eos_token_ids: tuple[int, ...]

    def __call__(
        self,
        tokens: Int[Tensor, "B L"],
        first: Int[Tensor, " B"],
        columns: Int[Tensor, "B K"],
        masked: Bool[Tensor, "B K"],
        inside: Bool[Tensor, "B K"],
    ) -> Aligned:
        """See `Aligner`.

        Raises:
            ValueError: decided text holds a special token that the guide does not have, or text that its
                tokenizer changes.
        """
        # Tokenizers work on one text at a time, on the host.
        host, begin, at = tokens.tolist(), first.tolist(), columns.tolist()
        rows = []
        upto = torch.full(columns.shape, NEVER)
        for b, drafted in enumerate(masked.tolist()):
            wanted = [column for column, is_draft in zip(at[b], drafted, strict=True) if is_draft]
            low, end = min(wanted), max(wanted) + 1
            row = self._row(host[b][begin[b] : end], low - begin[b])
            for k, column in enumerate(at[b]):
                if low <= column < low + len(row.upto):
                    upto[b, k] = row.upto[column - low]
            rows.append(row)
        ids = torch.zeros((len(rows), max(len(row.ids) for row in rows)), dtype=torch.long)
        for b, row in enumerate(rows):
            ids[b, : len(row.ids)] = torch.tensor(row.ids)
        device = tokens.device
        lengths = torch.tensor([len(row.ids) for row in rows], device=device)
        start = torch.tensor([row.start for row in rows], device=device)
        return Aligned(ids.to(device), lengths, start, torch.zeros_like(ids, dtype=torch.bool).to(device), upto.to(device))

    def _row(self, ids: list[int], drafted: int) -> _Row:
        """One row whose tokens from `drafted` on are in question."""
        out, at = self._opening(), 0
        for i in range(drafted):
            if ids[i] in self._special:
                out += self._encode_decided(ids[at:i])
                out.append(self._counterpart(ids[i]))
                at = i + 1
        self._encode_decided(ids[at:drafted])
        end = next((i for i in range(drafted, len(ids)) if ids[i] in self._special), len(ids))
        text = self._text(ids[at:end])
        theirs, borders = self._encode(text)
        ours = [self._border(ids[at:i], text) for i in range(drafted, end + 1)]
        decided = len(self._text(ids[at:drafted]))
        start = max(count for border, count in borders.items() if border <= decided)
        upto = []
        for i in range(1, len(ours)):
            behind = [borders[border] for border in ours[i:] if border in borders]
            upto.append(len(out) + behind[0] if behind else NEVER)
        row = _Row(out + theirs, len(out) + start, upto)
        if end < len(ids) and ids[end] in self.eos_token_ids and ours[-1] in borders:
            eos = self.theirs.eos_token_id
            if isinstance(eos, int):
                return _Row([*row.ids, eos], row.start, [*upto, len(row.ids) + 1])
        return row

    @cached_property
    def _special(self) -> set[int]:
        return set(self.ours.all_special_ids) | set(self.eos_token_ids)

    def _opening(self) -> list[int]:
        bos = self.theirs.bos_token_id
        return [bos] if bos is not None and bos in self.theirs("").input_ids else []

    def _text(self, ids: list[int]) -> str:
        return str(self.ours.decode(ids, clean_up_tokenization_spaces=False))

    def _border(self, ids: list[int], text: str) -> int | None:
        """Where in a text these leading tokens of it end; None within a character."""
        part = self._text(ids)
        return len(part) if text.startswith(part) and not part.endswith("\ufffd") else None

    def _encode(self, text: str) -> tuple[list[int], dict[int | None, int]]:
        """The guide's tokens of a text, and how many of them end at or before each whole border, as far as exact."""
        encoded = self.theirs(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, offsets = list(encoded["input_ids"]), encoded["offset_mapping"]
        exact = len(os.path.commonprefix((text, str(self.theirs.decode(ids, clean_up_tokenization_spaces=False)))))
        borders: dict[int | None, int] = {0: 0}
        for number, (_, end) in enumerate(offsets):
            if end <= exact and (number + 1 == len(offsets) or offsets[number + 1][0] >= end):
                borders[end] = number + 1
        return ids, borders

    def _encode_decided(self, ids: list[int]) -> list[int]:
        text = self._text(ids)
        theirs, borders = self._encode(text)
        if len(text) not in borders:
            raise ValueError(f"guide: its tokenizer changes the text {text[-40:]!r}; use a guide that represents it exactly")
        return theirs

    def _counterpart(self, token: int) -> int:
        """The guide's special token of the same name or meaning."""
        name = self.ours.convert_ids_to_tokens(token)
        found = self.theirs.get_vocab().get(name)
        if found is None and token in self.eos_token_ids:
            found = self.theirs.eos_token_id
        if found is None:
            raise ValueError(f"guide: it has no token {name!r}, which the prompt holds; use a guide that has it, or plain text")
        return int(found)


@dataclass(frozen=True)
class _Row:
    """`Aligned` for one row; `upto` from the first drafted column on."""

    ids: list[int]
    start: int
    upto: list[int]


def align(guide: Guide, tokenizer: PreTrainedTokenizerBase | None, vocab_size: int, eos: tuple[int, ...]) -> Aligner:
    """How a guide can read a denoiser's canvas.

    Args:
        guide: the guide.
        tokenizer: the denoiser's.
        vocab_size: entries of the denoiser's logits.
        eos: what ends a text for the denoiser.

    Raises:
        ValueError: the vocabularies differ and there is no text to go by.
    """
    name = guide.model.name_or_path
    if guide.tokenizer is None or tokenizer is None:
        if guide.tokenizer is tokenizer and guide.vocab_size == vocab_size:
            return SameVocabulary()
        raise ValueError(
            f"guide={name!r} and the model cannot be aligned: without a tokenizer for both, their vocabularies "
            f"({guide.vocab_size} and {vocab_size} entries) must be one and have no tokenizer; use another guide"
        )
    theirs, ours, special = guide.tokenizer.get_vocab(), tokenizer.get_vocab(), tokenizer.get_added_vocab()
    if all(theirs.get(token) == number for token, number in ours.items() if token not in special) and all(
        ours.get(token, number) == number for token, number in theirs.items()
    ):
        return SameVocabulary()  # the denoiser may know special tokens more, such as [MASK]
    if not guide.tokenizer.is_fast:
        raise ValueError(f"guide={name!r} has a tokenizer without offsets; use a guide with a fast tokenizer")
    return ByText(tokenizer, guide.tokenizer, eos)
