"""What a recorded decode of a reference implementation is called here: sampler, cache and options.

A case is a row of a file of tests/golden, or of the files of ../shared/golden: the checkpoint, prompt and
parameters of one decode by published code, with its sequence. `plan` maps it; what it does not map has no
counterpart here: `stop_until_eos` and FlashDLM's `early_stop`, which change what is decoded before the end of
text (here stopping never does); dInfer with a cache, its blocks that begin within the prompt, and its second hierarchy
where the low threshold is above the other; what published code does by fault where a prompt holds an end-of-text, fills
exactly one block, or is a sequence of rows; guided cases in which the reference's caches lost count; Dream's cases of
FreeDave and Fast-dLLM with a cache, which commit each block's first token unconditionally; FreeDave's eager
drafts with a cache, which are refused here; WINO as shipped, where it loses what it masked again; d2Cache's
thresholds and factors on a score other than the confidence, other rules on a confidence times `sigma`'s density,
factors that commit at least several, and KLASS with a cache; and options that are not here (guided `aggressive` and
`dynamic_threshold`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dllm.cache import DKVCache, DLLMCache, FreeCache
from dllm.cache import SubBlocks as SubBlockCache
from dllm.cache.base import Cache
from dllm.filters import ConfidenceFilter, Filter
from dllm.samplers import (
    EB,
    KLASS,
    AdaBlock,
    ARGuided,
    Certainty,
    Credit,
    Daedal,
    Editing,
    EntropyThreshold,
    Factor,
    FreeDave,
    Hierarchical,
    Learn2PD,
    LocalLeap,
    Prophet,
    Renoise,
    SlowFast,
    SubBlocks,
    Threshold,
    Vanilla,
    Wino,
)
from dllm.samplers.base import Sampler

ORDERS = {"maskgit_plus": "low_confidence", "topk_margin": "margin", "entropy": "entropy"}
MODES = {"batch_expanding": "batch", "tree_attention": "tree"}
STRATEGIES = {"deterministic": "argmax", "topk": "topk", "topk_relative": "ratio"}
# These end, with `early_stop` or not, after the first block that holds an end-of-text: what is up to it is the same.
DINFER_BLOCKS = ("dinfer_threshold", "dinfer_credit", "dinfer_hierarchy")
HIERARCHY = {"threshold": 2.0, "low_threshold": 0.0}  # null: no position, and every one
BLOCKWISE = ("llada2_generate", "llada21_generate", "fastdllm_v2_generate")
UNSUPPORTED = ("stop_until_eos",)
FILTERS = ("filters", "llada_filters")
SUPPRESSION = {(False, False): None, (True, False): "logits", (False, True): "confidence", (True, True): "both"}


class Plan(NamedTuple):
    """The arguments of `dllm.generate(lm, [case["prompt"]], sampler, cache, **options)` that repeat a case."""

    sampler: Sampler
    cache: Cache | str
    options: dict[str, Any]


@dataclass(frozen=True)
class Replayed(Renoise):
    """Renoising by recorded draws, in their order, so that nothing depends on a generator.

    Attributes:
        canvases: random tokens: of each block, those at first, and those after each step.
        draws: sampled tokens, of each step.
    """

    canvases: list[list[int]] = field(default_factory=list)
    draws: list[list[int]] = field(default_factory=list)

    def enter(self, state: Any, row: int, request: Any) -> None:
        """Begin anew."""
        state.sources[row] = iter(self.canvases), iter(self.draws)

    def _uniform(self, count: int, vocabulary: int, source: tuple[Iterator[list[int]], ...]) -> Tensor:  # type: ignore[override]
        return torch.tensor(next(source[0]))

    def _sample(self, shares: Tensor, source: tuple[Iterator[list[int]], ...]) -> Tensor:  # type: ignore[override]
        return torch.tensor(next(source[1]))


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
    if case["algorithm"] in BLOCKWISE:
        return blockwise_options(case)
    if case["algorithm"] == "diffusion_gemma_generate":  # whole canvases; the seed repeats the draws as well
        length, eos = p["canvas_length"], p["eos_token_id"]
        own = {"gen_length": -(-p["max_new_tokens"] // length) * length, "block_length": length, "seed": p["seed"]}
        return own | {"stop_at_eos": eos is not None} | ({} if eos is None else {"eos_token_id": eos})
    options = {
        "gen_length": p["max_gen_length"] if case["algorithm"] == "daedal" else p["gen_length"],
        "block_length": None if guided and "block_length" not in p else p.get("block_length", p.get("block_size")),
        "top_k": p.get("top_k"),
        "cfg_scale": p.get("cfg_scale", 0.0),
        "eos_suppression": SUPPRESSION[p.get("logits_eos_inf", False), p.get("confidence_eos_eot_inf", False)],
        "stop_at_eos": bool(p.get("early_stop")) or guided or case["algorithm"] in DINFER_BLOCKS,
    }
    if case["algorithm"] == "adablock":
        options["block_length"] = p["init_block_length"]
    eos = [token for token in (p.get("eos_id", p.get("eos_token_id")), p.get("eot_id")) if token is not None]
    if case["algorithm"].startswith("sdar"):  # whole blocks are decoded, and checked for what ends a text after each
        options["gen_length"] = len(case["sequence"]) - len(case["prompt"])
        eos, options["stop_at_eos"] = p["stop_ids"], bool(p["stop_ids"])
        options["top_k"] = None  # 1 there, which makes it greedy; the confidence is of the whole distribution
    return options | ({"eos_token_id": eos} if eos else {})


def blockwise_options(case: Mapping[str, Any]) -> dict[str, Any]:
    """The decoding options of a case of a block-causal model: whole blocks, counted from the prompt's first token."""
    p, given = case["params"], len(case["prompt"])
    if case["algorithm"] == "fastdllm_v2_generate":  # and the first token of the block after them
        length, eos = p["block_size"], p["stop_token"]
        end = (given // length + p["max_new_tokens"] // length) * length + 1
    else:
        length, eos = p["block_length"], p["eos_id"]
        end = -(-(given + p["gen_length"]) // length) * length
    stops = eos >= 0
    own = {"gen_length": end - given, "block_length": length, "stop_at_eos": stops}
    return own | ({"eos_token_id": eos} if stops else {})


def blockwise_sampler(case: Mapping[str, Any]) -> Sampler | None:
    """The sampler of a case of LLaDA2 or Fast-dLLM v2; None where the published code is at fault."""
    p, given = case["params"], len(case["prompt"])
    if p.get("temperature", 0.0) != 0.0:
        return None
    match case["algorithm"]:
        case "llada2_generate":
            if len(case["sequence"]) == given:  # an end-of-text in the prompt ends the decode as soon as one is written
                return None
            steps = min(p["steps"], p["gen_length"] // p["minimal_topk"])
            return Threshold(above(p["threshold"]), steps_per_block=steps) if steps else None
        case "llada21_generate":
            base = Threshold(above(p["threshold"]), at_least=p["num_to_transfer"])
            return Editing(p["editing_threshold"], p["max_post_steps"], base)
        case _:
            length = p["block_size"]
            # Denoising there attends in blocks of 32 whatever the block; a prompt of one block is not attended to.
            if 32 % length or given == length or p["max_new_tokens"] < length:
                return None
            return SubBlocks(p["small_block_size"], Threshold(above(p["threshold"])))


def above(threshold: float) -> float:
    """The least number above a threshold, where the reference compares by > and not >=."""
    return math.nextafter(threshold, math.inf)


def sampler_of(folder: Path, case: dict[str, Any]) -> Any:
    """The sampler that a case of the reference corresponds to; None where this file does not cover it."""
    p = case["params"]
    if p.get("early_stop") and case["algorithm"] not in ("localleap", *DINFER_BLOCKS):
        return None
    if case["algorithm"].startswith("dinfer") and p.get("cache", "none") != "none":
        return None
    if cache_of(case) is None or any(p.get(name) for name in UNSUPPORTED):
        return None
    if case["algorithm"] in BLOCKWISE:
        return blockwise_sampler(case)
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
            return d2cache_sampler(ORDERS[p.get("alg", "maskgit_plus")], p.get("num_transfer_tokens", 1), p)
        case _ if p.get("start_block_align") and len(case["prompt"]) % p["block_length"]:
            return None
        case "dinfer_threshold":  # `maximum_unroll` only adds forwards that are not needed
            return Threshold(p["threshold"])
        case "dinfer_credit":
            return Credit(p["threshold"], p["credit_alpha"], p["boost_gamma"], p["decay_beta"])
        case "dinfer_hierarchy":
            threshold, low = (one if (one := p[name]) is not None else none for name, none in HIERARCHY.items())
            return Hierarchical(threshold, min(low, threshold))
        case "dinfer_hierarchy_fast_v2" if p["low_threshold"] <= p["threshold"]:  # else another rule
            return Hierarchical(p["threshold"], p["low_threshold"])
        case "prophet":
            return Prophet(p["steps"], *p["thresholds"], p["answer_start"])
        case "slowfast":
            limits = p["high_confidence_threshold"], p["cycle_len_confidence_threshold"]
            window, deviation = p["cycle_length_stability_window"], p["cycle_length_stability_std_dev_threshold"]
            return SlowFast(*limits, p["k_exploration_steps"], window, deviation)
        case "klass":
            at_least, order = p.get("num_transfer_tokens", 1), ORDERS[p.get("alg", "maskgit_plus")]
            if p.get("threshold") is None and p.get("factor") is None and not p.get("sigma"):  # nothing qualifies
                return Vanilla(tokens_per_step=at_least, order=order)
            if (
                p.get("factor") is not None
                or p.get("sigma")
                or order != "low_confidence"
                or p.get("cache", "none") != "none"
            ):
                return None
            return KLASS(p["threshold"], p["kl_threshold"], p["kl_history_length"], at_least)
        case "sdar_greedy" | "sdar_generate":
            return sdar_sampler(case)
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
        case "diffusion_gemma_generate":
            return Replayed(
                p["max_denoising_steps"], p["entropy_bound"], p["t_min"], p["t_max"], p["stability_threshold"],
                p["confidence_threshold"], case["random_canvases"], case["multinomial_draws"],
            )  # fmt: skip
        case "wino" if p["mask_id"] not in case["sequence"] and p.get("alg", "maskgit_plus") == "maskgit_plus":
            return Wino(p["wide_in_thres"], p["narrow_out_thres"], p.get("num_transfer_tokens", 1))
        case _:
            return None


def d2cache_sampler(order: Any, at_least: int, p: dict[str, Any]) -> Any:
    """The sampler of a case of d2Cache's repository."""
    bounds = [p.get(name) for name in ("gamma", "factor", "threshold")]
    if p.get("sigma"):
        plain = order == "low_confidence" and bounds[:2] == [None, None]
        return Certainty(p["sigma"], 2.0 if bounds[2] is None else bounds[2], at_least) if plain else None
    match bounds:
        case [None, None, None]:
            return Vanilla(tokens_per_step=at_least, order=order)
        case [gamma, None, None]:
            return EB(gamma, order, "last", at_least)
        case [None, factor, None] if order == "low_confidence" and at_least == 1:
            return Factor(factor)
        case [None, None, threshold] if order == "low_confidence":
            return Threshold(threshold, at_least)
        case _:
            return None


def sdar_sampler(case: Mapping[str, Any]) -> Sampler | None:
    """The sampler of a case of SDAR; None where its published code takes ties at random, or overwrites the prompt."""
    p, strategy = case["params"], case["params"]["remasking_strategy"]
    if (p["top_k"], p["temperature"], p["top_p"]) != (1, 1.0, 1.0):
        return None
    steps, length = p["denoising_steps"], p["block_length"]
    if case["algorithm"] == "sdar_generate":
        if strategy == "sequential":
            return Vanilla(steps_per_block=steps, order="left_to_right")
        # The confidence, after top-k, is 1: the whole block at once, unless it has fewer masks than are due.
        masks = length - len(case["prompt"]) % length
        certain = strategy == "low_confidence_dynamic" and p["threshold"] < 1 and masks >= -(-length // steps)
        return Threshold(0.0) if certain else None
    if p["threshold"] >= 1:
        return Vanilla(steps_per_block=steps)
    return Threshold(above(p["threshold"]), steps_per_block=steps)


def cache_of(case: dict[str, Any]) -> Any:
    """The cache that a case of the reference corresponds to; None where this file does not cover it."""
    p = case["params"]
    match case["algorithm"]:
        case "flashdlm_freecache_llada" | "flashdlm_freecache_dream":
            return FreeCache(freeze="last_forward")
        case "flashdlm_guided_diffusion":
            frozen = {"prompt": "prompt", "aggressive": "token"}.get(p["caching"])
            return FreeCache(freeze="last_forward", granularity=frozen) if frozen else "none"
    if case["algorithm"] == "fastdllm_v2_generate":
        return SubBlockCache(length=p["small_block_size"]) if p["use_block_cache"] else "none"
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
