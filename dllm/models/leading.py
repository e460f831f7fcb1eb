"""Commands under torchrun: the first process runs the command, and the others repeat what it does with the model.

So files are read and written, random seeds drawn and lines printed once, and requests may come from the network. The
first process tells the others each call through torchrun's key-value store, in order: it never waits for them there.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import count
from threading import Lock, local
from typing import Any

from dllm.models import parallel

Teller = Callable[..., None]
_END = "end"


class _Lead:
    """Tells the calls of this process to the others."""

    def __init__(self) -> None:
        self._store, self._lock, self._told, self._objects = _store(), Lock(), count(), count()

    def tell(self, name: str, *arguments: Any) -> None:
        """The next call."""
        content = pickle.dumps((name, *arguments))
        with self._lock:
            self._store.set(f"{next(self._told)}", content)

    def numbered(self) -> int:
        """A number for a model or an engine."""
        return next(self._objects)


_leads: list[_Lead] = []  # of this process: one at most
_here = local()


@contextmanager
def leading() -> Iterator[None]:
    """Tell the other processes what is done with divided models in this context."""
    _leads.append(_Lead())
    try:
        yield
    finally:
        _leads.pop().tell(_END)
    parallel.leave()


@contextmanager
def untold() -> Iterator[None]:
    """Calls within others, which the other processes repeat as a part of these."""
    before, _here.untold = getattr(_here, "untold", False), True
    try:
        yield
    finally:
        _here.untold = before


def tell_load(**options: Any) -> int | None:
    """Tell the others to load a model; its number, None where nobody is told."""
    if (lead := _lead()) is None:
        return None
    number = lead.numbered()
    lead.tell("load", number, options)
    return number


def teller(number: int | None, kind: str, *arguments: Any) -> Teller:
    """Tell the others to create something of the model of a number; what is done with it is told by the result."""
    lead = _lead()
    if lead is None or number is None:
        return _nobody
    own = lead.numbered()
    lead.tell(kind, own, number, *arguments)
    return lambda name, *more: lead.tell(name, own, *more)


def tell(number: int | None, name: str, *arguments: Any) -> None:
    """Tell the others a call of the model of a number."""
    if (lead := _lead()) is not None and number is not None:
        lead.tell(name, number, *arguments)


def told() -> Iterator[tuple[Any, ...]]:
    """In another process than the first: its calls, until the end."""
    store, (_, processes) = _store(), parallel.launched() or (0, 1)
    for number in count():
        call: tuple[Any, ...] = pickle.loads(store.get(f"{number}"))  # of the first process
        if store.add(f"{number} read", 1) == processes - 1:  # everyone has it
            store.delete_key(f"{number}")
            store.delete_key(f"{number} read")
        if call[0] == _END:
            return
        yield call


def _lead() -> _Lead | None:
    return None if not _leads or getattr(_here, "untold", False) else _leads[-1]


def _nobody(name: str, *arguments: Any) -> None:
    """There is nobody to tell."""


def _store() -> Any:
    store = parallel.store("calls")
    store.set_timeout(timedelta(days=365))  # a server may wait for requests
    return store
