"""What checks the shapes in annotations while the tests run (see pyproject.toml)."""

from __future__ import annotations

from typing import Any

from beartype import BeartypeConf, beartype

# An int may stand where a float is expected, as the language says.
_checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
_known: dict[tuple[Any, ...], Any] = {}


def check(function: Any) -> Any:
    """Check a function that takes or returns tensors; what else may be wrong, the function itself must refuse.

    What comes here are jaxtyping's stand-ins: they have the annotations of the function that is checked, and do
    nothing. A function within another one is made, and stood in for, whenever that one is called; to write its checks
    anew each time would take longer than the checks themselves.
    """
    annotations = str(function.__annotations__)
    if "Tensor" not in annotations:
        return function
    assert function.__closure__ is None, "not a stand-in: others of this name may do something else"
    key = (function.__module__, function.__qualname__, function.__code__, annotations)
    if key not in _known:
        _known[key] = _checked(function)
    return _known[key]
