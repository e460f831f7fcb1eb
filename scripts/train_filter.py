"""`dllm train-filter`: train a Learn2PD filter for a model, on its own generations."""

from __future__ import annotations

if __name__ == "__main__":
    import dllm.scripts.cli

    dllm.scripts.cli.run_file(__file__)

from dataclasses import replace
from pathlib import Path
from typing import Any, get_type_hints

import torch
from omegaconf import DictConfig, OmegaConf
from safetensors import SafetensorError
from safetensors.torch import load_file

import dllm
from dllm.api import prepare
from dllm.checks import choice, number, seed, threads
from dllm.decoding.prompts import encode
from dllm.evaluation.claim import claimed
from dllm.files import read_json, write_whole
from dllm.filters import Filter, FilterCard
from dllm.filters.training import Records, Training, collect, fit, measure, split
from dllm.progress import progress_reports
from dllm.scripts import app, own
from dllm.scripts.collecting import check_source, collected, data_name, read_prompts
from dllm.stored import there

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
    built = app.build_both(cfg)
    fields: Any = OmegaConf.to_container(cfg, resolve=True)
    options = {name: fields[name] for name in dllm.Options.__dataclass_fields__ if name in fields}
    dllm.Options(**options)  # reject bad values before the model is loaded
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    prompts = read_prompts(cfg)
    if len(prompts) < 2:
        raise ValueError(f"data={cfg.data!r} has {len(prompts)} prompts, too few to hold one out; give more")
    lm = app.load_model(fields["model"])
    out = _out(cfg)
    ids = encode(prompts, lm.tokenizer)
    if len(set(map(tuple, ids))) < 2:
        raise ValueError(
            f"data={cfg.data!r} has one prompt {len(ids)} times, so that none can be held out; give others"
        )
    prepare(
        lm, ids, built.sampler, built.cache, dllm.Options(**options)
    )  # rejects incompatible options and long prompts
    trained = {name: fields[name] for name in _TRAINING}
    made = trained | {name: fields[name] for name in ("block_length", "cache", "sampler", "seed")}
    made |= {"fingerprint": lm.backbone.fingerprint(), "data": data_name(cfg), "prompts": len(ids)}
    with claimed(out, f"out={str(out)!r}", "another out"):
        _check_finished(out, made)
        recipe = {key: fields[key] for key in _RECIPE} | {"training": trained}
        records = _collect(lm, ids, built, options, _records(out), recipe)
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
            data=data_name(cfg),
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
    if not recipe.exists():  # the card holds neither all options nor what the prompts were
        raise ValueError(
            f"out={str(out)!r} is a finished filter whose records are gone ({recipe.parent}), so that it cannot be "
            "compared with this run; give another out, or remove that filter"
        )


def _collect(
    lm: dllm.LanguageModel,
    ids: list[list[int]],
    reads: app.Built,
    options: dict[str, Any],
    folder: Path,
    recipe: dict[str, Any],
) -> Records:
    """Records of all prompts, batch by batch; those of an earlier run with the same recipe are reused."""

    def make(batch: range) -> dict[str, Any]:
        seeded = options | {"seed": options["seed"] + batch.start}
        del seeded["batch_size"]
        records = collect(lm, ids[batch.start : batch.stop], reads.sampler, reads.cache, **seeded)
        return vars(replace(records, prompt=records.prompt + batch.start))

    def stored(file: Path, batch: range) -> dict[str, Any] | None:
        found = _part(file, batch, options["block_length"])
        return None if found is None else vars(found)

    parts = collected(lm, ids, reads, recipe, folder, stored, make)
    records = Records.join([Records(**part) for part in parts])
    first: dict[tuple[int, ...], int] = {}  # equal prompts are either trained on or held out
    alike = torch.tensor([first.setdefault(tuple(each), number) for number, each in enumerate(ids)])
    return replace(records, prompt=alike[records.prompt])


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
        precision = "-" if row["precision"] is None else f"{row['precision']:.2%}"
        print(f"threshold {row['threshold']:<6} precision {precision}  recall {row['recall']:.2%}")
    for share in (0.99, 0.999):
        print(f"recall {card.held_out[f'recall_at_{share}']:.2%} at a precision of {share:.1%}")
    beside = "" if plot else " (no reliability plot: it needs matplotlib, pip install 'dllm-samplers[plot]')"
    print(f"filter in {out}, card in {out.with_suffix('.json')}{f', plot in {plot}' if plot else ''}{beside}")


def _check(cfg: DictConfig) -> Training:
    choice("architecture", cfg.architecture, ("neighbours", "published"))
    for name in ("prompts", "epochs", "patience", "train_batch_size"):
        number(name, cfg[name], "a whole number of at least 1", low=1, whole=True)
    check_source(cfg)
    seed("seed", cfg.seed)
    threads(cfg.threads)
    if cfg.prompts < 2:
        raise ValueError(f"prompts={cfg.prompts} cannot be split; use 2 or more")
    if cfg.hidden is not None:
        number("hidden", cfg.hidden, "a whole number from 1 to 65536, or null", low=1, high=65536, whole=True)
    if cfg.block_length is None:
        raise ValueError("block_length=null is not supported; give the block length that the filter will be used with")
    if cfg.out is not None and not cfg.out.endswith(".safetensors"):
        raise ValueError(f"out={cfg.out!r} is not a filter file; give a name that ends in .safetensors")
    return Training(
        cfg.architecture, cfg.hidden, cfg.rate, cfg.train_batch_size, cfg.epochs, cfg.patience, cfg.held_out, cfg.seed
    )
