"""`dllm bench`: time of a denoising step, relative to its bare forward pass and to reference implementations."""

from __future__ import annotations

if __name__ == "__main__":
    import dllm.scripts.cli

    dllm.scripts.cli.run_file(__file__)

import copy
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

import dllm
from dllm.bench import Bench, CommitsPerStep, Cost, random_model
from dllm.bench.sections import SECTIONS
from dllm.bench.timing import REFERENCES
from dllm.cache.base import Cache
from dllm.checks import choice, naming, number, threads
from dllm.checks import known as check_known
from dllm.decoding import compatibility
from dllm.escape import markdown, markdown_table
from dllm.identity import plain_tensors
from dllm.models.checkpoint import DTYPES
from dllm.models.loading import find_device
from dllm.models.packed import pack
from dllm.progress import progress_bar, watched
from dllm.resolve import TARGET, build, options_of
from dllm.samplers.base import Sampler
from dllm.scripts import app, own

KINDS = {
    "block_length": int | None, "out": str | None, "threads": int | None, "steps": int | None,
    "commits_per_step": int | None, "cuda_graphs": bool | None, "samplers": Sequence[Any], "caches": Sequence[Any],
    "references": Sequence[str],
}  # fmt: skip
_CAUSAL = "causal"
_FILES = {".md": own.BENCH, ".json": own.BENCH_RECORD}
_MOST = 1_000_000
_BYTES = 1024  # minimum per position: its ids, and one vector of the smallest model's width
_MARKS = {
    "*": "\\* not the same tokens",
    "?": "? not decoded to the end (use steps=null), so tokens are not compared",
}


def main() -> None:
    """Entry point."""
    app.run(bench, "bench", KINDS)


def bench(cfg: DictConfig) -> None:
    """Time every sampler with every cache; print tables, and write `out`.md and `out`.json if `out` is given."""
    _check_room(cfg.canvas, cfg.batch_size)
    for name in ("canvas", "gen_length", "block_length", "batch_size", "steps", "repeats"):
        if cfg[name] is not None:
            number(name, cfg[name], f"1 to {_MOST}", low=1, high=_MOST, whole=True)
    threads(cfg.threads)
    if cfg.gen_length >= cfg.canvas:
        raise ValueError(f"gen_length={cfg.gen_length} leaves no prompt in canvas={cfg.canvas}; use less")
    if cfg.out:
        own.check("out", cfg.out, {Path(cfg.out + ending): kind for ending, kind in _FILES.items()})
    for place, name in enumerate(cfg.references):
        choice(f"references[{place}]", name, (*REFERENCES, _CAUSAL))
    settings = _settings(cfg)
    if cfg.threads is not None:
        torch.set_num_threads(cfg.threads)
    lm = _load(cfg)
    weights = sum(part.nbytes for each in lm.backbone.parameters() for part in plain_tensors(each))
    embedding: Any = lm.backbone.get_input_embeddings().weight  # a step reads a few rows of it
    tied = embedding is lm.backbone.get_output_embeddings().weight
    # The reference implementations run on unpacked weights, and so does everything unless told otherwise.
    packed = cfg.model.pack is True
    plain = copy.deepcopy(lm.backbone) if packed and cfg.references else None
    if packed:
        pack(lm.backbone)
    for sampler, cache in settings.values():
        compatibility.check(sampler, cache, 0.0, lm.backbone)
    run = Bench(lm, cfg.canvas, cfg.gen_length, cfg.batch_size, cfg.block_length, cfg.cuda_graphs, plain)
    floor = run.memory_floor(weights if tied else weights - embedding.nbytes)
    products = run.arithmetic_floor(cfg.canvas * cfg.batch_size) if lm.device.type == "cuda" else None
    costs, causal = _measure(run, settings, cfg)
    device = torch.cuda.get_device_name(lm.device) if lm.device.type == "cuda" else "cpu"
    names = ("canvas", "gen_length", "block_length", "batch_size", "commits_per_step", "repeats")
    sizes = ", ".join(f"{name}={cfg[name]}" for name in names)
    dtype = str(lm.backbone.dtype).removeprefix("torch.")
    if lm.quantization is not None:
        dtype += f" quantised by {json.dumps(OmegaConf.to_container(cfg.model.quantization, resolve=True))}"
    if packed:
        dtype += " packed (not for reference implementations)"
    caption = f"{lm.name}, {dtype}, {sizes}, {device} with {torch.get_num_threads()} thread(s)"
    table = _costs_table(costs, weights, bool(run.bare.forward.graphs))
    text = f"{markdown(caption)}\n\n{table}\n{_shares_table(costs)}"
    text += f"\nReading the weights once, at the bandwidth of a copy, takes {1000 * floor:.1f} ms.\n"
    if products is not None:
        text += (
            f"\nMultiplying them with {cfg.canvas * cfg.batch_size} columns, at the rate of a large product, takes "
            f"{1000 * products:.1f} ms.\n{_state(lm.device)}"
        )
    if causal is not None:
        text += (
            f"\nA causal model of the same shape (transformers, `generate` with its KV cache): {causal:.1f} tokens/s\n"
        )
    record = {
        "format": own.BENCH_FORMAT,
        "version": 1,
        "setting": caption,
        "torch": torch.__version__,
        "weights": weights,
        "memory_floor": floor,
        "arithmetic_floor": products,
        "costs": {label: asdict(replace(cost, tokens=None)) for label, cost in costs.items()},
        "causal_tokens_per_second": causal,
    }
    written = {".md": text, ".json": json.dumps(record, indent=1, allow_nan=False) + "\n"} if cfg.out else {}
    files = {Path(cfg.out + ending): (_FILES[ending], content) for ending, content in written.items()}
    own.write_and_print(cfg.out, files, text)


