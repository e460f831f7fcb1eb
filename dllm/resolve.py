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


def variants(group: str) -> list[str]:
    """Choices again with other options, in folders of a group, such as "tiny/threshold"."""
    entries = (resources.files("dllm.conf") / group).iterdir()
    return sorted(f"{each.name}/{name}" for each in entries if each.is_dir() for name in names(f"{group}/{each.name}"))


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
            known = ", ".join(names(group) + variants(group))
            raise ValueError(f"{called}={value!r} is no {group}; use one of {known}, or an object of one")
        return value
    return instantiate(OmegaConf.create(options_of(group, value, called)))


def options_of(group: str, name: str, parameter: str | None = None) -> dict[str, Any]:
    """The default options of a choice, its `_target_` among them.

    Raises:
        ValueError: no such name.
    """
    known = names(group) + variants(group)
    if name not in known:
        raise ValueError(f"{parameter or group}={name!r} is unknown; use one of {', '.join(known)}")
    text = (resources.files("dllm.conf") / group / f"{name}.yaml").read_text()
    found: Any = OmegaConf.to_container(OmegaConf.create(text))
    return dict(found)
