"""On-disk layout of one resumable run: identity, results, samples, trace."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import pyarrow
import torch
from pyarrow import parquet

from dllm.decoding.result import padded
from dllm.evaluation.metrics import COSTS, cost, impossible, not_a_share, quality, speedup
from dllm.evaluation.records import Record, sample_of
from dllm.evaluation.runner import BASELINES, Runner
from dllm.evaluation.trace import Trace, words_of
from dllm.files import check_kept, read_json, remove_unfinished, write_json, write_whole
from dllm.identity import digest
from dllm.models.loading import LanguageModel
from dllm.samplers.base import Policy
from dllm.stored import folder_there, misfit, shallow, there
from dllm.tasks.base import Graded

RESULTS, RESULTS_VERSION = "dllm-results", 1
_MEMBERS = ("results.json", "manifest.json", "samples.parquet", "trace.safetensors")
_CHECKED = _MEMBERS[2:]  # whose hashes the results hold
_PACKAGES = ("dllm-samplers", "torch", "transformers", "tokenizers", "datasets", "numpy", "hydra-core", "lm-eval")


class ScoreValue(TypedDict):
    """One score."""

    value: float
    interval: list[float | None] | None
    n: int


class Metrics(TypedDict):
    """The metrics that are read from results.json."""

    n: int
    accuracy: float | None
    accuracy_interval: tuple[float | None, float | None] | None
    accuracy_name: str | None
    scores: dict[str, ScoreValue]
    nfe: float | None
    tpf: float | None
    tokens_per_second: float | None
    speedup: Speedups | None


class SpeedupFactor(TypedDict):
    """Speed-up over one baseline."""

    time: float


class Speedups(TypedDict):
    """Speed-ups over both baselines."""

    naive: SpeedupFactor
    eos_aware: SpeedupFactor


class Results(TypedDict):
    """The fields that are read from results.json."""

    label: str
    task: str
    metrics: Metrics
    details: dict[str, Any]


class RunFolder:
    """The folder of a run: manifest.json, results.json, samples.parquet, trace.safetensors.

    An unfinished run has a journal instead of results.

    Attributes:
        key: hash of the identity.

    Args:
        out: parent folder of all runs.
        label: display name of the run.
        identity: everything that its results depend on; it determines the folder, whatever the label.
    """

    def __init__(self, out: Path, label: str, identity: Mapping[str, Any]) -> None:
        self.label, self.identity = label, dict(identity)
        self.key = hashlib.sha256(_text(self.identity).encode()).hexdigest()
        words = re.sub(r"[^A-Za-z0-9.=_-]+", "-", label).strip("-")[:80]
        short = self.key[:8]
        there_already = [each for each in sorted(out.glob(f"*-{short}")) if each.is_dir()]
        there_already.sort(key=lambda each: not (each / "results.json").exists())  # the finished one, if any
        self.path = next(iter(there_already), out / f"{words}-{short}")
        self._manifest: bytes | None = None

    @property
    def journal(self) -> Path:
        """The journal of an unfinished run."""
        return self.path / "journal.jsonl"

    def results(self, main: str | None = None) -> dict[str, Any] | None:
        """The results of a finished run; None if unfinished.

        Args:
            main: the score reported as accuracy; None for the task's default.

        Raises:
            ValueError: invalid files, or an unknown score.
        """
        fix = "remove it to run that setting again"
        folder_there(self.path, fix)
        for name in (*_MEMBERS, self.journal.name):
            there(self.path / name, fix)
        file = self.path / "results.json"
        if not there(file):
            return None
        try:
            found = _read_results(file, fix)
            if _text({name: found.get(name) for name in self.identity}) != _text(self.identity):
                raise ValueError(f"{file} holds the results of another run; {fix}")
            self._check_members(found.get("members", {}))
        except ValueError:
            if self.journal.exists():  # they can be rebuilt from it
                return None
            raise
        if self.journal.exists():  # the process was killed before removing it
            with suppress(OSError):  # read-only
                Runner.tidy(self.journal)
        metrics = found["metrics"]
        own = metrics.setdefault("task_accuracy", metrics["accuracy_name"])
        if main is None and isinstance(own, str) and own in metrics["scores"]:
            main = own
        if main is not None and main != metrics["accuracy_name"]:
            shares = {name: score for name, score in metrics["scores"].items() if score["interval"] is not None}
            if main not in shares:
                raise ValueError(not_a_share(main, shares))
            score = shares[main]
            metrics |= {"n": score["n"], "accuracy": score["value"], "accuracy_interval": score["interval"]}
            metrics["accuracy_name"] = main
            with suppress(OSError):  # read-only
                write_json(file, found)
        return found

    def _check_members(self, members: Mapping[str, str]) -> None:
        """Reject files that are not those that the results were written with."""
        for name, before in members.items():
            _check_member(self.path / name, before)

    def begin(self, lm: LanguageModel, config: Mapping[str, Any], answers: int = 0) -> None:
        """Write the manifest: configuration and environment; resuming adds a session.

        Args:
            lm: the model.
            config: of the command.
            answers: that there are already.
        """
        file = self.path / "manifest.json"
        remove_unfinished(self.path)
        before = sessions(self.path) if there(file) else []  # a damaged one is replaced
        manifest = {"format": "dllm-manifest", "version": 1, "label": self.label, "config": config}
        write_json(file, manifest | {"sessions": [*before, _session(lm) | {"answers": answers}]})
        self._manifest = file.read_bytes()

    def fail(self, message: str) -> None:
        """Record the error of a failed run."""
        error = {"format": "dllm-error", "version": 1, "label": self.label, "message": message}
        file = self.path / "error.json"
        if file.is_file() or not os.path.lexists(file):
            write_json(file, error)

    def clear_error(self) -> None:
        """Remove the recorded error after a successful run."""
        with suppress(OSError):  # missing, or not a file
            (self.path / "error.json").unlink()
        with suppress(OSError):  # missing, or not empty
            self.path.rmdir()

    def finish(self, runner: Runner, graded: Graded) -> dict[str, Any]:
        """Write everything, the results last, and remove the journal.

        Raises:
            OSError: another program removed or changed files of this run, or files cannot be written.
        """
        runner.journal.verify()
        if self._manifest is not None:
            file = self.path / "manifest.json"
            check_kept(file, self._manifest, "; run the command again, which keeps all answers")
            write_json(file, json.loads(self._manifest) | {"sessions": _busy(sessions(self.path), runner.answers)})
        records = runner.records()
        trace(runner, records).save(self.path / "trace.safetensors")
        _parquet(self.path / "samples.parquet", samples(records, graded))
        scores = {name: quality(list(values.values())) for name, values in graded.scores.items()} | {
            name: _total(value, len(graded.rows)) for name, value in graded.totals.items()
        }
        main = None if graded.main is None else scores[graded.main]
        metrics = {
            "n": len(graded.rows) if main is None else main["n"],
            "accuracy": main and main["value"],
            "accuracy_interval": main and main["interval"],
            "accuracy_name": graded.main,
            "task_accuracy": graded.own or graded.main,
            "scores": scores,
            **cost(records),
            "speedup": speedup(records, {name: runner.baseline(name) for name in BASELINES}),
        }
        found = {
            "format": RESULTS, "version": RESULTS_VERSION, "label": self.label,
            **self.identity, "kind": str(getattr(runner.setting.sampler, "kind", Policy.kind)),
            "metrics": metrics, "details": graded.details,
            "members": {name: digest(self.path / name) for name in _CHECKED},
        }  # fmt: skip
        write_json(self.path / "results.json", found)
        runner.close(remove=True)
        return found


def _total(value: float | tuple[float, int], samples: int) -> dict[str, Any]:
    total, count = value if isinstance(value, tuple) else (value, samples)
    return {"value": total, "interval": None, "n": count}


def _check_member(file: Path, before: str) -> None:
    if not file.is_file() or digest(file) != before:
        what = "was changed" if file.is_file() else "is gone"
        raise ValueError(f"{file} {what} since results.json was written; remove {file.parent} to run that again")


def load_trace(file: Path) -> Trace:
    """Read a trace; that of a finished run is the one that its results were written with.

    Raises:
        ValueError: it is damaged, or was changed.
    """
    results = file.with_name("results.json")
    found: dict[str, Any] = {}
    if file.name in _CHECKED and results.is_file():
        with suppress(ValueError):  # a file of something else
            found = read_json(results)
    members = found.get("members") if found.get("format") == RESULTS else None
    if isinstance(members, dict) and file.name in members:
        _check_member(file, members[file.name])
    return Trace.load(file)


def _text(identity: Mapping[str, Any]) -> str:
    """Canonical JSON, the same before and after a round trip through a file."""
    return json.dumps(identity, sort_keys=True, default=str)


def _read_results(file: Path, fix: str) -> dict[str, Any]:
    """The content of results.json.

    Raises:
        ValueError: it is damaged, or another kind of file.
    """
    found = read_json(file, fix)
    if found.get("format") != RESULTS or found.get("version") != RESULTS_VERSION:
        raise ValueError(f"{file} is not a results file of this version of dllm; {fix}")
    wrong = misfit(found, Results) or misfit(found.get("members", {}), dict[str, str], "members")
    metrics = found["metrics"] if wrong is None else {}
    if wrong is None and metrics["nfe"] is not None and None in (metrics["tpf"], metrics["tokens_per_second"]):
        wrong = "metrics has no speed"
    own = metrics.get("scores", {}).get(metrics.get("accuracy_name"))
    if wrong is None and own is not None and own["value"] != metrics["accuracy"]:
        wrong = f"metrics.accuracy is {metrics['accuracy']!r}, and the score of that name {own['value']!r}"
    if wrong is None and (number := impossible(metrics)) is not None:
        wrong = f"metrics.{number}"
    strange = [name for name in COSTS if not isinstance(metrics.get(name), (int, float, dict, type(None)))]
    if wrong or strange:
        raise ValueError(f"{file} is damaged ({wrong or f'metrics.{strange[0]}'}); {fix}")
    return found


def sessions(folder: Path) -> list[dict[str, Any]]:
    """The sessions in a run's manifest; empty if it is missing or damaged."""
    try:
        manifest = read_json(folder / "manifest.json")
    except ValueError:
        return []
    found = manifest.get("sessions")
    known = manifest.get("format") == "dllm-manifest" and isinstance(found, list) and shallow(found)
    return [each for each in found if isinstance(each, dict)] if known and isinstance(found, list) else []


