"""Tokenizers of the published layouts, loaded without remote code.

LLaDA publishes ``tokenizer.json``. Dream publishes ``vocab.json`` and ``merges.txt`` with a custom
tokenizer class as code; that class is Qwen2's byte-level BPE, so `Qwen2TokenizerFast` reads the files
and the code is never run. Other classes split texts otherwise; of these, GPT2's is read.
"""

from __future__ import annotations

import json
import re
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers.models import BPE
from transformers import (  # type: ignore[attr-defined]  # two of them are aliases in newer releases
    GPT2TokenizerFast,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2TokenizerFast,
)

from dllm.checks import Notice, first_line, is_text, panicked, telling_panics
from dllm.files import parse_json
from dllm.models.growth import check_prompts, check_texts

_BPE_FILES = ("vocab.json", "merges.txt")
# What splits texts, which these files do not say, by the tokenizer_class of tokenizer_config.json.
_BPE_CLASSES = {
    "DreamTokenizer": Qwen2TokenizerFast,
    "DreamTokenizerFast": Qwen2TokenizerFast,
    "GPT2Tokenizer": GPT2TokenizerFast,
    "GPT2TokenizerFast": GPT2TokenizerFast,
    "Qwen2Tokenizer": Qwen2TokenizerFast,
    "Qwen2TokenizerFast": Qwen2TokenizerFast,
}
_ANY_CLASS = ("PreTrainedTokenizerFast", "TokenizersBackend")  # what transformers calls any fast tokenizer
_OTHER_FILES = ("tokenizer_config.json", "tokenizer.model")
# Entries of tokenizer_config.json that a loader would read as file names.
_FILES = ("tokenizer.json", "tokenizer_config.json", "added_tokens.json", "special_tokens_map.json")
_BEFORE = ("0", "\n", ".")  # texts that are tokens of their own whatever follows, the one or the other
_BYTE = re.compile("<0x[0-9A-F]{2}>")  # a token for a byte, which nothing is merged to
_COMMENT = re.compile(r"\{#.*?#\}", re.DOTALL)  # of a chat template
_MOST_BYTES = 2 * 10**8
_ELSEWHERE = ("fast_tokenizer_files", "gguf_file", "init_inputs", "tokenizer_object", "vocab", "merges")


def tokens_of(tokenizer: PreTrainedTokenizerBase, text: str, what: str, *, special: bool = False) -> list[int]:
    """Token ids of a text.

    Args:
        tokenizer: the tokenizer.
        text: the text.
        what: the text is, in errors.
        special: whether to add special tokens.

    Raises:
        ValueError: it is no valid text, or the tokenizer's own expressions give up on it.
    """
    if not is_text(text):
        raise ValueError(f"{what} contains lone surrogates, which are not valid text; give UTF-8")
    with telling_panics(f"{what} cannot be tokenized", "give another text"):
        return list(tokenizer(text, add_special_tokens=special, verbose=False).input_ids)


def tokens_after(tokenizer: PreTrainedTokenizerBase, text: str, what: str) -> list[int]:
    """Token ids of a text that follows another one: without the space that some tokenizers put before each text.

    Args:
        tokenizer: the tokenizer.
        text: the text.
        what: the text is, in errors.

    Raises:
        ValueError: as `tokens_of`.
    """
    ids = tokens_of(tokenizer, text, what)
    for before in _BEFORE:
        if writes(tokenizer, ids, text):
            return ids
        head, whole = tokens_of(tokenizer, before, what), tokens_of(tokenizer, before + text, what)
        ids = whole[len(head) :] if whole[: len(head)] == head else ids
    return ids if writes(tokenizer, ids, text) else tokens_of(tokenizer, text, what)


def writes(tokenizer: PreTrainedTokenizerBase, ids: list[int], text: str) -> bool:
    """Whether tokens that follow others write a text."""
    before = tokenizer(_BEFORE[0], add_special_tokens=False).input_ids
    return text_of(tokenizer, before + ids) == text_of(tokenizer, before) + text


