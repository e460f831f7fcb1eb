"""Mapping a denoiser's canvas to a guide's tokens, and accepted tokens back to positions.

If both models have the same tokens, in whatever numbering, these are passed through. Otherwise the text between special
tokens is re-tokenized for the guide, and the two tokenizations are aligned by characters: a position is
accepted if all guide tokens in the shortest span of text are accepted that contains the position and
that starts and ends at token boundaries of both tokenizations. Text that a tokenizer cannot represent
exactly is never accepted.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from dllm.checks import telling_panics
from dllm.decoding.flags import flagged
from dllm.guide import Guide
from dllm.models.tokenizers import text_of

NEVER = 2**31
_CONTEXT = 16  # tokens decoded again before each boundary: how a token decodes depends on few before it


@dataclass(frozen=True)
class Aligned:
    """Input of the guide for some rows.

    Attributes:
        ids: its token ids, left-aligned.
        lengths: of each row.
        start: index of the first judged token.
        free: tokens that need no verification, because all their positions are committed.
        upto: number of leading tokens that must be accepted to accept a position of the window; NEVER if
            no number suffices.
    """

    ids: Int[Tensor, "B T"]
    lengths: Int[Tensor, " B"]
    start: Int[Tensor, " B"]
    free: Bool[Tensor, "B T"]
    upto: Int[Tensor, "B K"]

    def slots(self, about: Int[Tensor, "B N"]) -> Int[Tensor, "B K"]:
        """Which of the guide's logits are about each position of the window, by the tokens they are about; -1: none."""
        length = self.ids.shape[1]
        slot = torch.arange(about.shape[1], device=about.device).expand_as(about)
        slots = torch.full((len(about), length + 1), -1, device=about.device).scatter(1, about, slot)
        return slots.gather(1, (self.upto - 1).clamp(0, length - 1))


@runtime_checkable
class Aligner(Protocol):
    """Maps drafted canvases to a guide's tokens."""

    def check(self, prompt: Sequence[int], ends: Container[int]) -> None:
        """Reject a prompt that the guide cannot represent exactly.

        Args:
            prompt: token ids.
            ends: end-of-text ids.

        Raises:
            ValueError: the prompt has a token that the guide lacks, or text that its tokenizer changes.
        """
        ...

    def __call__(
        self,
        tokens: Int[Tensor, "B L"],
        first: Int[Tensor, " B"],
        columns: Int[Tensor, "B K"],
        masked: Bool[Tensor, "B K"],
        ends: Int[Tensor, "B E"],
    ) -> Aligned:
        """Align rows whose masks in the window are filled with drafts.

        A row with committed text that the guide cannot represent is not judged: its length is its start.

        Args:
            tokens: canvases with drafts.
            first: column of each row's first token.
            columns: of the window.
            masked: positions of the drafts.
            ends: end-of-text ids of each row.
        """
        ...


@dataclass(frozen=True)
class SameVocabulary:
    """The guide has the denoiser's tokens.

    Attributes:
        name: of the guide.
        numbers: the guide's id of each of the denoiser's tokens; -1 for tokens that it lacks.
    """

    name: str
    numbers: Int[Tensor, " V"]

    def check(self, prompt: Sequence[int], ends: Container[int]) -> None:
        """See `Aligner`."""
        numbers = self.numbers.tolist()
        unknown = next((token for token in prompt if numbers[token] < 0), None)
        if unknown is not None:
            raise ValueError(
                f"guide={self.name!r} does not have token {unknown} of a prompt; "
                "use a guide that has it, or a prompt without it"
            )

    def __call__(
        self,
        tokens: Int[Tensor, "B L"],
        first: Int[Tensor, " B"],
        columns: Int[Tensor, "B K"],
        masked: Bool[Tensor, "B K"],
        ends: Int[Tensor, "B E"],
    ) -> Aligned:
        """See `Aligner`."""
        length = tokens.shape[1]
        end = columns.masked_fill(~masked, -1).amax(-1) + 1
        start = columns.masked_fill(~masked, length).amin(-1) - first
        index = torch.arange(int((end - first).amax()), device=tokens.device)  # synchronizes: the width of the forward
        column = (first[:, None] + index).clamp(max=length - 1)
        ids = self.numbers[tokens.gather(1, column)]
        drafted = flagged(torch.zeros_like(tokens, dtype=torch.bool), columns, masked)
        unreadable = ((ids < 0) & (index < start[:, None])).any(-1)
        free = ~drafted.gather(1, column) & (ids >= 0)
        return Aligned(ids, torch.where(unreadable, start, end - first), start, free, columns - first[:, None] + 1)


