"""Attention patterns other than full attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, TypeVar

import numpy as np
from jaxtyping import Bool, Int
from numpy.typing import NDArray
from torch import Tensor

_Positions = TypeVar("_Positions", Tensor, NDArray[np.int64])


@dataclass(frozen=True)
class BlockCausal:
    """A position attends to its own block and to those before it (arXiv 2503.09573, section 3).

    Once a block and all blocks before it are decoded, its keys and values are final.

    Attributes:
        length: positions of a block.
        from_start: blocks are counted from the row's first token, and not from the first position to generate.
        encodes: finished text is computed again, for its own keys and values; the open block attends to these.
    """

    length: int
    from_start: ClassVar[bool] = True
    encodes: ClassVar[bool] = False

    @property
    def grain(self) -> int:
        """Positions of finished text that attend to each other."""
        return self.length

    def __call__(self, queries: Int[Tensor, "B C"], keys: Int[Tensor, "B S"]) -> Bool[Tensor, "B 1 C S"]:
        """The attention mask for queries and keys at these positions."""
        return (keys[:, None, :] < self.end(queries)[:, :, None])[:, None]

    def end(self, positions: _Positions) -> _Positions:
        """The position after the block of each position."""
        return (positions // self.length + 1) * self.length


@dataclass(frozen=True)
class OpenBlock(BlockCausal):
    """The open block attends to all of itself and to finished text, which an encoder computes causally by position.

    Its keys and values are not those that finished text has, so a block is computed again once it is finished.
    """

    from_start = False
    encodes = True

    @property
    def grain(self) -> int:
        return 1