def _busy(found: list[dict[str, Any]], answers: int) -> list[dict[str, Any]]:
    """The sessions that answered something, by how many answers there were before each; the last one if none did.

    Those of earlier versions do not say.
    """
    counts = [*(each.get("answers") for each in found), answers]
    pairs = zip(found, pairwise(counts), strict=True)
    return [each for each, (before, after) in pairs if before is None or before != after] or found[-1:]


def samples(records: Sequence[Record], graded: Graded) -> list[dict[str, Any]]:
    """One row per sample: question, answer, scores and costs.

    A sample with several answers, or with answers without grades, has one row per answer.
    """
    rows = []
    answered = set()
    for record in records:
        sample = sample_of(record.id)
        answered.add(sample)
        rows.append(
            {
                "id": record.id,
                **graded.rows.get(sample, {}),
                "text": record.text,
                **{name: values.get(sample) for name, values in graded.scores.items()},
                **{name: getattr(record, name) for name in _COSTS},
            }
        )
    for sample, row in graded.rows.items():
        if sample not in answered:  # scored by likelihood
            rows.append({"id": sample, **row, **{name: values.get(sample) for name, values in graded.scores.items()}})
    return rows


def trace(runner: Runner, records: Sequence[Record]) -> Trace:
    """The trace of a run: commit steps of all answers, and every step of the first ones."""
    backbone, tokenizer = runner.lm.backbone, runner.lm.tokenizer
    eos = runner.eos_token_ids
    frames = tuple(runner.frames(records))
    lengths = tuple(len(record.completion) for record in records)
    return Trace(
        ids=tuple(record.id for record in records),
        tokens=padded([record.completion for record in records], eos[0]),
        commit_step=padded([record.commit_step for record in records], -1),
        confidence=padded([record.confidence for record in records], np.nan, np.float32),
        frames=frames,
        words=words_of(tokenizer, [record.completion for record in records], frames, backbone.mask_token_id),
        mask_token_id=backbone.mask_token_id,
        eos_token_ids=eos,
        lengths=lengths if len(set(lengths)) > 1 else (),
    )


