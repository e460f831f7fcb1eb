"""CUDA graphs: a forward over a window is a thousand small kernels, and launching them takes longer than running them.

A forward whose shape was seen before is captured once and replayed from then on: what differs from one to the next
(tokens, positions, columns, places) is copied to where the graph reads it. The keys and values are where they
always are. Wide forwards keep the device busy anyway and are launched as usual.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dllm.backbones.base import MaskedDiffusionModel
from dllm.backbones.transformer import KVStore

_WIDEST = 512  # columns of a forward, over all sequences, that launching still takes longer than computing
_MOST = 64  # graphs kept


@runtime_checkable
class FixedStore(Protocol):
    """A store bound to memory that stays where it is, through an index that differs from forward to forward.

    Attributes:
        memory: equal for what was bound to the same memory.
        index: columns that are computed, within that memory.
    """

    memory: Hashable
    index: Int[Tensor, "A C"]

    def through(self, index: Int[Tensor, "A C"]) -> KVStore:
        """The same with the index read from another tensor."""
        ...


@runtime_checkable
class Graph(Protocol):
    """What is captured."""

    def replay(self) -> None:
        """Run it again."""
        ...


def capture(run: Callable[[], Tensor]) -> tuple[Graph, Tensor]:
    """Capture a function without arguments on a CUDA device; its result is written to the same place at each replay."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):  # libraries set themselves up at their first call, which cannot be captured
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    # One at a time is replayed, so what they need in between may lie in the same place.
    with torch.cuda.graph(graph, pool=_pool()):
        result = run()
    return graph, result


@cache
def _pool() -> Any:
    return torch.cuda.graph_pool_handle()


@dataclass(frozen=True)
class _Captured:
    graph: Graph
    inputs: tuple[Tensor, ...]
    logits: Float[Tensor, "N V"]


class Forward:
    """The backbone, replayed from graphs where that is faster.

    Args:
        backbone: the denoiser.
        graphs: whether to use graphs; None for where the whole model is on one CUDA device.
        capture: makes a graph.
    """

    def __init__(
        self,
        backbone: MaskedDiffusionModel,
        graphs: bool | None = None,
        capture: Callable[[Callable[[], Tensor]], tuple[Graph, Tensor]] = capture,
    ) -> None:
        on_one = backbone.device.type == "cuda" and len({each.device for each in backbone.parameters()}) == 1
        self.backbone, self.graphs, self._capture = backbone, on_one if graphs is None else graphs, capture
        self._seen: set[Hashable] = set()
        self._captured: OrderedDict[Hashable, _Captured] = OrderedDict()

    def __call__(
        self,
        tokens: Int[Tensor, "A C"],
        mask: Bool[Tensor, "A S"] | Bool[Tensor, "A 1 C S"] | None,
        positions: Int[Tensor, "A C"],
        store: KVStore | None,
        select: Int[Tensor, " N"],
    ) -> Float[Tensor, "N V"]:
        """Logits of the selected places."""
        if not self.graphs or tokens.numel() > _WIDEST or not isinstance(store, FixedStore):
            return self.backbone(tokens, mask, positions, store, select).logits
        key = store.memory, tokens.shape, mask is None
        if key not in self._seen:  # what comes once is not worth capturing
            self._seen.add(key)
            return self.backbone(tokens, mask, positions, store, select).logits
        # As many places as there are columns: how many are asked about differs from step to step.
        places = F.pad(select, (0, tokens.numel() - len(select)))
        inputs = tokens, positions, store.index, places, *([] if mask is None else [mask])
        if key not in self._captured:
            self._captured[key] = self._new(store, inputs)
            if len(self._captured) > _MOST:
                self._captured.popitem(last=False)
        self._captured.move_to_end(key)
        found = self._captured[key]
        for kept, fresh in zip(found.inputs, inputs, strict=True):
            kept.copy_(fresh)
        found.graph.replay()
        return found.logits[: len(select)].clone()  # the next replay writes to the same place

    def _new(self, store: FixedStore, inputs: tuple[Tensor, ...]) -> _Captured:
        own = tuple(each.clone() for each in inputs)
        tokens, positions, index, places, *masks = own
        bound, mask = store.through(index), masks[0] if masks else None
        graph, logits = self._capture(lambda: self.backbone(tokens, mask, positions, bound, places).logits)
        return _Captured(graph, own, logits)
