"""Content hash of the definition of a task of lm-evaluation-harness."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from dllm import identity


class _Plain(yaml.SafeLoader):
    """Loads a task's YAML without importing the functions that it names."""


_Plain.add_multi_constructor("!", lambda loader, suffix, node: loader.construct_scalar(node))


def definition(manager: Any, name: str, include_path: str | None) -> str:
    """A hash of everything that defines a task's requests and grading, except data sets on the hub.

    That is the harness's version, all files of `include_path`, the task's YAML, those it includes, and of a group or
    tag those of its members, with the Python files beside them, and the local data they name.
    """
    found = {} if include_path is None else {include_path: identity.tree(Path(include_path))}
    for file in _sources(manager, name):
        found |= {str(file): identity.digest(file)} | identity.contents(_data(file), paths=True)
    content = json.dumps([harness_version(), sorted(found.items())])
    return hashlib.sha256(content.encode()).hexdigest()


def harness_version() -> str:
    """The harness's version; empty if not installed."""
    try:
        return version("lm-eval")
    except PackageNotFoundError:
        return ""


def _sources(manager: Any, name: str) -> set[Path]:
    """The files that define a task and its members."""
    left, names, found = list(manager.match_tasks([name])), set[str](), set[Path]()
    while left:
        names.add(this := left.pop())
        entry = manager.task_index.get(this)
        path = getattr(entry, "yaml_path", None)
        files = [Path(path)] if path else []
        left += [] if path else sorted(set(getattr(entry, "tags", ())) - names)  # a tag has no file
        while files:
            file = files.pop()
            if file in found or not file.is_file():
                continue
            found |= {file, *file.parent.glob("*.py")}
            config = _read_yaml(file)
            files += _included(file, config)
            for each in _listed(config["task"]) if {"group", "task"} <= config.keys() else ():
                if isinstance(each, str) and each not in manager.task_index:
                    reason = next(refused(file.parent), "fix its list of tasks")
                    raise ValueError(f"{file} names the unknown task {each!r}; {reason}")
            left += sorted(set(_named(config.get("task"))) - names)
    return found


def refused(folder: Path) -> Iterator[str]:
    """Why the harness ignores definitions in a folder."""
    for file in sorted(folder.rglob("*.yaml")):
        if (reason := _fault(file, ())) is not None:
            yield f"{file} is ignored: {reason}; fix or remove it"


def _fault(file: Path, above: tuple[Path, ...]) -> str | None:
    if file.resolve() in above:
        return f"{file} includes itself"
    try:
        config = yaml.load(file.read_bytes(), Loader=_Plain)  # a safe loader
    except (OSError, yaml.YAMLError, RecursionError) as error:
        return f"{file} cannot be read ({' '.join(str(error).split())})"
    if not isinstance(config, dict):
        return f"{file} is a {type(config).__name__}, not a mapping"
    wrong = [each for each in _listed(config.get("include", [])) if not isinstance(each, str)]
    names = [config[key] for key in ("group", "task") if key in config and not (key == "task" and "group" in config)]
    if wrong or not all(isinstance(name, str) for name in names):
        return f"{file}: {'include' if wrong else 'the name of a task or group'}={(wrong or names)[0]!r} is not text"
    faults = (_fault(each, (*above, file.resolve())) for each in _included(file, config))
    return next((fault for fault in faults if fault is not None), None)


def _included(file: Path, config: dict[str, Any]) -> list[Path]:
    return [file.parent / each for each in _listed(config.get("include", [])) if isinstance(each, str)]


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _named(members: Any) -> Iterator[str]:
    """The names in a group's list, which may be nested."""
    match members:
        case str():
            yield members
        case list():
            for each in members:
                yield from _named(each)
        case dict():
            yield from _named([members.get("task"), members.get("group")])


def _data(file: Path) -> list[Any]:
    """The data sources of a definition and of its inline members."""
    return [] if file.suffix == ".py" else list(_data_of(_read_yaml(file)))


def _data_of(config: Any) -> Iterator[Any]:
    match config:
        case list():
            for each in config:
                yield from _data_of(each)
        case dict():
            given = config.get("dataset_kwargs")
            given = given if isinstance(given, dict) else {}
            # Other values may be names.
            others = {name: value for name, value in given.items() if name not in ("data_files", "data_dir")}
            yield from (config.get("dataset_path"), given.get("data_files"), given.get("data_dir"))
            yield from identity.contents(others)
            yield from _data_of(config.get("task"))


def _read_yaml(file: Path) -> dict[str, Any]:
    with suppress(OSError, yaml.YAMLError):
        found = yaml.load(file.read_bytes(), Loader=_Plain)  # a safe loader
        return found if isinstance(found, dict) else {}
    return {}
