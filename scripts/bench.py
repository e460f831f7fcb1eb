"""`dllm bench`: what a denoising step costs with each cache, beside the forward pass it needs."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

import dllm
from dllm.bench import Bench, Cost, random_model
from dllm.cache.base import Cache
from dllm.checks import choice, number
from dllm.loading import DTYPES, find_device
from dllm.scripts import app

KINDS = {"block_length": int | None, "out": str | None, "threads": int | None}


def main() -> None:
    """Entry point."""
    app.run(bench, "bench", KINDS)


def bench(cfg: DictConfig) -> None:
    """Time every cache; print a table, and write `out`.md and `out`.json where `out` is given."""
    for name in ("canvas", "gen_length", "block_length", "batch_size", "steps", "threads"):
        if cfg[name] is not None:
            number(name, cfg[name], "1 or more", low=1, whole=True)
    if cfg.gen_length >= cfg.canvas:
        raise ValueError(f"gen_length={cfg.gen_length} leaves no prompt in canvas={cfg.canvas}; use less")
    for suffix in (".md", ".json") if cfg.out else ():
        app.check_writable("out", cfg.out, cfg.out + suffix)
    if cfg.threads is not None:
        torch.set_num_threads(cfg.threads)
    sampler = instantiate(cfg.sampler)
    settings = {
        str(label): (sampler, app.make(f"caches.{label}", "cache", Cache, entry)) for label, entry in cfg.caches.items()
    }
    if "none" not in settings:
        raise ValueError(f"caches={list(settings)} lack none, which the others are compared with; add it")
    lm = _load(cfg)
    costs = _time(Bench(lm, cfg.canvas, cfg.gen_length, cfg.batch_size, cfg.block_length), settings, cfg.steps)
    device = torch.cuda.get_device_name(lm.device) if lm.device.type == "cuda" else "cpu"
    sizes = ", ".join(f"{name}={cfg[name]}" for name in ("canvas", "gen_length", "block_length", "batch_size"))
    dtype = str(lm.backbone.dtype).removeprefix("torch.")
    caption = f"{lm.name}, {dtype}, {sizes}, {sampler!r}, {device} with {torch.get_num_threads()} thread(s)"
    text = table(costs, caption)
    print(text)
    if cfg.out:
        Path(cfg.out).parent.mkdir(parents=True, exist_ok=True)
        Path(cfg.out + ".md").write_text(text, encoding="utf-8")
        record = {"setting": caption, "torch": torch.__version__, "costs": {k: asdict(v) for k, v in costs.items()}}
        Path(cfg.out + ".json").write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        print(f"written to {cfg.out}.md and {cfg.out}.json")


def _load(cfg: DictConfig) -> dllm.LanguageModel:
    options: Any = OmegaConf.to_container(cfg.model, resolve=True)
    path = options.pop("path")
    if not path.startswith("random:"):
        return dllm.load(path, **options)
    for name in ("revision", "device_map", "attn_implementation"):
        if options[name] is not None:
            raise ValueError(f"model.{name}={options[name]!r} has no effect on a random model; leave it out")
    device = find_device(options["device"])
    dtype = "float32" if options["dtype"] == "auto" else options["dtype"]
    choice("dtype", dtype, DTYPES)
    return random_model(path.removeprefix("random:"), cfg.canvas, device, getattr(torch, dtype))


def _time(bench: Bench, settings: dict[str, tuple[Any, Any]], steps: int) -> dict[str, Cost]:
    console = Console(stderr=True)
    columns = TextColumn("timing"), BarColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=len(settings) * (steps + 3))
        return bench.run(settings, steps, lambda: progress.advance(task))


def table(costs: dict[str, Cost], caption: str) -> str:
    """The costs as a Markdown table."""
    head = [
        "cache", "columns per step", "ms per step", "of none", "step / bare forward", "spread",
        "step / columns alone", "refreshing step / bare", "tokens/s", "store MiB",
    ]  # fmt: skip
    rows = [
        [
            label,
            f"{cost.columns:.0f}",
            f"{1000 * cost.step:.1f}",
            f"{cost.step / costs['none'].step:.2f}",
            f"{cost.to_bare:.2f}",
            f"{cost.spread:.2f}",
            f"{cost.to_alone:.2f}",
            "" if cost.refresh_to_bare is None else f"{cost.refresh_to_bare:.2f}",
            f"{cost.tokens_per_second:.1f}",
            f"{cost.store_bytes / 2**20:.1f}",
        ]
        for label, cost in costs.items()
    ]
    return f"{caption}\n\n{app.markdown(head, rows)}\n"


if __name__ == "__main__":
    main()
