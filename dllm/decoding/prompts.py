"""Encoding of prompts as token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dllm.decoding.chats import write_chat
from dllm.models.tokenizers import tokens_after, tokens_of

Message: TypeAlias = Mapping[str, Any]
Chat: TypeAlias = Sequence[Message]
Prompts: TypeAlias = str | Sequence[Any] | Mapping[str, Any] | Tensor | NDArray[Any]
Mask: TypeAlias = Sequence[Any] | Tensor | NDArray[Any]


def encode(
    prompts: Prompts,
    tokenizer: PreTrainedTokenizerBase | None,
    attention_mask: Mask | None = None,
    eos_token_ids: Sequence[int] = (),
) -> list[list[int]]:
    """Token ids of each prompt, without padding.

    Without a mask, padding tokens at either end of the rows of a tensor or an array are removed, as in transformers,
    unless the padding token is also end-of-text: that is ambiguous and rejected; give a mask (all ones without
    padding). Lists are used as they are, except if they have the same length and only some of them begin or end with
    the padding token; if all do, these are ordinary tokens.

    Args:
        prompts: a text, a list of texts, one chat (a list of messages), a list of chats, or token ids: lists, a
            (B, P) tensor or array, or what a tokenizer returns, with the mask it made.
        tokenizer: needed for everything except token ids.
        attention_mask: of token ids, in their shape: 1 at tokens, 0 at padding on either side.
        eos_token_ids: ids that end a text; the first one pads results.

    Raises:
        ValueError: prompts of the wrong type, text without a tokenizer, a chat that the template rejects, a mask
            of another shape or with gaps, or ambiguous padding.
    """
    if isinstance(prompts, Mapping):
        prompts, attention_mask = _tokenized(prompts, attention_mask)
    if isinstance(prompts, np.ndarray) and prompts.ndim == 1 and prompts.dtype.kind in "OU":  # texts
        prompts = prompts.tolist()
    if isinstance(prompts, (Tensor, np.ndarray)):
        rows = entries("prompts", prompts)
        if prompts.ndim != 2 or _kind(prompts) not in "iu":
            raise ValueError(f"prompts has shape {tuple(prompts.shape)} and {prompts.dtype}; give a (B, P) LongTensor")
        prompts = _without_padding(rows, tokenizer, eos_token_ids) if attention_mask is None else rows
    elif attention_mask is None and (rows := _padded_lists(prompts, tokenizer)) is not None:
        prompts = _without_padding(rows, tokenizer, eos_token_ids)
    if isinstance(prompts, str) or is_chat(prompts):
        prompts = [prompts]
    if not isinstance(prompts, Sequence):
        raise ValueError(f"prompts is a {type(prompts).__name__}; give text, a list of texts or chats, or token ids")
    if len(prompts) == 0:
        raise ValueError("prompts is empty; give at least one")
    if attention_mask is not None:
        return _masked(prompts, attention_mask)
    return [_encode_one(prompt, tokenizer, f"prompts[{number}]") for number, prompt in enumerate(prompts)]


def encode_one(
    prompt: Any, tokenizer: PreTrainedTokenizerBase | None, attention_mask: Mask | None = None, called: str = "prompt"
) -> list[int]:
    """Token ids of a single prompt: a text, a chat, a list or tensor of ids, or a tokenizer's output for one text.

    Args:
        prompt: as an entry of `prompts` in `encode`.
        tokenizer: needed for everything except token ids.
        attention_mask: of token ids.
        called: name of the prompt in errors.

    Raises:
        ValueError: as `encode`, or there are several prompts.
    """
    alone = token_list(prompt, called) is not None
    if attention_mask is None and (alone or isinstance(prompt, str) or is_chat(prompt)):
        return _encode_one(prompt, tokenizer, called)
    if alone:
        prompt, attention_mask = [prompt], [attention_mask]
    found = encode(prompt, tokenizer, attention_mask)
    if len(found) != 1:
        raise ValueError(f"{called} contains {len(found)} prompts; add one at a time")
    return found[0]


def is_chat(prompt: Any) -> bool:
    """Whether a value is a list of messages, each with a role and content (text, parts or None)."""
    return (
        isinstance(prompt, Sequence)
        and not isinstance(prompt, str)
        and len(prompt) > 0
        and all(isinstance(message, Mapping) and _is_message(message) for message in prompt)
    )


def _is_message(message: Message) -> bool:
    content = message.get("content")
    parts = isinstance(content, (list, tuple)) and all(
        isinstance(part, Mapping) and isinstance(part.get("type"), str) for part in content
    )
    silent = content is None and ("content" in message or "tool_calls" in message)
    return isinstance(message.get("role"), str) and (isinstance(content, str) or parts or silent)


def _encode_one(prompt: Any, tokenizer: PreTrainedTokenizerBase | None, called: str) -> list[int]:
    if (ids := token_list(prompt, called)) is not None:
        return ids
    if not isinstance(prompt, str) and not is_chat(prompt):
        raise ValueError(f"{called} is a {type(prompt).__name__}; give text, chat messages or token ids")
    if tokenizer is None:
        raise ValueError(f"{called} is text, and this model has no tokenizer; give token ids")
    if isinstance(prompt, str):
        return _with_masks(prompt, tokenizer, called, special=True)
    if tokenizer.chat_template is None:
        raise ValueError(f"{called} is a chat, and this tokenizer has no chat template; give plain text")
    return _with_masks(_written(prompt, tokenizer, called), tokenizer, called, special=False)


def _with_masks(text: str, tokenizer: PreTrainedTokenizerBase, called: str, *, special: bool) -> list[int]:
    """Token ids of a text, without the spaces that some tokenizers put before what follows a mask."""
    ids, mask, place = tokens_of(tokenizer, text, called, special=special), tokenizer.mask_token_id, 0
    parts = text.split(str(tokenizer.mask_token))[1:]
    for part in parts if ids.count(mask) == len(parts) else ():
        place = ids.index(mask, place) + 1
        alone = tokens_of(tokenizer, part, called) if part else []
        if alone and ids[place : place + len(alone)] == alone:
            ids[place : place + len(alone)] = tokens_after(tokenizer, part, called)
    return ids


def _written(chat: Chat, tokenizer: PreTrainedTokenizerBase, called: str) -> str:
    """A chat in the format of the model, including a partial answer at its end."""
    messages = [{**message, "content": _text(message, called)} for message in chat]
    last = messages[-1]
    begun = last["role"] == "assistant" and not last.get("tool_calls")
    if begun and not last["content"].strip():  # nothing to continue
        messages, begun = messages[:-1], False
    if not messages:
        raise ValueError(f"{called} has only an empty assistant message; give the message to be answered")
    return write_chat(tokenizer, messages, called, add_generation_prompt=not begun, continue_final_message=begun)


def _text(message: Message, place: str) -> str:
    """The text of a message's content, which may come in parts."""
    content = message.get("content")
    if content is None or isinstance(content, str):
        return content or ""
    for part in content:
        if part["type"] != "text" or not isinstance(part.get("text"), str):
            raise ValueError(f"{place} has content of type {part['type']!r}; give text, the only type supported")
    return "".join(part["text"] for part in content)


