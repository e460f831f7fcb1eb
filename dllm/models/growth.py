"""Tokenizers that make a text much longer, which would take any time and memory.

A tokenizer.json is a program: its normalizers, pre-tokenizers, post-processors and decoders run one after the other,
and the library that runs them neither hears signals nor has a bound. What is not bounded here is the time of an
expression: at each letter of a text it may take the library's limit, a fraction of a second.
"""

from __future__ import annotations

import base64
import json
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from math import inf
from typing import Any
from unicodedata import normalize

from tokenizers import Tokenizer

_MOST = 10_000  # letters that one letter of a prompt, or one token, may become
_MOST_TOKENS = 1000  # that one token may become with the special ones
_LONGEST_WORD = 1000  # letters that a WordPiece model looks up, whose time grows with their cube
_STEPS = 1000  # of a part
_DEEPEST = 20
_PARTS = ("normalizer", "pre_tokenizer", "decoder", "post_processor")
_INNER = ("normalizers", "pretokenizers", "decoders", "processors")
# Letters that a step writes for one, at most; a step of another type writes one, but maybe another one.
_FACTORS = {
    "BertNormalizer": 4,  # a Chinese letter between two spaces, or one without its accents
    "ByteLevel": 5,  # four bytes and a space before a word
    "Lowercase": 2,
    "Metaspace": 2,
    "NFC": 3,
    "NFD": 4,
    "NFKC": 18,
    "NFKD": 18,
}
# What leaves a text in compatible form, or counts as if.
_KEEPING = ("Lowercase", "NFC", "NFD", "Nmt", "Precompiled", "Strip", "StripAccents")
_FACTORS_OF_DECODERS = {"BPEDecoder": 3, "CTC": 3, "WordPiece": 2}  # an empty suffix is found around each letter
_NO_PARTS: dict[str, Any] = {
    "version": "1.0",
    "added_tokens": [],
    "model": {"type": "WordLevel", "vocab": {}, "unk_token": ""},
}
# Of expressions: what Python reads otherwise than the library, or not at all, as a letter, and what makes one too odd
# to say whether it takes a letter: look-around, boundaries, classes within classes, and counts that are optional there.
_AS_LETTER = re.compile(r"\\[pP]\{\^?\w+\}|\[:\^?\w+:\]|\\[hH]")
_ODD = re.compile(r"\(\?(?:[=!]|<[=!])|\\[bBGK]|&&|\[\^?(?:\\.|[^\\\]])*\[|\{\d+\}\?", re.DOTALL)
_LONGEST = 200  # letters of an expression that are looked at


def check_prompts(content: Mapping[str, Any]) -> None:
    """Reject what makes much of a short prompt, or looks up words for long.

    Args:
        content: of a tokenizer.json.

    Raises:
        ValueError: what it is, or steps that are nested too deep, too many or none of the library.
    """
    longest = content.get("model", {}).get("max_input_chars_per_word", 0)
    if longest > _LONGEST_WORD:
        raise ValueError(f"its max_input_chars_per_word={longest} is more than {_LONGEST_WORD}; lower it")
    parts = _read(content)
    if _growth([*parts["normalizer"], *parts["pre_tokenizer"]], _FACTORS) > _MOST:
        raise ValueError(f"its normalizer and pre_tokenizer may make more than {_MOST} letters of one")
    tokens = 1
    for step in parts["post_processor"]:
        tokens = _processed(step, tokens)
        if tokens > _MOST_TOKENS:
            raise ValueError(f"its post_processor makes more than {_MOST_TOKENS} tokens of one")


def check_texts(content: Mapping[str, Any], tokens: Iterable[str]) -> None:
    """Reject what makes much text of a few tokens.

    Args:
        content: of a tokenizer.json; {} if there is none.
        tokens: the whole vocabulary.

    Raises:
        ValueError: what it is, as for prompts.
    """
    longest = max(tokens, key=len, default="")
    if len(longest) * _growth(_read(content)["decoder"], _FACTORS_OF_DECODERS) > _MOST:
        raise ValueError(f"its decoder may make more than {_MOST} letters of the token {longest[:20]!r}")


