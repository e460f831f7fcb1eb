"""CUDA graphs: a forward over a window is a thousand small kernels, dominated by launch overhead.

A forward whose shape recurs is captured and replayed from then on: its inputs (tokens, positions, columns, selected
slots) are copied to the static inputs of the graph, except those that are there already. Keys and values have fixed
addresses. `Layout.recurring` widens a forward to one of few shapes. Those over very many columns keep the device busy
while their kernels are launched as usual.
"""

from __future__ import annotations

import gc
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from dllm.checks import Notice, first_line
from dllm.models import float8
from dllm.models.base import MaskedDiffusionModel
from dllm.models.experts import everywhere
from dllm.models.transformer import KVStore

_WIDEST = 2048  # columns of a forward, over all sequences, up to which launching takes longer than computing
NARROW = 512  # up to which it takes several times as long
# Forwards of a shape that are launched before it is captured, which takes as long as a few of them: narrow and wide.
AFTER, _LATER = 1, 3
_MOST = 64  # graphs kept
_SHAPES = 4096  # shapes counted
_SAMPLE = 16  # values of a weight at most
# Of a layer: its adapters, and the constant of a norm.
_STATE = ("active_adapter", "disable_adapters", "merged_adapters", "scaling", "eps")
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
        self._device = device

    @cached_property
    def _shared(self) -> tuple[torch.cuda.Stream, Any]:
        """A stream of its own, and a memory pool: graphs are replayed one at a time, so they can share it."""
        return torch.cuda.Stream(self._device), torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], Tensor]) -> tuple[Graph, Tensor]:
        """Capture a function without arguments; each replay overwrites the same result tensor."""
        with torch.cuda.device(self._device):
            aside, pool = self._shared
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):  # libraries initialize at their first call
                run()
            torch.cuda.current_stream().wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            # The outer context leaves the stream even if the end of the capture fails. Other threads may do anything.
            with (
                torch.cuda.stream(torch.cuda.current_stream()),
                _without_collection(),
                torch.cuda.graph(graph, pool=pool, stream=aside, capture_error_mode="thread_local"),
            ):
                result = run()
        return graph, result


