"""Validation of a task's data files before a model is loaded."""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Iterator, Mapping
from glob import escape
from io import BytesIO
from pathlib import Path
from typing import Any

from dllm.files import parse_json

_MOST_UNPACKED = 1 << 28  # bytes
_WRITTEN = ("doc_to_text", "doc_to_target")  # templates over the columns of a row


def pattern_of(file: str) -> str:
    """The pattern that stands for this file alone, where `datasets` expects patterns of files.

    Raises:
        ValueError: there is none.
    """
    if "::" in file:
        raise ValueError(f"task.data={file!r} has :: in its name, which datasets reads as an archive; rename it")
    return escape(str(Path(file).absolute()))


def read_rows(where: str, file: Path, give: str) -> Iterator[tuple[int, Any]]:
    """Rows of JSON Lines or of one JSON document, gzipped or not, each with its line or number.

    Args:
        where: name of the file in errors.
        file: the file.
        give: advice in errors.

    Raises:
        ValueError: it cannot be read, has other content or is empty.
    """
    try:
        content = file.read_bytes()
        if content[:2] == b"\x1f\x8b":
            with gzip.open(BytesIO(content)) as packed:
                content = packed.read(_MOST_UNPACKED + 1)
            if len(content) > _MOST_UNPACKED:
                raise ValueError(f"{where} unpacks to more than {_MOST_UNPACKED} bytes; give it unpacked")
        text = content.decode("utf-8-sig")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise ValueError(f"{where} cannot be read ({error}); give {give}") from None
    if not text.strip():
        raise ValueError(f"{where} has no lines; give {give}")
    try:
        whole = parse_json(text)
    except ValueError:  # of several lines
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                try:
                    row = parse_json(line)
                except ValueError as error:
                    raise ValueError(f"{where} line {number} is not JSON ({error}); fix or remove it") from None
                yield number, row
    else:
        if whole == []:
            raise ValueError(f"{where} has no rows; give {give}")
        yield from enumerate(whole if isinstance(whole, list) else [whole], 1)


def check_data(data: Mapping[str, str], config: Mapping[str, Any], num_fewshot: int | None) -> None:
    """Reject files without the columns or rows that a task of the harness needs.

    Args:
        data: a file for each split.
        config: the task's definition.
        num_fewshot: examples before each question; None for the task's own.

    Raises:
        ValueError: a file without rows, a row with a missing column, or fewer rows than examples.
    """
    own = config.get("num_fewshot")
    shots = own if num_fewshot is None or own == 0 else num_fewshot
    examples = next(filter(None, (config.get(f"{kind}_split") for kind in ("fewshot", "training", "validation"))), None)
    # A function may add columns to the rows.
    columns = set() if config.get("process_docs") else _columns(config)
    for split, file in data.items():
        where, count = f"task.data.{split}={file!r}", 0
        for number, row in read_rows(where, Path(file), "a JSONL file"):
            count += 1
            if not isinstance(row, dict):
                raise ValueError(f"{where} line {number} is not a JSON object; give a JSONL file of objects")
            for column in sorted(columns):
                if row.get(column) is None:
                    raise ValueError(f"{where} line {number} has no {column!r}, which the task reads; add it")
        if split == examples and isinstance(shots, int) and count < (needed := shots + (split == _asked(config))):
            raise ValueError(
                f"{where} has {count} rows, and task.num_fewshot={shots} needs {needed}; add rows or lower it"
            )


def _asked(config: Mapping[str, Any]) -> Any:
    """The split of the questions."""
    return config.get("test_split") or config.get("validation_split")


def _columns(config: Mapping[str, Any]) -> set[str]:
    """The columns that a task's templates use unconditionally."""
    texts = [text for name in _WRITTEN if isinstance(text := config.get(name), str) and "{%" not in text]
    return {column for text in texts for column in re.findall(r"{{\s*([^\W\d]\w*)\s*}}", text)}
