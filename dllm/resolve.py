"""Resolving names to objects: `_target_` in conf/ is the only registry, restricted to classes of this package."""

from __future__ import annotations

import inspect
import os
import re
import sys
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, is_dataclass
from functools import cache
from importlib import import_module, resources
from pathlib import Path
from typing import Any, TypeVar

import yaml

from dllm.checks import close, known, naming

TARGET = "_target_"
# An option of every policy that can be calibrated: a card of `dllm calibrate`.
CALIBRATION, CALIBRATED = "calibration", "dllm.samplers.Calibrated"
_CLASS = TypeVar("_CLASS", bound=type)
_REGISTERED: dict[str, type] = {}
_FOLDERS: list[Any] = [resources.files("dllm.conf")]  # where the choices of config groups are found


def register(cls: _CLASS) -> _CLASS:
    """Decorator: allow `_target_` to name a class of another package, as MODULE.CLASS.

    Classes of this package need none. Register in the module that defines the class, and import that before the
    command runs::

        import my_policies  # with @dllm.register on its classes
        from dllm.scripts.cli import main

        main()
    """
    _REGISTERED[f"{cls.__module__}.{cls.__qualname__}"] = cls
    return cls


def search_also(*folders: Path) -> None:
    """Find the choices of config groups in these folders, too, which are laid out like conf/: what --config-dir does.

    Args:
        folders: replace those of an earlier call.
    """
    if _FOLDERS[1:] != list(folders):
        _FOLDERS[1:] = folders
        for each in (defaults_list, sources, merged):
            each.cache_clear()


@dataclass(frozen=True)
class Carried:
    """What a process knows of classes and choices of one's own, for those that it starts.

    Attributes:
        classes: that are registered, with their modules; those of the script itself cannot be carried.
        path: where modules are found.
        folders: from `search_also`.
    """

    classes: tuple[tuple[str, str], ...]
    path: tuple[str, ...]
    folders: tuple[Path, ...]

    @classmethod
    def here(cls) -> Carried:
        """That of this process."""
        own = [(name, each.__module__) for name, each in _REGISTERED.items() if each.__module__ != "__main__"]
        path = (os.path.abspath(each) for each in sys.path) if own else ()  # noqa: PTH100  # a link stays one
        return cls(tuple(own), tuple(path), tuple(map(Path.absolute, _FOLDERS[1:])))

    def restore(self) -> None:
        """Know the same in another process."""
        if missing := dict.fromkeys(module for name, module in self.classes if name not in _REGISTERED):
            sys.path += [each for each in self.path if each not in sys.path]
            for module in missing:
                import_module(module)
        if not _FOLDERS[1:]:
            search_also(*self.folders)


def names(group: str) -> list[str]:
    """The choices of a config group, such as "sampler" or "cache"."""
    return sorted(each.name.removesuffix(".yaml") for each in _listed(group) if each.name.endswith(".yaml"))


def variants(group: str) -> list[str]:
    """Variants of the choices with other options, in subfolders of a group, such as "tiny/threshold"."""
    folders = {each.name for each in _listed(group) if each.is_dir()}
    return sorted(f"{folder}/{name}" for folder in folders for name in names(f"{group}/{folder}"))


def resolve(group: str, value: Any, protocol: type, parameter: str | None = None) -> Any:
    """Create an object by name, with default options; objects are returned unchanged.

    Args:
        group: config group of the names.
        value: a name or an object.
        protocol: required protocol.
        parameter: name of the value in errors; None for the group.

    Raises:
        ValueError: no such name, or an object of another kind.
    """
    called = parameter or group
    if not isinstance(value, str):
        if isinstance(value, type) or not isinstance(value, protocol):
            known = ", ".join(names(group) + variants(group))
            base = "; a class of one's own derives from dllm.samplers.base.Policy" if group == "sampler" else ""
            raise ValueError(f"{called}={value!r} is not a {group}; use one of {known}, or an object of one{base}")
        return value
    return build(called, options_of(group, value, called), protocol)


