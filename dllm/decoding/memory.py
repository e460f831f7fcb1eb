"""Device memory and CUDA graphs, which outlive the engine that they were made for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dllm.decoding.graphs import Forward
from dllm.models.base import MaskedDiffusionModel


class Memory:
    """What one engine at a time works in, and the next one after it.

    Args:
        backbone: the denoiser.
    """

    def __init__(self, backbone: MaskedDiffusionModel) -> None:
        self._backbone, self._weights = backbone, _weights(backbone)
        self._forwards: dict[bool | None, Forward] = {}
        self._tensors: dict[str, Tensor] = {}

    @property
    def fits(self) -> bool:
        """Whether the weights are where they were, so that what was captured reads them."""
        return self._weights == _weights(self._backbone)

    def forward(self, cuda_graphs: bool | None) -> Forward:
        """The backbone, replayed from graphs that are there already where they fit."""
        if cuda_graphs not in self._forwards:
            self._forwards[cuda_graphs] = Forward(self._backbone, cuda_graphs)
        return self._forwards[cuda_graphs]

    def tensor(self, name: str, shape: Sequence[int]) -> Tensor:
        """Zeros of a shape, in the model's dtype and on its device: those of this name from before if they fit.

        Args:
            name: unique within an engine.
            shape: of the tensor.
        """
        dtype, device, kept = self._backbone.dtype, self._backbone.device, self._tensors.pop(name, None)
        if kept is None or (kept.shape, kept.dtype, kept.device) != (torch.Size(shape), dtype, device):
            self._forwards.clear()  # what was captured reads and writes the tensors of then
            del kept
            kept = torch.empty(tuple(shape), dtype=dtype, device=device)
        self._tensors[name] = kept
        return kept.zero_()


def _weights(backbone: MaskedDiffusionModel) -> tuple[int, ...]:
    return tuple(each.data_ptr() for each in backbone.parameters())
