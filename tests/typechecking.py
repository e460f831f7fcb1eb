"""What checks the shapes in annotations while the tests run (see pyproject.toml)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from beartype import BeartypeConf, beartype

F = TypeVar("F", bound=Callable[..., object])

# An int may stand where a float is expected, as the language says.
_checked = beartype(conf=BeartypeConf(is_pep484_tower=True))


def check(function: F) -> F:
    """Check a function that takes or returns tensors; what else may be wrong, the function itself must refuse."""
    return _checked(function) if "Tensor" in str(function.__annotations__) else function
