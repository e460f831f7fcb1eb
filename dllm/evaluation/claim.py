"""Lock files: one process at a time writes a file; others get an error that names it."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import TypedDict

from filelock import FileLock, Timeout

from dllm.files import parse_json, state
from dllm.stored import misfit, there

_COMMAND = 200  # characters of a command that an error shows
_LARGEST = 1 << 14  # bytes; larger files are not locks


class _Holder(TypedDict):
    """The holder of a lock."""

    process: int
    host: str
    since: str
    command: str


class Claim:
    """A lock next to a file, `.NAME.lock`, which names its holder and is removed on release.

    The system releases it when its process ends in any way: the stale lock file of a killed process blocks nobody. It
    is removed before it is released; a waiting process then holds an unlinked file, which filelock detects and
    retries. A file of that name that is not a lock is neither changed nor removed.

    Args:
        file: the file, with links resolved, so that all of its names share one lock.
        called: its name in errors.
        give: advice in errors.
        patience: seconds to wait; a killed process may take a moment to end.
    """

    def __init__(self, file: Path, called: str, give: str, patience: float = 2.0) -> None:
        self.path = file.with_name(f".{file.name}.lock")
        self._called, self._give, self._patience = called, give, patience
        self._lock = FileLock(self.path)
        self._note: bytes | None = None

    def take(self) -> None:
        """Acquire the lock.

        Raises:
            ValueError: another process holds it, or the file cannot be locked or is not a lock.
        """
        there(self.path, f"rename that, or give {self._give}")
        before, self._note = state(self.path), None
        if (content := self._content()) and _holder(content) is None:
            raise ValueError(
                f"{self._called} cannot be locked, because {self.path} is not a lock of dllm; rename that file, or "
                f"give {self._give}"
            )
        try:
            self._lock.acquire(timeout=self._patience)
        except Timeout:
            held, by = _holder(self._content()), "another process"
            if held is not None:
                by = f"process {held['process']} on {held['host']} since {held['since']} ({held['command']})"
            raise ValueError(
                f"{self._called} is being written by {by}; wait for it to end, or give {self._give}"
            ) from None
        except OSError as error:
            raise ValueError(
                f"{self._called} cannot be locked ({error}); give {self._give}, in a folder where {self.path.name} can "
                "be created"
            ) from None
        if before is not None and before == state(self.path) and not content:
            return  # an existing empty file may belong to another program
        holder: _Holder = {
            "process": os.getpid(),
            "host": platform.node(),
            "since": datetime.now().astimezone().isoformat(timespec="seconds"),
            "command": shlex.join(sys.argv)[:_COMMAND],
        }
        self._note = json.dumps(holder, ensure_ascii=False).encode("utf-8", "replace")
        with suppress(OSError):  # informational only
            self.path.write_bytes(self._note)

    def release(self) -> None:
        """Release the lock."""
        if self._lock.is_locked:
            with suppress(OSError):  # removed already; Windows cannot remove open files
                if self._note is not None and self.path.read_bytes() in (self._note, b""):
                    self.path.unlink()
            self._lock.release()

    def _content(self) -> bytes:
        """Its first bytes; empty if unreadable, as on Windows while another process holds it."""
        try:
            with self.path.open("rb") as file:
                return file.read(_LARGEST)
        except OSError:
            return b""


@contextmanager
def claimed(file: Path, called: str, give: str) -> Iterator[None]:
    """Lock a file, whose folder is created if needed; arguments and errors as of `Claim`."""
    place = Path(os.path.realpath(file))
    place.parent.mkdir(parents=True, exist_ok=True)
    claim = Claim(place, called, give)
    claim.take()
    try:
        yield
    finally:
        claim.release()


def _holder(content: bytes) -> _Holder | None:
    """The holder according to the file; None if it is not a lock."""
    try:
        found: _Holder = parse_json(content)
    except ValueError:
        return None
    return None if misfit(found, _Holder) else found
