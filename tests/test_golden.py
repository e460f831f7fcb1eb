"""Decodes of the published reference implementations, token for token and in at most as many forwards.

Cases lie in tests/golden/cases.jsonl (a few of each kind) and, where it exists, in ../shared/golden
(all of them). Left out: `stop_until_eos` and FlashDLM's `early_stop`, which change what is decoded before
the end of text (here stopping never does); guided cases in which the reference's caches lost count;
Dream's cases of FreeDave and Fast-dLLM with a cache, which commit each block's first token unconditionally;
FreeDave's eager drafts with a cache, which are refused here; and options that are not here (`gamma`,
`sigma`, guided `aggressive` and `dynamic_threshold`). Where the reference stops at its end-of-text, what
is compared ends there.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import dllm
from dllm.cache import DKVCache, DLLMCache, FreeCache
from dllm.filters import ConfidenceFilter, Filter
from dllm.samplers import (
    ARGuided,
    EntropyThreshold,
    Factor,
    FreeDave,
    Learn2PD,
    LocalLeap,
    Threshold,
    Vanilla,
)

HERE = Path(__file__).parent / "golden"
SHARED = Path(__file__).parents[2] / "shared" / "golden"

ORDERS = {"maskgit_plus": "low_confidence", "topk_margin": "margin", "entropy": "entropy"}
MODES = {"batch_expanding": "batch", "tree_attention": "tree"}
STRATEGIES = {"deterministic": "argmax", "topk": "topk", "topk_relative": "ratio"}
UNSUPPORTED = ("gamma", "sigma", "stop_until_eos")
# Here the reference accepts a draft that its base would not have made: its tokens are not those of its own base.
LOSSY = {
    "freedave-a-none-batch-d4-eager-0", "freedave-a-none-batch-d8-eager-0", "freedave-a-none-batch-d4-std-ct0.9-0",
    "freedave-a-none-batch-d4-std-ct0.9-2", "freedave-a-none-batch-d4-eager-ct0.9-0",
    "freedave-a-prefix-batch-d4-std-ct0.9-0", "freedave-a-dual-batch-d4-std-ct0.9-0",
}  # fmt: skip


def sampler_of(folder: Path, case: dict[str, Any]) -> Any:
    """The sampler that a case of the reference corresponds to; None where this file does not cover it."""
    p = case["params"]
    if p.get("early_stop") and case["algorithm"] != "localleap":
        return None
    if cache_of(case) is None or any(p.get(name) for name in UNSUPPORTED):
        return None
    match case["algorithm"]:
        case "llada_vanilla" | "flashdlm_llada_baseline" | "flashdlm_freecache_llada" | "dkv_decode":
            return Vanilla(steps=p["steps"], order=p.get("remasking", "low_confidence"))
        case "fastdllm":
            return Vanilla(steps=p["steps"]) if p["threshold"] is None else Threshold(p["threshold"])
        case "dparallel" | "dparallel_dream_semiar":
            bound = p["entropy_threshold"]
            # Without a threshold the reference's cached functions rank by entropy, the others by confidence.
            order = "low_confidence" if p.get("cache", "none") == "none" else "entropy"
            return Vanilla(steps=p["steps"], order=order) if bound is None else EntropyThreshold(bound)
        case "freedave_static":
            if "dream" in case["checkpoint"]:
                return None
            bound = p["confidence_threshold"]
            return Vanilla() if bound is None else Threshold(bound)
        case "localleap":
            return LocalLeap(p["threshold"], p["relaxed_threshold"], p["radius"])
        case "freedave":
            if "dream" in case["checkpoint"] or (p["eager_acceptance"] and p["cache"] != "none"):
                return None
            return FreeDave(p["draft_steps"], base_of(case), MODES[p["draft_mode"]], p["eager_acceptance"])
        case "learn2pd" | "learn2pd_eot":
            file = str(folder / "llada_filters" / f"{p['filter']}.safetensors")
            cut = "published" if p["cache"] == "none" else "accepted"
            eotp = cut if case["algorithm"].endswith("eot") else "off"
            return Learn2PD(file, p["accept_threshold"], eotp, p["gen_length"] // p["steps"])
        case "l2p_predict_eot":  # the cut alone: a filter that accepts nothing
            nothing = Filter(ConfidenceFilter(p["block_length"]), None, "none")
            return Learn2PD(nothing, 1.0, "published", p["gen_length"] // p["steps"])
        case "flashdlm_guided_diffusion":
            accept = STRATEGIES.get(p["sampling_strategy"])
            if accept is None or case["extra"]["ar_cache_misaligned"] or not case["extra"]["cache_aligned"]:
                return None
            guide = str(folder / case["guide"])
            return ARGuided(guide, accept, p["acceptance_top_k"], p["relative_threshold"])
        case "d2_vanilla" | "d2cache_repo_vanilla":
            if p.get("factor") is not None:
                return Factor(p["factor"])
            if p.get("threshold") is not None:
                return Threshold(p["threshold"], at_least=p.get("num_transfer_tokens", 1))
            order = ORDERS[p.get("alg", "maskgit_plus")]
            return Vanilla(tokens_per_step=p.get("num_transfer_tokens", 1), order=order)
        case "dream_diffusion_generate" | "flashdlm_dream_baseline" | "flashdlm_freecache_dream":
            return Vanilla(steps=p["steps"], order=ORDERS[p["alg"]], schedule="timestep")
        case "fast_dllm_dream_nocache":
            return Threshold(p["threshold"], steps=p["steps"])
        case _:
            return None


def cache_of(case: dict[str, Any]) -> Any:
    """The cache that a case of the reference corresponds to; None where this file does not cover it."""
    p = case["params"]
    match case["algorithm"]:
        case "flashdlm_freecache_llada" | "flashdlm_freecache_dream":
            return FreeCache(freeze="last_forward")
        case "flashdlm_guided_diffusion":
            frozen = {"prompt": "prompt", "aggressive": "token"}.get(p["caching"])
            return FreeCache(freeze="last_forward", granularity=frozen) if frozen else "none"
    match p.get("cache", "none"):
        case "none" | "dual" as name:
            return name
        case "prefix":
            return "dual" if (p.get("cache_params") or {}).get("use_dual") else "prefix"
        case "dkv_decode":
            return DKVCache(p["cache_reloading_step"])
        case "dllm":
            options = p["cache_params"]
            return DLLMCache(options.get("kp", 50), options.get("kr", 2), options.get("rou", 0.25))
        case _:
            return None


def base_of(case: dict[str, Any]) -> Any:
    """The policy that a FreeDave case drafts."""
    bound = case["params"]["confidence_threshold"]
    return Vanilla() if bound is None else Threshold(bound)


def cases(folder: Path, files: tuple[str, ...]) -> Iterator[Any]:
    for name in files:
        path = folder / name
        for line in path.read_text().splitlines() if path.exists() else ():
            case = json.loads(line)
            if sampler_of(folder, case) is not None and not case["fragile"]:
                yield pytest.param(folder, case, id=case["id"])


@cache
def model(folder: Path) -> dllm.LanguageModel:
    return dllm.load(folder, device="cpu")


def decode(folder: Path, case: dict[str, Any], sampler: Any) -> dllm.Generation:
    lm, p = model(folder / case["checkpoint"]), case["params"]
    suppression = {(False, False): None, (True, False): "logits", (False, True): "confidence", (True, True): "both"}
    eos = [p.get("eos_id", p.get("eos_token_id", lm.backbone.eos_token_ids[0])), p.get("eot_id")]
    return dllm.generate(
        lm,
        [case["prompt"]],
        sampler,
        cache_of(case),
        gen_length=p["gen_length"],
        block_length=p.get("block_length", p.get("block_size") if case.get("guide") is None else None),
        top_k=p.get("top_k"),
        cfg_scale=p.get("cfg_scale", 0.0),
        eos_token_id=[token for token in eos if token is not None],
        eos_suppression=suppression[p.get("logits_eos_inf", False), p.get("confidence_eos_eot_inf", False)],
        stop_at_eos=bool(p.get("early_stop")) or case.get("guide") is not None,
    )


def check(folder: Path, case: dict[str, Any]) -> None:
    result = decode(folder, case, sampler_of(folder, case))
    compared = len(case["sequence"])
    if case["params"].get("early_stop") or case.get("guide") is not None:
        compared = len(case["prompt"]) + result.stats.tokens
    if case["id"] in LOSSY:
        base = decode(folder, case, base_of(case))
        assert base.sequences[0].tolist() != case["sequence"]
        assert result.sequences[0].tolist() == base.sequences[0].tolist()
        return
    assert result.sequences[0].tolist()[:compared] == case["sequence"][:compared]
    assert int(result.nfe[0]) <= case["nfe"]
    assert int(result.guide_nfe[0]) <= (case.get("ar_forwards") or 0)


@pytest.mark.parametrize(("folder", "case"), list(cases(HERE, ("cases.jsonl",))))
def test_decodes_as_the_reference(folder: Path, case: dict[str, Any]) -> None:
    check(folder, case)


@pytest.mark.skipif(not SHARED.exists(), reason="../shared/golden is not here")
@pytest.mark.parametrize(("folder", "case"), list(cases(SHARED, ("llada_cases.jsonl", "dream_cases.jsonl"))))
def test_decodes_as_the_reference_in_every_shared_case(folder: Path, case: dict[str, Any]) -> None:
    check(folder, case)


def test_committed_steps_are_those_of_the_reference() -> None:
    folder, case = next(c.values for c in cases(HERE, ("cases.jsonl",)) if c.values[1]["algorithm"] == "llada_vanilla")
    p = case["params"]
    result = decode(folder, case, sampler_of(folder, case))
    assert result.commit_step[0].tolist() == case["commit_step"][-p["gen_length"] :]