@contextmanager
def _without_collection() -> Iterator[None]:
    """Without garbage collection: to free another graph, which a cycle of objects may hold, ends a capture."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@dataclass
class _Captured:
    """A captured function.

    Attributes:
        graph: of it.
        inputs: its static inputs.
        result: of it.
        given: what was copied to the inputs last. Nobody writes to inputs of a forward, so the same tensors are not
            copied again.
    """

    graph: Graph
    inputs: tuple[Tensor, ...]
    result: Tensor
    given: tuple[Tensor | None, ...]

    def replay(self, inputs: tuple[Tensor, ...]) -> Tensor:
        """The result for other inputs, the first of which may have fewer entries than the static one."""
        count, given = len(inputs[0]), self.given
        self.given = (None,) * len(given)  # if it is interrupted
        for kept, before, fresh in zip((self.inputs[0][:count], *self.inputs[1:]), given, inputs, strict=True):
            if fresh is not before:
                kept.copy_(fresh)
        self.given = inputs
        self.graph.replay()
        return self.result[:count]


class Replays:
    """Functions of tensors, replayed from graphs once their shapes have recurred; the most recent ones are kept.

    If one cannot be captured, as when a hook waits for the device, all are launched from then on, with a warning.

    Args:
        capture: makes a graph of a function without arguments, and returns its result.
    """

    def __init__(self, capture: Callable[[Callable[[], Tensor]], tuple[Graph, Tensor]]) -> None:
        self._capture = capture
        self._seen: Counter[Hashable] = Counter()
        self._captured: OrderedDict[Hashable, _Captured] = OrderedDict()
        self._failed = False

    def __call__(
        self, key: Hashable, run: Callable[..., Tensor], inputs: tuple[Tensor, ...], after: int, places: int
    ) -> Tensor | None:
        """The result of a function, or None if it shall be launched.

        Args:
            key: equal for the same function of inputs of the same shapes, but for the first one's entries.
            run: the function; it may use other tensors only at their present addresses.
            inputs: of it; results belong to the entries of the first.
            after: how often it is launched before it is captured.
            places: entries that the first input is padded to.
        """
        if len(self._seen) > _SHAPES:
            self._seen.clear()
        self._seen[key] += 1
        if self._seen[key] <= after or self._failed:
            return None
        if key not in self._captured:
            if (new := self._new(run, inputs, places)) is None:
                return None
            self._captured[key] = new
            if len(self._captured) > _MOST:
                self._seen.pop(self._captured.popitem(last=False)[0], None)
        self._captured.move_to_end(key)
        return self._captured[key].replay(inputs)

    def _new(self, run: Callable[..., Tensor], inputs: tuple[Tensor, ...], places: int) -> _Captured | None:
        first, *others = (each.clone() for each in inputs)
        static = F.pad(first, (0, 0) * (first.ndim - 1) + (0, places - len(first))), *others
        try:
            graph, result = self._capture(lambda: run(*static))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self._failed = True
            warnings.warn(
                f"forwards are launched kernel by kernel, which is slower: one cannot be captured "
                f"({first_line(error)}); cuda_graphs=false does not try",
                Notice,
                stacklevel=2,
            )
            return None
        return _Captured(graph, static, result, inputs)


class Forward:
    """The backbone, replayed from graphs where that is faster.

    Args:
        backbone: the denoiser.
        graphs: whether to use graphs; None: if the whole model is in one process, on one CUDA device, and not quantised
            but by `float8`.
        capture: makes a graph; None for `Capture`.

    Attributes:
        replays: the graphs.
    """

    def __init__(
        self,
        backbone: MaskedDiffusionModel,
        graphs: bool | None = None,
        capture: Callable[[Callable[[], Tensor]], tuple[Graph, Tensor]] | None = None,
    ) -> None:
        if graphs is None:
            ordinary = getattr(backbone, "hf_quantizer", None) is None or float8.computes(backbone)
            devices = {each.device for each in backbone.parameters()}
            graphs = ordinary and not backbone.is_divided and [each.type for each in devices] == ["cuda"]
        self.backbone, self.graphs = backbone, graphs
        # In a graph, which has fixed shapes, experts without a grouped product are computed at every position.
        self._widest = NARROW if any(map(everywhere, backbone.modules())) else _WIDEST
        self._capture = capture
        self.replays = self.more_replays()
        self.launches = 0  # forwards that were launched kernel by kernel

    def more_replays(self) -> Replays:
        """Graphs of other functions, in memory of their own."""
        return Replays(self._capture or Capture(self.backbone.device))

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
        inputs = select, tokens, positions, *(each for each in (index, mask) if each is not None)

        def run(select: Tensor, tokens: Tensor, positions: Tensor, *optional: Tensor) -> Tensor:
            bound = None if fixed is None else fixed.through(optional[0])
            with _fastest(tokens, first=True):
                # Logits stay outside: each graph keeps the memory of its result.
                return self.backbone.hidden_states(
                    tokens, None if mask is None else optional[-1], positions, bound, select
                )

        hidden = self.replays(key, run, inputs, AFTER if tokens.numel() <= NARROW else _LATER, places)
        if hidden is None:
            return self._launched(tokens, mask, positions, store, select)
        return self.backbone.project(hidden)

    def _launched(
        self, tokens: Tensor, mask: Tensor | None, positions: Tensor, store: KVStore | None, select: Tensor
    ) -> Tensor:
        self.launches += 1
        with _fastest(tokens, first=False):
            return self.backbone(tokens, mask, positions, store, select).logits


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


def weights_of(model: nn.Module) -> tuple[Any, ...]:
    """The addresses of weights, and the state of what runs with the modules: hooks, and which adapters of PEFT do."""
    state = (
        (
            *each._forward_hooks,
            *each._forward_pre_hooks,
            vars(each).get("forward"),
            *(str(getattr(each, name, "")) for name in _STATE),
        )
        for each in model.modules()
    )
    return *(address for each in model.parameters() for address in _addresses(each)), *state


def unused_hooks(model: nn.Module) -> list[str]:
    """The modules with hooks, or a forward of their own, that no forward computes: those that only hold others.

    Hooks of accelerate, which move weights, are on all modules.
    """
    return [
        name
        for name, each in model.named_modules()
        if type(each).forward is nn.Module.forward
        and (each._forward_hooks or each._forward_pre_hooks or "forward" in vars(each))
        and not hasattr(each, "_hf_hook")
    ]


class Watch:
    """Tells whether weights, adapters or hooks of a model were changed.

    Changes in place are counted by torch, but for those through `.data`, as in merging an adapter: some values of every
    plain weight are read. A change of a few values through `.data`, as of one token's embedding, may not be seen.

    Args:
        model: the model.
    """

    def __init__(self, model: MaskedDiffusionModel) -> None:
        self._model = model
        self._known: tuple[Any, ...] = ()
        self._samples: list[Tensor] = []

    def __call__(self) -> tuple[Any, ...]:
        """What differs after a change."""
        weights = [*self._model.parameters(), *self._model.buffers()]
        known = (
            self._model.settings(),
            *weights_of(self._model),
            *(-1 if each.is_inference() else each._version for each in weights),
        )
        if known != self._known:
            self._known, self._samples = known, [_sample(each.data) for each in weights if _is_plain(each)]
        kinds: dict[Any, list[Tensor]] = {}
        for each in self._samples:
            kinds.setdefault((each.dtype, each.device), []).append(each)
        return *known, *(torch.cat(some).view(torch.uint8).cpu().numpy().tobytes() for some in kinds.values())


def _is_plain(weight: Tensor) -> bool:
    return type(weight.data) is Tensor and not weight.is_meta and weight.numel() > 0 and weight.is_contiguous()


def _sample(weight: Tensor) -> Tensor:
    """A view of some values."""
    return weight.view(-1)[:: -(-weight.numel() // _SAMPLE)]


def _addresses(tensor: Tensor) -> list[int]:
    """Of the plain tensors of a tensor: quantised ones have several."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor.data_ptr()]
    return [address for name in tensor.__tensor_flatten__()[0] for address in _addresses(getattr(tensor, name))]