def _check_room(canvas: int, batch_size: int) -> None:
    """Reject canvases that exceed the memory of the machine even without a model."""
    if not hasattr(os, "sysconf"):  # Windows
        return
    room = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if canvas * batch_size * _BYTES > room:
        given = f"canvas={canvas} and batch_size={batch_size}"
        raise ValueError(f"{given} do not fit into the {room / 2**30:.0f} GiB of this machine; use less")


def _settings(cfg: DictConfig) -> dict[str, tuple[Sampler, Cache]]:
    """Every sampler with every cache, by label."""
    samplers, caches = _named(cfg, "samplers", "sampler", Sampler), _named(cfg, "caches", "cache", Cache)
    if cfg.commits_per_step is not None:
        samplers = {label: CommitsPerStep(cfg.commits_per_step, sampler) for label, sampler in samplers.items()}
    return {
        f"{one} + {other}": (sampler, cache) for one, sampler in samplers.items() for other, cache in caches.items()
    }


def _named(cfg: DictConfig, parameter: str, group: str, protocol: type) -> dict[str, Any]:
    """The objects for a list of names, by label."""
    found: dict[str, Any] = {}
    entries: Any = OmegaConf.to_container(cfg[parameter], resolve=True)
    if not entries:
        raise ValueError(f"{parameter}=[] is empty; give at least one name")
    for place, entry in enumerate(entries):
        called = f"{parameter}[{place}]"
        if isinstance(entry, Mapping) and len(entry) == 1 and isinstance(next(iter(entry.values())), Mapping):
            name, options = next(iter(entry.items()))
            label = f"{name}({', '.join(f'{key}={value}' for key, value in options.items())})"
        elif isinstance(entry, str):
            name, options, label = entry, {}, entry
        else:
            raise ValueError(f"{called}={entry!r} is not a {group}; give a name, or {{name: {{option: value}}}}")
        defaults = options_of(group, name, called)
        given, choices = ([each for each in part if each != TARGET] for part in (options, defaults))
        check_known(given, choices, f"{called}.{name}.")
        chosen = defaults | dict(options)
        found[label] = build(called, chosen, protocol)
    return found


