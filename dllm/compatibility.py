"""Which sampler, cache and backbone go together; decided before the first forward.

A sampler says in `needs` what it relies on, a cache in `refuses` which of that it cannot give, and why.
Options of a run and the way a model is placed add needs of their own. Samplers and caches do not know
each other: they share the words below.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dllm.backbones.base import MaskedDiffusionModel

# What each need comes from, and how to do without.
NEEDS = {
    "guidance": ("cfg_scale above 0", "cfg_scale=0"),
    "next_block": ("drafts that run into the next block (eager=true)", "eager=false"),
    "several_devices": ("a model spread over several devices", "a device_map with one device"),
}


def check(sampler: Any, cache: Any, cfg_scale: float = 0.0, backbone: MaskedDiffusionModel | None = None) -> None:
    """Refuse a combination that cannot work.

    Raises:
        ValueError: which need the cache does not meet, why, and what to use.
    """
    for reason in refusals(sampler, cache, cfg_scale, backbone):
        raise ValueError(reason)


def refusals(
    sampler: Any, cache: Any, cfg_scale: float = 0.0, backbone: MaskedDiffusionModel | None = None
) -> Iterator[str]:
    """Why a combination does not work; nothing where it does."""
    needs = set(getattr(sampler, "needs", ()))
    needs |= {"guidance"} if cfg_scale > 0 else set()
    needs |= {"several_devices"} if backbone is not None and spread(backbone) else set()
    for need in sorted(needs & set(cache.refuses)):
        what, without = NEEDS[need]
        name = type(cache).__name__
        yield f"the cache {name} does not go with {what}: {cache.refuses[need]}; use cache=none, or {without}"


def spread(backbone: MaskedDiffusionModel) -> bool:
    """Whether a model's layers are on several devices."""
    return len(set((getattr(backbone, "hf_device_map", None) or {}).values())) > 1
