"""Tokenizers that make a text much longer, which would take any time and memory.

A tokenizer.json is a program: its normalizers, pre-tokenizers and decoders run one after the other, and the library
that runs them neither hears signals nor has a bound.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

_MOST = 1000  # letters, or tokens, that one may become
_STEPS = 1000  # replacements
_DEEPEST = 20
_BYTE_LEVELS = 3  # each of which writes a letter that is not ASCII as several
_PARTS = ("normalizer", "pre_tokenizer", "decoder", "post_processor")
_INNER = ("normalizers", "pretokenizers", "decoders", "processors")


def growing(content: Mapping[str, Any]) -> str | None:
    """What of a tokenizer.json makes texts much longer; None if nothing does.

    Raises:
        ValueError: its steps are nested too deep.
    """
    for name in _PARTS:
        steps = [*_steps(content.get(name), 0)]
        if sum(step.get("type") == "ByteLevel" for step in steps) > _BYTE_LEVELS:
            return f"its {name} has ByteLevel more than {_BYTE_LEVELS} times"
        for step in steps:
            pieces = [piece for key in ("single", "pair") for piece in _list(step.get(key)) if "Sequence" in piece]
            if len(pieces) > _STEPS:
                return f"its {name} repeats a text {len(pieces)} times"
        if wrong := _replacing([step for step in steps if step.get("type") == "Replace"]):
            return f"its {name} {wrong}"
    return None


def _steps(part: Any, depth: int) -> Iterator[Mapping[str, Any]]:
    """The steps of a part, in order."""
    if depth > _DEEPEST:
        raise ValueError("its steps are nested too deep")
    if not isinstance(part, Mapping):
        return
    yield part
    for name in _INNER:
        for each in _list(part.get(name)):
            yield from _steps(each, depth + 1)


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _replacing(steps: list[Mapping[str, Any]]) -> str | None:
    """Whether what one step writes is replaced again and again, by following what each becomes."""
    rules = [_rule(step) for step in steps]
    if len(rules) > _STEPS or any(len(written) > _MOST for _, written in rules):
        return f"has more than {_STEPS} replacements, or one of more than {_MOST} letters"
    for number, (pattern, text) in enumerate(rules):
        for replaced, written in rules[number + 1 :]:
            # An expression may match any letter, and is not run: it may take forever.
            text = written * len(text) if replaced is None else text.replace(replaced, written)
            if len(text) > _MOST:
                found = "an expression" if pattern is None else repr(pattern[:60])
                return f"makes more than {_MOST} letters of one match of {found}"
    return None


def _rule(step: Mapping[str, Any]) -> tuple[str | None, str]:
    """What a step replaces, None for an expression, and by what."""
    pattern, written = step.get("pattern"), str(step.get("content", ""))
    if isinstance(pattern, str):
        return pattern or None, written
    literal = pattern.get("String") if isinstance(pattern, Mapping) else None
    return (str(literal) or None) if literal is not None else None, written