def build(place: str, options: Any, protocol: type) -> Any:
    """Create an object of the class named by `_target_`, recursively for its options.

    Args:
        place: its name in errors, such as "sampler".
        options: `_target_` and the arguments of the class, as a Python or OmegaConf dictionary.
        protocol: required protocol.

    Raises:
        ValueError: a class that may not be named, an option it does not have, or what the class refuses.
    """
    from omegaconf import OmegaConf  # slow import: help and completion need names alone

    fields: Any = OmegaConf.to_container(options, resolve=True) if OmegaConf.is_config(options) else options
    if isinstance(fields, Mapping) and CALIBRATION in fields and fields.get(TARGET) != CALIBRATED:
        base = {name: value for name, value in fields.items() if name != CALIBRATION}
        built = build(place, base, protocol)
        if (card := fields[CALIBRATION]) is None:
            return built
        with naming({CALIBRATION: f"{place}.{CALIBRATION}"}):
            return find_class(place, {TARGET: CALIBRATED}, protocol)(card, built)
    cls = find_class(place, fields, protocol)
    parameters = [name for name in inspect.signature(cls).parameters if name.isidentifier()]
    known([name for name in fields if name != TARGET], parameters, f"{place}.")
    made = {name: _made(f"{place}.{name}", value, protocol) for name, value in fields.items() if name != TARGET}
    try:
        with naming({name: f"{place}.{name}" for name in parameters}):
            built = cls(**made)
    except TypeError as error:
        raise ValueError(f"{place}: {error}") from None
    if not isinstance(built, protocol):
        raise ValueError(f"{place}={built!r} is not a {protocol.__name__.lower()}; use another _target_")
    return built


def with_option(group: str, options: Mapping[str, Any], name: str, value: Any) -> dict[str, Any]:
    """Options with one of them set; `base.NAME` is an option of what the option `base` names or holds."""
    own, _, inner = name.partition(".")
    if inner:
        held = options.get(own)
        if held is not None and not isinstance(held, (str, Mapping)):
            raise ValueError(f"{own}={held!r} has no option {inner}")
        value = with_option(group, options_of(group, held, own) if isinstance(held, str) else held or {}, inner, value)
    return {**options, own: value}


def option_names(group: str, options: Mapping[str, Any]) -> list[str]:
    """Names of the options as `with_option` takes them."""
    found = []
    for name, value in options.items():
        held = value
        if name == "base" and isinstance(value, str) and value in (*names(group), *variants(group)):
            held = options_of(group, value)
        found += [name] if name not in (TARGET, CALIBRATION) else []
        found += [f"{name}.{each}" for each in option_names(group, held)] if isinstance(held, Mapping) else []
    return found


def _made(place: str, value: Any, protocol: type) -> Any:
    match value:
        case Mapping() if TARGET in value:
            return build(place, value, protocol)
        case Mapping():
            return {name: _made(f"{place}.{name}", each, protocol) for name, each in value.items()}
        case list():
            return [_made(f"{place}[{number}]", each, protocol) for number, each in enumerate(value)]
    return value


def find_class(place: str, fields: Any, protocol: type) -> type:
    """The class named by `_target_`; only modules of this package are imported.

    Raises:
        ValueError: it is not a class of this package that follows the protocol, nor a registered one.
    """
    kind = protocol.__name__.lower()
    if not isinstance(fields, Mapping) or TARGET not in fields:
        raise ValueError(f"{place}={fields!r} is not a {kind}; give {{_target_: CLASS, its options}}")
    name = fields[TARGET]
    found = _REGISTERED.get(name) if isinstance(name, str) else None
    if found is None and isinstance(name, str) and re.fullmatch(r"dllm(\.[A-Za-z]\w*)+", name, re.ASCII):
        module, _, last = name.rpartition(".")
        try:
            found = vars(import_module(module)).get(last)
        except ModuleNotFoundError:
            found = None
        # Names that a module imports, such as dllm.models.loading.torch, are rejected.
        own = isinstance(found, type) and found.__module__.startswith("dllm.") and is_dataclass(found)
        found = found if own else None
    if found is None or not all(callable(getattr(found, each, None)) for each in _methods(protocol)):
        raise ValueError(
            f"{place}._target_={name!r} is not a {kind} of dllm; register custom classes with dllm.register, in a "
            "script that imports them (docs/write-a-policy.md)"
        )
    return found


