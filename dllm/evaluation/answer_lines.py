"""How an answer is written to a JSONL file, and what of a file was written so."""

from __future__ import annotations

import codecs
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from dllm.files import parse_json

# What `write_line` gives: the id and the text come first, and no value has parts. A torn line may end within a
# character, so what bytes a text holds is not checked.
_TEXT = rb'"[^"\\\x00-\x1f]*(?:\\.[^"\\\x00-\x1f]*)*"'
_VALUE = rb"(?:%s|-?[0-9][0-9.eE+-]*|true|false|null)" % _TEXT
_LINE = re.compile(rb'\{"id": (?:-?[0-9]+|%s), "text": %s(?:, %s: %s)*\}' % (_TEXT, _VALUE, _TEXT, _VALUE))
# The ends of these are the ends of all lines: one of them completes any torn line.
_SAMPLES = (
    b'{"id": 0, "text": "", "a": 0, "a": true}',
    b'{"id": "", "text": false, "a": null}',
    b'{"id": "\\\\", "text": "\\\\", "\\\\": "\\\\"}',
)
_START = b'{"id": '
_ENDS = tuple({sample[start:] for sample in _SAMPLES for start in range(len(sample))})


def write_line(answer: Mapping[str, Any]) -> bytes:
    """The line of an answer, whose first two fields are `id` and `text`."""
    return json.dumps(answer, ensure_ascii=False).encode() + b"\n"


def is_torn(line: bytes) -> bool:
    """Whether this is the beginning, and not the whole, of a line as `write_line` writes it."""
    begins = line.startswith(_START) or _START.startswith(line)  # large files of other kinds are told at a glance
    return begins and any(_LINE.fullmatch(line + end) for end in _ENDS)


def hash_of(answer: Mapping[str, Any]) -> str:
    """Tells an answer from others, however its line is written."""
    return hashlib.sha256(json.dumps(answer, sort_keys=True).encode()).hexdigest()[:16]


def read_answers(content: bytes) -> tuple[dict[str | int, str], int]:
    """The answers in a file, hashes by ids, and how many of its bytes stay: all but a torn last line.

    What an editor leaves is taken too: other order or spacing of fields, blank lines, CRLF, a byte order mark, no
    newline at the end.

    Raises:
        ValueError: naming the line that is not an answer.
    """
    lines = content.removeprefix(codecs.BOM_UTF8).split(b"\n")
    whole = len(content)
    if is_torn(lines[-1]):
        whole -= len(lines.pop())
    found: dict[str | int, str] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = parse_json(line.decode())
        except ValueError:
            row = None
        if not isinstance(row, dict) or type(row.get("id")) not in (str, int) or "text" not in row:
            raise ValueError(f"line {number} is not an answer")
        if row["id"] in found:
            raise ValueError(f"line {number} answers {row['id']!r} again")
        found[row["id"]] = hash_of(row)
    return found, whole


def listed(ids: Sequence[str | int], most: int = 20) -> str:
    """Ids for an error; the first ones where there are many."""
    more = f" and {len(ids) - most} more" if len(ids) > most else ""
    return ", ".join(map(repr, ids[:most])) + more
