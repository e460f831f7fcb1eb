"""The output of a job: a folder of parquet shards, `rows-000000000512.parquet` by its first row, and a manifest.

A shard is written whole or not at all (`dllm.files.write_whole`), with every one of its rows exactly once, so that a
job killed at any moment continues after the shards that are there. Shards in the order of their names, and their rows
in the order of the file, are the rows of the input in its order. The manifest is `_manifest.json`: readers of parquet
ignore files that begin with an underscore.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypedDict

from dllm.evaluation.answer_manifest import differences, told
from dllm.evaluation.claim import Claim
from dllm.files import UNFINISHED, check_kept, disturbed, read_json, state, write_json, write_whole
from dllm.jobs.rows import Summary, hash_of
from dllm.jobs.shard import Result, is_whole, pack, unpack
from dllm.stored import misfit, there

MANIFEST = "_manifest.json"
FORMAT, VERSION = "dllm-job", 1
_SHARD = re.compile(r"rows-(\d{12})\.parquet")


class _Manifest(TypedDict):
    """The required fields of a manifest; others are informational."""

    input: str
    rows: int
    options: dict[str, Any]
    names: dict[str, Any]
    named: dict[str, Any]
    model: dict[str, Any]


class JobFolder:
    """The folder of a job; as a context manager it is locked, and what is in it is read.

    Args:
        given: the folder; created if missing.

    Attributes:
        path: the folder.
        called: its name in errors.
        finished: the number of the first row of every shard that is there, with the number of its failed rows.

    Raises:
        ValueError: it is a file, or (on entering) another process writes to it, or it has other files.
    """

    def __init__(self, given: str) -> None:
        self.path, self.called = Path(given), f"output={given!r}"
        if os.path.lexists(self.path) and not self.path.is_dir():
            raise ValueError(f"{self.called} is not a folder; give another output")
        self.finished: dict[int, int] = {}
        self._found: dict[str, Any] | None = None
        self._content: bytes | None = None  # of the manifest
        self._lost: OSError | None = None  # if another program removed or changed the manifest
        self._claim = Claim(Path(os.path.realpath(self.path)) / MANIFEST, self.called, "another output")
        self._made: list[Path] = []
        self._states: dict[int, tuple[int, int, int] | None] = {}  # of the shards that are there
        self._whole, self._job = False, ""

    @property
    def seed(self) -> int | None:
        """Of the shards that are there, for resuming with seed=null."""
        return None if self._found is None else self._found["options"].get("seed")

    @property
    def manifest(self) -> dict[str, Any] | None:
        """What made the shards that are there; None without shards."""
        return self._found

    @property
    def failures(self) -> int:
        """Rows with an error in the shards that are there."""
        return sum(self.finished.values())

    def open(self, summary: Summary, session: Mapping[str, Any], size: int) -> None:
        """Take up the shards that are there.

        Args:
            summary: of the input.
            session: from `dllm.evaluation.answer_manifest.describe`.
            size: rows of a shard.

        Raises:
            ValueError: they are of another input or of other options, or one is damaged.
        """
        self._whole = summary.whole
        if self._found is None:
            return
        refuse(self.called, self._found, session, "options")
        if (self._found["input"], self._found["rows"]) != (summary.digest, summary.rows):
            raise ValueError(
                f"{self.called} is the job of another input, of {self._found['rows']} rows; this one has "
                f"{summary.rows}: give another output, or the original input"
            )
        self._job = _job(self._found)
        ids = dict(zip(range(0, summary.rows, size), summary.ids, strict=True))
        for path in self._shards():
            first = int(_SHARD.fullmatch(path.name)[1])  # type: ignore[index]  # `_shards` matched it
            self._states[first] = state(path)
            self.finished[first] = self._failed(path, ids.get(first))

    def fits(self, session: Mapping[str, Any]) -> bool:
        """Whether the model is the same by name, so that it need not be loaded for comparison."""
        return self._found is not None and self._found["named"] == session["named"]

    def begin(self, summary: Summary, session: Mapping[str, Any]) -> None:
        """Record what makes the shards that follow; with shards there already, only compare the model.

        Args:
            summary: of the input.
            session: with `model` from `dllm.evaluation.answer_manifest.identify`.

        Raises:
            ValueError: the model is another one.
        """
        if self._found is not None:
            refuse(self.called, self._found, session, "model")
            return
        about = {"format": FORMAT, "version": VERSION, "dllm": version("dllm-samplers"), "host": platform.node()}
        about |= {"started": datetime.now(UTC).isoformat(timespec="seconds")}
        self._found = {**about, "input": summary.digest, "rows": summary.rows, **session}
        self._job = _job(self._found)
        write_json(self.path / MANIFEST, self._found)
        self._content = (self.path / MANIFEST).read_bytes()

    def write(self, results: Sequence[Result]) -> None:
        """Write one shard, and the manifest again where another program removed or changed it.

        Args:
            results: of its rows, in the order of the input.

        Raises:
            OSError: it cannot be written; nothing is left of it.
        """
        first = results[0].number
        self._keep_manifest()
        path = self._shard(first)
        write_whole(path, pack(results, self._whole, self._job))
        self._states[first] = state(path)
        self.finished[first] = sum(each.error is not None for each in results)

    def verify(self) -> None:
        """Verify that every shard is still there as it was written, and that nothing happened to the manifest.

        Raises:
            OSError: another program removed or changed one of them; a manifest is written again.
        """
        for first, written in sorted(self._states.items()):
            path = self._shard(first)
            there = state(path)
            if there is None or there != written or not is_whole(path):
                fix = "run the command again" if there is None else "remove it, then run the command again"
                raise disturbed(f"{self.called}: {path.name}", path, f"; {fix}")
        self._keep_manifest()
        if self._lost is not None:
            raise self._lost

    def __enter__(self) -> JobFolder:
        path = Path(os.path.realpath(self.path))
        self._made = [folder for folder in (path, *path.parents) if not folder.exists()]
        try:
            try:
                path.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ValueError(f"{self.called} cannot be created ({error.strerror}); give another output") from None
            self._claim.take()
            self._read()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        with suppress(OSError):  # the folder is gone, or the disk full
            if self._shards():
                self._keep_manifest()
        self._claim.release()
        with suppress(OSError):  # not empty any more
            for folder in self._made:
                folder.rmdir()

    def _read(self) -> None:
        """Read the manifest, and remove what was not finished when the job was killed."""
        found = sorted(self.path.iterdir())
        for path in found:
            if not path.name.startswith(".") and path.name != MANIFEST and not _SHARD.fullmatch(path.name):
                raise ValueError(f"{self.called} holds {path.name}, which is no shard of a job; give another output")
        for path in found:  # of this job, since nothing of others is here
            if UNFINISHED.fullmatch(path.name) and path.is_file():
                path.unlink(missing_ok=True)
        shards, file, fix = self._shards(), self.path / MANIFEST, "give another output"
        if not there(file, fix) or (not shards and file.stat().st_size == 0):
            if shards:
                raise ValueError(f"{self.called} has shards without a {MANIFEST}, so that their job is unknown; {fix}")
            return
        manifest = read_json(file, fix)
        if not shards and manifest.get("format") == FORMAT:
            return  # nothing is lost by beginning again
        if (manifest.get("format"), manifest.get("version")) != (FORMAT, VERSION):
            raise ValueError(f"{file} is not a manifest of a job that this version of dllm knows; {fix}")
        if (wrong := misfit(manifest, _Manifest)) or misfit(manifest["options"].get("seed"), int | None):
            raise ValueError(f"{file} is damaged ({wrong or 'seed'}); {fix}")
        self._found, self._content = manifest, file.read_bytes()

    def _keep_manifest(self) -> None:
        """Write the manifest again if another program removed or changed it: shards without it have no job."""
        if self._content is None:
            return
        file = self.path / MANIFEST
        try:
            check_kept(file, self._content, "; it is written again, and all rows are kept")
        except OSError as error:
            self._lost = error
            write_whole(file, self._content)

    def _shard(self, first: int) -> Path:
        return self.path / f"rows-{first:012}.parquet"

    def _shards(self) -> list[Path]:
        return sorted(path for path in self.path.iterdir() if _SHARD.fullmatch(path.name))

    def _failed(self, path: Path, ids: str | None) -> int:
        """The number of failed rows of a shard, after checking that it belongs to this job.

        Args:
            path: the shard.
            ids: the hash of its ids; None if no shard begins there.
        """
        called = f"{self.called}: {path.name}"
        try:
            table = unpack(path, self._job)
        except ValueError as error:
            raise ValueError(f"{called} {error}") from None
        if hash_of(table.column("id").to_pylist()) != ids:
            raise ValueError(
                f"{called} has other rows than its name says; move it elsewhere, then run the command again"
            )
        return int(len(table) - table.column("error").null_count)


def refuse(called: str, before: Mapping[str, Any], session: Mapping[str, Any], part: str) -> None:
    """Reject other options or another model than those of the shards that are there.

    Args:
        called: the folder in errors.
        before: the manifest.
        session: what would make further shards.
        part: "options" or "model".

    Raises:
        ValueError: they differ.
    """
    differing = differences(before[part], session[part])
    if part == "model" and before["named"].get("path") != session["named"]["path"]:
        differing = list(dict.fromkeys("model" if name != "model.dtype" else name for name in differing))
    if differing:
        then, now = (", ".join(told(name, each) for name in differing) for each in (before, session))
        raise ValueError(f"{called} was made with {then}; this run has {now}: give another output")


def _job(manifest: Mapping[str, Any]) -> str:
    """A hash of everything that results depend on."""
    parts = {name: manifest[name] for name in ("input", "rows", "options", "model")}
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]