def _methods(protocol: type) -> list[str]:
    return [name for name, value in vars(protocol).items() if inspect.isfunction(value) and not name.startswith("_")]


def options_of(group: str, name: str, parameter: str | None = None) -> dict[str, Any]:
    """The default options of a choice, including `_target_`, with bases as in `written_out`.

    Raises:
        ValueError: no such name, or a choice that is its own base.
    """
    known = names(group) + variants(group)
    if name not in known:
        raise ValueError(
            f"unknown {parameter or group}={name!r}{close(name, known)}; expected one of {', '.join(known)}"
        )
    return written_out(group, deepcopy(merged(f"{group}/{name}")), (name,))


def written_out(group: str, options: Mapping[str, Any], above: tuple[str, ...] = ()) -> dict[str, Any]:
    """Options with those of the base in place of its name, if that is a YAML of the user's own, which may change.

    Args:
        group: config group of the names.
        options: of a choice.
        above: choices that it is the base of.

    Raises:
        ValueError: a choice is its own base.
    """
    base = options.get("base")
    if isinstance(base, str) and base in (*names(group), *variants(group)) and not is_shipped(group, base):
        if base in above:
            raise ValueError(f"{group}={base} is its own base; give another base")
        base = written_out(group, deepcopy(merged(f"{group}/{base}")), (*above, base))
    elif isinstance(base, Mapping):
        base = written_out(group, base, above)
    else:
        return dict(options)
    return {**options, "base": base}


def is_shipped(group: str, name: str) -> bool:
    """Whether a choice is one of this package."""
    return bool((_FOLDERS[0] / group / f"{name}.yaml").is_file())


def text(file: str) -> str:
    """What a YAML of conf/ says, named by its path there without ending.

    Raises:
        ValueError: one in a folder of the user's own is not plain YAML.
    """
    found = next((path for each in _FOLDERS if (path := each / f"{file}.yaml").is_file()), None)
    if found is None or found.is_relative_to(_FOLDERS[0]):
        return (found or _FOLDERS[0] / f"{file}.yaml").read_text(encoding="utf-8")
    try:
        said: str = found.read_text(encoding="utf-8")
        if not isinstance(yaml.safe_load(said), dict):
            raise ValueError("it has no NAME: VALUE lines")
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{found} cannot be read ({' '.join(str(error).split())}); fix it") from None
    return said


@cache
def defaults_list(file: str) -> tuple[Any, ...]:
    """What a YAML of conf/ is composed of: paths of others, and `{GROUP: CHOICE}` for groups."""
    return tuple(yaml.safe_load(text(file)).get("defaults", []))


def _listed(group: str) -> list[Any]:
    return [entry for each in _FOLDERS if (folder := each / group).is_dir() for entry in folder.iterdir()]


@cache
def sources(file: str) -> tuple[str, ...]:
    """The text of a YAML of conf/, and of those that its `defaults` include by their path, as Hydra merges them."""
    entries = [each for each in defaults_list(file) if isinstance(each, str)]
    order = entries if "_self_" in entries else [*entries, "_self_"]
    parts = ((text(file),) if each == "_self_" else sources(each.lstrip("/").partition("@")[0]) for each in order)
    return tuple(each for part in parts for each in part)


@cache
def merged(file: str) -> dict[str, Any]:
    """The options of a YAML of conf/, with those that it includes; groups that a user chooses are left out."""
    from omegaconf import OmegaConf

    found: Any = OmegaConf.to_container(OmegaConf.merge(*map(OmegaConf.create, sources(file))))
    return {name: value for name, value in found.items() if name not in ("defaults", "hydra")}
