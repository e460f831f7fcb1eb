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

from filelock import FileLock, Timeout

from dllm.files import parse_json

_COMMAND = 200  # characters of a command that an error shows


class Claim:
    """A lock beside a file, `.NAME.lock`, which says who holds it and is gone when nobody does.

    The system lets go of it when its process ends, however that happens: a lock that a killed process left behind
    keeps nobody out. It is removed before it is released; whoever waited for it then holds a file without a name,
    which filelock notices and starts over.

    Args:
        file: the file itself, not a link to it, so that all of its names share one lock.
        called: what errors call it.
        patience: seconds to wait; a process that was killed a moment ago may not have ended yet.
    """

    def __init__(self, file: Path, called: str, patience: float = 2.0) -> None:
        self.path = file.with_name(f".{file.name}.lock")
        self._called, self._patience = called, patience
        self._lock = FileLock(self.path)

    def take(self) -> None:
        """Keep others out.

        Raises:
            ValueError: somebody else has it, or a file there cannot be locked.
        """
        try:
            self._lock.acquire(timeout=self._patience)
        except Timeout:
            raise ValueError(
                f"{self._called} is being written by {self._holder()}; wait for it to end, or give another file"
            ) from None
        except OSError as error:
            raise ValueError(
                f"{self._called} cannot be locked ({error}); give a file in a folder where {self.path.name} can be made"
            ) from None
        holder = {
            "process": os.getpid(),
            "host": platform.node(),
            "since": datetime.now().astimezone().isoformat(timespec="seconds"),
            "command": shlex.join(sys.argv)[:_COMMAND],
        }
        with suppress(OSError):  # it is only for people
            self.path.write_text(json.dumps(holder, ensure_ascii=False), encoding="utf-8", errors="replace")

    def release(self) -> None:
        """Let others in."""
        if self._lock.is_locked:
            with suppress(OSError):  # Windows removes nothing that is open
                self.path.unlink()
            self._lock.release()

    def _holder(self) -> str:
        try:
            who = parse_json(self.path.read_text(encoding="utf-8"))
            return f"process {who['process']} on {who['host']} since {who['since']} ({who['command']})"
        except (OSError, ValueError, KeyError, TypeError):
            return "another process"
