"""Weights reordered for oneDNN: on a CPU in float32, small forwards then take about two thirds of the time.

`torch.nn.Linear` reorders the weights in each call, which dominates for few columns. Packed weights only support
forwards: such a model cannot be trained, moved or saved.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dllm.models.base import MaskedDiffusionModel
from dllm.models.linear import Rows, joinable

_COLUMNS = 32  # the layout is tuned for this number, but supports any


class PackedLinear(nn.Module):
    """Linear layers with the same input, packed as one.

    Args:
        *layers: the layers; their outputs follow each other.
    """

    def __init__(self, *layers: nn.Linear) -> None:
        super().__init__()
        weights: list[Tensor] = [each.weight for each in layers]
        biases: list[Tensor] = [each.bias for each in layers if each.bias is not None]
        self.out_features = sum(len(each) for each in weights)
        self.bias = torch.cat(biases) if biases else None
        self._packed = torch.ops.mkldnn._reorder_linear_weight(torch.cat(weights).detach(), _COLUMNS)

    def forward(self, x: Float[Tensor, "*B d"]) -> Float[Tensor, "*B e"]:
        return torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, "none", [], "")

    def _apply(self, *_: Any, **__: Any) -> PackedLinear:
        raise ValueError("packed weights cannot be moved or converted; load the model with the device and dtype needed")

    def _save_to_state_dict(self, *_: Any, **__: Any) -> None:
        raise ValueError("packed weights cannot be saved; load the model with pack=false")


def pack(backbone: MaskedDiffusionModel) -> None:
    """Pack the weights of all linear layers, a few at a time to avoid a second copy of the model.

    Raises:
        ValueError: the model is not on a CPU, not in float32, or quantised, or torch has no oneDNN.
    """
    devices = {each.device.type for each in backbone.parameters()}
    if devices != {"cpu"} or backbone.dtype != torch.float32:
        place = f"on {' and '.join(sorted(devices))} in {str(backbone.dtype).removeprefix('torch.')}"
        raise ValueError(f"pack=true is for a CPU and float32, and the model is {place}; use pack=false")
    if not torch.backends.mkldnn.is_available():
        raise ValueError("pack=true needs torch built with oneDNN (mkldnn); use pack=false")
    if getattr(backbone, "hf_quantizer", None) is not None:
        raise ValueError("pack=true does not support quantised weights; use pack=false")
    backbone.remembered_fingerprint = backbone.fingerprint()
    with torch.inference_mode():
        blocks: Iterable[Any] = backbone.blocks
        for block in blocks:
            value = block.parts.value  # some caches compute it for more columns than queries and keys
            for layers in block.parts.of_one_input:
                _pack_together(block, [each for each in layers if each is not value])
        holders = [module for module in backbone.modules() if type(module) is not nn.Linear]
        for module in holders:
            for name in [name for name, child in module.named_children() if type(child) is nn.Linear]:
                setattr(module, name, PackedLinear(getattr(module, name)))


def _pack_together(block: nn.Module, layers: Sequence[Any]) -> None:
    """Replace layers by the rows of one packed layer, which is kept beside the first."""
    if not joinable(*layers):
        return
    places = {id(child): (holder, name) for holder in block.modules() for name, child in holder.named_children()}
    whole, low = PackedLinear(*layers), 0
    for layer in layers:
        holder, name = places[id(layer)]
        delattr(holder, name)
        setattr(holder, name, Rows(whole, low, low + layer.out_features))
        low += layer.out_features
    setattr(places[id(layers[0])][0], "_".join(places[id(each)][1] for each in layers), whole)
