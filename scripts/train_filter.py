"""`dllm train-filter`: train a Learn2PD filter for a model, on its own generations."""

from __future__ import annotations

if __name__ == "__main__":
    import dllm.scripts.cli

    dllm.scripts.cli.run_file(__file__)

import json
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_type_hints

import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from safetensors import SafetensorError
from safetensors.torch import load_file, save

import dllm
from dllm import identity
from dllm.api import prepare
from dllm.cache.base import Cache
from dllm.checks import choice, number, seed, threads
from dllm.decoding.prompts import encode
from dllm.evaluation.jsonl import read_questions
from dllm.files import check_kept, read_json, write_json, write_whole
from dllm.filters import Filter, FilterCard
from dllm.filters.training import Records, Training, collect, fit, measure, split
from dllm.progress import progress_reports
from dllm.resolve import build
from dllm.samplers.base import Sampler
from dllm.scripts import app, own
from dllm.stored import there
from dllm.tasks import word_problems

_KINDS = get_type_hints(dllm.Options) | {
    name: kind | None for name, kind in {"data": str, "split": str, "column": str, "out": str, "hidden": int}.items()
}
# Options that the records depend on; others may change between runs on the same records.
_RECIPE = """model sampler cache seed gen_length block_length temperature top_p top_k tempered_confidence stop_at_eos
eos_token_id eos_suppression batch_size""".split()
_TRAINING = "architecture hidden rate train_batch_size epochs patience held_out".split()


def main() -> None:
    """Entry point."""
    app.run(train_filter, "train_filter", _KINDS)


def train_filter(cfg: DictConfig) -> None:
    """Collect records, train and evaluate a filter, write it with its card."""
    how = _check(cfg)
    _check_files(_out(cfg))
    sampler, cache = build("sampler", cfg.sampler, Sampler), build("cache", cfg.cache, Cache)
    fields: Any = OmegaConf.to_container(cfg, resolve=True)
    options = {name: fields[name] for name in dllm.Options.__dataclass_fields__ if name in fields}
    dllm.Options(**options)  # reject bad values before the model is loaded
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    prompts = _prompts(cfg)
    lm = app.load_model(fields["model"])
    out = _out(cfg)
    ids = encode(prompts, lm.tokenizer)
    prepare(lm, ids, sampler, cache, dllm.Options(**options))  # rejects incompatible options and long prompts
    trained = {name: fields[name] for name in _TRAINING}
    made = trained | {name: fields[name] for name in ("block_length", "cache", "sampler", "seed")}
    made |= {"fingerprint": lm.backbone.fingerprint(), "data": _data_name(cfg), "prompts": len(ids)}
    _check_finished(out, made)
    records = _collect(
        lm, ids, sampler, cache, options, _records(out), {key: fields[key] for key in _RECIPE} | {"training": trained}
    )
    learn, held_out = split(records, how)
    with progress_reports("training") as report:
        network, epoch = fit(
            learn, held_out, how, lambda number, loss: report(number, how.epochs, f"held-out loss {loss:.4f}")
        )
    quality, calibration = measure(network, held_out)
    card = FilterCard(
        architecture=network.architecture,
        block_length=records.confidence.shape[1],
        backbone=lm.name,
        fingerprint=lm.backbone.fingerprint(),
        cache=fields["cache"],
        sampler=fields["sampler"],
        data=_data_name(cfg),
        prompts=len(ids),
        seed=cfg.seed,
        records={"learned": len(learn.prompt), "held_out": len(held_out.prompt), "epoch": epoch},
        held_out=quality,
        calibration=calibration,
    )
    _check_files(out)
    Filter(network, card, out.stem).save(out)
    plot = _plot(card, out.with_suffix(".svg"))
    _report(card, out, plot)


def _out(cfg: DictConfig) -> Path:
    return Path(cfg.out or f"outputs/filters/{Path(cfg.model.path).name}-{cfg.block_length}.safetensors")


def _check_files(out: Path) -> None:
    """Reject overwriting files of another kind."""
    kinds = {".safetensors": own.FILTER, ".json": own.CARD, ".svg": own.RELIABILITY}
    own.check("out", str(out), {out.with_suffix(suffix): kind for suffix, kind in kinds.items()})
    own.check_records(str(out), _records(out), ("fingerprint", "prompts", "sampler"))


