"""Chats as texts: the template of a checkpoint, which is a program, in limited time."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock, Timer, get_ident
from typing import Any

from jinja2 import Environment
from transformers import PreTrainedTokenizerBase

_SECONDS = 5.0  # of one chat


def write_chat(tokenizer: PreTrainedTokenizerBase, chat: Any, called: str, **options: Any) -> str:
    """Apply the tokenizer's chat template.

    Args:
        tokenizer: has a chat template.
        chat: its messages.
        called: name of the chat in errors.
        **options: as for `apply_chat_template`.

    Raises:
        ValueError: the template is invalid, takes too long, or rejects the chat.
    """
    try:
        _check_powers(tokenizer.chat_template)
        with _within(_SECONDS):
            return str(tokenizer.apply_chat_template(chat, tokenize=False, **options))
    except Exception as error:  # noqa: BLE001  # a template is code and may raise anything
        text = " ".join(str(error).split()) or type(error).__name__
        reason = "nested too deep" if isinstance(error, RecursionError) else text
        if options.get("continue_final_message") and isinstance(error, ValueError):
            reason = "it changes the partial answer at the end; leave out the last message"
        raise ValueError(f"{called} does not fit the chat template: {reason}") from None


def _check_powers(template: Any) -> None:
    """Reject powers, of which one takes forever, and no other code runs then."""
    sources = template.values() if isinstance(template, dict) else (template,)
    for source in (each for each in sources if isinstance(each, str) and "**" in each):
        if any((kind, value) == ("operator", "**") for _, kind, value in Environment().lex(source)):
            raise ValueError("it computes a power (**)")


@contextmanager
def _within(seconds: float) -> Iterator[None]:
    """Raise a TimeoutError in the Python code that this thread runs, once it has taken too long."""
    thread, lock, running = ctypes.c_ulong(get_ident()), Lock(), True
    throw = ctypes.pythonapi.PyThreadState_SetAsyncExc

    def end() -> None:
        with lock:
            if running:
                throw(thread, ctypes.py_object(TimeoutError))

    timer = Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    except TimeoutError:
        raise TimeoutError(f"it takes more than {seconds:g} seconds") from None
    finally:
        with lock:
            running = False
        throw(thread, None)  # if it was not raised yet
        timer.cancel()
