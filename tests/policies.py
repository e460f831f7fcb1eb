"""The policies that run on models with [MASK], by name."""

from __future__ import annotations

from dllm.resolve import names, resolve
from dllm.samplers.base import Sampler


def over_masks() -> list[str]:
    """All but those over random tokens."""
    return [name for name in names("sampler") if "noise" not in resolve("sampler", name, Sampler).needs]
