"""Moving small arrays from the host to the device together: one transfer costs what ten would."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor


def send(device: torch.device, *arrays: NDArray[np.integer] | NDArray[np.bool_]) -> list[Int[Tensor, ...]]:
    """The arrays as tensors of whole numbers on a device."""
    flat = torch.as_tensor(np.concatenate([each.ravel() for each in arrays]), dtype=torch.long, device=device)
    parts = flat.split([each.size for each in arrays])
    return [part.view(each.shape) for part, each in zip(parts, arrays, strict=True)]
