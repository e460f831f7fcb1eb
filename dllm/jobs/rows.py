"""The input of a job: JSONL and parquet files, folders of them, and data sets, as one numbered sequence of rows.

Files are read in the order of their names, twice: once before the job for errors, ids and a hash, and once while it
decodes. Neither pass holds more than one shard in memory, beside the ids.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
from pyarrow import parquet

from dllm.checks import first_line, is_text, out_of_memory
from dllm.decoding.prompts import is_chat
from dllm.escape import brief
from dllm.files import check_readable, disturbed, is_folder, parse_json
from dllm.identity import is_system, within

_BATCH = 64  # rows of a file in memory
_LETTERS = 10**7  # of a prompt
# Columns of a parquet file that unpack to more bytes, and to so many times their size, hold no texts.
_UNPACKED, _RATIO = 1 << 28, 1000
_FILES = (".jsonl", ".parquet")
_PROMPTS = ("prompt", "messages")
_HUB = re.compile(r"\w[\w.-]{0,95}(/\w[\w.-]{0,95})?")
_LARGEST = 1 << 63


@dataclass(frozen=True)
class Row:
    """One row of the input.

    Attributes:
        number: its place in the input, from 0.
        id: its `id`, or its number.
        prompt: text or chat messages; None if it has neither.
        error: why it cannot be decoded; None if it may be.
        place: its file and line or row, for errors.
    """

    number: int
    id: str | int
    prompt: str | list[Mapping[str, Any]] | None
    error: str | None = None
    place: str = ""


@dataclass(frozen=True)
class Summary:
    """What is known of the input after reading it once.

    Attributes:
        rows: their number.
        shards: a hash of the ids and prompts of every shard.
        ids: a hash of the ids of every shard, see `hash_of`.
        whole: whether every id is a whole number that fits into a column of them.
    """

    rows: int
    shards: Sequence[str]
    ids: Sequence[str]
    whole: bool

    @property
    def digest(self) -> str:
        """A hash of all ids and prompts, whatever files they are in."""
        return hashlib.sha256(json.dumps(self.shards).encode()).hexdigest()[:16]


class Part(Protocol):
    """A file, or a data set: `place` names it in errors."""

    place: str

    def records(self, columns: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
        """Each row, of at least these columns where it has them, with its place."""
        ...

    def names(self) -> list[str] | None:
        """The columns; None if each row has its own."""
        ...


class Input:
    """The rows of a job.

    Args:
        given: a JSONL or parquet file, a folder of such files, a folder saved by `datasets`, or the name of a data set.
        split: of a data set; None for train.
        column: with the prompts, texts or chats; None for prompt or messages.

    Attributes:
        note: files of the folder that are not read; None without any.

    Raises:
        ValueError: it does not exist or cannot be read.
    """

    def __init__(self, given: str, split: str | None = None, column: str | None = None) -> None:
        self.given, self.called = given, f"input={given!r}"
        self.note: str | None = None
        self._prompts = _PROMPTS if column is None else (column,)
        self._parts: list[Part] = []
        path = Path(given)
        saved = any((path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json"))
        if is_folder(path) and not saved:
            self._parts = self._files(path)
        elif is_folder(path) or (not os.path.lexists(path) and _HUB.fullmatch(given) and path.suffix not in _FILES):
            self._parts, split = [_DataSet(self.called, given, split)], None
        else:
            check_readable("input", path, "a JSONL or parquet file, or a folder of them")
            if not path.is_file():
                raise ValueError(f"{self.called} is not a file; give one, since a job reads its input twice")
            self._parts = [_file(self.called, path)]
        if split is not None:
            raise ValueError(f"split={split!r} has no effect on files; leave it out")

    def scan(self, size: int) -> Summary:
        """Read everything once.

        Args:
            size: rows of a shard.

        Raises:
            ValueError: a part that cannot be read, has no column of prompts or no rows, or an id that occurs twice.
        """
        seen: set[str] = set()
        shards, ids, whole = [], [], True
        for rows in self.shards(size):
            for row in rows:
                whole = whole and isinstance(row.id, int) and -_LARGEST <= row.id < _LARGEST
                if (name := str(row.id)) in seen:
                    raise ValueError(f"{row.place}: id {name!r} occurs twice; make ids unique")
                seen.add(name)
            shards.append(_hash(rows))
            ids.append(hash_of(row.id for row in rows))
        if not seen:
            raise ValueError(f"{self.called} has no rows; give at least one prompt")
        return Summary(len(seen), shards, ids, whole)

    def left(self, size: int, summary: Summary, finished: Iterable[int]) -> Iterator[list[Row]]:
        """The shards that are not finished, by the number of their first row.

        Raises:
            OSError: the input changed since it was scanned.
        """
        done, place = set(finished), -1
        for place, rows in enumerate(self.shards(size)):
            if place >= len(summary.shards) or _hash(rows) != summary.shards[place]:
                raise self._changed()
            if rows[0].number not in done:
                yield rows
        if place + 1 != len(summary.shards):
            raise self._changed()

    def _changed(self) -> OSError:
        return disturbed(self.called, Path(self.given), "; run the command again")

    def shards(self, size: int) -> Iterator[list[Row]]:
        """All rows, `size` at a time."""
        rows = self._rows()
        while shard := list(islice(rows, size)):
            yield shard

    def _rows(self) -> Iterator[Row]:
        number = 0
        for part in self._parts:
            named, known = part.names(), False
            if named is not None:
                self._check_columns(part, named)
            keys: Iterable[str] = ()
            for place, record in part.records((*self._prompts, "id")):
                keys = keys or record
                known = known or any(name in record for name in self._prompts)
                yield self._row(number, place, record)
                number += 1
            if named is None and keys and not known:
                self._check_columns(part, list(keys))

    def _check_columns(self, part: Part, names: Sequence[str]) -> None:
        if twice := next((name for name in (*self._prompts, "id") if names.count(name) > 1), None):
            raise ValueError(f"{part.place} has several columns {twice}; keep one of them")
        if not any(name in names for name in self._prompts):
            wanted = " or ".join(self._prompts)
            raise ValueError(
                f"{part.place} has no column {wanted}; give column=NAME, one of {', '.join(names) or 'none at all'}"
            )

    def _row(self, number: int, place: str, record: Mapping[str, Any]) -> Row:
        name = record.get("id")
        name = number if name is None else name
        if not isinstance(name, (str, int)) or isinstance(name, bool) or not is_text(str(name)):
            raise ValueError(f"{place} has id {brief(repr(name))}; use text or a whole number")
        given = [record[each] for each in self._prompts if record.get(each) is not None]
        row = Row(number, name, None, place=place)
        if len(given) != 1:
            return replace(row, error=f"the row has {'no' if not given else 'both'} {' and '.join(self._prompts)}")
        prompt = given[0]
        if isinstance(prompt, str):
            if len(prompt) > _LETTERS:
                return replace(row, error=_too_long(prompt))
            if not is_text(prompt):
                return replace(row, error="the prompt has a lone surrogate")
            return replace(row, prompt=prompt)
        try:
            written = json.dumps(_without_none(prompt), default=_written)
            if len(written) > _LETTERS:
                return replace(row, error=_too_long(written))
            chat, why = parse_json(written), ""
        except TypeError as error:
            chat, why = None, f" ({error})"
        except (ValueError, RecursionError):
            chat, why = None, ""
        if not is_chat(chat):
            return replace(row, error=f"the prompt is {brief(repr(prompt))}, and neither text nor messages{why}")
        return replace(row, prompt=chat)

    def _files(self, folder: Path) -> list[Part]:
        with _reading(self.called):
            found = sorted({_spelled(path, folder) for path in within(folder, _is_hidden) if not _is_hidden(path.name)})
        wanted = [path for path in found if path.suffix in _FILES]
        for path in wanted:
            if not path.is_file():
                what = "a link to nothing" if path.is_symlink() else "no file"
                raise ValueError(f"{self.called}: {path.relative_to(folder)} is {what}; repair or remove it")
        if not wanted:
            raise ValueError(f"{self.called} has no .jsonl or .parquet files; give a folder that has some")
        if others := [str(path.relative_to(folder)) for path in found if path.suffix not in _FILES]:
            more = f" and {len(others) - 3} more" if len(others) > 3 else ""
            self.note = f"{self.called}: not read, since neither .jsonl nor .parquet: {', '.join(others[:3])}{more}"
        return [_file(f"{self.called}: {path.relative_to(folder)}", path) for path in wanted]


@dataclass
class _Lines:
    """A JSONL file."""

    place: str
    path: Path

    def names(self) -> None:
        return None

    def records(self, columns: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
        with _reading(self.place), self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                where = f"{self.place} line {number}"
                if not line.strip():
                    continue
                try:
                    record = parse_json(line.decode("utf-8-sig" if number == 1 else "utf-8"), once=True)
                except ValueError as error:
                    raise ValueError(f"{where} is not JSON ({first_line(error)}); fix or remove it") from None
                if not isinstance(record, dict):
                    raise ValueError(f"{where} is a JSON {type(record).__name__}, not an object; fix or remove it")
                yield where, record


@dataclass
class _Parquet:
    """A parquet file."""

    place: str
    path: Path

    def names(self) -> list[str]:
        with _reading(self.place):
            return list(parquet.read_schema(self.path).names)

    def records(self, columns: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
        with _reading(self.place), parquet.ParquetFile(self.path) as file:
            wanted = [name for name in file.schema_arrow.names if name in columns]
            self._check_sizes(file.metadata, wanted)
            yield from _numbered(self.place, file.iter_batches(_BATCH, columns=wanted))

    def _check_sizes(self, metadata: Any, wanted: Sequence[str]) -> None:
        for group in range(metadata.num_row_groups):
            row_group = metadata.row_group(group)
            columns = [row_group.column(place) for place in range(row_group.num_columns)]
            read = [column for column in columns if column.path_in_schema.partition(".")[0] in wanted]
            packed, unpacked = (
                sum(getattr(column, f"total_{kind}_size") for column in read) for kind in ("compressed", "uncompressed")
            )
            if unpacked > max(_UNPACKED, _RATIO * packed):
                raise ValueError(f"it unpacks {packed} bytes to {unpacked}")


class _DataSet:
    """A data set of the `datasets` library: a saved folder, or a name of the hub."""

    def __init__(self, place: str, given: str, split: str | None) -> None:
        self.place = place
        with _reading(place if split is None else f"{place} with split={split!r}"):
            self._data = _load(given, split)

    def names(self) -> list[str]:
        return list(self._data.column_names)

    def records(self, columns: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
        wanted = [name for name in self._data.column_names if name in columns]
        with _reading(self.place):
            yield from _numbered(self.place, self._data.select_columns(wanted).with_format("arrow").iter(_BATCH))


def _load(given: str, split: str | None) -> Any:
    from datasets import disable_progress_bars, load_dataset, load_from_disk  # slow import, only needed here

    disable_progress_bars()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it reports every attempt to reach the hub
    try:
        if not is_folder(Path(given)):
            return load_dataset(given, split=split or "train")
        found = load_from_disk(given)
    except ConnectionError as error:
        raise ValueError(f"it is no file or folder here, and not within reach: {first_line(error)}") from None
    except Exception as error:  # of any type, for a damaged one
        if out_of_memory(error):
            raise
        raise ValueError(first_line(error.__cause__ or error)) from None
    if not isinstance(found, dict):
        if split is not None:
            raise ValueError("it has no splits; leave split out")
        return found
    if (wanted := split or "train") not in found:
        raise ValueError(f"it has no split {wanted!r}; use split= with one of {', '.join(found)}")
    return found[wanted]


def hash_of(ids: Iterable[str | int]) -> str:
    """A hash of the ids of a shard, in their order; numbers are taken as text."""
    return hashlib.sha256(json.dumps([str(each) for each in ids]).encode()).hexdigest()[:16]


def _file(place: str, path: Path) -> Part:
    return _Parquet(place, path) if path.suffix == ".parquet" else _Lines(place, path)


def _numbered(place: str, batches: Iterable[Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    number = 0
    for batch in batches:
        for record in batch.to_pylist():
            number += 1
            yield f"{place} row {number}", record


@contextmanager
def _reading(place: str) -> Iterator[None]:
    """Report errors of the libraries that read files as bad input, naming the file."""
    try:
        yield
    except (pa.ArrowException, OSError, ValueError) as error:
        if str(error).startswith("input="):  # names it already
            raise
        raise ValueError(f"{place} cannot be read ({first_line(error)}); repair or remove it") from None


def _too_long(text: str) -> str:
    return f"the prompt has {len(text)} letters, and no model's context holds more than {_LETTERS}"


def _spelled(path: Path, folder: Path) -> Path:
    """A file of a folder by the name that it has there without links to other folders, if it has one."""
    real, root = Path(os.path.realpath(path.parent)), Path(os.path.realpath(folder))
    inside = real.relative_to(root) if real.is_relative_to(root) else None
    return path if inside is None or any(map(_is_hidden, inside.parts)) else folder / inside / path.name


def _is_hidden(name: str) -> bool:
    """Whether a file or a folder is no data, by the convention of parquet's readers: it begins with . or _."""
    return name.startswith((".", "_")) or is_system(name)


def _without_none(value: Any) -> Any:
    """A chat without the empty fields that a table adds to messages that lack them."""
    if isinstance(value, Mapping):
        return {name: _without_none(each) for name, each in value.items() if each is not None or name == "content"}
    return [_without_none(each) for each in value] if isinstance(value, (list, tuple)) else value


def _written(value: Any) -> str:
    """What a table has and JSON does not: times and decimals, as messages may carry beside their text; no bytes."""
    if isinstance(value, bytes):
        raise TypeError("JSON has no bytes")
    return str(value)


def _hash(rows: Sequence[Row]) -> str:
    content = [[row.id, row.prompt, row.error] for row in rows]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
