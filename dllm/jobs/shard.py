"""The file of a shard: a parquet table of results that names its job and the hash of its own bytes."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
from pyarrow import parquet

from dllm.checks import first_line

# In the metadata of the file: the job that made it, and the number of bytes before the footer with their hash.
_JOB, _BYTES = b"dllm-job", b"dllm-bytes"


@dataclass(frozen=True)
class Result:
    """What became of one row.

    Attributes:
        number: of the row.
        id: of the row.
        text: the answer; None if it failed.
        tokens: generated tokens.
        nfe: denoiser forwards.
        guide_nfe: guide forwards.
        error: why it failed; None if it did not.
    """

    number: int
    id: str | int
    text: str | None = None
    tokens: int = 0
    nfe: int = 0
    guide_nfe: int = 0
    error: str | None = None


def pack(results: Sequence[Result], whole: bool, job: str) -> bytes:
    """The content of a file.

    Args:
        results: of its rows.
        whole: whether the ids of the whole job are numbers.
        job: that makes it.
    """
    columns = {
        "id": pa.array([r.id if whole else str(r.id) for r in results], pa.int64() if whole else pa.string()),
        "text": pa.array([r.text for r in results], pa.string()),
        **{name: pa.array([getattr(r, name) for r in results], pa.int64()) for name in ("tokens", "nfe", "guide_nfe")},
        "error": pa.array([r.error for r in results], pa.string()),
    }
    table, file = pa.table(columns).replace_schema_metadata({_JOB: job}), io.BytesIO()
    with parquet.ParquetWriter(file, table.schema, compression="zstd") as writer:
        writer.write_table(table)
        writer.add_key_value_metadata({_BYTES.decode(): _digest(file.getvalue())})
    return file.getvalue()


def unpack(path: Path, job: str) -> pa.Table:
    """The columns id and error of a file.

    Raises:
        ValueError: it is damaged, was changed, or is of another job; the message goes on from the name of the file.
    """
    again = "remove it, then the same command makes it again"
    try:
        if not path.is_file():
            raise ValueError("it is no ordinary file")
        content = path.read_bytes()
        file = parquet.ParquetFile(pa.BufferReader(content))
        table = file.read(columns=["id", "error"])
        if missing := {"id", "error"}.difference(table.column_names):
            raise ValueError(f"no column {min(missing)}")
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ValueError(f"cannot be read ({first_line(error)}); {again}") from None
    marks = file.metadata.metadata or {}
    if marks.get(_JOB) != job.encode():
        raise ValueError("is no shard of this job; move it elsewhere, then the same command makes it")
    if _BYTES not in marks:
        raise ValueError(f"was written by another program, or by an earlier version of dllm; {again}")
    if not _is_written(content, marks[_BYTES]):
        raise ValueError(f"was changed since this job wrote it; {again}")
    return table


def is_whole(path: Path) -> bool:
    """Whether a file has the content that was written, by its own hash."""
    try:
        content = path.read_bytes()
        marks = parquet.read_metadata(pa.BufferReader(content)).metadata or {}
    except (pa.ArrowException, OSError):
        return False
    return _is_written(content, marks.get(_BYTES, b""))


def _is_written(content: bytes, mark: bytes) -> bool:
    size = mark.decode("ascii", "replace").partition(":")[0]
    return size.isdecimal() and _digest(content[: int(size)]).encode() == mark


def _digest(content: bytes) -> str:
    return f"{len(content)}:{hashlib.sha256(content).hexdigest()}"
