"""Decodes of the published reference implementations, token for token and in at most as many forwards.

Cases lie in tests/golden/cases.jsonl (a few of each kind) and, where it exists, in ../shared/golden
(all of them). Left out: the references' own end-of-text stopping (`early_stop`, `stop_until_eos`),
which changes what is decoded before the end of text; here stopping never does.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import dllm
from dllm.samplers import EntropyThreshold, Factor, FreeDave, LocalLeap, Threshold, Vanilla

HERE = Path(__file__).parent / "golden"
SHARED = Path(__file__).parents[2] / "shared" / "golden"

ORDERS = {"maskgit_plus": "low_confidence", "topk_margin": "margin", "entropy": "entropy"}
MODES = {"batch_expanding": "batch", "tree_attention": "tree"}
UNSUPPORTED = ("gamma", "sigma", "early_stop", "stop_until_eos")


def sampler_of(case: dict[str, Any]) -> Any:
    """The sampler that a case of the reference corresponds to; None where this file does not cover it."""
    p = case["params"]
    if p.get("cache", "none") != "none" or any(p.get(name) for name in UNSUPPORTED):
        return None
    match case["algorithm"]:
        case "llada_vanilla" | "flashdlm_llada_baseline":
            return Vanilla(steps=p["steps"], order=p["remasking"])
        case "fastdllm":
            return Vanilla(steps=p["steps"]) if p["threshold"] is None else Threshold(p["threshold"])
        case "dparallel" | "dparallel_dream_semiar":
            bound = p["entropy_threshold"]
            return Vanilla(steps=p["steps"]) if bound is None else EntropyThreshold(bound)
        case "freedave_static":
            bound = p["confidence_threshold"]
            return Vanilla() if bound is None else Threshold(bound)
        case "localleap":
            return LocalLeap(p["threshold"], p["relaxed_threshold"], p["radius"])
        case "freedave":
            bound = p["confidence_threshold"]
            base = "vanilla" if bound is None else Threshold(bound)
            return FreeDave(p["draft_steps"], base, MODES[p["draft_mode"]], p["eager_acceptance"])
        case "d2_vanilla" | "d2cache_repo_vanilla":
            if p.get("factor") is not None:
                return Factor(p["factor"])
            if p.get("threshold") is not None:
                return Threshold(p["threshold"], at_least=p.get("num_transfer_tokens", 1))
            order = ORDERS[p.get("alg", "maskgit_plus")]
            return Vanilla(tokens_per_step=p.get("num_transfer_tokens", 1), order=order)
        case "dream_diffusion_generate" | "flashdlm_dream_baseline":
            return Vanilla(steps=p["steps"], order=ORDERS[p["alg"]], schedule="timestep")
        case "fast_dllm_dream_nocache":
            return Threshold(p["threshold"], steps=p["steps"])
        case _:
            return None


def cases(folder: Path, files: tuple[str, ...]) -> Iterator[Any]:
    for name in files:
        path = folder / name
        for line in path.read_text().splitlines() if path.exists() else ():
            case = json.loads(line)
            if sampler_of(case) is not None and not case["fragile"]:
                yield pytest.param(folder, case, id=case["id"])


@cache
def model(folder: Path) -> dllm.LanguageModel:
    return dllm.load(folder, device="cpu")


def check(folder: Path, case: dict[str, Any]) -> None:
    lm, p = model(folder / case["checkpoint"]), case["params"]
    suppression = {(False, False): None, (True, False): "logits", (False, True): "confidence", (True, True): "both"}
    eos = [token for token in (p.get("eos_id", lm.backbone.eos_token_ids[0]), p.get("eot_id")) if token is not None]
    result = dllm.generate(
        lm,
        [case["prompt"]],
        sampler_of(case),
        gen_length=p["gen_length"],
        block_length=p.get("block_length"),
        top_k=p.get("top_k"),
        cfg_scale=p.get("cfg_scale", 0.0),
        eos_token_id=eos,
        eos_suppression=suppression[p.get("logits_eos_inf", False), p.get("confidence_eos_eot_inf", False)],
        stop_at_eos=False,
    )
    assert result.sequences[0].tolist() == case["sequence"]
    assert int(result.nfe[0]) <= case["nfe"]


@pytest.mark.parametrize(("folder", "case"), list(cases(HERE, ("cases.jsonl",))))
def test_decodes_as_the_reference(folder: Path, case: dict[str, Any]) -> None:
    check(folder, case)


@pytest.mark.skipif(not SHARED.exists(), reason="../shared/golden is not here")
@pytest.mark.parametrize(("folder", "case"), list(cases(SHARED, ("llada_cases.jsonl", "dream_cases.jsonl"))))
def test_decodes_as_the_reference_in_every_shared_case(folder: Path, case: dict[str, Any]) -> None:
    check(folder, case)


def test_committed_steps_are_those_of_the_reference() -> None:
    folder, case = next(c.values for c in cases(HERE, ("cases.jsonl",)) if c.values[1]["algorithm"] == "llada_vanilla")
    lm, p = model(folder / case["checkpoint"]), case["params"]
    result = dllm.generate(
        lm, [case["prompt"]], sampler_of(case),
        gen_length=p["gen_length"], block_length=p["block_length"], stop_at_eos=False,
    )  # fmt: skip
    assert result.commit_step[0].tolist() == case["commit_step"][-p["gen_length"] :]
