"""Asynchronous transfer of small arrays from the host to the device."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor


class HostCopy:
    """A copy on the host of what a device computes, which goes on meanwhile.

    Args:
        most: of the largest that is copied, on its device.
    """

    def __init__(self, most: Tensor) -> None:
        self._pinned = torch.zeros_like(most, device="cpu").pin_memory() if most.is_cuda else None
        self._ready: torch.cuda.Event | None = None
        self._values = most

    def begin(self, values: Tensor) -> None:
        """Copy once these values, the first rows of the largest, are computed."""
        self._values = values
        if self._pinned is not None:
            self._values = self._pinned[: len(values)].copy_(values, non_blocking=True)
            self._ready = torch.cuda.Event()
            self._ready.record(torch.cuda.current_stream(values.device))  # the current device may be another

    def end(self) -> NDArray[np.int64]:
        """Wait for it. The next copy overwrites it."""
        if self._ready is not None:
            self._ready.synchronize()
        read: NDArray[np.int64] = self._values.cpu().numpy()
        return read


def put(device: torch.device, array: NDArray[np.generic]) -> Tensor:
    """An array as a tensor on a device."""
    tensor = torch.as_tensor(array, device="cpu")
    # A copy from pageable memory would synchronize.
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def send(device: torch.device, *arrays: NDArray[np.integer] | NDArray[np.bool_]) -> list[Int[Tensor, ...]]:
    """Arrays as integer tensors on a device, in a single transfer."""
    flat = put(device, np.concatenate([each.ravel() for each in arrays]).astype(np.int64, copy=False))
    parts = flat.split([each.size for each in arrays])
    return [part.view(each.shape) for part, each in zip(parts, arrays, strict=True)]