@dataclass(frozen=True)
class ByText:
    """The guide has another tokenizer and reads the same text.

    Attributes:
        name: of the guide.
        ours: the denoiser's tokenizer.
        theirs: the guide's fast tokenizer.
    """

    name: str
    ours: PreTrainedTokenizerBase
    theirs: PreTrainedTokenizerBase

    def __call__(
        self,
        tokens: Int[Tensor, "B L"],
        first: Int[Tensor, " B"],
        columns: Int[Tensor, "B K"],
        masked: Bool[Tensor, "B K"],
        ends: Int[Tensor, "B E"],
    ) -> Aligned:
        """See `Aligner`."""
        # Synchronizes: tokenizers run on the host, one text at a time.
        host, begin, at, ids_of_ends = tokens.tolist(), first.tolist(), columns.tolist(), ends.tolist()
        rows = []
        upto = torch.full(columns.shape, NEVER, device="cpu")
        for b, drafted in enumerate(masked.tolist()):
            wanted = [column for column, is_draft in zip(at[b], drafted, strict=True) if is_draft]
            low, end = min(wanted), max(wanted) + 1
            try:
                row = self._row(
                    host[b][begin[b] : end], low - begin[b], {column - low for column in wanted}, ids_of_ends[b]
                )
            except _UnreadableError:
                row = _Row([], 0, [], [])
            for k, column in enumerate(at[b]):
                if low <= column < low + len(row.upto):
                    upto[b, k] = row.upto[column - low]
            rows.append(row)
        ids = pad_sequence([torch.tensor(row.ids or [0], device="cpu") for row in rows], batch_first=True)
        device = tokens.device
        lengths = torch.tensor([len(row.ids) for row in rows], device=device)
        start = torch.tensor([row.start for row in rows], device=device)
        free = torch.zeros_like(ids, dtype=torch.bool)
        for b, row in enumerate(rows):
            free[b, row.free] = True
        return Aligned(ids.to(device), lengths, start, free.to(device), upto.to(device))

    def check(self, prompt: Sequence[int], ends: Container[int]) -> None:
        """See `Aligner`."""
        self._decided(list(prompt), ends)

    def _decided(self, ids: list[int], ends: Container[int]) -> tuple[list[int], int]:
        """The guide's tokens up to our last special token, and the number of our tokens they cover."""
        out, at = self._opening(), 0
        for i, token in enumerate(ids):
            if token in self._special or token in ends:
                out += self._encode_decided(ids[at:i])
                out.append(self._counterpart(token, ends))
                at = i + 1
        self._encode_decided(ids[at:])
        return out, at

    def _row(self, ids: list[int], drafted: int, drafts: set[int], ends: Container[int]) -> _Row:
        """Align one row, judged from token `drafted` on; `drafts` are the indices of drafts, relative to `drafted`."""
        out, at = self._decided(ids[:drafted], ends)
        end = next((i for i in range(drafted, len(ids)) if ids[i] in self._special or ids[i] in ends), len(ids))
        text = self._text(ids[at:end])
        theirs, borders = self._encode(text)
        ours = self._borders(ids[at:end], drafted - at, text)
        # A partially committed character is judged as a whole.
        decided = len(self._text(ids[at:drafted]).rstrip("\ufffd"))
        start = max(count for border, count in borders.items() if border <= decided)
        upto = []
        for i in range(1, len(ours)):
            after = [borders[border] for border in ours[i:] if border is not None and border in borders]
            upto.append(len(out) + after[0] if after else NEVER)
        stretches = {count: border for border, count in borders.items()}
        free = [
            len(out) + number
            for number in range(start, len(theirs))
            if not _touches(stretches.get(number), stretches.get(number + 1), ours, drafts)
        ]
        row = _Row(out + theirs, len(out) + start, upto, free)
        if end < len(ids) and ids[end] in ends and ours[-1] in borders:
            eos = self.theirs.eos_token_id
            if isinstance(eos, int):
                return _Row([*row.ids, eos], row.start, [*upto, len(row.ids) + 1], free)
        return row

    @cached_property
    def _special(self) -> set[int]:
        return set(self.ours.all_special_ids)

    def _opening(self) -> list[int]:
        bos = self.theirs.bos_token_id
        return [bos] if bos is not None and bos in self.theirs("").input_ids else []

    def _text(self, ids: list[int]) -> str:
        return _decoded(self.ours, ids)

    def _borders(self, ids: list[int], first: int, text: str) -> list[int | None]:
        """Character index in `text` after each number of leading tokens from `first` on; None within a character."""
        near = max(0, first - _CONTEXT)
        whole = self._text(ids[near:])
        if not text.endswith(whole):  # they decode differently after the others
            near, whole = 0, text
        parts = [self._text(ids[near:i]) for i in range(first, len(ids) + 1)]
        before = len(text) - len(whole)
        exact = [whole.startswith(part) and not part.endswith("\ufffd") for part in parts]
        return [before + len(part) if good else None for part, good in zip(parts, exact, strict=True)]

    def _encode(self, text: str) -> tuple[list[int], dict[int, int]]:
        """The guide's tokens of a text, and the number of tokens before each token boundary, where exact."""
        try:
            with telling_panics(f"guide={self.name!r}: a text cannot be tokenized", "give another text"):
                encoded = self.theirs(text, add_special_tokens=False, return_offsets_mapping=True)
        except ValueError as error:
            raise _UnreadableError(str(error)) from None
        ids, offsets = list(encoded["input_ids"]), encoded["offset_mapping"]
        back = _decoded(self.theirs, ids)
        exact = next(
            (i for i, (one, other) in enumerate(zip(text, back, strict=False)) if one != other),
            min(len(text), len(back)),
        )
        borders = {0: 0}
        for number, (_, end) in enumerate(offsets):
            if end <= exact and (number + 1 == len(offsets) or offsets[number + 1][0] >= end):
                borders[end] = number + 1
        return ids, borders

    def _encode_decided(self, ids: list[int]) -> list[int]:
        text = self._text(ids)
        theirs, borders = self._encode(text)
        if len(text) not in borders:
            raise _UnreadableError(
                f"guide={self.name!r} has a tokenizer that changes the text {text[-40:]!r}; "
                "use a guide that represents it exactly"
            )
        return theirs

    def _counterpart(self, token: int, ends: Container[int]) -> int:
        """The guide's special token with the same name or meaning."""
        name = str(self.ours.convert_ids_to_tokens(token))
        found = self.theirs.get_vocab().get(name)
        if found is None and token in ends:
            found = self.theirs.eos_token_id
        if found is None:
            raise _UnreadableError(
                f"guide={self.name!r} has no token {name!r}, which the prompt contains; "
                "use a guide that has it, or plain text"
            )
        return int(found)