def _tokenized(given: Mapping[str, Any], attention_mask: Mask | None) -> tuple[Any, Any]:
    """Token ids and mask from a tokenizer's output for one text or several."""
    if "input_ids" not in given:
        raise ValueError(
            f"prompts is a {type(given).__name__} without input_ids; give the output of a tokenizer, or "
            "a list of messages"
        )
    ids, mask = given["input_ids"], given.get("attention_mask")
    if isinstance(ids, (str, bytes)):
        raise ValueError(f"prompts['input_ids']={ids!r} is text; give token ids, or the text itself as prompts")
    if mask is not None and attention_mask is not None:
        raise ValueError("attention_mask is given twice, within prompts and separately; leave one out")
    mask = attention_mask if mask is None else mask
    if token_list(ids, "prompts") is not None and len(ids) > 0:  # one text, not in a batch
        ids = ids[None] if isinstance(ids, (Tensor, np.ndarray)) else [ids]
        mask = None if mask is None else mask[None] if isinstance(mask, (Tensor, np.ndarray)) else [mask]
    return ids, mask


def token_list(row: Any, called: str) -> list[int] | None:
    """A list, tensor or array of token ids as a list; None for other types.

    Raises:
        ValueError: a tensor without values.
    """
    if isinstance(row, (Tensor, np.ndarray)):
        ids = entries(called, row)
        return ids if row.ndim == 1 and _kind(row) in "iu" else None
    is_list = isinstance(row, Sequence) and not isinstance(row, (str, bytes, bytearray, memoryview))
    if is_list and all(isinstance(token, Integral) and not isinstance(token, bool) for token in row):
        return [int(token) for token in row]
    return None


