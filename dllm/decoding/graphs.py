"""CUDA graphs: a forward over a window is a thousand small kernels, and launching them takes longer than running them.

A forward whose shape comes again and again is captured and replayed from then on: what differs from one to the next
(tokens, positions, columns, places) is copied to where the graph reads it. The keys and values are where they
always are. Wide forwards keep the device busy anyway and are launched as usual.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dllm.models.base import MaskedDiffusionModel
from dllm.models.transformer import KVStore

_WIDEST = 512  # columns of a forward, over all sequences, that launching still takes longer than computing
_AFTER = 3  # forwards of a shape are launched before it is captured, which takes as long as a few of them
_MOST = 64  # graphs kept
_FEWEST = 16  # places that are projected


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


class Capture:
    """Captures functions on a CUDA device.

    Args:
        device: where everything is.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._aside = device, torch.cuda.Stream(device)
        # One at a time is replayed, so what they need in between may lie in the same place.
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], Tensor]) -> tuple[Graph, Tensor]:
        """Capture a function without arguments; its result is written to the same place at each replay."""
        with torch.cuda.device(self._device):
            self._aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._aside):  # libraries set themselves up at a first call, which is not captured
                for _ in range(2):
                    run()
            torch.cuda.current_stream().wait_stream(self._aside)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, stream=self._aside):
                result = run()
        return graph, result


@dataclass(frozen=True)
class _Captured:
    graph: Graph
    inputs: tuple[Tensor, ...]
    logits: Float[Tensor, "N V"]


class Forward:
    """The backbone, replayed from graphs where that is faster.

    Args:
        backbone: the denoiser.
        graphs: whether to use graphs; None for where the whole model is on one CUDA device and not quantised.
        capture: makes a graph; None for that of the device.
    """

    def __init__(
        self,
        backbone: MaskedDiffusionModel,
        graphs: bool | None = None,
        capture: Callable[[Callable[[], Tensor]], tuple[Graph, Tensor]] | None = None,
    ) -> None:
        self.backbone, self.graphs = backbone, graphs
        if graphs is None:
            ordinary = getattr(backbone, "hf_quantizer", None) is None
            self.graphs = ordinary and {each.device.type for each in backbone.parameters()} == {"cuda"}
            self.graphs &= len({each.device for each in backbone.parameters()}) == 1
        self._capture = capture
        self._seen: Counter[Hashable] = Counter()
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
        # How many places are asked about differs from step to step: up to the next power of two are projected.
        places = F.pad(select, (0, max(_FEWEST, 1 << (len(select) - 1).bit_length()) - len(select)))
        key = store.memory, tokens.shape, len(places), mask is None
        self._seen[key] += 1
        if self._seen[key] <= _AFTER:  # what does not come again is not worth capturing
            return self.backbone(tokens, mask, positions, store, select).logits
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
        if self._capture is None:
            self._capture = Capture(inputs[0].device)
        own = tuple(each.clone() for each in inputs)
        tokens, positions, index, places, *masks = own
        bound, mask = store.through(index), masks[0] if masks else None
        graph, logits = self._capture(lambda: self.backbone(tokens, mask, positions, bound, places).logits)
        return _Captured(graph, own, logits)
