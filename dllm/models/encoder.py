"""The interface of models that encode finished text and denoise an open block, conditioned on their last prediction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from jaxtyping import Bool, Float, Int
from torch import Tensor

from dllm.models.transformer import KVStore


@dataclass(frozen=True)
class Finished:
    """Finished text that the open blocks attend to.

    Attributes:
        tokens: of the P columns to encode now; the others are in the store.
        positions: of these columns.
        real: False where a sequence has fewer, and another column only fills the forward.
        keys: positions of the S columns attended to.
        visible: (A, S) True at those that are finished text.
        store: keys and values of the S columns, one head of a layer's keys or values side by side; None if all are
            encoded now: S = P.
    """

    tokens: Int[Tensor, "A P"]
    positions: Int[Tensor, "A P"]
    real: Bool[Tensor, "A P"]
    keys: Int[Tensor, "A S"]
    visible: Bool[Tensor, "A S"]
    store: KVStore | None


@dataclass(frozen=True)
class Open:
    """The open blocks.

    Attributes:
        tokens: of the K columns, random ones at undecided positions.
        positions: of the columns.
        real: False after the end of a shorter block.
        signal: what `Encoder.signal` made of the last prediction of each block; zeros where there was none.
    """

    tokens: Int[Tensor, "A K"]
    positions: Int[Tensor, "A K"]
    real: Bool[Tensor, "A K"]
    signal: Float[Tensor, "A K d"]


@runtime_checkable
class Encoder(Protocol):
    """Encodes finished text, and predicts every position of an open block at once."""

    def decode(self, finished: Finished, block: Open) -> Float[Tensor, "A K V"]:
        """Logits of the open blocks, -inf at the id after the vocabulary."""
        ...

    def signal(self, logits: Float[Tensor, "A K V"]) -> Float[Tensor, "A K d"]:
        """What the next forward of a block is told of these logits."""
        ...
