"""How a command ends: bad input, Ctrl-C, SIGTERM and closed pipes give one line or none, and an exit code.

Nothing heavy is imported here, so that signals are already heard while torch is being imported.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn, TextIO

from dllm.escape import brief, terminal

CLOSED_PIPE = 1  # as Python documents it, and as rich leaves
_SAID = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}


class Stopped(KeyboardInterrupt):
    """A signal that asks the process to end."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class _Watch:
    """What a signal does: it ends the process, at once or, while work is done, by an exception that tidies up."""

    def __init__(self) -> None:
        self.command, self.working, self.stopping = "dllm", False, False

    def __call__(self, number: int, frame: object) -> None:
        if self.working and not self.stopping:
            self.stopping = True
            raise Stopped(number)
        self.end(number)

    def end(self, number: int) -> NoReturn:
        """Leave without running anything else."""
        with suppress(OSError, ValueError):
            os.write(2, f"{line(self.command, interruption(number))}\n".encode())
        os._exit(128 + number)

    def unraisable(self, lost: Any) -> None:
        """An exception where none can be raised, such as in a finaliser: a signal is heard all the same."""
        if isinstance(lost.exc_value, Stopped):
            self.end(lost.exc_value.number)
        sys.__unraisablehook__(lost)


_watch = _Watch()


@contextmanager
def watching(command: str) -> Iterator[None]:
    """Hear signals from here on, and once more when the interpreter ends."""
    _watch.command, _watch.working, _watch.stopping = command, False, False
    hook, before = sys.unraisablehook, {}
    with suppress(ValueError):  # another thread than the main one hears no signals
        # A signal that the process was started to ignore stays ignored.
        before = {number: signal.signal(number, _watch) for number in _SAID if _heard(number)}
        sys.unraisablehook = _watch.unraisable
    try:
        yield
    finally:
        _watch.working = False
        if before:
            atexit.register(_hear, list(before))
        for number, handler in before.items():
            signal.signal(number, handler)
        sys.unraisablehook = hook


@contextmanager
def working() -> Iterator[None]:
    """Let a signal tidy up what is done within."""
    _watch.working = True
    try:
        yield
    finally:
        _watch.working = False


def _heard(number: int) -> bool:
    return signal.getsignal(number) is not signal.SIG_IGN


def _hear(numbers: list[int]) -> None:
    for number in numbers:
        signal.signal(number, _watch)


@contextmanager
def piped(command: str) -> Iterator[None]:
    """Print all there is to print; leave quietly where nobody reads it any more."""
    try:
        yield
    except BrokenPipeError:
        leave_quietly()
    except SystemExit as leaving:
        if isinstance(leaving.__context__, BrokenPipeError):  # how rich leaves
            leave_quietly()
        if leaving.code:  # what went wrong is said already
            _silence(sys.stdout)
        else:
            _flush(command)
        raise
    _flush(command)


def _flush(command: str) -> None:
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        leave_quietly()
    except OSError as error:
        _silence(sys.stdout)
        fail(command, f"the output cannot be written ({error.strerror or error}); send it elsewhere")


def leave_quietly() -> NoReturn:
    """End as a process does that writes to a closed pipe."""
    for stream in (sys.stdout, sys.stderr):
        _silence(stream)
    sys.exit(CLOSED_PIPE)


def _silence(stream: TextIO | None) -> None:
    """Let nothing that is still to be written fail."""
    if stream is None:  # the process was started with it closed
        return
    with suppress(OSError, ValueError, AttributeError):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def interruption(number: int = signal.SIGINT) -> str:
    """What a signal is answered with."""
    return f"{_SAID.get(signal.Signals(number), 'ended')}; what was written is kept"


def fail(command: str, message: str, code: int = 2) -> NoReturn:
    """Say what is wrong and leave."""
    with suppress(BrokenPipeError):
        print(line(command, message), file=sys.stderr, flush=True)
    sys.exit(code)


def line(command: str, message: str) -> str:
    """What a command prints about bad input."""
    return terminal(brief(f"{command}: error: {message}"), one_line=True)
