"""The policies that run on every model with [MASK], by name."""

from __future__ import annotations

from dllm.resolve import names, resolve
from dllm.samplers.base import Sampler


def over_masks() -> list[str]:
    """All but those over random tokens, or over causal models only."""
    return [name for name in names("sampler") if not {"noise", "causal"} & resolve("sampler", name, Sampler).needs]
