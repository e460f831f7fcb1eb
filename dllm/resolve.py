"""From a name to an object: `_target_` in conf/ is the only registry, and it names classes of this package alone."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import is_dataclass
from functools import cache
from importlib import import_module, resources
from typing import Any, TypeVar

from omegaconf import OmegaConf

from dllm.checks import known, naming

TARGET = "_target_"
_CLASS = TypeVar("_CLASS", bound=type)
_REGISTERED: dict[str, type] = {}


def register(cls: _CLASS) -> _CLASS:
    """Let `_target_` name a class of your own, as MODULE.CLASS; a decorator.

    Classes of this package need none. Register in the module that defines the class, and import that before the
    command runs::

        import my_policies  # with @dllm.register on its classes
        from dllm.scripts.cli import main

        main()
    """
    _REGISTERED[f"{cls.__module__}.{cls.__qualname__}"] = cls
    return cls


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
            base = "; a class of one's own derives from dllm.samplers.base.Policy" if group == "sampler" else ""
            raise ValueError(f"{called}={value!r} is not a {group}; use one of {known}, or an object of one{base}")
        return value
    return build(called, options_of(group, value, called), protocol)


def build(place: str, options: Any, protocol: type) -> Any:
    """Make an object of the class that `_target_` names, and so at any depth of its options.

    Args:
        place: what errors call it, such as "sampler".
        options: `_target_` and the arguments of the class, as Python or OmegaConf holds them.
        protocol: what the class must follow.

    Raises:
        ValueError: a class that may not be named, an option it does not have, or what the class refuses.
    """
    fields: Any = OmegaConf.to_container(options, resolve=True) if OmegaConf.is_config(options) else options
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
    """The class that `_target_` names; other than modules of this package, nothing is imported to find it.

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
        # What a module only imports, such as dllm.models.loading.torch, is not part of this package.
        own = isinstance(found, type) and found.__module__.startswith("dllm.") and is_dataclass(found)
        found = found if own else None
    if found is None or not all(callable(getattr(found, each, None)) for each in _methods(protocol)):
        raise ValueError(
            f"{place}._target_={name!r} is not a {kind} of dllm; register custom classes with dllm.register"
        )
    return found


def _methods(protocol: type) -> list[str]:
    return [name for name, value in vars(protocol).items() if inspect.isfunction(value) and not name.startswith("_")]


def options_of(group: str, name: str, parameter: str | None = None) -> dict[str, Any]:
    """The default options of a choice, its `_target_` among them.

    Raises:
        ValueError: no such name.
    """
    known = names(group) + variants(group)
    if name not in known:
        raise ValueError(f"unknown {parameter or group}={name!r}; expected one of {', '.join(known)}")
    text = (resources.files("dllm.conf") / group / f"{name}.yaml").read_text()
    return deepcopy(_parsed(text))


@cache
def _parsed(text: str) -> dict[str, Any]:
    found: Any = OmegaConf.to_container(OmegaConf.create(text))
    return dict(found)
