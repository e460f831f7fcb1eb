"""Prompts from a JSONL file, answers to another, and which of them are there already."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from dllm.files import check_readable, parse_json


@dataclass(frozen=True)
class Question:
    """One line of the input.

    Attributes:
        id: its `id`, or the line's number from 0.
        number: the line's number from 0.
        prompt: plain text, or chat messages.
        place: what an error calls it: file, line and id.
    """

    id: str | int
    number: int
    prompt: str | list[Mapping[str, str]]
    place: str


def read_questions(path: Path, option: str = "input") -> list[Question]:
    """Read lines of ``{"id": ..., "prompt": "..."}`` or ``{"id": ..., "messages": [...]}``.

    Args:
        path: the file.
        option: what errors call it.

    Raises:
        ValueError: an unreadable file or line, a line without a prompt, or an id that occurs twice.
    """
    check_readable(option, path, "a JSONL file in UTF-8")
    try:
        lines = path.read_bytes().decode("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{option}={str(path)!r} cannot be read ({error}); give a JSONL file in UTF-8") from None
    questions: dict[str | int, Question] = {}
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
    """Answers, one line each, added as they finish; nothing is touched before the first is added.

    Args:
        path: the file; answers that it holds are kept, and a last line cut off by an interruption is not.

    Attributes:
        ids: of the answers that are there.

    Raises:
        ValueError: the file cannot be read or holds something else.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: BinaryIO | None = None
        try:
            content = path.read_bytes() if path.exists() else b""
            # An interruption may cut a line anywhere, within a character as well.
            self._whole = content.rfind(b"\n") + 1
            rows = [parse_json(line) for line in content[: self._whole].split(b"\n") if line.strip()]
            self.ids: set[str | int] = {row["id"] for row in rows if "text" in row}
        except (OSError, ValueError, KeyError, TypeError):
            self.ids, rows = set(), [None]
        if len(self.ids) != len(rows):
            raise ValueError(f"output={str(path)!r} holds something other than answers; give another file")

    def add(self, answer: Mapping[str, Any]) -> None:
        """Write one answer at once."""
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("ab")
            self._file.truncate(self._whole)
        self._file.write(json.dumps(answer, ensure_ascii=False).encode() + b"\n")
        self._file.flush()
        self.ids.add(answer["id"])

    def __enter__(self) -> AnswerFile:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._file is not None:
            self._file.close()


def _question(where: str, number: int, line: str) -> Question:
    try:
        row: Any = parse_json(line)
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError(f"{where} has a character that is half of one (a lone surrogate); remove it") from None
    except ValueError as error:
        raise ValueError(f"{where} is not JSON ({error}); fix or remove it") from None
    if not isinstance(row, dict) or ("prompt" in row) == ("messages" in row):
        raise ValueError(f"{where} needs either a prompt or messages; give one of them")
    prompt: Any = row.get("prompt", row.get("messages"))
    if not (isinstance(prompt, str) if "prompt" in row else _is_chat(prompt)):
        raise ValueError(f"{where} has a prompt of another kind; give a text prompt, or messages with role and content")
    name = row.get("id", number)
    if not isinstance(name, (str, int)) or isinstance(name, bool):
        raise ValueError(f"{where} has id {name!r}; use text or a whole number")
    return Question(name, number, prompt, f"{where} (id {name!r})" if "id" in row else where)


def _is_chat(messages: Any) -> bool:
    return (
        isinstance(messages, list)
        and len(messages) > 0
        and all(
            isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
            for m in messages
        )
    )
