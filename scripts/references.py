"""References between options (${NAME}), which may double each other: a configuration resolves so many, and no more."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from omegaconf import Container, DictConfig, ListConfig
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException

_MOST, _LETTERS = 5000, 10**7
_SAID = "references to other options multiply; write the values themselves"
_resolve = Container.resolve_parse_tree


class _Count:
    """What was resolved since the count began; once all options were checked, nothing is counted."""

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Count from here."""
        self.counting, self.references, self.letters = True, 0, 0

    @property
    def exhausted(self) -> bool:
        """Whether it is too much."""
        return self.counting and (self.references > _MOST or self.letters > _LETTERS)


_count = _Count()


def _counted(container: Any, *arguments: Any, **options: Any) -> Any:
    """OmegaConf's own method, counted."""
    if not _count.exhausted:
        value = _resolve(container, *arguments, **options)
        _count.references += 1
        _count.letters += len(value) if isinstance(value, str) else 0
        if not _count.exhausted:
            return value
    raise InterpolationResolutionError(_SAID)


@contextmanager
def counted() -> Iterator[None]:
    """Let OmegaConf count what it resolves."""
    _count.begin()
    _replace(_counted)
    try:
        yield
    finally:
        _replace(_resolve)


def _replace(resolve: Any) -> None:
    setattr(Container, "resolve_parse_tree", resolve)  # noqa: B010  # mypy knows no such assignment


def check(node: DictConfig) -> None:
    """Resolve all options of a configuration once, of which each may then be resolved any number of times.

    Raises:
        ValueError: they are too many, or too long.
    """
    _count.begin()
    waiting: list[Container] = [node]
    while waiting:
        each: Any = waiting.pop()
        for name in list(each) if isinstance(each, DictConfig) else range(len(each)):
            try:
                value = each[name]
            except OmegaConfBaseException:  # known later, or an error of its own
                value = None
            if _count.exhausted:
                raise ValueError(f"{each._get_full_key(name)}: {_SAID}")
            if isinstance(value, (DictConfig, ListConfig)):
                waiting.append(value)
    _count.counting = False
