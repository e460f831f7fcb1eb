"""From what a user gives as prompts to token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

Message: TypeAlias = Mapping[str, str]
Chat: TypeAlias = Sequence[Message]
Prompts: TypeAlias = str | Sequence[str] | Chat | Sequence[Chat] | Sequence[Sequence[int]] | Tensor


def encode(prompts: Prompts, tokenizer: PreTrainedTokenizerBase | None) -> list[list[int]]:
    """Token ids of each prompt.

    Args:
        prompts: a text, a list of texts, one chat (a list of messages), a list of chats, a list of
            lists of token ids, or a (B, P) tensor of them.
        tokenizer: needed for everything but token ids.

    Raises:
        ValueError: prompts of another kind, or text without a tokenizer.
    """
    if isinstance(prompts, Tensor):
        if prompts.ndim != 2 or prompts.dtype != torch.long:
            raise ValueError(f"prompts has shape {tuple(prompts.shape)} and {prompts.dtype}; give a (B, P) LongTensor")
        prompts = prompts.tolist()
    if isinstance(prompts, str) or _is_chat(prompts):
        prompts = [prompts]  # type: ignore[assignment]  # one prompt: a list of one
    if not isinstance(prompts, Sequence):
        raise ValueError(f"prompts is a {type(prompts).__name__}; give text, a list of texts or chats, or token ids")
    if len(prompts) == 0:
        raise ValueError("prompts is empty; give at least one")
    return [_encode_one(prompt, tokenizer, number) for number, prompt in enumerate(prompts)]


def _encode_one(prompt: Any, tokenizer: PreTrainedTokenizerBase | None, number: int) -> list[int]:
    if isinstance(prompt, Sequence) and not isinstance(prompt, str) and all(isinstance(t, int) for t in prompt):
        return list(prompt)
    if not isinstance(prompt, str) and not _is_chat(prompt):
        raise ValueError(f"prompts[{number}] is a {type(prompt).__name__}; give text, chat messages or token ids")
    if tokenizer is None:
        raise ValueError(f"prompts[{number}] is text, and this model has no tokenizer; give token ids")
    if isinstance(prompt, str):
        return list(tokenizer(prompt).input_ids)
    if tokenizer.chat_template is None:
        raise ValueError(f"prompts[{number}] is a chat, and this tokenizer has no chat template; give plain text")
    text = write_chat(tokenizer, prompt, f"prompts[{number}]", add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def write_chat(tokenizer: PreTrainedTokenizerBase, chat: Any, called: str, **options: Any) -> str:
    """A chat as the tokenizer's template writes it.

    Args:
        tokenizer: has a chat template.
        chat: its messages.
        called: what errors call it.
        **options: as for `apply_chat_template`.

    Raises:
        ValueError: the template is damaged, or refuses the chat.
    """
    try:
        return str(tokenizer.apply_chat_template(chat, tokenize=False, **options))
    except (TemplateError, RecursionError, SyntaxError, ArithmeticError, TypeError, ValueError, LookupError) as error:
        reason = "nested too deep" if isinstance(error, RecursionError) else " ".join(str(error).split())
        raise ValueError(
            f"{called} cannot be written as the tokenizer's chat template asks ({reason}); give plain text, or a chat "
            "that fits the template"
        ) from None


def _is_chat(prompt: Any) -> bool:
    if not isinstance(prompt, Sequence) or isinstance(prompt, str) or len(prompt) == 0:
        return False
    texts = [(m.get("role"), m.get("content")) for m in prompt if isinstance(m, Mapping)]
    return len(texts) == len(prompt) and all(isinstance(part, str) for pair in texts for part in pair)
