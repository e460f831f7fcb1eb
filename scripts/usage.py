"""Help texts, generated from the comments in the YAML files."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from dllm.resolve import TARGET, defaults_list, names, sources, text, variants

_PACKAGE = "# @package _global_\n"  # first line of a YAML that sets options of the command itself


def summary(config_name: str) -> str:
    """The first line of a command's description."""
    return _comment(config_name)[0]


def groups(config_name: str) -> dict[str, str]:
    """The config groups of a command and what each is by default."""
    pairs = [pair for each in defaults_list(config_name) if isinstance(each, dict) for pair in each.items()]
    return {group: choice or "null" for group, choice in pairs}


def options(config_name: str) -> list[str]:
    """What a command takes: its own options and its groups."""
    return [*_entries(config_name), *groups(config_name)]


def describe(config_name: str, arguments: Sequence[str] = ()) -> str:
    """The help text of a command: summary, options and groups with defaults.

    Args:
        config_name: its YAML in conf/.
        arguments: of the command line; the choices of groups there are explained.

    Raises:
        ValueError: an unknown choice of a group.
    """
    defaults = groups(config_name)
    chosen = defaults | {key: value for key, _, value in (a.partition("=") for a in arguments) if key in defaults}
    parts = [*_comment(config_name), "", "Options and their defaults, changed with NAME=VALUE:", *_body(config_name)]
    for group, choice in chosen.items():
        parts += ["", *_describe_group(group, choice, defaults[group])]
    return "\n".join([*parts, "", "Flags of Hydra, which reads the options: --hydra-help."])


def _describe_group(group: str, choice: str, default: str) -> list[str]:
    choices = names(group) + variants(group)
    if choice not in (*choices, default):
        raise ValueError(f"unknown {group}={choice}; expected one of {', '.join(choices)}")
    width = max(map(len, choices))
    lines = [f"{group}=NAME, by default {default}:", ""]
    lines += _indent(f"{name:<{width}}  {_comment(f'{group}/{name}')[0]}" for name in choices)
    file = f"{group}/{choice}"
    if choice == "null" or not _entries(file):
        return lines
    everywhere = text(file).startswith(_PACKAGE)
    title = (
        f"{group}={choice} sets:" if everywhere else f"Options of {group}={choice}, changed with {group}.NAME=VALUE:"
    )
    return [*lines, "", title, *_body(file)]


def _comment(file: str) -> list[str]:
    """The leading comment of a YAML."""
    head = re.split(r"^(?!#)", text(file).removeprefix(_PACKAGE), maxsplit=1, flags=re.MULTILINE)[0]
    return [line.removeprefix("#").removeprefix(" ") for line in head.splitlines()]


def _entries(file: str) -> dict[str, str]:
    """The options of a YAML and of those it includes, with comments, without Hydra's own keys."""
    parts = [part for each in sources(file) for part in re.split(r"^(?=\w)", each, flags=re.MULTILINE)[1:]]
    named = {part.partition(":")[0]: part for part in parts}
    return {name: part for name, part in named.items() if name not in ("defaults", "hydra", TARGET)}


def _body(file: str) -> list[str]:
    return ["", *_indent("".join(_entries(file).values()).rstrip("\n").splitlines())]


def _indent(lines: Iterable[str]) -> list[str]:
    return [f"  {line}" if line else "" for line in lines]
