"""The source files of classes that are no part of the package, and of what these import."""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Iterator
from contextlib import suppress
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec, resolve_name
from pathlib import Path

_INSTALLED = {"site-packages", "dist-packages"}


def files_of(kind: type) -> dict[str, Path]:
    """The source files of a class and its bases, and of the modules that they import, by module.

    Modules of this package and of Python are left out, and so are installed ones, except a class's own. What is made
    without a file, as in a notebook, has none. Imports are read from the source, those within functions too.
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
    for name in _imported(module, file):
        with suppress(ImportError, ValueError, AttributeError):  # no module, or one that is not there
            other = _source(name)
            same = name.partition(".")[0] == module.partition(".")[0]
            if other is not None and (same or not _INSTALLED & set(other.parts)):
                _follow(name, other, found)


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
    """The file of a module, found without importing it; its packages' own files are not looked at."""
    parts = name.split(".")
    if _foreign(parts[0]):
        return None
    spec: ModuleSpec | None = find_spec(parts[0])
    for end in range(2, len(parts) + 1):
        if spec is None or spec.submodule_search_locations is None:
            return None
        spec = PathFinder.find_spec(".".join(parts[:end]), spec.submodule_search_locations)
    file = Path(spec.origin) if spec is not None and spec.origin is not None else None
    return file if file is not None and file.suffix == ".py" and file.is_file() else None


def _foreign(module: str) -> bool:
    """Whether a module is of this package or of Python."""
    root = module.partition(".")[0]
    return root == "dllm" or root in sys.stdlib_module_names
