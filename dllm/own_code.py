"""The source files of classes that are no part of the package, and of what these import."""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cache
from importlib.util import find_spec, resolve_name
from pathlib import Path


def files_of(kind: type) -> dict[str, Path]:
    """The source files of a class and its bases, and of the modules that they import, by module.

    Modules of this package and of Python are left out, and so are installed ones, except a class's own, whose imports
    do not count. What is made without a file, as in a notebook, has none. Imports are read from the source, those
    within functions too.
    """
    found: dict[str, Path] = {}
    for each in kind.__mro__:
        if not _foreign(each.__module__):
            with suppress(TypeError, OSError):
                if (file := Path(inspect.getsourcefile(each) or "")).is_file():
                    _follow(each.__module__, file, found)
    return found


def _follow(module: str, file: Path, found: dict[str, Path]) -> None:
    if module in found:
        return
    found[module] = file
    for name in () if _is_installed(file) else _imported(module, file):
        with suppress(ImportError, ValueError, AttributeError, KeyError):  # no module, or one that is not there
            other = _source(name)
            if other is not None and not _is_installed(other):
                _follow(name, other, found)


def _is_installed(file: Path) -> bool:
    return any(map(_has_packages, file.parents))


@cache
def _has_packages(folder: Path) -> bool:
    """Whether pip installs into a folder."""
    return folder.name in ("site-packages", "dist-packages") or any(folder.glob("*.dist-info"))


def _imported(module: str, file: Path) -> Iterator[str]:
    """Names that may be modules."""
    loaded = sys.modules.get(module)
    package = getattr(loaded, "__package__", None) or (module if file.stem == "__init__" else module.rpartition(".")[0])
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (each.name for each in node.names)
        elif isinstance(node, ast.ImportFrom):
            with suppress(ImportError):  # relative, beyond the package
                origin = resolve_name("." * node.level + (node.module or ""), package)
                yield origin
                yield from (f"{origin}.{each.name}" for each in node.names)


def _source(name: str) -> Path | None:
    """The file of a module, found without importing it or its packages; their own files are not looked at."""
    root, *parts = name.split(".")
    if _foreign(root) or (spec := find_spec(root)) is None:
        return None
    file = None if spec.origin is None else Path(spec.origin)
    folders = [Path(each) for each in spec.submodule_search_locations or ()]
    for part in parts:
        file, folders = _member(folders, part)
    return file if file is not None and file.suffix == ".py" and file.is_file() else None


def _member(folders: Sequence[Path], name: str) -> tuple[Path | None, list[Path]]:
    """The file of a module of a package, and its folders if it is a package itself."""
    for folder in folders:
        for file, own in ((folder / name / "__init__.py", [folder / name]), (folder / f"{name}.py", [])):
            if file.is_file():
                return file, own
    return None, [folder / name for folder in folders if (folder / name).is_dir()]


def _foreign(module: str) -> bool:
    """Whether a module is of this package or of Python."""
    root = module.partition(".")[0]
    return root == "dllm" or root in sys.stdlib_module_names