def _read(content: Mapping[str, Any]) -> dict[str, list[Mapping[str, Any]]]:
    """The steps of each part, in order, as the library reads them, which does not need to be told their types."""
    for name in _PARTS:
        if sum(1 for _ in _steps(content.get(name), 0)) > _STEPS:
            raise ValueError(f"its {name} has more than {_STEPS} steps")
    given = _NO_PARTS | {name: content[name] for name in _PARTS if name in content}
    known = json.loads(Tokenizer.from_str(json.dumps(given)).to_str())
    return {name: [*_steps(known[name], 0)] for name in _PARTS}


def _steps(part: Any, depth: int) -> Iterator[Mapping[str, Any]]:
    if depth > _DEEPEST:
        raise ValueError("its steps are nested too deep")
    if not isinstance(part, Mapping):
        return
    if part.get("type") != "Sequence":
        yield part
    for name in _INNER:
        inner = part.get(name)
        for each in inner if isinstance(inner, list) else []:
            yield from _steps(each, depth + 1)


def _growth(steps: list[Mapping[str, Any]], factors: Mapping[str, int]) -> float:
    """Letters that one letter becomes at most, found from the last step to the first.

    `become` has letters that later steps replace; `other` is for those they do not, `least` for all.
    """
    other, least, become = 1.0, 1.0, dict[str, float]()
    own = _factors(steps, factors)

    def written(text: str) -> float:
        return inf if len(text) > _MOST else sum(max(become.get(letter, other), least) for letter in text)

    for step, factor in zip(reversed(steps), reversed(own), strict=True):
        kind, inserted = step["type"], 0.0
        if kind == "Replace":
            pattern, text = step["pattern"], written(step["content"])
            literal = pattern.get("String")
            if literal:
                for letter in literal:
                    become[letter] = max(become.get(letter, other), text / len(literal))
                continue
            if literal is None and _takes(pattern["Regex"]):
                least = max(least, text)  # it may match any letter, and is not run: it may take forever
                continue
            inserted = 2 * text  # before and after
        elif kind == "Prepend":
            inserted = written(step["prepend"])
        other, least, become = factor * max(other, least, *become.values()) + inserted, 1.0, {}
    return max(other, least, *become.values())


def _factors(steps: list[Mapping[str, Any]], factors: Mapping[str, int]) -> list[int]:
    """The factor of each step: what has Unicode's compatible form has the letters of the other one, or few more."""
    found, compatible = list[int](), False
    for step in steps:
        kind = step["type"]
        factor = _longest_entry(step) if kind == "Precompiled" else factors.get(kind, 1)
        found.append(factors.get("NFD", 1) if compatible and kind in ("NFKC", "NFKD") else factor)
        compatible = kind in ("NFKC", "NFKD") or (compatible and kind in _KEEPING)
    return found


def _takes(expression: str) -> bool:
    """Whether what an expression matches has a letter at least; False where that is not sure."""
    readable = _AS_LETTER.sub("a", expression)
    if len(expression) > _LONGEST or _ODD.search(readable):
        return False
    try:
        with warnings.catch_warnings(action="ignore"):
            return re.compile(readable).match("") is None
    except (re.error, OverflowError, RecursionError):
        return False


def _longest_entry(step: Mapping[str, Any]) -> int:
    """Letters of the longest text, in compatible form, that a precompiled table writes: after its trie and the size."""
    table = base64.b64decode(step["precompiled_charsmap"])
    texts = table[4 + int.from_bytes(table[:4], "little") :].split(b"\0")
    return max(1, *(len(normalize("NFKD", each.decode(errors="replace"))) for each in texts))


def _processed(step: Mapping[str, Any], tokens: int) -> int:
    """Tokens that a post-processor makes of some."""
    if step["type"] != "TemplateProcessing":
        return tokens + 4  # those of Bert and Roberta around a pair
    special = {name: max(len(each["ids"]), len(each["tokens"])) for name, each in step["special_tokens"].items()}
    return max(
        sum(
            special.get(piece["SpecialToken"]["id"], 0) if "SpecialToken" in piece else tokens for piece in step[pieces]
        )
        for pieces in ("single", "pair")
    )
