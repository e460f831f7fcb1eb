"""References between options (${NAME}), which may double each other: a command resolves so many, and no more."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from omegaconf import Container, DictConfig, ListConfig
from omegaconf import base as omegaconf_base
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException

_MOST, _LETTERS = 5000, 10**7
_SAID = "references to other options multiply; write the values themselves"
_resolve = omegaconf_base.Container.resolve_parse_tree
_spent = {"references": 0, "letters": 0}


@contextmanager
def counted() -> Iterator[None]:
    """Let OmegaConf count what it resolves."""
    _spent.update(references=0, letters=0)
    with patch.object(omegaconf_base.Container, "resolve_parse_tree", _counted):
        yield


def check(node: DictConfig) -> None:
    """Begin to count anew, and resolve all options of a configuration once.

    Raises:
        ValueError: they are too many, or too long.
    """
    _spent.update(references=0, letters=0)
    waiting: list[Container] = [node]
    while waiting:
        each: Any = waiting.pop()
        for name in list(each) if isinstance(each, DictConfig) else range(len(each)):
            try:
                value = each[name]
            except OmegaConfBaseException:  # known later, or an error of its own
                value = None
            if _exhausted():
                raise ValueError(f"{each._get_full_key(name)}: {_SAID}")
            if isinstance(value, (DictConfig, ListConfig)):
                waiting.append(value)


def _exhausted() -> bool:
    return _spent["references"] > _MOST or _spent["letters"] > _LETTERS


def _counted(self: Any, *arguments: Any, **options: Any) -> Any:
    if not _exhausted():
        value = _resolve(self, *arguments, **options)
        _spent["references"] += 1
        _spent["letters"] += len(value) if isinstance(value, str) else 0
        if not _exhausted():
            return value
    raise InterpolationResolutionError(_SAID)
