"""Which sampler, cache and backbone go together; decided before the first forward.

A sampler says in `needs` what it relies on, a cache in `refuses` which of that it cannot give, and why.
Options of a run and the way a model is placed add needs of their own. Samplers and caches do not know
each other: they share the words below.
"""

from __future__ import annotations

from typing import Any

from dllm.models.base import MaskedDiffusionModel
from dllm.resolve import names, resolve

# What each need comes from, and how to do without.
NEEDS = {
    "guidance": ("classifier-free guidance (cfg_scale above 0)", "cfg_scale=0"),
    "next_block": ("drafts that run into the next block (eager=true)", "eager=false"),
    "repeatable": (
        "drafts that promise the tokens of their base",
        "prefix, dual or freecache with freeze=clean, granularity=block and refresh_above=null",
    ),
    "shadows": ("positions that only look at the canvas", "a cache that keeps the keys and values of whole layers"),
    "graphs": ("CUDA graphs (cuda_graphs=true)", "cuda_graphs=null"),
    "several_devices": ("a model spread over several devices", "a model on one"),
}


def check(
    sampler: Any,
    cache: Any,
    cfg_scale: float = 0.0,
    backbone: MaskedDiffusionModel | None = None,
    cuda_graphs: bool | None = None,
) -> None:
    """Refuse a combination that cannot work.

    Raises:
        ValueError: which need the cache does not meet, why, and what to use.
    """
    needs = unmet(sampler, cache, cfg_scale, backbone, cuda_graphs)
    if needs:
        reasons = "; nor with ".join(f"{NEEDS[need][0]}: {cache.refuses[need]}" for need in needs)
        ways = " and ".join(NEEDS[need][1] for need in needs)
        exact = "" if "graphs" in needs else "cache=none, or "
        raise ValueError(f"{_named(cache)} does not go with {reasons}; use {exact}{ways}")


def unmet(
    sampler: Any,
    cache: Any,
    cfg_scale: float = 0.0,
    backbone: MaskedDiffusionModel | None = None,
    cuda_graphs: bool | None = None,
) -> list[str]:
    """The needs that a cache does not meet, in the words of `NEEDS`; none where everything goes together."""
    needs = set(sampler.needs)
    needs |= {"guidance"} if cfg_scale > 0 else set()
    needs |= {"graphs"} if cuda_graphs else set()
    needs |= {"several_devices"} if backbone is not None and spread(backbone) else set()
    return sorted(needs & set(cache.refuses))


def _named(cache: Any) -> str:
    """A cache as it is chosen."""
    kinds = {type(resolve("cache", name, object)): f"cache={name}" for name in names("cache")}
    return kinds.get(type(cache), f"the cache {type(cache).__name__}")


def spread(backbone: MaskedDiffusionModel) -> bool:
    """Whether a model's layers, or parts of them, are on several devices."""
    parts = getattr(backbone, "tp_size", None) or 1
    return parts > 1 or len(set((getattr(backbone, "hf_device_map", None) or {}).values())) > 1
