"""From a name to an object: Hydra's `_target_` in conf/ is the only registry."""

from __future__ import annotations

from importlib import resources
from typing import Any

from hydra.utils import instantiate
from omegaconf import OmegaConf


def names(group: str) -> list[str]:
    """The choices of a config group, such as "sampler" or "cache"."""
    folder = resources.files("dllm.conf") / group
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def resolve(group: str, value: Any, protocol: type, parameter: str | None = None) -> Any:
    """Make the object a name stands for, with its default options; objects pass through.

    Args:
        group: config group of the names.
        value: a name or an object.
        protocol: what an object must be.
        parameter: what errors call the value; None for the group.

    Raises:
        ValueError: no such name, or an object of another kind.
    """
    called = parameter or group
    if not isinstance(value, str):
        if isinstance(value, type) or not isinstance(value, protocol):
            known = ", ".join(names(group))
            raise ValueError(f"{called}={value!r} is no {group}; use one of {known}, or an object of one")
        return value
    if value not in names(group):
        raise ValueError(f"{called}={value!r} is unknown; use one of {', '.join(names(group))}")
    text = (resources.files("dllm.conf") / group / f"{value}.yaml").read_text()
    return instantiate(OmegaConf.create(text))
