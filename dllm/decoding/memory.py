"""Device memory and CUDA graphs, which outlive the engine that allocated them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from dllm.cache.base import Cache
from dllm.checks import Notice
from dllm.decoding.graphs import Forward, Replays, unused_hooks, weights_of
from dllm.decoding.setup import Setup
from dllm.models.base import MaskedDiffusionModel

_SHARE = 0.8  # of free memory, that keys and values may take


class Memory:
    """Memory used by one engine at a time, and then by the next.

    Args:
        backbone: the denoiser.
    """

    def __init__(self, backbone: MaskedDiffusionModel) -> None:
        self._backbone, self._weights = backbone, weights_of(backbone)
        if any(each.training and each.p for each in backbone.modules() if isinstance(each, nn.Dropout)):
            warnings.warn("dropout is on, which makes answers random; call lm.backbone.eval()", Notice, stacklevel=2)
        if unused := unused_hooks(backbone):
            warnings.warn(
                f"hooks of {unused[0]} do not run, which only holds other modules; put them on its parts, or on its "
                "layer",
                Notice,
                stacklevel=2,
            )
        self._forwards: dict[bool | None, Forward] = {}
        self._tensors: dict[str, Tensor] = {}
        self.kept: dict[str, Any] = {}  # of samplers

    @property
    def fits(self) -> bool:
        """Whether weights have the same addresses, and adapters and hooks are the same, so that graphs are valid."""
        return self._weights == weights_of(self._backbone)

    def refresh(self) -> None:
        """Forget graphs of weights, adapters or hooks that were changed since they were captured."""
        if any(forward.graphs for forward in self._forwards.values()) and not self.fits:
            for forward in self._forwards.values():
                forward.replays = forward.more_replays()
            self._weights = weights_of(self._backbone)

    def forward(self, cuda_graphs: bool | None) -> Forward:
        """The backbone, with the graphs captured so far."""
        if cuda_graphs not in self._forwards:
            self._forwards[cuda_graphs] = Forward(self._backbone, cuda_graphs)
        return self._forwards[cuda_graphs]

    def replays(self, cuda_graphs: bool | None) -> Callable[[], Replays] | None:
        """What makes graphs of a sampler's own forwards; None without graphs."""
        forward = self.forward(cuda_graphs)
        return forward.more_replays if forward.graphs else None

    def tensor(self, name: str, shape: Sequence[int]) -> Tensor:
        """Zeros of a shape, in the model's dtype and on its device; reuses the tensor of this name if it fits.

        Args:
            name: unique within an engine.
            shape: of the tensor.
        """
        dtype, device, kept = self._backbone.dtype, self._backbone.device, self._tensors.pop(name, None)
        if kept is None or (kept.shape, kept.dtype, kept.device) != (torch.Size(shape), dtype, device):
            self._forwards.clear()  # captured graphs use the old tensors
            del kept
            kept = torch.empty(tuple(shape), dtype=dtype, device=device)
        self._tensors[name] = kept
        return kept.zero_()

    def fitting_length(self, cache: Cache, setup: Setup) -> int:
        """Columns of the longest canvas, at most those of a setup, whose cached tensors take 80% of the free memory.

        Their bytes are a + b * columns, with a and b from what the cache asks for at two lengths.

        Raises:
            ValueError: not even one column fits.
        """
        one, two = (_bytes(cache, replace(setup, length=length)) for length in (1, 2))
        if one == two:
            return setup.length
        room = int(_SHARE * (free_bytes(setup.device) + sum(each.nbytes for each in self._tensors.values())))
        length = 1 + (room - one) // (two - one)
        if (fixed := 2 * one - two) > max(room, two - one):
            raise ValueError(f"cache={cache} takes {fixed} bytes beside its rows, and {room} are free; use less")
        if length < 1:
            raise ValueError(
                f"batch_size={setup.slots} leaves no room for keys and values: a token of a row takes "
                f"{(two - one) // setup.slots} bytes, and {room} are free; use less"
            )
        return min(length, setup.length)


def free_bytes(device: torch.device) -> int:
    """Free memory of a device, including what torch reserves and does not use."""
    if device.type != "cuda":
        return psutil.virtual_memory().available
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def _bytes(cache: Cache, setup: Setup) -> int:
    """Bytes of the tensors that a cache allocates."""
    sizes: list[int] = []

    def tensor(name: str, shape: Sequence[int]) -> Tensor:
        sizes.append(setup.dtype.itemsize * math.prod(shape))
        return torch.empty(tuple(shape), dtype=setup.dtype, device="meta")

    cache.start(replace(setup, tensor=tensor))
    return sum(sizes)
