"""The manifest of an answers file, `NAME.manifest.json`: the prompts, options and models of the answers."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from collections.abc import Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

from dllm import identity
from dllm.evaluation.jsonl import MANIFEST, AnswerFile, PromptLine
from dllm.files import check_kept, expanded, read_json, write_json
from dllm.models import adapters
from dllm.models.loading import LanguageModel
from dllm.resolve import TARGET
from dllm.stored import misfit, there

FORMAT, VERSION = "dllm-answers", 1
# Options that do not change answers beyond rounding. All others are compared, including ones added later.
# - input and output: input (its prompts are compared one by one), output, picture, prompt, show, resume
# - batching: batch_size (a row does not depend on the other rows), cuda_graphs
# - column, split, engine: which prompts of the input, and what computes them; of jobs (`dllm.jobs`)
# - device and kernels of the model: the model itself and its dtype are compared once it is loaded
_FREE = {
    "input", "output", "picture", "prompt", "show", "resume", "batch_size", "cuda_graphs", "model", "column", "split",
    "engine",
}  # fmt: skip
_COSTS = 20  # the manifest is rewritten at most every this many times the duration of a write
# The required fields of a session; its other fields are informational.
_FILES_OF = "files of "
_PARTS: dict[str, Any] = {"answers": 0, "options": {}, "names": {}, "named": {}, "model": {}}
_FORMAT = "response_format"
_IN_PARTS = "(recorded in parts by an earlier version)"


class AnswerManifest:
    """The settings of the answers of a file, session by session.

    It is written before a session's first answer, so that every answer in the file is covered. It has a hash of each
    prompt and of each answer synced to disk; and for each session the options, the model, and the number of answers
    at its start.

    Args:
        answers: the file, locked against other writers.
        mixed: keep answers of other options or models.

    Attributes:
        note: a message about answers of unknown origin, if any.

    Raises:
        ValueError: its path has another kind of file.
    """

    def __init__(self, answers: AnswerFile, mixed: bool) -> None:
        self.path = answers.file.with_name(answers.file.name + MANIFEST)
        self._answers, self._mixed = answers, mixed
        self._prompts: dict[str, str] = {}
        self._made: dict[str, str] = {}
        self._ended = False  # if True, the hashes are complete
        self._sessions: list[dict[str, Any]] = []
        self._written: bytes | None = None
        self._at = self._took = 0.0
        if there(self.path, "give another output, or remove it"):
            self._read()
        if not answers.ids:
            self._prompts, self._made, self._ended, self._sessions = {}, {}, False, []  # the answers were removed
        elif self._sessions and self._began_with(answers.ids):
            del self._sessions[-1]  # it ended before its first answer
        unknown = self._sessions[0]["answers"] if self._sessions else len(answers.ids)
        note = f"{unknown} answers are older than {self.path.name}: their prompts and options are unknown"
        self.note = note if unknown and not mixed else None

    @property
    def seed(self) -> int | None:
        """Of the last session, for resuming with seed=null."""
        return self._sessions[-1]["options"].get("seed") if self._sessions else None

    def check(self, questions: Sequence[PromptLine], session: Mapping[str, Any]) -> None:
        """Reject answers of other prompts or options.

        Args:
            questions: the input.
            session: from `describe`.

        Raises:
            ValueError: a prompt has changed since it was answered, or options have and `mixed` is off.
        """
        answered = [question for question in questions if question.id in self._answers.ids]
        changed = [each for each in answered if self._prompts.get(_key(each), _hash(each)) != _hash(each)]
        if changed:
            called = f"output={str(self._answers.path)!r}"
            more = f", nor are those of {len(changed) - 1} other lines" if len(changed) > 1 else ""
            raise ValueError(
                f"{changed[0].place} is not the prompt that {called} answers{more}; give another output, or the "
                "original input"
            )
        if self._mixed:
            return
        for before in self._sessions:
            self._refuse(differences(before["options"], session["options"]), before, session)
        found = self._hashes()
        known = self._made if self._ended else found | self._made
        if strange := [name for name, digest in found.items() if known.get(name) != digest]:
            raise ValueError(
                f"output={str(self._answers.path)!r} has {len(strange)} answers (the first one: {strange[0]}) that "
                f"are not in {self.path.name}; remove them, give another output, or resume=mixed to keep them"
            )

    def fits(self, session: Mapping[str, Any]) -> bool:
        """Whether the model is the same by name, so that it need not be loaded for comparison."""
        return self._mixed or all(before["named"] == session["named"] for before in self._sessions)

    def check_model(self, session: Mapping[str, Any]) -> None:
        """Reject answers of another model, unless `mixed`.

        Args:
            session: from `describe`, with `model` from `identify`.

        Raises:
            ValueError: weights, tokenizer or precision differ.
        """
        for before in [] if self._mixed else self._sessions:
            differing = differences(before["model"], session["model"])
            if before["named"].get("path") != session["named"]["path"]:
                differing = ["model" if name != "model.dtype" else name for name in differing]
            self._refuse(list(dict.fromkeys(differing)), before, session)

    def begin(self, questions: Sequence[PromptLine], session: Mapping[str, Any]) -> None:
        """Record the settings of the answers that follow.

        Raises:
            OSError: it cannot be written.
        """
        here = {
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "host": platform.node(),
            "dllm": version("dllm-samplers"),
            "answers": len(self._answers.ids),
            "ids": _hash_of(self._answers.ids),
        }
        self._sessions.append(here | dict(session))
        self._prompts = {_key(question): _hash(question) for question in questions}
        self._made, self._ended = self._hashes(), False
        self._write()
        self._answers.synced = self._update

    def end(self) -> None:
        """Mark the hashes as complete, unless another program changed the manifest."""
        self._ended, self._took = True, 0.0
        self._update()

    def verify(self) -> None:
        """Verify that the manifest is unchanged; if removed, it is written again.

        Raises:
            OSError: another program removed or changed it during this run.
        """
        if self._written is None:
            return
        gone = not os.path.lexists(self.path)
        try:
            fix = "it is written again, and all answers are kept" if gone else "put it back, or give another output"
            check_kept(self.path, self._written, f"; {fix}")
        finally:
            if gone:
                self._write()

    def _update(self) -> None:
        """Add the hashes of the answers on disk, at a rate that costs little time."""
        now = time.monotonic()
        if self._written is None or now - self._at < _COSTS * self._took:
            return
        self._made = self._hashes()
        with suppress(OSError):  # the current content suffices to resume
            if self.path.read_bytes() == self._written:  # otherwise `verify` raises an error
                self._write()
        self._at, self._took = time.monotonic(), time.monotonic() - now

    def _hashes(self) -> dict[str, str]:
        return {json.dumps(name): digest for name, digest in self._answers.hashes.items()}

    def _write(self) -> None:
        content = {"format": FORMAT, "version": VERSION, "sessions": self._sessions, "prompts": self._prompts}
        content |= {"answers": self._made, "ended": self._ended}
        try:
            write_json(self.path, content)
            self._written = self.path.read_bytes()
        except OSError as error:
            called = f"output={str(self._answers.path)!r}"
            raise OSError(
                f"{called}: {self.path.name} cannot be written beside it ({error}); free disk space"
            ) from None

    def _read(self) -> None:
        fix = "give another output, or remove it"
        found = read_json(self.path, fix)
        if (found.get("format"), found.get("version")) != (FORMAT, VERSION):
            raise ValueError(f"{self.path} is not a manifest of answers that this version of dllm knows; {fix}")
        try:
            self._prompts = {str(name): str(value) for name, value in found["prompts"].items()}
            self._made = {str(name): str(value) for name, value in found.get("answers", {}).items()}
            self._ended = found.get("ended") is True
            self._sessions = [_PARTS | each for each in found["sessions"]]
            for each in self._sessions:
                if any(type(each[name]) is not type(part) for name, part in _PARTS.items()):
                    raise TypeError
                if misfit(each["options"].get("seed"), int | None):
                    raise TypeError
        except (AttributeError, KeyError, TypeError):
            raise ValueError(f"{self.path} is damaged; {fix}") from None

    def _began_with(self, ids: Set[str | int]) -> bool:
        """Whether these are exactly the answers at the start of the last session."""
        last = self._sessions[-1]
        return bool(last["answers"] == len(ids) and last.get("ids", _hash_of(ids)) == _hash_of(ids))

    def _refuse(self, differing: Sequence[str], before: Mapping[str, Any], session: Mapping[str, Any]) -> None:
        if differing:
            then, now = (", ".join(told(name, each) for name in differing) for each in (before, session))
            raise ValueError(
                f"output={str(self._answers.path)!r} was made with {then}; this run has {now}: give another output, "
                "or resume=mixed to keep those answers"
            )


def describe(fields: Mapping[str, Any], choices: Mapping[str, str], made: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a session that are known before the model is loaded.

    Args:
        fields: the composed configuration, with the seed that is used.
        choices: names of the sampler and the cache.
        made: the sampler and the cache.
    """
    options = {name: value for name, value in _flat(fields).items() if name.partition(".")[0] not in _FREE}
    if fields["cache"].get("refresh_above") is None:
        options.pop("cache.measure_every", None)  # measuring alone does not change results
    named = identity.contents([fields["sampler"], fields["cache"]])
    options |= {f"content of {name}": digest for name, digest in named.items()}
    for group, value in made.items():
        # By content: their paths differ between machines.
        if read := sorted(digest for name, digest in identity.read_by(value).items() if name not in named):
            options[f"{_FILES_OF}{group}"] = hashlib.sha256(json.dumps(read).encode()).hexdigest()[:16]
    return {
        "options": options,
        "names": {group: choices[group] for group in ("sampler", "cache")},
        "named": {name: fields["model"].get(name) for name in ("path", "revision", "dtype", "adapter")}
        | {"files": _files(fields)}
        | ({} if (quantised := fields["model"].get("quantization")) is None else {"quantization": quantised}),
    }


