"""Reading prompts from a JSONL file and writing answers to another, with resuming."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping, Set
from contextlib import suppress
from dataclasses import dataclass
from errno import ENAMETOOLONG
from io import FileIO
from pathlib import Path
from typing import Any

from dllm.decoding.prompts import is_chat
from dllm.evaluation.answer_lines import hash_of, listed, read_answers, write_line
from dllm.evaluation.claim import Claim
from dllm.files import check_readable, disturbed, parse_json, state, sync_folder

MANIFEST = ".manifest.json"  # suffix of the manifest of an answers file


@dataclass(frozen=True)
class PromptLine:
    """One line of the input.

    Attributes:
        id: its `id`, or the line's number from 0.
        number: the line's number from 0.
        prompt: plain text, or chat messages.
        place: its name in errors: file, line and id.
    """

    id: str | int
    number: int
    prompt: str | list[Mapping[str, Any]]
    place: str

    @property
    def seed(self) -> int:
        """Added to a run's seed: derived from the id, so that moving or adding lines does not change other results."""
        if isinstance(self.id, int):
            return self.id % 2**61
        return int.from_bytes(hashlib.sha256(self.id.encode()).digest()[:8]) % 2**61


def read_questions(path: Path, option: str = "input") -> list[PromptLine]:
    """Read lines of ``{"id": ..., "prompt": "..."}`` or ``{"id": ..., "messages": [...]}``.

    A chat whose last message is the assistant's ends with a partial answer.

    Args:
        path: the file.
        option: its name in errors.

    Raises:
        ValueError: an unreadable file or line, a line without a prompt, or a duplicate id.
    """
    check_readable(option, path, "a JSONL file in UTF-8")
    try:
        lines = path.read_bytes().decode("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{option}={str(path)!r} cannot be read ({error}); give a JSONL file in UTF-8") from None
    questions: dict[str | int, PromptLine] = {}
    for number, line in enumerate(lines):
        if not line.strip():
            continue
        where = f"{option}={str(path)!r} line {number + 1}"
        question = _question(where, number, line)
        if question.id in questions:
            raise ValueError(f"{where}: id {question.id!r} occurs twice; make ids unique")
        questions[question.id] = question
    if not questions:
        raise ValueError(f"{option}={str(path)!r} has no lines; give one JSON object a line")
    return list(questions.values())


