"""Running a job: what is left of it is decoded, and every finished shard written at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

from dllm.jobs.decoder import Decoder, Setting
from dllm.jobs.engines import JobEngine
from dllm.jobs.folder import JobFolder, refuse
from dllm.jobs.rows import Input, Summary
from dllm.jobs.shard import Result


@dataclass(frozen=True)
class Outcome:
    """What is in the folder of a finished job.

    Attributes:
        rows: their number.
        failures: how many of them have an error.
    """

    rows: int
    failures: int


def run(
    source: Input,
    folder: JobFolder,
    engine: JobEngine,
    setting: Setting,
    session: Mapping[str, Any],
    report: Callable[[int, int, str], None] = lambda done, total, note: None,
) -> Outcome:
    """Decode what the folder lacks.

    Args:
        source: the input.
        folder: the output, entered.
        engine: what computes.
        setting: what decodes; its `check` is set here.
        session: from `dllm.evaluation.answer_manifest.describe`.
        report: called with the number of finished rows, of all rows, and a note.

    Raises:
        ValueError: bad input, a folder of another job, too many failed rows, or no row with an answer.
        OSError: a file cannot be written, or another program changed one.
    """
    size = engine.shard_rows
    summary = source.scan(size)
    session = {**session, "options": {**session["options"], "engine.shard_rows": size}}
    folder.open(summary, session, size)
    before, called = folder.manifest, folder.called

    def check(model: Mapping[str, Any]) -> None:
        """Before any decoding, also in an actor."""
        if before is not None:
            refuse(called, before, {**session, "model": model}, "model")

    setting = replace(setting, check=check)
    if len(folder.finished) < len(summary.shards):
        _decode(_Progress(summary, folder, engine, report), source, setting, session)
    elif not folder.fits(session):
        Decoder(setting, 1)  # another model by name, which may be the same one
    folder.verify()
    if folder.failures == summary.rows:
        raise ValueError(f"{called}: none of the {summary.rows} rows has an answer; the column error says why")
    return Outcome(summary.rows, folder.failures)


class _Progress:
    """The results so far, and the shards that they complete."""

    def __init__(
        self, summary: Summary, folder: JobFolder, engine: JobEngine, report: Callable[[int, int, str], None]
    ) -> None:
        self.summary, self.folder, self.engine, self._report = summary, folder, engine, report
        self._results: dict[int, dict[int, Result]] = {}
        size = engine.shard_rows
        self._done = sum(min(size, summary.rows - first) for first in folder.finished)
        self._failed, self._last = folder.failures, ""
        self._tell()

    def add(self, results: list[Result]) -> None:
        """Write the shards that are complete with these.

        Raises:
            ValueError: more rows failed than may.
        """
        size = self.engine.shard_rows
        for result in results:
            first = result.number - result.number % size
            if first in self.folder.finished or result.number in self._results.setdefault(first, {}):
                continue  # decoded again, after an actor died
            self._results[first][result.number] = result
            self._done += 1
            if result.error is not None:
                self._failed += 1
                self._last = f"{result.id!r}: {result.error}"
            if len(self._results[first]) == min(size, self.summary.rows - first):
                shard = self._results.pop(first)
                self.folder.write([shard[number] for number in sorted(shard)])
        self._tell()
        self.check()

    def check(self) -> None:
        """Stop the job where too many rows failed."""
        most = self.engine.max_failures
        if most is not None and self._failed > most:
            last = f"; the last one, id {self._last}" if self._last else ""
            raise ValueError(
                f"engine.max_failures={most} is exceeded: {self._failed} of {self._done} rows failed{last}; raise it "
                "to go on, or mend the input and give another output"
            )

    def _tell(self) -> None:
        self._report(self._done, self.summary.rows, f"{self._failed} failed" if self._failed else "")


def _decode(progress: _Progress, source: Input, setting: Setting, session: Mapping[str, Any]) -> None:
    progress.check()
    size, folder = progress.engine.shard_rows, progress.folder
    shards = source.left(size, progress.summary, folder.finished)
    begun: dict[str, Any] | None = None
    with closing(progress.engine.run(setting, shards)) as running:
        for model, finished in running:
            if model != begun:
                folder.begin(progress.summary, {**session, "model": model})
                begun = model
            if finished:
                progress.add(finished)