def _records(out: Path) -> Path:
    return out.with_suffix(".records")


def _check_finished(out: Path, made: dict[str, Any]) -> None:
    """Reject replacing a finished filter by one with other options, according to its card and records."""
    card, recipe = out.with_suffix(".json"), _records(out) / "recipe.json"
    if not (out.exists() and there(card)):
        return
    before = {name: value for name, value in read_json(card, "give another out").items() if name != "held_out"}
    if recipe.exists():
        training = read_json(recipe, "remove that folder").get("training")
        before |= training if isinstance(training, dict) else {}
    if other := [name for name in made if name in before and before[name] != made[name]]:
        then, now = (", ".join(f"{name}={each[name]}" for name in other) for each in (before, made))
        raise ValueError(
            f"out={str(out)!r} is a finished filter of {then}, this run has {now}; give another out, or "
            "remove that filter"
        )


def _prompts(cfg: DictConfig) -> list[Any]:
    """The first `prompts` prompts of the source, or all if it has fewer."""
    prompts = _read(cfg)[: cfg.prompts]
    if len(prompts) < 2:
        raise ValueError(f"data={cfg.data!r} has {len(prompts)} prompts, too few to hold one out; give more")
    if cfg.chat:
        return [[{"role": "user", "content": text}] if isinstance(text, str) else text for text in prompts]
    return prompts


def _read(cfg: DictConfig) -> list[Any]:
    if cfg.data is None:
        return [problem.question for problem in word_problems.problems(cfg.prompts, cfg.seed)]
    if cfg.data.endswith(".jsonl"):
        return [question.prompt for question in read_questions(Path(cfg.data), "data")]
    from datasets import disable_progress_bars, load_dataset  # slow import, only needed here
    from datasets.exceptions import DatasetsError

    if not Console(stderr=True).is_terminal:
        disable_progress_bars()
    with TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        # For local files, datasets caches by name and time, not by content.
        kept = {"cache_dir": temporary} if Path(cfg.data).exists() else {}
        try:
            rows = load_dataset(cfg.data, split=cfg.split or "train", **kept)
        except (DatasetsError, OSError, ValueError) as error:
            # For parse errors, only the cause has details.
            raise ValueError(
                f"data={cfg.data!r} with split={cfg.split or 'train'!r} cannot be read: {error.__cause__ or error}"
            ) from None
        column = cfg.column or "question"
        if column not in rows.column_names:
            raise ValueError(f"column={column!r} is not in {cfg.data}; use one of {', '.join(rows.column_names)}")
        return list(rows[: cfg.prompts][column])


def _collect(
    lm: dllm.LanguageModel,
    ids: list[list[int]],
    sampler: Any,
    cache: Any,
    options: dict[str, Any],
    folder: Path,
    recipe: dict[str, Any],
) -> Records:
    """Records of all prompts, batch by batch; those of an earlier run with the same recipe are reused."""
    file = folder / "recipe.json"
    asked = sha256(json.dumps(ids).encode()).hexdigest()
    stamps = identity.stamps_read_by(sampler, cache)
    read = identity.contents(recipe) | identity.read_by(sampler) | identity.read_by(cache)
    recipe = recipe | {"fingerprint": lm.backbone.fingerprint(), "checkpoint": identity.model(lm), "files": read}
    recipe |= {"prompts": asked}
    if there(file, "remove that folder"):
        before = read_json(file, "remove that folder")
        # Training options do not change the records.
        other = ", ".join(name for name in recipe if name != "training" and before.get(name) != recipe[name])
        if other:
            raise ValueError(
                f"out: {folder} has records of other settings ({other}); give another out, or remove that folder"
            )
    write_json(file, recipe)
    written = file.read_bytes()
    size, parts = options["batch_size"], []
    with progress_reports("collecting") as report:
        for start in range(0, len(ids), size):
            part = folder / f"{start:07}.safetensors"
            found = _part(part, range(start, min(start + size, len(ids))), options["block_length"])
            if found is None:
                seeded = options | {"seed": options["seed"] + start}
                del seeded["batch_size"]
                records = collect(lm, ids[start : start + size], sampler, cache, **seeded)
                records = replace(records, prompt=records.prompt + start)
                identity.check_weights(lm, stamps)
                check_kept(file, written, "; run the command again")
                write_whole(part, save(vars(records)))
                found = records
            parts.append(found)
            report(min(start + size, len(ids)), len(ids))
    return Records.join(parts)


