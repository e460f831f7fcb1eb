"""Chats as texts: the template of a checkpoint, which is a program.

Reading it and its loops take limited time, and on Linux all of it limited memory. A single operation, such as the
product of two integers of millions of digits, cannot be ended; powers, which need no such integers, are refused.
"""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from threading import Event, Lock, Thread, get_ident
from typing import Any

import psutil
from jinja2 import Environment
from transformers import PreTrainedTokenizerBase

_SECONDS = 5.0  # of one chat
_BYTES = 4 << 30  # that it may allocate at most, or half of the free memory
_limiting = Lock()


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
        with _within_memory(), _within(_SECONDS):
            if _has_powers(tokenizer.chat_template):  # of which one takes forever, and nothing ends it
                raise OverflowError("it computes a power (**)")
            return str(tokenizer.apply_chat_template(chat, tokenize=False, **options))
    except Exception as error:  # noqa: BLE001  # a template is code and may raise anything
        text = " ".join(str(error).split()) or type(error).__name__
        reason = {RecursionError: "nested too deep", MemoryError: "it takes too much memory"}.get(type(error), text)
        if options.get("continue_final_message") and isinstance(error, ValueError):
            reason = "it changes the partial answer at the end; leave out the last message"
        raise ValueError(f"{called} does not fit the chat template: {reason}") from None


def _has_powers(template: Any) -> bool:
    for source in template.values() if isinstance(template, dict) else (template,):
        words = ((kind, word) for _, kind, word in Environment().lex(str(source)) if kind != "whitespace")
        # After an opening bracket or a comma, it unpacks arguments.
        if any(word == ("operator", "**") and before not in ("(", ",") for (_, before), word in pairwise(words)):
            return True
    return False


@contextmanager
def _within_memory() -> Iterator[None]:
    """Raise a MemoryError where this process allocates too much more, by any thread."""
    if not sys.platform.startswith("linux"):
        yield
        return
    import resource  # not everywhere

    with _limiting:
        before = soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
        taken = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
        most = taken + min(_BYTES, psutil.virtual_memory().available // 2)
        if soft == resource.RLIM_INFINITY or soft > most:
            resource.setrlimit(resource.RLIMIT_DATA, (most, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_DATA, before)


@contextmanager
def _within(seconds: float) -> Iterator[None]:
    """Raise a TimeoutError in the Python code of this thread once it has computed for too long."""
    thread, lock, ended = get_ident(), Lock(), Event()
    taken = _clock(thread)
    throw, begun = ctypes.pythonapi.PyThreadState_SetAsyncExc, taken()

    def watch() -> None:
        while (left := begun + seconds - taken()) > 0:
            if ended.wait(max(left, 0.05)):
                return
        with lock:
            if not ended.is_set():
                throw(ctypes.c_ulong(thread), ctypes.py_object(TimeoutError))

    Thread(target=watch, daemon=True).start()
    try:
        yield
    except TimeoutError:
        raise TimeoutError(f"it takes more than {seconds:g} seconds") from None
    finally:
        with lock:
            ended.set()
        throw(ctypes.c_ulong(thread), None)  # if it was not raised yet


def _clock(thread: int) -> Callable[[], float]:
    """The seconds that a thread has computed; of all, where the system does not tell."""
    if not hasattr(time, "pthread_getcpuclockid"):
        return time.monotonic
    number = time.pthread_getcpuclockid(thread)
    return lambda: time.clock_gettime(number)
