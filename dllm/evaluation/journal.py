"""Journal of an unfinished run: an append-only JSONL file of its results so far."""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import sha256
from io import FileIO
from pathlib import Path
from typing import Any, TypedDict

from dllm.evaluation.claim import Claim
from dllm.files import disturbed, parse_json, state
from dllm.stored import folder_there, misfit, there


class _Entry(TypedDict):
    """One line."""

    kind: str
    id: str
    value: Any


class Journal:
    """Entries by kind and id, kept in a file by one process at a time.

    A truncated last line is dropped; everything before it is kept. Each line has a hash of itself and of its run; those
    of earlier versions have none.

    Args:
        path: the file; created with its folder if missing. None keeps everything in memory.
        patience: seconds to wait for another writer; an orphaned process ends with its next answer.
        run: what identifies the run.

    Raises:
        ValueError: another process writes it, or it has other content.
    """

    def __init__(self, path: Path | None, patience: float = 20.0, run: str = "") -> None:
        self.path, self._run = path, run
        self._entries: dict[tuple[str, str], Any] = {}
        self._lines: dict[tuple[str, str], int] = {}
        self._file: FileIO | None = None
        if path is None:
            return
        fix = f"remove it to start the run in {path.parent} again"
        folder_there(path.parent, fix)
        there(path, fix)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._claim = Claim(path, str(path.parent), "another out", patience)
        self._claim.take()
        try:
            content = path.read_bytes() if there(path, fix) else b""
            whole = content.rfind(b"\n") + 1
            self._read(content[:whole])
            self._file = FileIO(path, "a")  # unbuffered
            self._file.truncate(whole)
            self._state = state(self._file.fileno())
        except (ValueError, OSError):
            self._claim.release()
            raise

    def _read(self, content: bytes) -> None:
        for number, line in enumerate(content.split(b"\n")[:-1], start=1):
            try:
                row = parse_json(line)
            except ValueError as error:
                raise self._damage(number, str(error)) from None
            if wrong := misfit(row, _Entry):
                raise self._damage(number, wrong)
            if row.get("hash") not in (None, self._hash(row)):
                raise self._damage(number, "it is of another run, or was changed")
            key = row["kind"], row["id"]
            if key in self._entries:
                raise self._damage(number, f"it repeats line {self._lines[key]}")
            self._entries[key], self._lines[key] = row["value"], number

    def _hash(self, entry: _Entry) -> str:
        text = json.dumps([self._run, entry["kind"], entry["id"], entry["value"]], ensure_ascii=False)
        return sha256(text.encode("utf-8", "replace")).hexdigest()[:16]

    def _damage(self, line: int, reason: str) -> ValueError:
        return ValueError(
            f"{self.path} is not a journal of a run, or damaged, in line {line} ({reason}); remove that line to repeat "
            "that part of the run, or the file to repeat all of it"
        )

    def damage(self, kind: str, name: str, reason: str) -> ValueError:
        """The error for an invalid entry."""
        return self._damage(self._lines.get((kind, name), len(self._entries)), reason)

    @property
    def keys(self) -> list[tuple[str, str]]:
        """Kinds and ids of all entries."""
        return list(self._entries)

    def get(self, kind: str, name: str) -> Any:
        """The value of an entry; None if missing."""
        return self._entries.get((kind, name))

    def of(self, kind: str) -> Mapping[str, Any]:
        """All entries of a kind by id, in order."""
        return {name: value for (each, name), value in self._entries.items() if each == kind}

    def add(self, kind: str, name: str, value: Any) -> None:
        """Append an entry.

        Raises:
            RuntimeError: the entry exists.
            OSError: it cannot be written, or another program removed or changed the file.
        """
        self.verify()
        if (kind, name) in self._entries:
            raise RuntimeError(f"{kind} {name!r} is in {self.path} already")
        self._entries[kind, name] = value
        if self._file is not None:
            entry = _Entry(kind=kind, id=name, value=value)
            line = json.dumps({**entry, "hash": self._hash(entry)}, ensure_ascii=False)
            rest = memoryview(line.encode("utf-8", "replace") + b"\n")
            try:
                while rest:
                    rest = rest[self._file.write(rest) :]
            except OSError as error:
                error.filename = str(self.path)  # missing in errors about a full disk
                raise
            self._state = state(self._file.fileno())

    def verify(self) -> None:
        """Verify that the file is unchanged.

        Raises:
            OSError: another program removed or changed the file.
        """
        if self._file is not None and self.path is not None and state(self.path) != self._state:
            raise disturbed(str(self.path), self.path, "; run the command again")

    def close(self) -> None:
        """Close the file and release its lock."""
        if self._file is None or self.path is None:
            return
        self._file.close()
        self._file = None
        self._claim.release()
