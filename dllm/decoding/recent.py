"""What was made for the last few inputs, so that a step like the last one is not prepared again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from numpy.typing import NDArray

T = TypeVar("T")
_KEPT = 4  # forwards of a step: some rows enter a block, others refresh, others do neither


class Recent(Generic[T]):
    """Results by the host arrays that they are made from; nobody may write to them."""

    def __init__(self) -> None:
        self._made: OrderedDict[tuple[bytes, ...], T] = OrderedDict()

    def __call__(self, inputs: tuple[NDArray[Any], ...], make: Callable[[], T]) -> T:
        """The result for these arrays, whose shapes follow from their contents; made if it is not there."""
        key = tuple(each.tobytes() for each in inputs)
        if key not in self._made:
            self._made[key] = make()
            if len(self._made) > _KEPT:
                self._made.popitem(last=False)
        self._made.move_to_end(key)
        return self._made[key]