def entries(called: str, given: Tensor | NDArray[Any] | np.generic) -> Any:
    """The values of a tensor or an array as lists of Python numbers.

    Raises:
        ValueError: it cannot be converted, as on the device "meta", or if sparse, nested or quantised.
    """
    try:
        return given.tolist()
    except RuntimeError:
        nested = isinstance(given, Tensor) and given.is_nested
        kind = "nested" if nested else f"{given.dtype}, {getattr(given, 'layout', None)}, on {given.device}"
        raise ValueError(f"{called} is a tensor that cannot be read ({kind}); give a dense one with values") from None


def _masked(prompts: Sequence[Any], attention_mask: Any) -> list[list[int]]:
    """Token ids where the mask is 1."""
    if isinstance(attention_mask, (Tensor, np.ndarray)):
        attention_mask = entries("attention_mask", attention_mask)
    if not isinstance(attention_mask, Sequence) or len(attention_mask) != len(prompts):
        count = len(attention_mask) if isinstance(attention_mask, Sequence) else repr(attention_mask)
        raise ValueError(f"attention_mask has {count} rows for {len(prompts)} prompts; give one in the prompts' shape")
    found = []
    for number, (prompt, given) in enumerate(zip(prompts, attention_mask, strict=True)):
        if (ids := token_list(prompt, f"prompts[{number}]")) is None:
            raise ValueError(f"attention_mask is for token ids, and prompts[{number}] is not; leave it out")
        mask = entries(f"attention_mask[{number}]", given) if isinstance(given, (Tensor, np.ndarray)) else given
        if not _is_mask(mask, len(ids)):
            raise ValueError(
                f"attention_mask[{number}] does not fit the {len(ids)} tokens of prompts[{number}]; give 1 for each "
                "token and 0 for padding"
            )
        seen = [place for place, each in enumerate(mask) if each]
        if seen and seen[-1] - seen[0] >= len(seen):
            raise ValueError(f"attention_mask[{number}] has 0 between tokens; mask padding at either end only")
        found.append([ids[place] for place in seen])
    return found


def _is_mask(mask: Any, length: int) -> bool:
    try:
        return isinstance(mask, Sequence) and len(mask) == length and all(each in (0, 1) for each in mask)
    except (RuntimeError, ValueError):  # tensors without values, or arrays
        return False


def _padded_lists(prompts: Any, tokenizer: PreTrainedTokenizerBase | None) -> list[list[int]] | None:
    """Lists of token ids of the same length, if some but not all of them have the padding token at an end."""
    if tokenizer is None or not isinstance(prompts, Sequence):
        return None
    rows = [ids for number, prompt in enumerate(prompts) if (ids := token_list(prompt, f"prompts[{number}]"))]
    padded = {tokenizer.pad_token_id in (row[0], row[-1]) for row in rows}
    alike = len(rows) == len(prompts) and len({len(row) for row in rows}) == 1
    return rows if alike and len(padded) == 2 else None


def _without_padding(
    rows: list[list[int]], tokenizer: PreTrainedTokenizerBase | None, eos_token_ids: Sequence[int]
) -> list[list[int]]:
    """Rows without the padding at their ends, where that is unambiguous."""
    pad = None if tokenizer is None else tokenizer.pad_token_id
    unclear = {*eos_token_ids[:1], *([pad] if pad in eos_token_ids else [])}
    for number, row in enumerate(rows):
        if row and (token := next((each for each in (row[0], row[-1]) if each in unclear), None)) is not None:
            raise ValueError(
                f"prompts[{number}] begins or ends with token id {token}, which is padding or end-of-text: give "
                "attention_mask, 1 at tokens and 0 at padding"
            )
    if pad is None or pad in unclear:
        return rows
    kept = [[place for place, token in enumerate(row) if token != pad] for row in rows]
    return [row[places[0] : places[-1] + 1] if places else [] for row, places in zip(rows, kept, strict=True)]


def _kind(values: Tensor | NDArray[Any]) -> str:
    """NumPy's kind of the entries: i and u are integers."""
    if isinstance(values, np.ndarray):
        return str(values.dtype.kind)
    return "b" if values.dtype == torch.bool else "f" if values.is_floating_point() or values.is_complex() else "i"
