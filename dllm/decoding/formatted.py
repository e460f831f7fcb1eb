"""Requests whose answers have a format: their constraint, and the scaffold that is given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from dllm.decoding.request import Request
from dllm.models.loading import LanguageModel
from dllm.models.tokenizers import tokens_after, writes
from dllm.structure import Constraint, ResponseFormat, Tracker


def constraint_of(form: ResponseFormat, lm: LanguageModel, ends: Sequence[int]) -> Constraint:
    """The language of a format in the tokens of a model.

    Raises:
        ValueError: a format or a tokenizer that is not supported.
    """
    if lm.tokenizer is None:
        raise ValueError("response_format needs a tokenizer, and this model has none; leave it out")
    return Constraint.build(form, lm.tokenizer, lm.backbone.logits_size, ends)


def check_room(request: Request, name: str) -> None:
    """Reject a request without an answer of its format.

    Args:
        request: with or without a format.
        name: of the prompt in errors.

    Raises:
        ValueError: no text of the format fits the positions to generate.
    """
    constraint = request.constraint
    if constraint is None:
        return
    start = request.answer_start
    if not request.infill:
        room = len(request.tokens) - start
        if constraint.shortest > room:
            raise ValueError(
                f"response_format needs at least {constraint.shortest} tokens; gen_length={room} is too short: use a "
                "larger one"
            )
        return
    tracker = Tracker(constraint.automaton, len(request.tokens) - start)
    silent = np.isin(request.tokens[start:], list(constraint.special)) & ~request.region[start:]
    tracker.read(constraint.read(request.tokens[start:], request.mask_token_id, silent))
    if not tracker.satisfiable:
        where = "the scaffold of response_format" if request.prompt else name
        raise ValueError(
            f"{where} cannot be completed to a text of response_format with its masks; give more of them, or another "
            "format"
        )


def with_scaffold(
    form: ResponseFormat, lm: LanguageModel, ids: Sequence[int], length: int, room: int, infill: bool
) -> list[int]:
    """The prompt, and after it the scaffold of a format with masks for its values.

    Args:
        form: a schema with a scaffold.
        lm: the model.
        ids: of the prompt.
        length: positions of the answer where the format does not say those of each value.
        room: positions of a row.
        infill: whether the prompt has masks of its own.

    Raises:
        ValueError: there is no room for the values, or none in the row for all.
    """
    if infill:
        raise ValueError("response_format.scaffold gives a text of its own; leave it out to infill")
    tokenizer = lm.tokenizer
    assert tokenizer is not None
    parts = form.compiled.parts
    given = {number: _given(tokenizer, part.text) for number, part in enumerate(parts) if part.text}
    values = {number: part for number, part in enumerate(parts) if part.regex}
    if not values:
        raise ValueError(
            "response_format.scaffold has no value to fill in, as the schema allows one text; leave it out"
        )
    fixed = {
        number: max(len(tokens_after(tokenizer, text, _NAME)) for text in part.texts)
        for number, part in values.items()
        if part.texts
    }
    if form.value_length is None:
        left = length - sum(map(len, given.values())) - sum(fixed.values())
        free = [number for number in values if number not in fixed]
        if left < len(free):
            raise ValueError(
                f"response_format.scaffold needs at least {length - left + len(free)} tokens; gen_length={length} is "
                "too short: use a larger one"
            )
        lengths = {number: left // len(free) + (place < left % len(free)) for place, number in enumerate(free)} | fixed
    else:
        lengths = {number: _length(form.value_length, part.path, fixed.get(number)) for number, part in values.items()}
        if isinstance(form.value_length, Mapping):
            paths = {part.path for part in values.values()}
            if unknown := sorted(set(form.value_length) - paths):
                raise ValueError(
                    f"response_format.value_length.{unknown[0]} is of no value; expected some of "
                    f"{', '.join(sorted(paths))}"
                )
    total = sum(map(len, given.values())) + sum(lengths.values())
    if total > room - len(ids):
        name = "gen_length" if form.value_length is None else "response_format.value_length"
        raise ValueError(
            f"response_format.scaffold has {total} tokens with its values, and a row of {room} leaves "
            f"{max(0, room - len(ids))} beside the prompt; use a smaller {name}, or a shorter prompt"
        )
    mask = lm.backbone.mask_token_id
    written = [given[number] if number in given else [mask] * lengths[number] for number in range(len(parts))]
    return [*ids, *(token for each in written for token in each)]


_NAME = "response_format.scaffold"
_VALUE = 16  # positions of a value that a mapping leaves out


def _length(lengths: int | Mapping[str, int], path: str, fixed: int | None) -> int:
    if isinstance(lengths, Mapping):
        return lengths.get(path, fixed or _VALUE)
    return fixed or lengths


def _given(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids = tokens_after(tokenizer, text, _NAME)
    if not writes(tokenizer, ids, text):
        raise ValueError(f"{_NAME} gives {text!r}, which the tokenizer of this model changes; leave it out")
    return ids
