"""Products of float8 weights that torchao quantised, their inputs quantised by one kernel.

torchao quantises the input of every layer anew by several kernels, which over few columns take longer than reading
half the bytes saves. Here it is one kernel for all layers with the same input. The weights stay those of torchao: they
are saved, loaded and told apart as before.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dllm.models.kernels import quantise_rows


class Float8Linear(nn.Linear):
    """A linear layer of `row_scaled` float8 weights; with gradients, or other weights, as any other layer."""

    weight: Any

    @property
    def rows(self) -> tuple[Tensor, Tensor]:
        """The weights (e, d) in float8, and the scale (e, 1) of each row, in float32."""
        return self.weight.qdata, self.weight.scale

    def forward(self, x: Float[Tensor, "*B d"]) -> Float[Tensor, "*B e"]:
        if torch.is_grad_enabled() or not row_scaled(self.weight):  # it may have been replaced
            return super().forward(x)
        return linear(x, *self.rows, self.bias)


def linear(x: Float[Tensor, "*B d"], weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """The product with float8 weights.

    Args:
        x: quantised row by row, so that no row depends on another.
        weight: (e, d) in float8.
        scale: (e, 1), of each row.
        bias: of the outputs.
    """
    if not x.numel():
        return x.new_empty(*x.shape[:-1], len(weight))
    rows, scales = quantise_rows(x.reshape(-1, x.shape[-1]))
    product = torch._scaled_mm(
        rows, weight.t(), scale_a=scales, scale_b=scale.t(), bias=bias, out_dtype=x.dtype, use_fast_accum=True
    )
    return product.view(*x.shape[:-1], len(weight))


def row_scaled(weight: Any) -> bool:
    """Whether a weight is torchao's float8, with a scale for each row, and its input is quantised in the same way."""
    inputs = getattr(weight, "act_quant_kwargs", None)
    if type(weight).__name__ != "Float8Tensor" or inputs is None:
        return False
    bounds = getattr(inputs, "hp_value_lb", None), getattr(inputs, "hp_value_ub", None)
    fast = getattr(getattr(weight, "mm_config", None), "use_fast_accum", True)
    return (
        weight.dtype == torch.bfloat16
        and weight.qdata.dtype == inputs.float8_dtype == torch.float8_e4m3fn
        and weight.scale.shape == (len(weight.qdata), 1)
        and type(inputs.granularity).__name__ == "PerRow"
        and bounds == (None, None)
        and fast
    )


def computes(model: nn.Module) -> bool:
    """Whether torchao quantised a model, and each of its quantised weights is one of a `Float8Linear`."""
    quantiser = getattr(model, "hf_quantizer", None)
    if getattr(getattr(quantiser, "quantization_config", None), "quant_method", None) != "torchao":
        return False
    others = (layer for layer in model.modules() if not (isinstance(layer, Float8Linear) and row_scaled(layer.weight)))
    return all(type(each.data) is Tensor for layer in others for each in layer.parameters(recurse=False))


def adopt(model: nn.Module) -> None:
    """Have the layers with `row_scaled` weights computed by `Float8Linear`."""
    for layer in model.modules():
        if type(layer) is nn.Linear and row_scaled(layer.weight):
            layer.__class__ = Float8Linear
