"""Help texts, read from the YAML files themselves: a comment there is what --help shows."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from importlib import resources
from typing import Any

from omegaconf import OmegaConf

from dllm.resolve import names, variants

_PACKAGE = "# @package _global_\n"  # what stands first in a YAML that sets options of the command itself


def summary(config_name: str) -> str:
    """The first line of a command's description."""
    return _split(f"{config_name}.yaml")[0][0]


def groups(config_name: str) -> dict[str, str]:
    """The config groups of a command and what each is by default."""
    text = (resources.files("dllm.conf") / f"{config_name}.yaml").read_text(encoding="utf-8")
    source: Any = OmegaConf.to_container(OmegaConf.create(text))
    pairs = [pair for entry in source.get("defaults", []) if isinstance(entry, dict) for pair in entry.items()]
    return {name: choice or "null" for name, choice in pairs if not name.startswith("override ")}


def options(config_name: str) -> list[str]:
    """What a command takes: its own options and its groups."""
    text = (resources.files("dllm.conf") / f"{config_name}.yaml").read_text(encoding="utf-8")
    own: Any = OmegaConf.to_container(OmegaConf.create(text))
    return [name for name in own if name not in ("defaults", "hydra")] + list(groups(config_name))


def describe(config_name: str, arguments: Sequence[str] = ()) -> str:
    """What a command does, its options and groups with their defaults.

    Args:
        config_name: its YAML in conf/.
        arguments: of the command line; a group chosen there is the one explained.

    Raises:
        ValueError: a group has no such choice.
    """
    head, body = _split(f"{config_name}.yaml")
    defaults = groups(config_name)
    chosen = defaults | {key: value for key, _, value in (a.partition("=") for a in arguments) if key in defaults}
    parts = [*head, "", "Options and their defaults, changed with NAME=VALUE:", "", *_indent(body)]
    for group, choice in chosen.items():
        parts += ["", *_describe_group(group, choice, defaults[group])]
    return "\n".join([*parts, "", "Flags of Hydra, which reads the options: --hydra-help."])


def _describe_group(group: str, choice: str, default: str) -> list[str]:
    choices = names(group) + variants(group)
    if choice not in (*choices, default):
        raise ValueError(f"unknown {group}={choice}; expected one of {', '.join(choices)}")
    width = max(map(len, choices))
    lines = [f"{group}=NAME, by default {default}:", ""]
    lines += _indent(f"{name:<{width}}  {_split(f'{group}/{name}.yaml')[0][0]}" for name in choices)
    body = (
        []
        if choice == "null"
        else [line for line in _split(f"{group}/{choice}.yaml")[1] if not line.startswith("_target_")]
    )
    if not body:
        return lines
    everywhere = (resources.files("dllm.conf") / group / f"{choice}.yaml").read_text().startswith(_PACKAGE)
    title = (
        f"{group}={choice} sets:" if everywhere else f"Options of {group}={choice}, changed with {group}.NAME=VALUE:"
    )
    return [*lines, "", title, "", *_indent(body)]


def _split(file: str) -> tuple[list[str], list[str]]:
    """The comment that opens a YAML, and its options with their comments, without what only Hydra reads."""
    text = (resources.files("dllm.conf") / file).read_text(encoding="utf-8")
    text = text.removeprefix(_PACKAGE)
    lines = re.sub(r"^(defaults|hydra):\n(?:[ -].*\n|\n)*", "", text, flags=re.MULTILINE).splitlines()
    count = next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))
    body = "\n".join(lines[count:]).strip("\n").splitlines()
    return [line.removeprefix("#").removeprefix(" ") for line in lines[:count]], body


def _indent(lines: Iterable[str]) -> list[str]:
    return [f"  {line}" if line else "" for line in lines]