class _UnreadableError(ValueError):
    """Committed text that the guide cannot represent exactly."""


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    try:
        return text_of(tokenizer, ids, clean_up_tokenization_spaces=False)
    except ValueError as error:
        raise _UnreadableError(str(error)) from None


@dataclass(frozen=True)
class _Row:
    """`Aligned` for one row; `upto` from the first drafted column on, `free` as indices."""

    ids: list[int]
    start: int
    upto: list[int]
    free: list[int]


def _touches(low: int | None, high: int | None, borders: list[int | None], drafts: set[int]) -> bool:
    """Whether the text between two characters overlaps a draft; True if a boundary is unknown."""
    if low is None or high is None:
        return True
    for number in drafts & set(range(len(borders) - 1)):
        begin, end = borders[number], borders[number + 1]
        if (begin is None or begin < high) and (end is None or end > low):
            return True
    return False


def align(guide: Guide, tokenizer: PreTrainedTokenizerBase | None, vocab_size: int) -> Aligner:
    """The aligner for a guide and a denoiser.

    Args:
        guide: the guide.
        tokenizer: the denoiser's.
        vocab_size: entries of the denoiser's logits.

    Raises:
        ValueError: the vocabularies differ and a tokenizer is missing.
    """
    device = guide.model.device
    if guide.tokenizer is None or tokenizer is None:
        if guide.tokenizer is tokenizer and guide.vocab_size == vocab_size:
            return SameVocabulary(guide.name, torch.arange(vocab_size, device=device))
        raise ValueError(
            f"guide={guide.name!r} and the model cannot be aligned: without a tokenizer for both, their vocabularies "
            f"({guide.vocab_size} and {vocab_size} entries) must be the same and have no tokenizer; use another guide"
        )
    if guide.tokenizer is tokenizer and guide.vocab_size != vocab_size:
        raise ValueError(
            f"guide={guide.name!r} has {guide.vocab_size} tokens and the model {vocab_size}: a guide without its own "
            "tokenizer must use the model's; give dllm.guide.Guide(model, tokenizer)"
        )
    if numbers := _same_tokens(guide.tokenizer, tokenizer):
        found = torch.full((vocab_size,), -1, device=device)
        for ours, theirs in numbers.items():
            if ours < vocab_size:
                found[ours] = theirs
        return SameVocabulary(guide.name, found)
    if not guide.tokenizer.is_fast:
        raise ValueError(f"guide={guide.name!r} has a tokenizer without offsets; use a guide with a fast tokenizer")
    return ByText(guide.name, tokenizer, guide.tokenizer)


def _same_tokens(guide: PreTrainedTokenizerBase, tokenizer: PreTrainedTokenizerBase) -> dict[int, int]:
    """The guide's id of each of our tokens that it has, if both have the same but for special ones; else none."""
    theirs, ours, special = guide.get_vocab(), tokenizer.get_vocab(), tokenizer.get_added_vocab()
    # Either may have additional special tokens, such as [MASK]; all others must be the same.
    taken = set(ours.values())
    shared = {token: number for token, number in ours.items() if theirs.get(token) == number}
    if all(token in shared or token in special for token in ours) and all(
        token in shared or (token not in ours and number not in taken) for token, number in theirs.items()
    ):
        return {number: number for number in shared.values()}
    if not all(token in theirs or token in special for token in ours):
        return {}
    # In another numbering, unless it opens or ends a text otherwise, which its tokenizer knows.
    added, shared = guide.get_added_vocab(), {token: theirs[token] for token in ours if token in theirs}
    alike = all(token in ours or token in added for token in theirs)
    if alike and guide.eos_token == tokenizer.eos_token and not guide("").input_ids:
        return {ours[token]: number for token, number in shared.items()}
    return {}
