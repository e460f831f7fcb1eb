"""Random numbers of several steps that one forward covers."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count

from jaxtyping import Int
from torch import Tensor

from dllm.decoding.window import Window


class Numbers:
    """Random numbers for the steps in one forward: the same ones wherever the n-th step is looked at.

    A row draws as many in every step of the engine, whatever its batch mates do.

    Args:
        window: the rows.
        steps: that one forward covers.
    """

    def __init__(self, window: Window, steps: int) -> None:
        self._window, self._steps = window, steps
        self._drawn: list[Tensor] = []

    def of(self, step: Int[Tensor, " N"], entry: Int[Tensor, " N"]) -> Callable[[], Tensor]:
        """A `Window.uniform` for some steps of some entries of the window; its n-th call has the n-th numbers."""
        asked = count()

        def draw() -> Tensor:
            number = next(asked)
            if number == len(self._drawn):
                self.draw()
            drawn = self._drawn[number]
            return drawn[step.clamp(max=len(drawn) - 1), entry]

        return draw

    def draw(self) -> None:
        """Draw those that are asked for next."""
        self._drawn.append(self._window.uniform(self._steps))
