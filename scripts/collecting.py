"""What the commands share that train on decodes: where prompts come from, and storing decodes batch by batch.

Options: `data`, `split`, `column`, `prompts`, `chat` and `seed`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from omegaconf import DictConfig
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

import dllm
from dllm import identity
from dllm.checks import number, out_of_memory
from dllm.evaluation.jsonl import read_questions
from dllm.files import check_kept, portable, read_json, write_json, write_whole
from dllm.progress import progress_reports
from dllm.scripts import app
from dllm.stored import there
from dllm.tasks import word_problems


def check_source(cfg: DictConfig) -> None:
    """Reject bad values of the options of the prompts."""
    number("prompts", cfg.prompts, "a whole number of at least 1", low=1, whole=True)
    if cfg.data is None:
        word_problems.check_count("prompts", cfg.prompts)
    for name in ("split", "column"):
        if cfg[name] is not None and (cfg.data is None or cfg.data.endswith(".jsonl")):
            raise ValueError(
                f"{name}={cfg[name]!r} has no effect without a data set; leave it out, or name one in data"
            )


def data_name(cfg: DictConfig) -> str:
    """The source of the prompts."""
    if cfg.data is None:
        return f"dllm.tasks.word_problems, seed {cfg.seed}"
    if cfg.data.endswith(".jsonl"):
        return str(cfg.data)
    return f"{cfg.data}, split {cfg.split or 'train'}, column {cfg.column or 'question'}"


def read_prompts(cfg: DictConfig) -> list[Any]:
    """The first `prompts` prompts of the source, or all if it has fewer."""
    prompts = _read(cfg)[: cfg.prompts]
    if cfg.chat:
        return [[{"role": "user", "content": text}] if isinstance(text, str) else text for text in prompts]
    return prompts


def _read(cfg: DictConfig) -> list[Any]:
    if cfg.data is None:
        return [problem.question for problem in word_problems.problems(cfg.prompts, cfg.seed)]
    if cfg.data.endswith(".jsonl"):
        return [question.prompt for question in read_questions(Path(cfg.data), "data")]
    from datasets import disable_progress_bars, load_dataset  # slow import, only needed here

    if not Console(stderr=True).is_terminal:
        disable_progress_bars()
    with TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        # For local files, datasets caches by name and time, not by content.
        kept = {"cache_dir": temporary} if Path(cfg.data).exists() else {}
        try:
            rows = load_dataset(cfg.data, split=cfg.split or "train", **kept)
        except Exception as error:  # of any type, for what is no data set or a damaged one
            if out_of_memory(error):
                raise
            # For parse errors, only the cause has details.
            raise ValueError(
                f"data={cfg.data!r} with split={cfg.split or 'train'!r} cannot be read: {error.__cause__ or error}"
            ) from None
        column = cfg.column or "question"
        if column not in rows.column_names:
            raise ValueError(f"column={column!r} is not in {cfg.data}; use one of {', '.join(rows.column_names)}")
        return list(rows[: cfg.prompts][column])


def contents_of(lm: dllm.LanguageModel, ids: list[list[int]], reads: app.Built) -> dict[str, str]:
    """What records are made from besides the options: a hash by option.

    Args:
        lm: the model that makes them.
        ids: the prompts.
        reads: sampler and cache, with the files that they read.

    Raises:
        OSError: the model's files changed since it was loaded.
    """
    made = {"sampler": reads.sampler, "cache": reads.cache}
    files = {name: sorted(identity.read_by(read).values()) for name, read in made.items()}
    return {
        "model.path": " ".join(identity.model(lm).values()),
        "data": _hash(ids),
        **{name: " ".join(found) for name, found in files.items()},
    }


def _hash(ids: list[list[int]]) -> str:
    return sha256(json.dumps(ids).encode()).hexdigest()


def _digest(tensors: Mapping[str, Tensor], source: str = "") -> str:
    """A hash of tensors, and of what they were made from, which earlier versions left out."""
    found = sha256(source.encode())
    for name, tensor in sorted(tensors.items()):
        found.update(name.encode() + tensor.numpy().tobytes())
    return found.hexdigest()


def _as_written(part: Path, *digests: str) -> bool:
    """Whether a file was written with one of these hashes."""
    with safe_open(part, "pt") as file:
        return (file.metadata() or {}).get("digest") in digests


def collected(
    lm: dllm.LanguageModel,
    ids: list[list[int]],
    reads: app.Built,
    recipe: Mapping[str, Any],
    folder: Path,
    load: Callable[[Path, range], dict[str, Tensor] | None],
    make: Callable[[range], dict[str, Tensor]],
    fix: str = "remove that folder",
) -> list[dict[str, Tensor]]:
    """What was made from each batch of prompts; that of an earlier run with the same recipe is reused.

    A file of another batch or recipe is made again, as a damaged one.

    Args:
        lm: the model that makes it.
        ids: the prompts.
        reads: sampler and cache, whose files are part of the recipe.
        recipe: options that it depends on, with `batch_size`; those under `training` may differ.
        folder: of the stored files.
        load: reads a file of some prompts; None if it is missing or damaged.
        make: makes it for some prompts.
        fix: what else to do where they are of other settings.

    Raises:
        ValueError: the folder holds that of other settings.
    """
    file = folder / "recipe.json"
    by_path = identity.contents({**recipe}) | identity.read_by(reads.sampler) | identity.read_by(reads.cache)
    files = {portable(Path(path)): content for path, content in by_path.items()}
    now = {**recipe, "fingerprint": lm.backbone.fingerprint(), "checkpoint": identity.model(lm), "files": files}
    now |= {"prompts": _hash(ids)}
    # Training options do not change the records.
    made_from = {name: value for name, value in now.items() if name != "training"}
    if there(file, "remove that folder"):
        before = read_json(file, "remove that folder")
        if isinstance(known := before.get("files"), dict):  # earlier versions wrote paths of the installation
            before["files"] = {portable(Path(path)): content for path, content in known.items()}
        other = ", ".join(name for name, value in made_from.items() if before.get(name) != value)
        if other:
            raise ValueError(f"out: {folder} has records of other settings ({other}); give another out, or {fix}")
    write_json(file, now)
    written = file.read_bytes()
    size, parts = recipe["batch_size"], []
    with progress_reports("collecting") as report:
        for start in range(0, len(ids), size):
            batch = range(start, min(start + size, len(ids)))
            part = folder / f"{start:07}.safetensors"
            source = json.dumps([made_from, batch.start, batch.stop], sort_keys=True)
            found = load(part, batch)
            if found is None or not _as_written(part, _digest(found, source), _digest(found)):
                found = make(batch)
                identity.check_weights(lm, reads.stamps)
                check_kept(file, written, "; run the command again")
                write_whole(part, save(found, {"digest": _digest(found, source)}))
            parts.append(found)
            report(batch.stop, len(ids))
    return parts