def text_of(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int], **options: Any) -> str:
    """The text of some tokens.

    Args:
        tokenizer: the tokenizer.
        tokens: ids.
        options: of the tokenizer's `decode`.

    Raises:
        ValueError: the tokenizer's own expressions give up on it.
    """
    with telling_panics("tokens cannot be decoded", "use the tokenizer of the published model"):
        return str(tokenizer.decode(list(tokens), **options))


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    """Load the tokenizer of a checkpoint folder, padding on the left.

    Args:
        folder: the checkpoint folder; ``tokenizer.json`` is preferred to ``vocab.json`` and ``merges.txt``.

    Returns:
        The tokenizer, or None if the folder has no tokenizer files.

    Raises:
        ValueError: tokenizer files that are incomplete, unreadable or inconsistent.
    """
    present = {path.name for path in folder.iterdir() if path.is_file()}
    files: tuple[str, ...] = ("tokenizer.json",)
    if present.isdisjoint(files) and not present.isdisjoint(_BPE_FILES):
        files = _BPE_FILES
    elif present.isdisjoint((*files, *_OTHER_FILES)):
        return None
    missing = next((file for file in files if file not in present), None)
    if missing is not None:
        raise ValueError(f"{folder}: the tokenizer's {missing} is missing; copy it here from the published model")
    check_tokenizer_config(folder)
    kind = _bpe_class(folder) if files == _BPE_FILES else PreTrainedTokenizerFast
    try:
        content = _read(folder / "tokenizer.json")
        check_prompts(content)  # added tokens are normalized as they are read
        tokenizer = kind.from_pretrained(folder, padding_side="left", local_files_only=True)
        if hasattr(tokenizer.backend_tokenizer.model, "dropout"):  # for training: other tokens at each call
            tokenizer.backend_tokenizer.model.dropout = None
        check_texts(content, tokenizer.get_vocab())
        check_vocabulary(tokenizer, (content or json.loads(tokenizer.backend_tokenizer.to_str()))["model"])
        declared = _declared_ids(folder, content)
    except BaseException as error:
        if not isinstance(error, Exception) and not panicked(error):
            raise
        reason = first_line(error)
        raise ValueError(
            f"{folder}: the tokenizer files ({', '.join(files)}, tokenizer_config.json) cannot be read: {reason}; "
            "copy them again from the published model"
        ) from None
    if _is_empty(tokenizer.chat_template):  # it would leave out all messages
        tokenizer.chat_template = None
    _check_special(folder, tokenizer, content)
    ids, own = set(tokenizer.get_vocab().values()), {each["content"] for each in content.get("added_tokens", [])}
    for token, declared_id in declared:
        found = tokenizer.convert_tokens_to_ids(token)
        if found == declared_id or not token:  # an empty one is not read
            continue
        problem = f"{folder}: the tokenizer gives {token!r} the id {found}, its files say {declared_id}"
        if declared_id in ids or token not in own:
            raise ValueError(f"{problem}; copy the tokenizer files of one model")
        warnings.warn(f"{problem}; transformers reads it so, too, as ids have no gaps", Notice, stacklevel=2)
    return tokenizer


def _is_empty(template: Any) -> bool:
    """Whether a chat template, or the default of several, writes nothing at all."""
    if isinstance(template, dict):
        return all(map(_is_empty, template.values())) or _is_empty(template.get("default", "other"))
    return template is None or not _COMMENT.sub("", str(template)).strip()


def check_tokenizer_config(folder: Path) -> None:
    """Reject a `tokenizer_config.json` that names other files, or an invalid length.

    Raises:
        ValueError: an unsupported entry.
    """
    try:
        for file in (*_FILES, *_BPE_FILES):
            _check_size(folder / file)
        config = _read(folder / "tokenizer_config.json")
        for key in _ELSEWHERE:
            if key in config and config[key] not in (None, []):
                raise ValueError(f"{key}={config[key]!r} is not supported; remove it")
        longest = dict(config).get("model_max_length")
        if longest is not None and (isinstance(longest, bool) or not isinstance(longest, (int, float))):
            raise ValueError(f"model_max_length={longest!r} is not a number; remove it")
    except (OSError, ValueError, TypeError) as error:
        reason = first_line(error)
        raise ValueError(
            f"{folder}: the tokenizer's tokenizer_config.json cannot be read: {reason}; "
            "copy it again from the published model"
        ) from None


