"""Validation of stored files before use."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints, is_typeddict

from dllm.checks import is_text

# Metadata of fields that files of earlier versions do not have.
LATER: Mapping[str, Any] = {"later": True}
_DEEPEST = 100
_LARGEST = 1 << 63  # integers must fit into tensors


def there(path: Path, fix: str = "remove it") -> bool:
    """Whether a file exists, without opening it.

    Args:
        path: the file.
        fix: advice in errors.

    Raises:
        ValueError: something else is in its place: a folder, a pipe, a link that leads nowhere.
    """
    if path.is_file():
        return True
    if os.path.lexists(path):
        kind = "a folder" if path.is_dir() else "a link to no file" if path.is_symlink() else "no ordinary file"
        raise ValueError(f"{path} is {kind}, where a file belongs; {fix}")
    return False


def folder_there(path: Path, fix: str = "remove it") -> None:
    """Reject a file at the path of a folder; a missing folder is accepted.

    Raises:
        ValueError: it is there and no folder.
    """
    if os.path.lexists(path) and not path.is_dir():
        raise ValueError(f"{path} is not a folder, where one belongs; {fix}")


def misfit(value: Any, hint: Any, name: str = "it") -> str | None:
    """The mismatch between a JSON value and a type hint; None if it fits.

    Args:
        value: of any kind.
        hint: made of str, int, float, bool, None, Any, list, dict, tuple for lists of a fixed length, unions, data
            classes, which take no other fields and may lack those of `LATER`, and TypedDicts, which take others.
        name: of the value in the message.
    """
    if hint is Any:
        return None if shallow(value) else f"{name} is nested too deep"
    parts, kind = get_args(hint), get_origin(hint) or hint
    if kind in (Union, UnionType):
        found = [misfit(value, part, name) for part in parts]
        return None if None in found else found[0]
    if is_dataclass(kind) or is_typeddict(kind):
        return _misfit_fields(value, kind, name)
    children: list[tuple[str, Any, Any]] = []
    if kind is list:
        good = isinstance(value, list)
        if good and _are_numbers(value, parts[0]):
            return None
        children = [(f"{name}[{place}]", each, parts[0]) for place, each in enumerate(value if good else ())]
    elif kind is tuple:
        good = isinstance(value, list) and len(value) == len(parts)
        children = [(f"{name}[{place}]", value[place], part) for place, part in enumerate(parts if good else ())]
    elif kind is dict:
        good = isinstance(value, dict) and all(is_text(key) for key in value)
        children = [(f"{name}.{key}", each, parts[1]) for key, each in (value if good else {}).items()]
    else:
        good = _is_scalar(value, kind)
    if not good:
        return f"{name} is {_shown(value)}"
    return next((wrong for child in children if (wrong := misfit(child[1], child[2], child[0]))), None)


def shallow(value: Any) -> bool:
    """Whether lists and dictionaries are nested no deeper than in files of dllm."""
    level = [value]
    for _ in range(_DEEPEST):
        inner = [each for each in level if isinstance(each, (dict, list))]
        level = [part for each in inner for part in (each.values() if isinstance(each, dict) else each)]
        if not level:
            return True
    return False


def _misfit_fields(value: Any, kind: Any, name: str) -> str | None:
    hints, optional = get_type_hints(kind), set()
    if is_dataclass(kind):
        hints = {field.name: hints[field.name] for field in fields(kind)}
        optional = {each.name for each in fields(kind) if each.metadata == LATER}
    if not isinstance(value, Mapping):
        return f"{name} is {_shown(value)}"
    if missing := sorted(set(hints) - set(value) - optional):
        return f"{name} has no {missing[0]}"
    if is_dataclass(kind) and (more := sorted(map(str, set(value) - set(hints)))):
        return f"{name} has {more[0]!r}"
    inside = "" if name == "it" else f"{name}."
    wrong = (misfit(value[key], hint, f"{inside}{key}") for key, hint in hints.items() if key in value)
    return next((each for each in wrong if each), None)


def _are_numbers(values: list[Any], hint: Any) -> bool:
    """The same for many numbers at once, for speed."""
    kinds = set(get_args(hint) or (hint,))
    allowed = kinds | ({int} if float in kinds else set())
    if not kinds <= {int, float, NoneType} or not set(map(type, values)) <= allowed:
        return False
    whole = [value for value in values if type(value) is int]
    return not whole or -_LARGEST <= min(whole) <= max(whole) < _LARGEST


def _is_scalar(value: Any, kind: Any) -> bool:
    if kind in (None, NoneType):
        return value is None
    if kind is str:
        return is_text(value)
    if kind in (int, float):
        number = isinstance(value, (int, kind)) and not isinstance(value, bool)
        return number and (isinstance(value, float) or -_LARGEST <= value < _LARGEST)
    return isinstance(value, kind)


def _shown(value: Any) -> str:
    text = type(value).__name__ if isinstance(value, (dict, list)) else ascii(value)
    return text if len(text) < 60 else f"{text[:57]}..."
