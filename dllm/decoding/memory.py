"""Device memory and CUDA graphs, which outlive the engine that allocated them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dllm.decoding.graphs import Forward
from dllm.models.base import MaskedDiffusionModel


class Memory:
    """Memory used by one engine at a time, and then by the next.

    Args:
        backbone: the denoiser.
    """

    def __init__(self, backbone: MaskedDiffusionModel) -> None:
        self._backbone, self._weights = backbone, _weights(backbone)
        self._forwards: dict[bool | None, Forward] = {}
        self._tensors: dict[str, Tensor] = {}

    @property
    def fits(self) -> bool:
        """Whether the weights have the same addresses, so that captured graphs are valid."""
        return self._weights == _weights(self._backbone)

    def forward(self, cuda_graphs: bool | None) -> Forward:
        """The backbone, with the graphs captured so far."""
        if cuda_graphs not in self._forwards:
            self._forwards[cuda_graphs] = Forward(self._backbone, cuda_graphs)
        return self._forwards[cuda_graphs]

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


def _weights(backbone: MaskedDiffusionModel) -> tuple[int, ...]:
    return tuple(each.data_ptr() for each in backbone.parameters())
