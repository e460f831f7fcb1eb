"""The bare forward pass of a step: recording the calls of the backbone, and repeating them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dllm.decoding.graphs import Forward
from dllm.models import MaskedDiffusionModel
from dllm.models.transformer import FeatureStore

_FIRST = 5  # warm-up calls of a shape: CUDA graphs are captured by then


@dataclass(frozen=True)
class Call:
    """The shape of one call of the backbone.

    Attributes:
        sequences: A.
        columns: C, computed in each.
        selected: positions that are projected to the vocabulary.
        reuses: cached keys and values of other columns are attended to.
    """

    sequences: int
    columns: int
    selected: int
    reuses: bool


@dataclass(frozen=True)
class Heard:
    """A call that was made.

    Attributes:
        call: its shape.
        in_part: layers compute only some of its columns.
        launched: kernel by kernel, not replayed from a CUDA graph.
    """

    call: Call
    in_part: bool
    launched: bool


class Given:
    """A store with constant keys and values of a whole canvas, without any cost.

    Args:
        backbone: of the keys and values.
        sequences: A.
        columns: C, computed in each.
        canvas: columns attended to.
    """

    def __init__(self, backbone: MaskedDiffusionModel, sequences: int, columns: int, canvas: int) -> None:
        _, heads, size = backbone.kv_shape
        shape = sequences, heads, canvas, size
        self.keys = torch.zeros(shape, dtype=backbone.dtype, device=backbone.device)
        self.values = torch.zeros_like(self.keys)
        self.memory: Hashable = shape
        self.index = torch.zeros((sequences, columns), dtype=torch.long, device=backbone.device)

    def through(self, index: Int[Tensor, "A C"]) -> Given:
        """Itself: nothing is written."""
        return self

    def update(
        self, layer: int, keys: Float[Tensor, "B H C D"], values: Float[Tensor, "B H C D"]
    ) -> tuple[Float[Tensor, "B H S D"], Float[Tensor, "B H S D"]]:
        """Return the constants."""
        return self.keys, self.values


class Bare:
    """Calls a backbone on dummy tokens.

    Args:
        backbone: the denoiser.
        canvas: columns attended to where keys and values are reused.
        cuda_graphs: as in `dllm.Options`.
    """

    def __init__(self, backbone: MaskedDiffusionModel, canvas: int, cuda_graphs: bool | None) -> None:
        self.backbone, self.canvas = backbone, canvas
        self.forward = Forward(backbone, cuda_graphs)
        self._known: set[Call] = set()
        self._given: dict[tuple[int, int], Given] = {}

    def prepare(self, call: Call) -> Callable[[], Tensor]:
        """A function to be timed."""
        device = self.backbone.device
        tokens = torch.zeros((call.sequences, call.columns), dtype=torch.long, device=device)
        positions = torch.arange(call.columns, device=device).expand_as(tokens)
        shape = call.sequences, call.columns
        if call.reuses and shape not in self._given:
            self._given[shape] = Given(self.backbone, *shape, self.canvas)
        store = self._given[shape] if call.reuses else None
        select = torch.arange(call.selected, device=device) % tokens.numel()
        mask = None
        if call.reuses and self.backbone.pattern is not None:  # which is part of every mask
            mask = torch.ones((call.sequences, 1, call.columns, self.canvas), dtype=torch.bool, device=device)
        run = partial(self.forward, tokens, mask, positions, store, select)
        if self.forward.graphs and call not in self._known:
            self._known.add(call)
            for _ in range(_FIRST):
                run()
        return run


def in_part(call: Call, computed: int) -> Call:
    """A call whose layers compute only some columns, approximated by a call with that many columns."""
    return replace(call, columns=-(-computed // call.sequences), reuses=True)


@contextmanager
def listening() -> Iterator[list[Heard]]:
    """Record the forwards."""
    calls: list[Heard] = []
    inner = Forward.__call__

    def noting(self: Forward, tokens: Tensor, mask: Any, positions: Tensor, store: Any, select: Tensor) -> Tensor:
        call, launches = Call(tokens.shape[0], tokens.shape[1], len(select), store is not None), self.launches
        logits = inner(self, tokens, mask, positions, store, select)
        calls.append(Heard(call, isinstance(store, FeatureStore), self.launches > launches))
        return logits

    with patch.object(Forward, "__call__", noting):
        yield calls
