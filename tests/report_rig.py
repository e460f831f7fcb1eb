"""Sweeps as `dllm evaluate` leaves them, made up: for reports, pages and players."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from dllm.evaluation.metrics import wilson
from dllm.evaluation.trace import Frames, Trace

MASK, EOS = 1, 0
_TEXTS = ["Tom", " has", " 2", "3", " apples", ".", " We", " compute", " +", " 1", "2", " =", " 35", "\n", "<b>&"]
WORDS = {EOS: "<|end|>", MASK: "<|mask|>"} | dict(enumerate([*_TEXTS, " answer", "</script>", "é", ""], start=2))


def frames(identity: str = "a", prompt: int = 7, generated: int = 24, drafts: bool = True, seed: int = 0) -> Frames:
    """A decode of blocks of 8 with random tokens; some drafts are rejected, and columns before the block are cached."""
    random = np.random.default_rng(seed)
    final = random.integers(2, max(WORDS) + 1, generated)
    final[-3:] = EOS
    canvas, kept = np.full(generated, MASK), []
    step = 0
    while (open_ := np.flatnonzero(canvas == MASK)).size:
        block = open_[open_ // 8 == open_[0] // 8]
        write = np.sort(random.choice(block, min(len(block), 1 + step % 3), replace=False))
        predicted, confidence = np.full(generated, MASK), np.full(generated, np.nan, np.float32)
        predicted[block] = np.where(random.random(len(block)) < 0.7, final[block], 5)
        predicted[write] = final[write]
        confidence[block] = random.integers(1, 9, len(block)) / 8
        drafted = np.full(generated, MASK)
        if drafts and step % 2:
            drafted[block] = np.where(np.isin(block, write), final[block], 4)
        canvas = canvas.copy()
        canvas[write] = final[write]
        computed = np.ones(prompt + generated, bool)
        computed[: prompt + block[0] // 8 * 8] = step % 4 == 0
        kept.append((canvas, predicted, confidence, drafted, computed, step + 1))
        step += 1
    columns = [np.stack(column) for column in zip(*kept, strict=True)]
    return Frames(identity, np.arange(2, 2 + prompt), *columns)


def trace(samples: int = 2, **options: Any) -> Trace:
    """A run of five samples, the first few with their steps."""
    shown = tuple(
        frames(f"problem {number}", generated=24 - 4 * number, seed=number, **options) for number in range(samples)
    )
    return Trace(
        ids=tuple(f"problem {number}" for number in range(5)),
        tokens=np.full((5, 24), 3),
        commit_step=np.zeros((5, 24), int),
        confidence=np.ones((5, 24), np.float32),
        frames=shown,
        words=dict(WORDS),
        mask_token_id=MASK,
        eos_token_ids=(EOS,),
    )


def results(
    label: str = "vanilla", accuracy: float | None = 0.9, nfe: float | None = 20.0, n: int = 100, **more: Any
) -> dict[str, Any]:
    """The content of a results.json; `more` replaces fields at the top, or in the metrics."""
    sampler, _, cache = label.partition(" + ")
    speed = None if nfe is None else 9000 / nfe
    interval = None if accuracy is None else wilson(round(accuracy * n), n)
    metrics: dict[str, Any] = {
        "n": n, "accuracy": accuracy, "accuracy_interval": interval, "accuracy_name": "final answer",
        "scores": {} if accuracy is None else {
            "final answer": {"value": accuracy, "interval": interval, "n": n},
            "whole chain": {"value": accuracy / 2, "interval": wilson(round(accuracy / 2 * n), n), "n": n},
        },
        "nfe": nfe, "nfe_error": None if nfe is None else 0.05 * nfe, "tpf": None if nfe is None else 40 / nfe,
        "tokens": 40 * n, "tokens_per_sample": 40.0, "tokens_per_second": speed, "seconds": 3.0,
        "latency_p50": 1.1, "latency_p95": 1.4, "guide_nfe": 0.0, "guide_seconds": 0.0, "positions": 1075.0,
        "computed_share": 1.0, "refreshes": 0.0, "drift": None, "peak_memory": 812_345_678, "speedup": None,
    }  # fmt: skip
    content: dict[str, Any] = {
        "format": "dllm-results", "version": 1, "label": label, "model": "tiny-llada", "task": "word_problems",
        "sampler": {"name": sampler.split(" ")[0]}, "cache": {"name": cache or "none"}, "options": {"gen_length": 64},
    }  # fmt: skip
    for name, value in more.items():
        (content if name in content else metrics)[name] = value
    return content | {"metrics": metrics}


def write_run(folder: Path, *arguments: Any, record: Trace | None = None, **options: Any) -> Path:
    """A run's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(results(*arguments, **options)), encoding="utf-8")
    if record is not None:
        record.save(folder / "trace.safetensors")
    return folder


def write_error(folder: Path, label: str, message: str) -> None:
    """The folder of a run that failed."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {"format": "dllm-error", "version": 1, "label": label, "message": message}
    (folder / "error.json").write_text(json.dumps(content), encoding="utf-8")


SETTINGS = {
    "vanilla": (0.98, 57.7), "vanilla 2": (0.88, 28.4), "vanilla 4": (0.76, 13.7), "threshold 0.999": (0.98, 12.6),
    "threshold 0.9": (0.8, 7.7), "threshold 0.7": (0.49, 5.1), "localleap 0.999/0.99/4": (0.97, 10.4),
    "localleap 0.999/0.99/4 + freecache": (0.96, 11.0), "localleap 0.999/0.99/4 + dual": (0.95, 12.0),
    "freedave 4 + none": (0.98, 28.7), "ar_guided topk 5": (0.74, 3.3), "oracle": (0.98, 3.7),
}  # fmt: skip


def write_sweep(folder: Path) -> Path:
    """A sweep of twelve settings; three left a trace, and two more failed."""
    for number, (label, (accuracy, nfe)) in enumerate(SETTINGS.items()):
        more: dict[str, Any] = {}
        if "+" in label:
            more = {"refreshes": 2.0, "computed_share": 0.5, "speedup": speedup(number)}
            more["drift"] = {"measured": 9, "kv_error": 0.06, "worst_kv_error": 0.2, "kl": 0.01, "flips": 0.02}
        record = trace(drafts="freedave" in label) if number in (3, 7, 9) else None
        write_run(folder / f"{number:02d}", label, accuracy, nfe, record=record, **more)
    write_error(folder / "12", "ar_guided + d2cache", "ar_guided does not go with <d2cache>")
    write_error(folder / "13", "vanilla | 3", "out of memory\nsecond line")
    return folder


def speedup(factor: float) -> dict[str, Any]:
    """Over both baselines."""
    fields = {"tokens_per_second": 100.0, "nfe": 64.0, "time": factor, "forwards": factor / 2}
    return {"samples": 20, "naive": fields, "eos_aware": fields | {"time": factor / 1.5}}
