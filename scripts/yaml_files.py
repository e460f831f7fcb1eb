"""YAML files of the user's own (--config-dir, --config-path), read only where they are plain and small."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from omegaconf.errors import OmegaConfBaseException

from dllm.files import check_readable

_MOST_BYTES, _MOST_NODES, _DEEPEST = 1 << 20, 10_000, 20


_load = FileConfigSource.load_config


def load_config(source: FileConfigSource, config_path: str) -> Any:
    """Hydra's reader of folders, which would follow an alias, or a file, however much comes of it."""
    path = Path(source.path, source._normalize_file_name(config_path))
    if not path.exists():
        return _load(source, config_path)
    check_readable("--config-dir", path)
    if not path.is_file() or path.stat().st_size > _MOST_BYTES:
        raise ValueError(f"{path} is no file of at most {_MOST_BYTES} bytes; give a smaller one")
    try:
        _check_plain(yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader))
        return _load(source, config_path)
    except RecursionError:
        raise ValueError(f"{path} is nested too deep; give plainer values") from None
    except (yaml.YAMLError, OmegaConfBaseException, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({_reason(error)}); mend it") from None


# Not a source of our own: the worker of a launcher, which gets the sources of its parent, would refuse a second one.
FileConfigSource.load_config = load_config  # type: ignore[assignment,method-assign]


def _reason(error: Exception) -> str:
    return " ".join(str(error).partition("\n    full_key:")[0].split())


def _check_plain(node: Any) -> None:
    """Refuse what is no mapping, and what is too much once its aliases are followed."""
    if not isinstance(node, (yaml.MappingNode, type(None))):
        raise ValueError("it holds no NAME: VALUE lines")
    count, depth = _extent(node, {})
    if count > _MOST_NODES or depth > _DEEPEST:
        raise ValueError(f"it is nested deeper than {_DEEPEST}, or holds more than {_MOST_NODES} values")


def _extent(node: Any, known: dict[int, tuple[int, int]]) -> tuple[int, int]:
    """How many values there are, and how deep, when every alias is written out."""
    if id(node) not in known:
        known[id(node)] = _MOST_NODES + 1, 0  # what refers to itself has no end
        entries = node.value if isinstance(node, yaml.CollectionNode) else []
        nodes = [each for pair in entries for each in pair] if isinstance(node, yaml.MappingNode) else entries
        parts = [_extent(each, known) for each in nodes]
        known[id(node)] = 1 + sum(count for count, _ in parts), 1 + max((depth for _, depth in parts), default=0)
    return known[id(node)]