def identify(lm: LanguageModel) -> dict[str, Any]:
    """Identity of a loaded model, independent of its path and device."""
    return (
        identity.model(lm)
        | {
            "model.dtype": str(lm.backbone.dtype).removeprefix("torch."),
            "eos": list(lm.backbone.eos_token_ids),
        }
        | ({} if lm.quantization is None else {"model.quantization": dict(lm.quantization)})
    )


def _files(fields: Mapping[str, Any]) -> list[list[Any]]:
    """Name, size and times of the files of a local model and its adapter, to detect changes."""
    folders = [expanded(name) for name in (fields["model"]["path"], fields["model"].get("adapter")) if name]
    for folder in folders[:1]:
        with suppress(ValueError):
            if (folder / adapters.CONFIG).is_file() and not (folder / "config.json").is_file():
                folders.append(expanded(adapters.base_of(folder)[0]))  # an adapter, which names its base model
    files = [file for folder in folders if folder.is_dir() for file in sorted(folder.iterdir())]
    found = [(file.name, file.stat()) for file in files if file.exists()]
    return [[name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns] for name, stat in found]


def _flat(fields: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Options by dotted names; mappings that are values, such as a schema, are JSON, in the order of their keys."""
    flat: dict[str, Any] = {}
    for name, value in fields.items():
        match value:
            case Mapping() if TARGET in value:
                flat |= _flat(value, f"{prefix}{name}.")
            case Mapping():
                flat[f"{prefix}{name}"] = json.dumps(value, ensure_ascii=False)
            case _:
                flat[f"{prefix}{name}"] = value
    return flat


def _joined(options: Mapping[str, Any]) -> Mapping[str, Any]:
    """Options with the format as one value: earlier versions recorded parts, which do not tell formats apart."""
    rest = {name: value for name, value in options.items() if not name.startswith(f"{_FORMAT}.")}
    return options if len(rest) == len(options) else {**rest, _FORMAT: _IN_PARTS}


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Names whose values differ; a missing option counts as null, but for code, which earlier versions did not know."""
    before, now = _joined(before), _joined(now)
    both = [name for name in dict.fromkeys([*now, *before]) if name in before or not name.startswith(_FILES_OF)]
    names = [name for name in both if before.get(name) != now.get(name)]
    # If the sampler differs, its options are not compared.
    others = [name for name in names if name in ("sampler._target_", "cache._target_")]
    groups = tuple(name.removesuffix("_target_") for name in others)
    return [name for name in names if name in others or not name.startswith(groups)]


def told(name: str, session: Mapping[str, Any]) -> str:
    """An option of a session as a user writes it."""
    group = name.removesuffix("._target_")
    if group in session["names"]:
        return f"{group}={session['names'][group]}"
    if name == "model":
        return f"model={session['named'].get('path')}"
    value = (_joined(session["options"]) | session.get("model", {})).get(name)
    return f"{name}={value if isinstance(value, str) else json.dumps(value)}"


def _key(question: PromptLine) -> str:
    """An id as JSON, which distinguishes the number 1 from the text "1"."""
    return json.dumps(question.id, ensure_ascii=False)


def _hash_of(ids: Set[str | int]) -> str:
    """Hash of a set of ids."""
    names = sorted(json.dumps(name) for name in ids)
    return hashlib.sha256(json.dumps(names).encode()).hexdigest()[:16]


def _hash(question: PromptLine) -> str:
    """Hash of a prompt, without the line's place and id."""
    asked = {name: value for name, value in asdict(question).items() if value is not None}
    for name in ("id", "number", "place"):
        del asked[name]
    return hashlib.sha256(json.dumps(asked, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
