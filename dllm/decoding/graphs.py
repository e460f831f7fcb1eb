"""CUDA graphs: a forward over a window is a thousand small kernels, dominated by launch overhead.

A forward whose shape recurs is captured and replayed from then on: its inputs (tokens, positions, columns, selected
slots) are copied to the static inputs of the graph, except those that are there already. Keys and values have fixed
addresses. `Layout.recurring` widens a forward to one of few shapes. Those over very many columns keep the device busy
while their kernels are launched as usual.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dllm.models.base import MaskedDiffusionModel
from dllm.models.experts import everywhere
from dllm.models.transformer import KVStore

_WIDEST = 2048  # columns of a forward, over all sequences, up to which launching takes longer than computing
_NARROW = 512  # up to which it takes several times as long
# Forwards of a shape that are launched before it is captured, which takes as long as a few of them: narrow and wide.
_AFTER, _AFTER_WIDE = 1, 3
_MOST = 64  # graphs kept
_SHAPES = 4096  # shapes counted
_FEWEST = 16  # projected positions
_FEW = 128  # queries of one sequence for which flash attention is faster than cuDNN's
# Fastest first on an H200, for 1,024 keys: 32 queries of one sequence take 14, 35 and 17 us a layer, of 16 sequences
# 107 (flash) and 71 (cuDNN). cuDNN plans each new shape, so only captured forwards begin with it.
_FEW_QUERIES = [
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.MATH,
]
_MANY_QUERIES = [SDPBackend.CUDNN_ATTENTION, *(each for each in _FEW_QUERIES if each != SDPBackend.CUDNN_ATTENTION)]


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
            with torch.cuda.stream(self._aside):  # libraries initialize at their first call
                run()
            torch.cuda.current_stream().wait_stream(self._aside)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, stream=self._aside):
                result = run()
        return graph, result


@dataclass
class _Captured:
    """A captured forward.

    Attributes:
        graph: of it.
        inputs: its static inputs.
        hidden: its result.
        given: what was copied to the inputs last. Nobody writes to inputs of a forward, so the same tensors are not
            copied again.
    """

    graph: Graph
    inputs: tuple[Tensor, ...]
    hidden: Float[Tensor, "N d"]
    given: tuple[Tensor | None, ...]

    def replay(self, inputs: tuple[Tensor, ...]) -> Float[Tensor, "N d"]:
        """The result for other inputs, the first of which are the selected positions, of any number up to its own."""
        count, given = len(inputs[0]), self.given
        self.given = (None,) * len(given)  # if it is interrupted
        for kept, before, fresh in zip((self.inputs[0][:count], *self.inputs[1:]), given, inputs, strict=True):
            if fresh is not before:
                kept.copy_(fresh)
        self.given = inputs
        self.graph.replay()
        return self.hidden[:count]


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
        # In a graph, which has fixed shapes, experts without a grouped product are computed at every position.
        self._widest = _NARROW if any(map(everywhere, backbone.modules())) else _WIDEST
        self._capture = capture
        self.launches = 0  # forwards that were launched kernel by kernel
        self._seen: Counter[Hashable] = Counter()
        self._captured: OrderedDict[Hashable, _Captured] = OrderedDict()

    @property
    def widest(self) -> int:
        """Columns of a forward, over all sequences, up to which it is replayed."""
        return self._widest if self.graphs else 0

    def __call__(
        self,
        tokens: Int[Tensor, "A C"],
        mask: Bool[Tensor, "A S"] | Bool[Tensor, "A 1 C S"] | None,
        positions: Int[Tensor, "A C"],
        store: KVStore | None,
        select: Int[Tensor, " N"],
    ) -> Float[Tensor, "N V"]:
        """Logits of the selected positions."""
        fixed = store if isinstance(store, FixedStore) else None
        if tokens.numel() > self.widest or fixed is not store:
            return self._launched(tokens, mask, positions, store, select)
        # The number of requested positions varies between steps: it is padded to the next power of two.
        places = max(_FEWEST, 1 << (len(select) - 1).bit_length())
        memory, index = (None, None) if fixed is None else (fixed.memory, fixed.index)
        key = memory, tokens.shape, places, None if mask is None else mask.shape
        if len(self._seen) > _SHAPES:
            self._seen.clear()
        self._seen[key] += 1
        if self._seen[key] <= (_AFTER if tokens.numel() <= _NARROW else _AFTER_WIDE):
            return self._launched(tokens, mask, positions, store, select)
        inputs = select, tokens, positions, *(each for each in (index, mask) if each is not None)
        if key not in self._captured:
            self._captured[key] = self._new(fixed, mask is not None, places, inputs)
            if len(self._captured) > _MOST:
                self._seen.pop(self._captured.popitem(last=False)[0], None)
        self._captured.move_to_end(key)
        return self.backbone.project(self._captured[key].replay(inputs))

    def _launched(
        self, tokens: Tensor, mask: Tensor | None, positions: Tensor, store: KVStore | None, select: Tensor
    ) -> Tensor:
        self.launches += 1
        with _fastest(tokens, first=False):
            return self.backbone(tokens, mask, positions, store, select).logits

    def _new(self, store: FixedStore | None, masked: bool, places: int, inputs: tuple[Tensor, ...]) -> _Captured:
        if self._capture is None:
            self._capture = Capture(inputs[0].device)
        select, *others = (each.clone() for each in inputs)
        select = F.pad(select, (0, places - len(select)))
        tokens, positions, *optional = others
        bound = None if store is None else store.through(optional[0])
        mask = optional[-1] if masked else None
        # Logits stay outside: each graph keeps the memory of its result.
        run = self.backbone.hidden_states
        with _fastest(tokens, first=True):
            graph, hidden = self._capture(lambda: run(tokens, mask, positions, bound, select))
        return _Captured(graph, (select, *others), hidden, inputs)


def _fastest(tokens: Int[Tensor, "A C"], first: bool) -> AbstractContextManager[None]:
    """Attention by the fastest kernel.

    Args:
        tokens: of the forward.
        first: whether planning for a new shape does not matter.
    """
    if not tokens.is_cuda:
        return nullcontext()
    many = first and (tokens.shape[0] > 1 or tokens.shape[1] > _FEW)
    return sdpa_kernel(_MANY_QUERIES if many else _FEW_QUERIES, set_priority=True)
