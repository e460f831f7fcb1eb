"""Custom YAML files (--config-dir, --config-path), which must be plain and small."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from hydra._internal.core_plugins import file_config_source, importlib_resources_config_source
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.plugins import Plugins
from omegaconf.errors import OmegaConfBaseException

from dllm.files import check_readable

# Packages of YAML files, which are imported: those of this package, of Hydra and of its plugins.
_PACKAGES = re.compile(r"(dllm|hydra|hydra_plugins\.\w+)\.conf(\.\w+)*")
_MOST_BYTES, _MOST_NODES, _DEEPEST = 1 << 20, 10_000, 20


class FileConfigSource(file_config_source.FileConfigSource):
    """Hydra's reader of folders, with limits on files and YAML aliases, in which other folders are no groups.

    It has the name of Hydra's class, since joblib workers check by name whether it is registered.
    """

    options: frozenset[str] = frozenset()  # of the command

    def is_group(self, config_path: str) -> bool:
        """Whether it is a config group; a folder of other files may have the name of an option, such as out."""
        return super().is_group(config_path) and config_path not in self.options

    def load_config(self, config_path: str) -> Any:
        """Read one file after validation."""
        path = Path(self.path, self._normalize_file_name(config_path))
        if not path.exists():
            return super().load_config(config_path)
        check_readable("--config-dir", path)
        if not path.is_file() or path.stat().st_size > _MOST_BYTES:
            raise ValueError(f"{path} is not a file of at most {_MOST_BYTES} bytes; give a smaller one")
        try:
            _check_plain(yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader))
            return super().load_config(config_path)
        except RecursionError:
            raise ValueError(f"{path} is nested too deep; give plainer values") from None
        except (yaml.YAMLError, OmegaConfBaseException, ValueError) as error:
            raise ValueError(f"{path} cannot be read ({_reason(error)}); fix it") from None


class ImportlibResourcesConfigSource(importlib_resources_config_source.ImportlibResourcesConfigSource):
    """Hydra's reader of packages, which imports no others. Its name is Hydra's as well."""

    def __init__(self, provider: str, path: str) -> None:
        super().__init__(provider=provider, path=path)
        if not _PACKAGES.fullmatch(self.path):
            raise ValueError(f"pkg://{self.path} names code to import; give the folder of its files")


def register(options: Iterable[str]) -> None:
    """Register these readers in Hydra.

    Args:
        options: of the command, but for its config groups.
    """
    FileConfigSource.options = frozenset(options)
    Plugins.instance()  # otherwise Hydra would register its own later
    for source in (FileConfigSource, ImportlibResourcesConfigSource):
        SourcesRegistry.instance().types[source.scheme()] = source


def _reason(error: Exception) -> str:
    return " ".join(str(error).partition("\n    full_key:")[0].split())


def _check_plain(node: Any) -> None:
    """Reject anything but a mapping, and too many values after expanding aliases."""
    if not isinstance(node, (yaml.MappingNode, type(None))):
        raise ValueError("it has no NAME: VALUE lines")
    count, depth = _extent(node, {})
    if count > _MOST_NODES or depth > _DEEPEST:
        raise ValueError(f"it is nested deeper than {_DEEPEST}, or has more than {_MOST_NODES} values")


def _extent(node: Any, known: dict[int, tuple[int, int]]) -> tuple[int, int]:
    """Number of values and depth, with all aliases expanded."""
    if id(node) not in known:
        known[id(node)] = _MOST_NODES + 1, 0  # for cyclic references
        entries = node.value if isinstance(node, yaml.CollectionNode) else []
        nodes = [each for pair in entries for each in pair] if isinstance(node, yaml.MappingNode) else entries
        parts = [_extent(each, known) for each in nodes]
        known[id(node)] = 1 + sum(count for count, _ in parts), 1 + max((depth for _, depth in parts), default=0)
    return known[id(node)]
