"""One process at a time writes a file; others are told who does."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import TypedDict

from filelock import FileLock, Timeout

from dllm.files import parse_json, state
from dllm.stored import misfit, there

_COMMAND = 200  # characters of a command that an error shows
_LARGEST = 1 << 14  # bytes; what is larger is not a lock


class _Holder(TypedDict):
    """Who holds a lock."""

    process: int
    host: str
    since: str
    command: str


class Claim:
    """A lock beside a file, `.NAME.lock`, which says who holds it and is gone when nobody does.

    The system lets go of it when its process ends, however that happens: a lock that a killed process left behind
    keeps nobody out. It is removed before it is released; whoever waited for it then holds a file without a name,
    which filelock notices and starts over. A file of that name that is no lock is neither changed nor removed.

    Args:
        file: the file itself, not a link to it, so that all of its names share one lock.
        called: what errors call it.
        give: what errors advise instead of it.
        patience: seconds to wait; a process that was killed a moment ago may not have ended yet.
    """

    def __init__(self, file: Path, called: str, give: str, patience: float = 2.0) -> None:
        self.path = file.with_name(f".{file.name}.lock")
        self._called, self._give, self._patience = called, give, patience
        self._lock = FileLock(self.path)
        self._note: bytes | None = None

    def take(self) -> None:
        """Keep others out.

        Raises:
            ValueError: somebody else has it, or a file there cannot be locked, or is not a lock.
        """
        there(self.path, f"rename that, or give {self._give}")
        before, self._note = state(self.path), None
        if (content := self._content()) and _holder(content) is None:
            raise ValueError(
                f"{self._called} cannot be locked, because {self.path} is a file of something else; rename that, or "
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
                "be made"
            ) from None
        if before is not None and before == state(self.path) and not content:
            return  # an empty file that was there may be anybody's
        holder: _Holder = {
            "process": os.getpid(),
            "host": platform.node(),
            "since": datetime.now().astimezone().isoformat(timespec="seconds"),
            "command": shlex.join(sys.argv)[:_COMMAND],
        }
        self._note = json.dumps(holder, ensure_ascii=False).encode("utf-8", "replace")
        with suppress(OSError):  # it is only for people
            self.path.write_bytes(self._note)

    def release(self) -> None:
        """Let others in."""
        if self._lock.is_locked:
            with suppress(OSError):  # it is gone; Windows removes nothing that is open
                if self._note is not None and self.path.read_bytes() in (self._note, b""):
                    self.path.unlink()
            self._lock.release()

    def _content(self) -> bytes:
        """Its first bytes; none where it cannot be read, as Windows has it of what others hold."""
        try:
            with self.path.open("rb") as file:
                return file.read(_LARGEST)
        except OSError:
            return b""


def _holder(content: bytes) -> _Holder | None:
    """Who says that they hold it; None where it is not a lock."""
    try:
        found: _Holder = parse_json(content)
    except ValueError:
        return None
    return None if misfit(found, _Holder) else found