_COSTS = (
    "tokens", "nfe", "guide_nfe", "seconds", "latency", "guide_seconds", "positions", "canvas", "refreshes",
    "peak_memory", "completion", "commit_step",
)  # fmt: skip


def _session(lm: LanguageModel) -> dict[str, Any]:
    device = lm.device
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type}, {platform.machine()}"
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: found for name in _PACKAGES if (found := _version(name))},
        "git": _git(),
        "device": where,
        "threads": torch.get_num_threads(),
        "dtype": str(lm.backbone.dtype).removeprefix("torch."),
        "weights": lm.backbone.fingerprint(),
        # What null and auto stand for.
        "defaults": {"eos_token_id": [*lm.backbone.eos_token_ids], "block_length": lm.backbone.own_block_length},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git() -> str | None:
    """The git commit of this code, marked if dirty; None for an installed package."""
    here = ["git", "-C", str(Path(__file__).parent)]
    try:
        tracked, found = (
            subprocess.run([*here, *command], check=True, capture_output=True, text=True, timeout=5).stdout.strip()
            for command in (("ls-files", __file__), ("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"))
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return found if tracked else None


def _parquet(file: Path, rows: list[dict[str, Any]]) -> None:
    buffer = pyarrow.BufferOutputStream()
    names = dict.fromkeys(name for row in rows for name in row)
    parquet.write_table(pyarrow.Table.from_pylist([dict.fromkeys(names) | row for row in rows]), buffer)
    write_whole(file, buffer.getvalue().to_pybytes())
