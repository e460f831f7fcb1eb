"""A script for torchrun: what two processes compute together, compared with one; as JSON; then a command.

Usage: divided.py FOLDER, with a checkpoint in each of its folders (`tests/test_parallel.py`). Writes found.json there.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import dllm
from dllm.decoding.following import follow
from dllm.evaluation.likelihood import Estimate, loglikelihood
from dllm.models import leading, parallel
from dllm.scripts import cli

FOLDER = Path(sys.argv[1])
PROMPTS = [[35, 36, 37, 39, 41], [38]]
BUNDLED = ("tiny-llada", "tiny-dream")
CACHES: dict[str, list[Any]] = {
    "tiny-llada": ["none", "dual", "prefix", "freecache", "d2cache", "dllm_cache", "elastic", "sparse", "dkv"],
    "tiny-dream": ["none", "prefix", dllm.cache.Dual(measure_every=2, refresh_above=0.01)],
    "sdar": ["none", "block"],
    "llada2": ["none", "block"],
    "moe": ["none", "dual"],
    "tied": ["none", "block"],
}
OPTIONS: dict[str, Any] = {"gen_length": 8, "block_length": 4, "stop_at_eos": False, "seed": 3}


def load(name: str, **options: Any) -> dllm.LanguageModel:
    """A bundled model or one of the folder."""
    return dllm.load(name if name in BUNDLED else FOLDER / name, dtype="float64", **options)


def outcome(lm: dllm.LanguageModel, cache: Any, **options: Any) -> list[Any]:
    """Tokens, cost, and what was measured."""
    found = dllm.generate(lm, PROMPTS, "threshold", cache, **OPTIONS | options)
    drift = None if found.stats.drift is None else round(found.stats.drift.kv_error, 9)
    return [found.sequences.tolist(), found.nfe.tolist(), found.stats.cache_refreshes, drift]


def error_of(call: Callable[[], object]) -> str:
    """The message of a refusal."""
    try:
        call()
    except ValueError as error:
        return str(error)
    return "not refused"


def main() -> None:
    """Compare everything."""
    torch.set_num_threads(1)
    first, found = os.environ["RANK"] == "0", {}
    alone: dict[str, dllm.LanguageModel] = {}
    for name, caches in CACHES.items():
        divided, alone[name] = load(name, tp=True), load(name, device="cpu")
        found[name] = {
            "heads": [lm.backbone.kv_shape[1] for lm in (divided, alone[name])],
            "weights": [sum(each.numel() for each in lm.backbone.parameters()) for lm in (divided, alone[name])],
            "fingerprint": [lm.backbone.fingerprint() for lm in (divided, alone[name])],
            "same": [outcome(divided, cache) == outcome(alone[name], cache) for cache in caches],
            "sampled": outcome(divided, "none", temperature=0.7) == outcome(alone[name], "none", temperature=0.7),
        }
    found["errors"] = {
        "save": error_of(lambda: divided.backbone.save_pretrained(FOLDER / "saved")),
        "graphs": error_of(lambda: dllm.Engine(divided, cuda_graphs=True)),
        "uneven": error_of(lambda: load("odd", tp=True)),
        "nan": error_of(lambda: load("nan", tp=True)),
    }
    every: list[Any] = [None] * 2
    torch.distributed.all_gather_object(every, found)
    parallel.leave()
    if not first:
        follow()
        return
    estimate = Estimate(method="chain", samples=2)
    with leading.leading():  # from here on the other process repeats what this one does
        lm = load("tiny-llada", tp=True)
        led: list[Any] = [outcome(lm, "dual", seed=None, temperature=0.0)[1]]
        with dllm.Engine(lm, dllm.samplers.Oracle(dllm.samplers.Threshold(0.9)), max_length=32) as engine:
            dropped = engine.add(PROMPTS[0], **OPTIONS)
            engine.add(PROMPTS[1], **OPTIONS)
            engine.step()
            engine.abort(dropped)
            answers = [answer for step in engine.steps() for answer in step.answers.values()]
        led.append([len(answers), answers[0].nfe < 16])
        led += [loglikelihood(each, [5, 6], [7, 8, 9], estimate) for each in (lm, alone["tiny-llada"])]
        led.append(error_of(lambda: load("odd", tp=True)))
        form = {"type": "regex", "regex": r"The answer is [0-9]+\."}
        led.append(dllm.generate(lm, "Tom has 23 apples.", "threshold", gen_length=32, response_format=form).texts)
    led[0] = led[0] == outcome(alone["tiny-llada"], "dual")[1]
    (FOLDER / "found.json").write_text(json.dumps({"every": every, "led": led}))


if __name__ == "__main__":
    main()
    sys.argv[1:] = ["model.tp=true", "model.dtype=float64", "show=none", "seed=5", "sampler=threshold"]
    cli.main("generate")
