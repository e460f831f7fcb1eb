"""Weights reordered for oneDNN: on a CPU in float32, small forwards then take about two thirds of the time.

`torch.nn.Linear` reorders the weights in each call, which dominates for few columns. Packed weights only support
forwards: such a model cannot be trained, moved or saved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
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

    def weight(self, low: int, high: int) -> Float[Tensor, "e d"]:
        """The weights of some outputs, as they were before packing."""
        return self._packed.to_dense()[low:high]

    def _apply(self, *_: Any, **__: Any) -> PackedLinear:
        raise ValueError("packed weights cannot be moved or converted; load the model with the device and dtype needed")

    def _save_to_state_dict(self, *_: Any, **__: Any) -> None:
        raise ValueError("packed weights cannot be saved; load the model with pack=false")


def why_not(backbone: MaskedDiffusionModel) -> str | None:
    """Why the weights cannot be packed; None if they can."""
    devices = {each.device.type for each in backbone.parameters()}
    if devices != {"cpu"} or backbone.dtype != torch.float32:
        place = f"on {' and '.join(sorted(devices))} in {str(backbone.dtype).removeprefix('torch.')}"
        return f"is for a CPU and float32, and the model is {place}"
    if not torch.backends.mkldnn.is_available():
        return "needs torch built with oneDNN (mkldnn)"
    if getattr(backbone, "hf_quantizer", None) is not None:
        return "does not support quantised weights"
    if not all(hasattr(block, "parts") for block in backbone.blocks):
        return "does not support the layers of this model, which are those of transformers"
    return None


def pack(backbone: MaskedDiffusionModel) -> None:
    """Pack the weights of all linear layers, a few at a time to avoid a second copy of the model.

    Raises:
        ValueError: the model is not on a CPU, not in float32, or quantised, or torch has no oneDNN.
    """
    if (reason := why_not(backbone)) is not None:
        raise ValueError(f"pack=true {reason}; use pack=false")
    packing = _Packing(backbone)
    with torch.inference_mode():
        blocks: Iterable[Any] = backbone.blocks
        for block in blocks:
            value = block.parts.value  # some caches compute it for more columns than queries and keys
            for layers in block.parts.of_one_input:
                together = [each for each in layers if each is not value]
                if joinable(*together):
                    packing.replace_together(together)
        for name in [name for name, module in backbone.named_modules() if type(module) is nn.Linear]:
            packing.replace(name)
    backbone.packed_weights = packing.weights


class _Packing:
    """Replaces the linear layers of a model, and tells where their weights are found by name."""

    def __init__(self, backbone: nn.Module) -> None:
        self._names = {id(module): name for name, module in backbone.named_modules()}
        self._root = backbone
        self.weights: dict[str, Callable[[], Tensor]] = {
            name: partial(_itself, weight) for name, weight in backbone.state_dict(keep_vars=True).items()
        }

    def replace(self, name: str) -> None:
        """Pack the layer of a name."""
        layer: Any = self._root.get_submodule(name)
        holder, own = self._place(layer)
        setattr(holder, own, self._packed([layer]))

    def replace_together(self, layers: Sequence[nn.Linear]) -> None:
        """Replace layers by the rows of one packed layer, which is kept beside the first."""
        whole, low = self._packed(layers), 0
        places = [self._place(layer) for layer in layers]
        for (holder, name), layer in zip(places, layers, strict=True):
            delattr(holder, name)
            setattr(holder, name, Rows(whole, low, low + layer.out_features))
            low += layer.out_features
        setattr(places[0][0], "_".join(name for _, name in places), whole)

    def _place(self, layer: nn.Linear) -> tuple[nn.Module, str]:
        holder, _, name = self._names[id(layer)].rpartition(".")
        return self._root.get_submodule(holder), name

    def _packed(self, layers: Sequence[nn.Linear]) -> PackedLinear:
        whole, low = PackedLinear(*layers), 0
        for layer in layers:
            name = f"{self._names[id(layer)]}.weight"
            self.weights[name] = partial(whole.weight, low, low + layer.out_features)
            low += layer.out_features
        return whole


def _itself(weight: Tensor) -> Tensor:
    return weight