class AnswerFile:
    """Answers, one line each, appended as they finish; the file is not touched before the first one.

    As a context manager it locks the file and reads it again.

    Args:
        path: the file; existing answers are kept, a truncated last line is dropped.

    Attributes:
        file: its path with links resolved.
        hashes: of the answers so far, by id.
        prepare: called before the first answer is added.
        synced: called whenever the answers so far are synced to disk.

    Raises:
        ValueError: the file cannot be read or has other content.
    """

    prepare: Callable[[], None] | None = None
    synced: Callable[[], None] | None = None

    def __init__(self, path: Path) -> None:
        self.path, self.file = path, Path(os.path.realpath(path))
        self.hashes: dict[str | int, str] = {}
        self._called = f"output={str(path)!r}"
        self._claim = Claim(self.file, self._called, "another file")
        self._check_name()
        self._made: list[Path] = []
        self._out: FileIO | None = None
        self._synced = 0.0
        self._read()

    @property
    def ids(self) -> Set[str | int]:
        """Of the answers so far."""
        return self.hashes.keys()

    def add(self, answer: Mapping[str, Any]) -> None:
        """Append one answer.

        Raises:
            OSError: it cannot be written, or another program changed the file; earlier answers are unchanged.
        """
        if self._state != state(self.path):
            raise self._changed()
        if self._out is None:
            if self.prepare is not None:
                self.prepare()
            self._open()
        written = True
        try:
            self._write(write_line(answer))
        except OSError:
            written = False
            raise
        finally:  # even where a signal comes meanwhile: what is missing of it is decoded again
            if written:
                self.hashes[answer["id"]] = hash_of(answer)
        if time.monotonic() - self._synced > _SYNC_SECONDS:
            self._sync()

    def verify(self) -> None:
        """Sync to disk, and verify that all answers can be read back.

        Raises:
            OSError: another program removed, replaced or changed the file.
        """
        if self._out is not None:
            self._sync()
            sync_folder(self.file.parent)
        if self._state != state(self.path) or (self.ids and self._lost()):
            raise self._changed()

    def __enter__(self) -> AnswerFile:
        self._made = [folder for folder in self.file.parents if not folder.exists()]
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self._claim.take()
            self._read()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        if self._out is not None:
            self._out.close()
        self._claim.release()
        with suppress(OSError):  # not empty any more
            for folder in self._made:
                folder.rmdir()

    def _check_name(self) -> None:
        """Reject names that are too long, or reserved for locks and manifests."""
        name = self.file.name
        if (name.startswith(".") and name.endswith(".lock")) or name.endswith(MANIFEST):
            raise ValueError(f"{self._called} has the name of a lock or a manifest of answers; give another file")
        folder = next(parent for parent in self.file.parents if parent.exists())
        for beside in (self._claim.path.name, name + MANIFEST):
            try:
                os.lstat(folder / beside)
            except OSError as error:
                if error.errno == ENAMETOOLONG:
                    raise ValueError(
                        f"{self._called} is too long a name: the file name with {MANIFEST} needs "
                        f"{len(MANIFEST)} bytes more; give a shorter one"
                    ) from None

    def _read(self) -> None:
        there = self.path.exists()
        stray = (not self.file.is_file()) if there else self.file.is_symlink()  # pipes, folders; links to themselves
        if stray or _is_printed_to(self.path):
            raise ValueError(f"{self._called} is not an ordinary file; give the name of one, which can be read again")
        try:
            self._state = state(self.path)
            content = b"" if self._state is None else self.file.read_bytes()
        except OSError as error:
            raise ValueError(f"{self._called} cannot be read ({error}); give another file") from None
        try:
            self.hashes, self._whole = read_answers(content)
        except ValueError as error:
            raise ValueError(f"{self._called} has content other than answers; give another file ({error})") from None
        self._needs_newline = self._whole > 0 and content[self._whole - 1 : self._whole] != b"\n"

    def _open(self) -> None:
        self._out = FileIO(self.file, "a")
        self._out.truncate(self._whole)
        self._state = state(self._out.fileno())
        if self._needs_newline:
            self._write(b"\n")

    def _write(self, data: bytes) -> None:
        assert self._out is not None
        assert self._state is not None
        device, number, size = self._state
        rest = memoryview(data)
        try:
            while rest:
                rest = rest[self._out.write(rest) :]
        except OSError as error:
            with suppress(OSError):  # otherwise the line is truncated and dropped on resuming
                self._out.truncate(size)
            raise self._full(error) from None
        self._state = device, number, size + len(data)

    def _sync(self) -> None:
        assert self._out is not None
        try:
            os.fsync(self._out.fileno())
        except OSError as error:  # some file systems report a full disk only here
            raise self._full(error) from None
        self._synced = time.monotonic()
        if self.synced is not None:
            self.synced()

    def _full(self, error: OSError) -> OSError:
        problem = f"{self._called} cannot be written ({error.strerror or error}), {len(self.ids)} answers are in it"
        return OSError(f"{problem}; free disk space, then the same command resumes")

    def _lost(self) -> list[str | int]:
        """The answers that are not in the file as they were written."""
        try:
            found = read_answers(self.path.read_bytes())[0]
        except (OSError, ValueError):
            found = {}
        return sorted((name for name, digest in self.hashes.items() if found.get(name) != digest), key=str)

    def _changed(self) -> OSError:
        lost = self._lost()
        problem = f"{len(lost)} answers are lost or changed ({listed(lost)})" if lost else "no answer is lost"
        return disturbed(self._called, self.path, f", {problem}; run the command again")


# A power failure may lose the answers of this many seconds; syncing each one would slow down fast models.
_SYNC_SECONDS = 1.0


def _is_printed_to(file: Path) -> bool:
    """Whether stdout or stderr of the command is this file."""
    with suppress(OSError):
        return any(os.path.samestat(os.fstat(stream), file.stat()) for stream in (1, 2))
    return False


def _question(where: str, number: int, line: str) -> PromptLine:
    try:
        row: Any = parse_json(line, once=True)
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError(f"{where} has a lone surrogate; remove it") from None
    except ValueError as error:
        raise ValueError(f"{where} is not JSON ({error}); fix or remove it") from None
    if not isinstance(row, dict) or ("prompt" in row) == ("messages" in row):
        raise ValueError(f"{where} needs either a prompt or messages; give one of them")
    prompt: Any = row.get("prompt", row.get("messages"))
    if not (isinstance(prompt, str) if "prompt" in row else is_chat(prompt)):
        raise ValueError(f"{where} has an invalid prompt; give a text prompt, or messages with role and content")
    name = row.get("id", number)
    if not isinstance(name, (str, int)) or isinstance(name, bool):
        raise ValueError(f"{where} has id {name!r}; use text or a whole number")
    return PromptLine(name, number, prompt, f"{where} (id {name!r})" if "id" in row else where)