def _load(cfg: DictConfig) -> dllm.LanguageModel:
    options: Any = OmegaConf.to_container(cfg.model, resolve=True)
    if not options["path"].startswith("random:"):
        return app.load_model(options | {"pack": False})
    for name in ("revision", "device_map", "attn_implementation", "adapter", "tp"):
        if options[name]:
            raise ValueError(f"model.{name}={options[name]!r} has no effect on a random model; leave it out")
    device = find_device(options["device"], "model.device")
    dtype = "float32" if options["dtype"] == "auto" else options["dtype"]
    choice("model.dtype", dtype, DTYPES)
    preset = options["path"].removeprefix("random:")
    with naming({"quantization": "model.quantization"}):
        return random_model(preset, cfg.canvas, device, getattr(torch, dtype), options["quantization"])


def _measure(
    run: Bench, settings: Mapping[str, tuple[Any, Any]], cfg: DictConfig
) -> tuple[dict[str, Cost], float | None]:
    """Measure memory, then time everything, then profile it."""
    peaks = {label: run.peak(*setting) for label, setting in settings.items()}
    references = {name: cfg.commits_per_step or 1 for name in cfg.references if name in REFERENCES}
    console = Console(stderr=True)
    steps = cfg.gen_length if cfg.steps is None else cfg.steps
    total = (len(settings) + len(references)) * (steps * cfg.repeats + (steps if run.bare.forward.graphs else 3))
    with progress_bar("timing", total, console=console, show=watched(console)) as update:
        costs = run.run(settings, cfg.steps, cfg.repeats, references, partial(update, advance=1))
    for label, setting in settings.items():
        costs[label] = replace(costs[label], shares=run.shares(*setting), peak=peaks[label])
    return costs, run.causal(cfg.repeats) if _CAUSAL in cfg.references else None


def _state(device: torch.device) -> str:
    """Clock, power and temperature of a GPU; empty where torch cannot ask (nvidia-ml-py)."""
    with suppress(Exception):  # of several libraries
        clock, power = torch.cuda.clock_rate(device), torch.cuda.power_draw(device) / 1000
        return f"\nAfter it the GPU ran at {clock} MHz, {power:.0f} W and {torch.cuda.temperature(device)} degrees C.\n"
    return ""


def _costs_table(costs: Mapping[str, Cost], weights: int, graphs: bool) -> str:
    references = [name for name in REFERENCES if name in costs]
    head = [
        "setting", "steps", "columns per step", "ms per step", "step / bare forward", "spread",
        "refreshing step / bare", "tokens/s", *(f"of {name}" for name in references), "store MiB",
        "peak / (weights + store)",
        *(["first step, ms", "steps with launches", "whole decode, tokens/s"] if graphs else []),
    ]  # fmt: skip
    rows = []
    for label, cost in costs.items():
        rows.append(
            [
                markdown(label),
                str(cost.steps),
                f"{cost.columns:.0f}" if cost.columns else "",
                f"{1000 * cost.step:.1f}",
                _ratio(cost.to_bare),
                _ratio(cost.spread),
                _ratio(cost.refresh_to_bare),
                f"{cost.tokens_per_second:.1f}",
                *(
                    f"{cost.tokens_per_second / costs[name].tokens_per_second:.2f}{_mark(cost, costs[name])}"
                    for name in references
                ),
                f"{cost.store_bytes / 2**20:.1f}",
                _ratio(None if cost.peak is None else (weights + cost.peak) / (weights + cost.store_bytes)),
                *([f"{1000 * cost.first:.1f}", f"{cost.launched:.0f}", _rate(cost.whole)] if graphs else []),
            ]
        )
    cells = "".join(cell for row in rows for cell in row)
    notes = [f"\n{meaning}\n" for mark, meaning in _MARKS.items() if mark in cells]
    return f"{markdown_table(head, rows)}\n{''.join(notes)}"


def _mark(cost: Cost, reference: Cost) -> str:
    """A mark if the tokens differ from those of the reference, or were not compared."""
    if cost.tokens is None or reference.tokens is None:
        return " ?"
    return "" if cost.tokens == reference.tokens else " *"


def _shares_table(costs: Mapping[str, Cost]) -> str:
    rows = [
        [markdown(label), *(f"{100 * cost.shares[section]:.1f}" for section in SECTIONS)]
        for label, cost in costs.items()
        if cost.shares is not None
    ]
    return f"{markdown_table(['% of a step', *SECTIONS], rows)}\n"


def _rate(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
