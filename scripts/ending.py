"""Exit of a command: bad input, Ctrl-C, SIGTERM and closed pipes give at most one line, and an exit code.

Imports are light, so that signals are handled while torch is being imported.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NoReturn, TextIO, TypeVar

from dllm.escape import brief, terminal

CLOSED_PIPE = 1  # as documented by Python, and used by rich
_CURSOR = b"\x1b[?25h"
_UTF8 = ["-X", "utf8"]  # options of Python
_AGAIN = 0.2  # seconds after which a swallowed signal is raised again
_SAID = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}
# Becomes another program, which gets SIGTERM when the given process ends (PR_SET_PDEATHSIG).
_TIE = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 15, 0, 0, 0)
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], sys.argv[2:])
"""

T = TypeVar("T")


class Stopped(KeyboardInterrupt):
    """A termination signal.

    Args:
        number: of the signal.
        expected: it is how the command ends, and no error.
    """

    def __init__(self, number: int, expected: bool = False) -> None:
        super().__init__(number)
        self.number, self.expected = number, expected


class _Watch:
    """Signal handler: ends the process, at once or, during work, by an exception that cleans up.

    Within an event loop the exception may lose a step of a task, which then never ends: there the work is cancelled.
    """

    def __init__(self) -> None:
        self.command, self.working, self.stopping = "dllm", False, False
        self.number = 0
        self.cancel: Callable[[], object] | None = None  # in an event loop

    def __call__(self, number: int, frame: object) -> None:
        if not self.working or self.stopping:
            self.end(number)
        self.stopping, self.number = True, number
        if self.cancel is None:
            self.stop()
        self.cancel()

    def stop(self) -> NoReturn:
        """Raise the exception."""
        signal.setitimer(signal.ITIMER_REAL, _AGAIN, _AGAIN)
        raise Stopped(self.number)

    def again(self, number: int, frame: object) -> None:
        """Raise the exception again if it was swallowed, as by compiled modules during their import.

        While it cleans up, it is the exception being handled, or the context of that one.
        """
        if self.working and self.cancel is None and not _cleans_up():
            raise Stopped(self.number)

    def end(self, number: int) -> NoReturn:
        """Exit immediately, without a display's own end, which shows the cursor that it hid."""
        with suppress(OSError, ValueError):
            if os.isatty(1):
                os.write(1, _CURSOR)
            os.write(2, f"{line(self.command, interruption(number))}\n".encode())
        os._exit(128 + number)

    def unraisable(self, lost: Any) -> None:
        """Handle a signal raised where exceptions are ignored, such as in a finaliser."""
        if isinstance(lost.exc_value, Stopped):
            self.end(lost.exc_value.number)
        sys.__unraisablehook__(lost)


def _cleans_up() -> bool:
    """Whether a signal's exception, or one that came of it, is being handled."""
    found, seen = [sys.exception()], set()
    while found:
        error = found.pop()
        if isinstance(error, Stopped):
            return True
        if error is not None and id(error) not in seen:
            seen.add(id(error))
            found += [error.__cause__, error.__context__]
    return False


_watch = _Watch()


@contextmanager
def watching(command: str) -> Iterator[None]:
    """Handle signals in this context, and during interpreter exit."""
    _watch.command, _watch.working, _watch.stopping = command, False, False
    hook, before = sys.unraisablehook, {}
    with suppress(ValueError):  # only the main thread can handle signals
        # Signals ignored at process start stay ignored.
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
    """Let signals raise an exception in this context."""
    before = None
    with suppress(ValueError):  # only the main thread can handle signals
        before = signal.signal(signal.SIGALRM, _watch.again)
    _watch.working = True
    try:
        yield
    finally:
        _watch.working = False
        if before is not None:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)


def in_loop(work: Coroutine[Any, Any, T]) -> T:
    """`asyncio.run`, in which a signal cancels the work; its exception is raised afterwards.

    Args:
        work: that is awaited.
    """
    import asyncio

    wait, cleans_up = (lambda: None), _watch.stopping

    async def main() -> T:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None
        _watch.cancel = lambda: loop.call_soon_threadsafe(task.cancel)
        if _watch.stopping and not cleans_up:  # since before the line above
            task.cancel()
        try:
            return await work
        finally:
            _watch.cancel = wait

    _watch.cancel = wait
    try:
        return asyncio.run(main())
    finally:
        _watch.cancel = None
        if _watch.stopping and not cleans_up:
            _watch.stop()


def tied(command: Sequence[str]) -> list[str]:
    """A command that ends when this process does, in whatever way; only on Linux.

    Args:
        command: a program's path, and its arguments.
    """
    if sys.platform != "linux":
        return [*command]
    return [sys.executable, "-I", "-S", "-c", _TIE, str(os.getpid()), *command]


def _heard(number: int) -> bool:
    return signal.getsignal(number) is not signal.SIG_IGN


def _hear(numbers: list[int]) -> None:
    for number in numbers:
        signal.signal(number, _watch)


def in_any_locale() -> None:
    """Take arguments, paths and texts as UTF-8 whatever the locale says, and write what an output's encoding lacks.

    Only the start of an interpreter decides how it decodes arguments and encodes paths; Python 3.15 decides so itself.
    """
    if sys.getfilesystemencoding() != "utf-8" and sys.orig_argv[1:3] != _UTF8:
        os.execv(sys.executable, [sys.executable, *_UTF8, *sys.orig_argv[1:]])
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError):  # closed at process start, or replaced
            # Escapes lose nothing, but on a terminal they would break the layout.
            stream.reconfigure(errors="replace" if stream.isatty() else "backslashreplace")  # type: ignore[union-attr]


@contextmanager
def piped(command: str) -> Iterator[None]:
    """Flush stdout at the end; exit silently if the pipe is closed."""
    try:
        yield
    except BrokenPipeError:
        leave_quietly()
    except SystemExit as leaving:
        if isinstance(leaving.__context__, BrokenPipeError):  # raised by rich
            leave_quietly()
        if leaving.code:  # the error is reported already
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
        fail(command, f"the output cannot be written ({error.strerror or error}); redirect it elsewhere")


def leave_quietly() -> NoReturn:
    """Exit like a process that writes to a closed pipe."""
    for stream in (sys.stdout, sys.stderr):
        _silence(stream)
    sys.exit(CLOSED_PIPE)


def _silence(stream: TextIO | None) -> None:
    """Discard pending output that cannot be written."""
    if stream is None:  # closed at process start
        return
    with suppress(OSError, ValueError, AttributeError):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def heard() -> int:
    """The signal that stops the command; 0 for none. Libraries may turn the exception that it raises into another."""
    return _watch.number if _watch.stopping else 0


def interruption(number: int = signal.SIGINT) -> str:
    """The message for a signal."""
    return f"{_SAID.get(signal.Signals(number), 'ended')}; what was written is kept"


def fail(command: str, message: str, code: int = 2) -> NoReturn:
    """Print an error and exit; what a signal caused is the signal."""
    if (number := heard()) and code == 2:
        message, code = interruption(number), 128 + number
    try:
        print(line(command, message), file=sys.stderr, flush=True)
    except OSError:  # a closed pipe, or a full disk
        _silence(sys.stderr)
    sys.exit(code)


def line(command: str, message: str) -> str:
    """The error line of a command."""
    return terminal(brief(f"{command}: error: {message}"), one_line=True)
