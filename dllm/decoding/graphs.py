"""CUDA graphs: a forward over a window is a thousand small kernels, dominated by launch overhead.

A forward whose shape recurs is captured and replayed from then on: its inputs (tokens, positions, columns, selected
slots) are copied to the static inputs of the graph. Keys and values have fixed addresses. `Layout.recurring` widens a
forward to one of few shapes. Those over many columns keep the device busy anyway and are launched as usual.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dllm.models.base import MaskedDiffusionModel
from dllm.models.transformer import KVStore

_WIDEST = 512  # columns of a forward, over all sequences, up to which launch overhead dominates
_AFTER = 1  # forwards of a shape that are launched before it is captured, which takes as long as a few of them
_MOST = 64  # graphs kept
_FEWEST = 16  # projected positions
# Fastest first for few queries on an H200: 13, 35 and 18 us a layer. cuDNN is last since it plans each new shape.
_ATTENTION = [
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.MATH,
]


@runtime_checkable
class FixedStore(Protocol):
    """A store with a fixed address, accessed through an index that differs between forwards.

    Attributes:
        memory: key, equal for the same memory.
        index: computed columns, within that memory.
    """

    memory: Hashable
    index: Int[Tensor, "A C"]

    def through(self, index: Int[Tensor, "A C"]) -> KVStore:
        """The same with the index given by another tensor."""
        ...


@runtime_checkable
class Graph(Protocol):
    """A captured graph."""

    def replay(self) -> None:
        """Run it again."""
        ...


class Capture:
    """Captures functions on a CUDA device.

    Args:
        device: of all tensors.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._aside = device, torch.cuda.Stream(device)
        # Graphs are replayed one at a time, so they can share a memory pool.
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], Tensor]) -> tuple[Graph, Tensor]:
        """Capture a function without arguments; each replay overwrites the same result tensor."""
        with torch.cuda.device(self._device):
            self._aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._aside):  # warm-up: libraries initialize at their first call
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
    hidden: Float[Tensor, "N d"]


class Forward:
    """The backbone, replayed from graphs where that is faster.

    Args:
        backbone: the denoiser.
        graphs: whether to use graphs; None: if the whole model is in one process, on one CUDA device and not quantised.
        capture: makes a graph; None for `Capture`.
    """

    def __init__(
        self,
        backbone: MaskedDiffusionModel,
        graphs: bool | None = None,
        capture: Callable[[Callable[[], Tensor]], tuple[Graph, Tensor]] | None = None,
    ) -> None:
        self.backbone, self.graphs = backbone, graphs
        if graphs is None:
            ordinary = getattr(backbone, "hf_quantizer", None) is None and not backbone.is_divided
            self.graphs = ordinary and {each.device.type for each in backbone.parameters()} == {"cuda"}
            self.graphs &= len({each.device for each in backbone.parameters()}) == 1
        self._capture = capture
        self._seen: Counter[Hashable] = Counter()
        self._captured: OrderedDict[Hashable, _Captured] = OrderedDict()

    @property
    def widest(self) -> int:
        """Columns of a forward, over all sequences, up to which it is replayed."""
        return _WIDEST if self.graphs else 0

    def __call__(
        self,
        tokens: Int[Tensor, "A C"],
        mask: Bool[Tensor, "A S"] | Bool[Tensor, "A 1 C S"] | None,
        positions: Int[Tensor, "A C"],
        store: KVStore | None,
        select: Int[Tensor, " N"],
    ) -> Float[Tensor, "N V"]:
        """Logits of the selected positions."""
        with sdpa_kernel(_ATTENTION, set_priority=True) if tokens.is_cuda else nullcontext():
            return self._replayed(tokens, mask, positions, store, select)

    def _replayed(
        self, tokens: Tensor, mask: Tensor | None, positions: Tensor, store: KVStore | None, select: Tensor
    ) -> Tensor:
        if tokens.numel() > self.widest or not isinstance(store, FixedStore):
            return self.backbone(tokens, mask, positions, store, select).logits
        # The number of requested positions varies between steps: it is padded to the next power of two.
        places = F.pad(select, (0, max(_FEWEST, 1 << (len(select) - 1).bit_length()) - len(select)))
        key = store.memory, tokens.shape, len(places), mask is None
        self._seen[key] += 1
        if self._seen[key] <= _AFTER:  # a shape that does not recur is not worth capturing
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
        return self.backbone.project(found.hidden[: len(select)])

    def _new(self, store: FixedStore, inputs: tuple[Tensor, ...]) -> _Captured:
        if self._capture is None:
            self._capture = Capture(inputs[0].device)
        own = tuple(each.clone() for each in inputs)
        tokens, positions, index, places, *masks = own
        bound, mask = store.through(index), masks[0] if masks else None
        # Logits stay outside: each graph keeps the memory of its result.
        run = self.backbone.hidden_states
        graph, hidden = self._capture(lambda: run(tokens, mask, positions, bound, places))
        return _Captured(graph, own, hidden)
