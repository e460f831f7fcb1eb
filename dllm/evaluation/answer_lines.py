"""Format of the lines of an answers file (JSONL), and parsing of such a file."""

from __future__ import annotations

import codecs
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from dllm.files import parse_json

# The output of `write_line`: id and text come first, and values are scalars. A truncated line may end within a
# character, so the bytes of a text are not checked.
_TEXT = rb'"[^"\\\x00-\x1f]*(?:\\.[^"\\\x00-\x1f]*)*"'
_VALUE = rb"(?:%s|-?[0-9][0-9.eE+-]*|true|false|null)" % _TEXT
_LINE = re.compile(rb'\{"id": (?:-?[0-9]+|%s), "text": %s(?:, %s: %s)*\}' % (_TEXT, _VALUE, _TEXT, _VALUE))
# Some suffix of these completes any truncated line.
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
    """Whether this is a proper prefix of a line of `write_line`."""
    begins = line.startswith(_START) or _START.startswith(line)  # rejects large files of other kinds quickly
    return begins and any(_LINE.fullmatch(line + end) for end in _ENDS)


def hash_of(answer: Mapping[str, Any]) -> str:
    """Hash of an answer, independent of the formatting of its line."""
    return hashlib.sha256(json.dumps(answer, sort_keys=True).encode()).hexdigest()[:16]


def read_answers(content: bytes) -> tuple[dict[str | int, str], int]:
    """The answers in a file, hashes by ids, and the number of bytes to keep: all but a truncated last line.

    Edited files are accepted: other order or spacing of fields, blank lines, CRLF, a byte order mark, no newline at
    the end.

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
    """Ids for an error message, at most `most`."""
    more = f" and {len(ids) - most} more" if len(ids) > most else ""
    return ", ".join(map(repr, ids[:most])) + more
