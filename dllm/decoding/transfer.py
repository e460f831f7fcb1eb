"""Moving small arrays from the host to the device, without waiting for what the device is doing."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor


def put(device: torch.device, array: NDArray[np.generic]) -> Tensor:
    """An array as a tensor on a device."""
    tensor = torch.as_tensor(array, device="cpu")
    # Memory that may be swapped out is copied only once all that is under way is done.
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def send(device: torch.device, *arrays: NDArray[np.integer] | NDArray[np.bool_]) -> list[Int[Tensor, ...]]:
    """Arrays as tensors of whole numbers on a device: one transfer costs what ten would."""
    flat = put(device, np.concatenate([each.ravel() for each in arrays]).astype(np.int64, copy=False))
    parts = flat.split([each.size for each in arrays])
    return [part.view(each.shape) for part, each in zip(parts, arrays, strict=True)]