def _part(file: Path, prompts: range, block_length: int) -> Records | None:
    """The records of one batch; None if missing or damaged."""
    if not there(file):
        return None
    try:
        found = load_file(file)
        records = Records(**found)
    except (SafetensorError, TypeError, OSError, ValueError, KeyError):
        return None
    kinds = {
        name: torch.float32 if name == "confidence" else torch.int64 if name == "prompt" else torch.bool
        for name in found
    }
    shapes = {name: found["confidence"].shape if name != "prompt" else found["confidence"].shape[:1] for name in found}
    good = all(tensor.dtype == kinds[name] and tensor.shape == shapes[name] for name, tensor in found.items())
    good = good and found["confidence"].ndim == 2 and found["confidence"].shape[1] == block_length
    good = good and bool(((found["confidence"] >= 0) & (found["confidence"] <= 1)).all())  # NaN is neither
    return records if good and set(records.prompt.tolist()) == set(prompts) else None


def _plot(card: FilterCard, path: Path) -> Path | None:
    """The reliability diagram: share of final predictions over predicted probability."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(4.4, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot([0, 1], [0, 1], color="#bbbbbb", linewidth=1)
    axes.plot([row["predicted"] for row in card.calibration], [row["final"] for row in card.calibration], "o-")
    axes.set(xlabel="predicted probability", ylabel="share that was final", title=f"{card.backbone}, held-out prompts")
    write_whole(path, own.svg(figure))
    return path


def _report(card: FilterCard, out: Path, plot: Path | None) -> None:
    learned, apart = card.records["learned"], card.records["held_out"]
    print(f"{card.prompts} prompts gave {learned} training records and {apart} held-out records, split by prompt")
    for row in card.held_out["thresholds"]:
        precision = f"{row['precision']:.2%}" if row["recall"] else "-"  # nothing was accepted
        print(f"threshold {row['threshold']:<6} precision {precision}  recall {row['recall']:.2%}")
    for share in (0.99, 0.999):
        print(f"recall {card.held_out[f'recall_at_{share}']:.2%} at a precision of {share:.1%}")
    beside = "" if plot else " (no reliability plot: it needs matplotlib, pip install 'dllm-samplers[plot]')"
    print(f"filter in {out}, card in {out.with_suffix('.json')}{f', plot in {plot}' if plot else ''}{beside}")


def _data_name(cfg: DictConfig) -> str:
    if cfg.data is None:
        return f"dllm.tasks.word_problems, seed {cfg.seed}"
    if cfg.data.endswith(".jsonl"):
        return str(cfg.data)
    return f"{cfg.data}, split {cfg.split or 'train'}, column {cfg.column or 'question'}"


def _check(cfg: DictConfig) -> Training:
    choice("architecture", cfg.architecture, ("neighbours", "published"))
    for name in ("prompts", "epochs", "patience", "train_batch_size"):
        number(name, cfg[name], "a whole number of at least 1", low=1, whole=True)
    if cfg.data is None:
        word_problems.check_count("prompts", cfg.prompts)
    seed("seed", cfg.seed)
    threads(cfg.threads)
    if cfg.prompts < 2:
        raise ValueError(f"prompts={cfg.prompts} cannot be split; use 2 or more")
    if cfg.hidden is not None:
        number("hidden", cfg.hidden, "a whole number from 1 to 65536, or null", low=1, high=65536, whole=True)
    if cfg.block_length is None:
        raise ValueError("block_length=null is not supported; give the block length that the filter will be used with")
    for name in ("split", "column"):
        if cfg[name] is not None and (cfg.data is None or cfg.data.endswith(".jsonl")):
            raise ValueError(
                f"{name}={cfg[name]!r} has no effect without a data set; leave it out, or name one in data"
            )
    if cfg.out is not None and not cfg.out.endswith(".safetensors"):
        raise ValueError(f"out={cfg.out!r} is not a filter file; give a name that ends in .safetensors")
    return Training(
        cfg.architecture, cfg.hidden, cfg.rate, cfg.train_batch_size, cfg.epochs, cfg.patience, cfg.held_out, cfg.seed
    )
