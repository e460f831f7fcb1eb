"""Asynchronous transfer of small arrays from the host to the device."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor


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
