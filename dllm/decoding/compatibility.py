"""Compatibility of sampler, cache and backbone; checked before the first forward.

A sampler lists its requirements in `needs`, a cache in `refuses` those that it does not meet, and why; a
backbone has either. Options of a run and the placement of a model add needs. Samplers, caches and backbones are
independent of each other: they share the names below.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dllm.models.base import MaskedDiffusionModel
from dllm.resolve import names, resolve

# Source of each need, and how to avoid it.
NEEDS = {
    "causal": ("a policy that verifies one position after the other (s2d2)", "ssd or freedave"),
    "growth": ("a canvas that grows (daedal)", "another sampler"),
    "guidance": ("classifier-free guidance (cfg_scale above 0)", "cfg_scale=0"),
    "next_block": ("drafts that run into the next block (eager=true)", "eager=false"),
    "noise": ("a policy over uniformly random tokens (renoise)", "eb or remdm"),
    "repeatable": (
        "lossless drafting (freedave, ssd, s2d2)",
        "prefix, dual or freecache with freeze=clean, granularity=block and refresh_above=null",
    ),
    "shadows": ("positions that only attend to the canvas", "a cache that keeps the keys and values of whole layers"),
    "graphs": ("CUDA graphs (cuda_graphs=true)", "cuda_graphs=null"),
    "measured": ("measuring the error of a cache (measure_every)", "measure_every=null"),
    "several_devices": ("a model spread over several devices", "a model on one"),
    "whole_blocks": ("a model that computes a block as a whole", "block or prefix"),
}
# How to avoid a need that the backbone does not meet, where that is another way.
_FOR_BACKBONES = {"repeatable": "another sampler"} | dict.fromkeys(("growth", "shadows"), "another sampler")


def check(
    sampler: Any,
    cache: Any,
    cfg_scale: float = 0.0,
    backbone: MaskedDiffusionModel | None = None,
    cuda_graphs: bool | None = None,
) -> None:
    """Reject an incompatible combination.

    Raises:
        ValueError: the needs that the backbone or the cache does not meet, why, and what to use.
    """
    refused: Mapping[str, str] = {} if backbone is None else backbone.refuses
    if lacking := sorted(_needs(sampler, cache, cfg_scale, backbone, cuda_graphs) & refused.keys()):
        reasons = "; nor with ".join(f"{NEEDS[need][0]}: {refused[need]}" for need in lacking)
        ways = " and ".join(dict.fromkeys(_FOR_BACKBONES.get(need, NEEDS[need][1]) for need in lacking))
        raise ValueError(f"{type(backbone).__name__} is not compatible with {reasons}; use {ways}")
    needs = unmet(sampler, cache, cfg_scale, backbone, cuda_graphs)
    if needs:
        reasons = "; nor with ".join(f"{NEEDS[need][0]}: {cache.refuses[need]}" for need in needs)
        ways = " and ".join(NEEDS[need][1] for need in needs)
        exact = "" if "graphs" in needs else "cache=none, or "
        raise ValueError(f"{_named(cache)} is not compatible with {reasons}; use {exact}{ways}")


def unmet(
    sampler: Any,
    cache: Any,
    cfg_scale: float = 0.0,
    backbone: MaskedDiffusionModel | None = None,
    cuda_graphs: bool | None = None,
) -> list[str]:
    """The needs that a cache does not meet, by the names of `NEEDS`; empty if compatible."""
    return sorted(_needs(sampler, cache, cfg_scale, backbone, cuda_graphs) & set(cache.refuses))


def _needs(
    sampler: Any, cache: Any, cfg_scale: float, backbone: MaskedDiffusionModel | None, cuda_graphs: bool | None
) -> set[str]:
    needs = set(sampler.needs) | set(() if backbone is None else backbone.needs)
    needs |= {"measured"} if cache.measure_every is not None else set()
    needs |= {"guidance"} if cfg_scale > 0 else set()
    needs |= {"graphs"} if cuda_graphs else set()
    needs |= {"several_devices"} if backbone is not None and spread(backbone) else set()
    return needs


def _named(cache: Any) -> str:
    """A cache as the user selects it."""
    kinds = {type(resolve("cache", name, object)): f"cache={name}" for name in names("cache")}
    return kinds.get(type(cache), f"the cache {type(cache).__name__}")


def spread(backbone: MaskedDiffusionModel) -> bool:
    """Whether a model is distributed over several devices, by layer or by tensor."""
    parts = getattr(backbone, "tp_size", None) or 1
    return parts > 1 or len(set((getattr(backbone, "hf_device_map", None) or {}).values())) > 1