def check_vocabulary(tokenizer: Any, model: dict[str, Any]) -> None:
    """Reject two tokens with one id, and a BPE whose merges are cut off: its words would be read as letters.

    Args:
        tokenizer: a fast one.
        model: of its tokenizer.json.

    Raises:
        ValueError: what it is.
    """
    if not isinstance(tokenizer.backend_tokenizer.model, BPE):
        return
    vocabulary = tokenizer.get_vocab()
    for number, times in Counter(vocabulary.values()).most_common(1):
        if times > 1:
            same = sorted(token for token, each in vocabulary.items() if each == number)
            raise ValueError(f"its tokens {same[0]!r} and {same[1]!r} have one id, {number}")
    if model.get("ignore_merges"):
        return
    prefix, suffix = (model.get(each) or "" for each in ("continuing_subword_prefix", "end_of_word_suffix"))
    pairs = (each.split(" ") if isinstance(each, str) else each for each in model["merges"])
    made = {first + second.removeprefix(prefix) for first, second in pairs}
    words = {
        word
        for word in vocabulary.keys() - tokenizer.get_added_vocab().keys() - {model.get("unk_token")}
        if len(word.removeprefix(prefix).removesuffix(suffix)) > 1 and not _BYTE.fullmatch(word)
    }
    if len(words - made) > max(20, len(words) // 10):  # some have a few that nothing makes, such as special ones
        raise ValueError(f"its merges make only {len(words & made)} of the {len(words)} words of its vocabulary")


def _bpe_class(folder: Path) -> Any:
    """The class that reads `vocab.json` and `merges.txt`; Qwen2's if none is named.

    Raises:
        ValueError: the class is another one.
    """
    named = str(_read(folder / "tokenizer_config.json").get("tokenizer_class") or _ANY_CLASS[0])
    kind = _BPE_CLASSES["Qwen2Tokenizer"] if named in _ANY_CLASS else _BPE_CLASSES.get(named)
    if kind is None:
        raise ValueError(
            f"{folder}: the tokenizer's tokenizer_class={named!r} is not read from vocab.json and merges.txt; save its "
            "tokenizer.json (save_pretrained of a fast tokenizer), or name the class it is like (GPT2Tokenizer, "
            "Qwen2Tokenizer)"
        )
    return kind


def _check_special(folder: Path, tokenizer: Any, content: dict[str, Any]) -> None:
    """Reject an ordinary token that other files name as a special or an added one.

    It would vanish from all texts, or prompts would be split elsewhere.

    Raises:
        ValueError: there is one.
    """
    if not content:  # of tokenizer.json
        return
    added = content.get("added_tokens", [])
    declared, vocabulary = {each["content"] for each in added}, tokenizer.backend_tokenizer.model
    named = {token.content for token in tokenizer.added_tokens_decoder.values()}
    for token in sorted(named.union(map(str, tokenizer.all_special_tokens))):
        if token not in declared and vocabulary.token_to_id(token) is not None:
            raise ValueError(
                f"{folder}: the tokenizer's files name {token!r} as special or added, an ordinary token of "
                "tokenizer.json; copy the tokenizer files of one model"
            )


def _declared_ids(folder: Path, content: dict[str, Any]) -> list[tuple[str, int]]:
    """Ids of the added tokens according to the files; a loader may renumber them silently."""
    added: dict[str, int] = _read(folder / "added_tokens.json")
    stated = _read(folder / "tokenizer_config.json").get("added_tokens_decoder", {})
    added |= {token["content"]: int(number) for number, token in stated.items()}
    return [*((token["content"], token["id"]) for token in content.get("added_tokens", [])), *added.items()]


def _read(path: Path) -> dict[str, Any]:
    return parse_json(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _check_size(path: Path) -> None:
    if path.is_file() and (size := path.stat().st_size) > _MOST_BYTES:
        raise ValueError(f"{path.name} is of {size} bytes, too long for a tokenizer")
