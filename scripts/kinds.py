"""Validation of the types of options against type hints and defaults."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from inspect import signature
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from dllm.cache.base import Cache
from dllm.checks import known
from dllm.jobs import JobEngine
from dllm.models.loading import load
from dllm.resolve import CALIBRATION, TARGET, find_class, merged
from dllm.samplers.base import Sampler
from dllm.scripts.usage import groups, options
from dllm.tasks.base import Task

_PROTOCOLS: Mapping[str, type] = {"sampler": Sampler, "cache": Cache, "task": Task, "engine": JobEngine}
_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Path: "text", NoneType: "null"}


def check_kinds(fields: Mapping[str, Any], config_name: str, kinds: Mapping[str, Any]) -> None:
    """Refuse options that do not exist and values of the wrong type.

    Args:
        fields: the composed configuration.
        config_name: its YAML in conf/; a default other than null tells an option's kind.
        kinds: type hints that go before the defaults.

    Raises:
        ValueError: naming the option, its value and the expected type.
    """
    defaults, chosen = merged(config_name), groups(config_name)
    known(fields, options(config_name))  # other options would have no effect
    for name, value in fields.items():
        if name in chosen:
            _check_group(name, value)
        elif name in kinds:
            _check(name, value, kinds[name])
        else:
            _check_like(name, value, defaults[name])
    # A configuration of the user's own may lack some; `sweep` is null by default, and then not there.
    if missing := [name for name in options(config_name) if name not in fields and chosen.get(name) != "null"]:
        raise ValueError(f"{missing[0]} has no value; add it to the configuration")


def canonical(fields: Mapping[str, Any], kinds: Mapping[str, Any]) -> dict[str, Any]:
    """Normalized options, so that equivalent values are equal: 1.0 for 1 in floats, a for ./a/.

    Args:
        fields: the options, groups as dictionaries.
        kinds: as for `check_kinds`.
    """
    spelt: dict[str, Any] = {}
    for name, value in fields.items():
        made = name in _PROTOCOLS and isinstance(value, Mapping) and TARGET in value
        hints = get_type_hints(find_class(name, value, _PROTOCOLS[name])) if made else {}
        spelt[name] = canonical(value, hints) if isinstance(value, Mapping) else _spelt(value, kinds.get(name))
    return spelt


def _spelt(value: Any, hint: Any) -> Any:
    parts = get_args(hint) or (hint,)
    if type(value) is int and float in parts and int not in parts:
        return float(value)
    # Free text may be too long for Path.exists.
    is_path = isinstance(value, str) and "/" in value and os.path.exists(value)  # noqa: PTH110
    return str(Path(value)) if is_path else value


def _check_group(group: str, values: Any) -> None:
    """Validate a group's options against the constructor or function."""
    if isinstance(values, str):
        raise ValueError(
            f"{group}={values!r} is a name where options are expected; in a custom YAML select it by "
            f"defaults: [{{override /{group}: {values}}}]"
        )
    if group == "model" and not (isinstance(values, Mapping) and "path" in values):
        raise ValueError("model.path has no value; set it with model.path=...")
    if group == "sweep":
        raise ValueError("sweep has no options of its own; begin a YAML of your own with `# @package _global_`")
    made: Any = load if group == "model" else find_class(group, values, _PROTOCOLS[group])
    hints = get_type_hints(made)
    taken = ["path" if name == "name" and made is load else name for name in signature(made).parameters]
    if group == "sampler":
        taken, hints = [*taken, CALIBRATION], hints | {CALIBRATION: str | None}
    known([name for name in values if made is load or name != TARGET], taken, f"{group}.")
    for name, value in values.items():
        _check(f"{group}.{name}", value, hints.get(name, str if name == "path" else Any))


def _check_like(name: str, value: Any, default: Any) -> None:
    """Validate a value by the type of its default; null allows anything."""
    if isinstance(default, dict) and isinstance(value, dict):
        for key in set(value) & set(default):
            _check_like(f"{name}.{key}", value[key], default[key])
    elif isinstance(default, list):
        _check(name, value, Sequence[type(default[0])])  # type: ignore[misc]  # a type known only now
    elif default is not None:
        _check(name, value, type(default))


def _check(name: str, value: Any, hint: Any) -> None:
    if not _fits(value, hint):
        raise ValueError(f"{name}={value!r} is of the wrong type; give {_describe(hint)}")


def _fits(value: Any, hint: Any) -> bool:
    parts = get_args(hint)
    match get_origin(hint) or hint:
        case kind if kind in (Union, UnionType):
            return any(_fits(value, part) for part in parts)
        case kind if kind is Literal:
            return value in parts
        case kind if kind is Sequence:
            return isinstance(value, list) and all(_fits(entry, parts[0]) for entry in value)
        case kind if kind in (int, float):
            return isinstance(value, (int, kind)) and not isinstance(value, bool)
        case kind if kind in (bool, str, NoneType):
            return isinstance(value, kind)
        case kind:
            # An object built from a group of options, validated by its constructor.
            return kind is Any or isinstance(value, dict)


def _describe(hint: Any) -> str:
    parts = get_args(hint)
    match get_origin(hint) or hint:
        case kind if kind in (Union, UnionType):
            return " or ".join(dict.fromkeys(_describe(part) for part in parts))
        case kind if kind is Literal:
            return " or ".join(map(str, parts))
        case kind if kind is Sequence:
            return "a list"
        case kind:
            return _WORDS.get(kind, "a group of options")
