"""What a recorded decode of a reference implementation is called here: sampler, cache and options.

A case is a row of a file of tests/golden, or of the files of ../shared/golden: the checkpoint, prompt and
parameters of one decode by published code, with its sequence. `plan` maps it; what it does not map has no
counterpart here: `stop_until_eos` and FlashDLM's `early_stop`, which change what is decoded before the end of
text (here stopping never does); guided cases in which the reference's caches lost count; Dream's cases of
FreeDave and Fast-dLLM with a cache, which commit each block's first token unconditionally; FreeDave's eager
drafts with a cache, which are refused here; WINO as shipped, where it loses what it masked again; and options
that are not here (`gamma`, `sigma`, guided `aggressive` and `dynamic_threshold`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dllm.cache import DKVCache, DLLMCache, FreeCache
from dllm.cache.base import Cache
from dllm.filters import ConfidenceFilter, Filter
from dllm.samplers import (
    AdaBlock,
    ARGuided,
    Daedal,
    EntropyThreshold,
    Factor,
    FreeDave,
    Learn2PD,
    LocalLeap,
    Threshold,
    Vanilla,
    Wino,
)
from dllm.samplers.base import Sampler

ORDERS = {"maskgit_plus": "low_confidence", "topk_margin": "margin", "entropy": "entropy"}
MODES = {"batch_expanding": "batch", "tree_attention": "tree"}
STRATEGIES = {"deterministic": "argmax", "topk": "topk", "topk_relative": "ratio"}
UNSUPPORTED = ("gamma", "sigma", "stop_until_eos")
FILTERS = ("filters", "llada_filters")
SUPPRESSION = {(False, False): None, (True, False): "logits", (False, True): "confidence", (True, True): "both"}


class Plan(NamedTuple):
    """The arguments of `dllm.generate(lm, [case["prompt"]], sampler, cache, **options)` that repeat a case."""

    sampler: Sampler
    cache: Cache | str
    options: dict[str, Any]


def plan(case: Mapping[str, Any], folder: Path) -> Plan | None:
    """Map a case of a reference implementation to the settings that give its tokens.

    Args:
        case: a row of a file of cases.
        folder: what holds the checkpoints that cases name, and ``filters`` or ``llada_filters``.

    Returns:
        None where nothing here does what the reference did.
    """
    cache = cache_of(case)
    sampler = None if cache is None else sampler_of(folder, case)
    return None if sampler is None else Plan(sampler, cache, options_of(case))


def options_of(case: Mapping[str, Any]) -> dict[str, Any]:
    """The decoding options of a case."""
    p = case["params"]
    guided = case.get("guide") is not None
    options = {
        "gen_length": p["max_gen_length"] if case["algorithm"] == "daedal" else p["gen_length"],
        "block_length": None if guided and "block_length" not in p else p.get("block_length", p.get("block_size")),
        "top_k": p.get("top_k"),
        "cfg_scale": p.get("cfg_scale", 0.0),
        "eos_suppression": SUPPRESSION[p.get("logits_eos_inf", False), p.get("confidence_eos_eot_inf", False)],
        "stop_at_eos": bool(p.get("early_stop")) or guided,
    }
    if case["algorithm"] == "adablock":
        options["block_length"] = p["init_block_length"]
    eos = [token for token in (p.get("eos_id", p.get("eos_token_id")), p.get("eot_id")) if token is not None]
    if case["algorithm"].startswith("sdar"):  # whole blocks are decoded, and checked for what ends a text after each
        options["gen_length"] = len(case["sequence"]) - len(case["prompt"])
        eos, options["stop_at_eos"] = p["stop_ids"], bool(p["stop_ids"])
        options["top_k"] = None  # 1 there, which makes it greedy; the confidence is of the whole distribution
    return options | ({"eos_token_id": eos} if eos else {})


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
            name = f"{p['filter']}.safetensors"
            file = str(next(file for kind in FILTERS if (file := folder / kind / name).exists()))
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
        case "sdar_greedy" if p["block_length"] % p["denoising_steps"] == 0:
            count = p["block_length"] // p["denoising_steps"]
            return Vanilla(tokens_per_step=count) if p["threshold"] >= 1 else Threshold(p["threshold"], at_least=count)
        case "dream_diffusion_generate" | "flashdlm_dream_baseline" | "flashdlm_freecache_dream":
            return Vanilla(steps=p["steps"], order=ORDERS[p["alg"]], schedule="timestep")
        case "fast_dllm_dream_nocache":
            return Threshold(p["threshold"], steps=p["steps"])
        case "daedal":
            return Daedal(
                p["initial_gen_length"], p["expansion_factor"], p["eos_confidence_threshold"],
                p["expand_eos_confidence_threshold"], p["high_conf_threshold"], p["low_conf_threshold"],
                p["eos_check_tokens"],
            )  # fmt: skip
        case "adablock":
            return AdaBlock(p["threshold"], p["delimiter_ids"], p["delimiter_threshold"])
        case "wino" if p["mask_id"] not in case["sequence"] and p.get("alg", "maskgit_plus") == "maskgit_plus":
            return Wino(p["wide_in_thres"], p["narrow_out_thres"], p.get("num_transfer_tokens", 1))
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
