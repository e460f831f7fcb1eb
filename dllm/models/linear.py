"""Linear layers with the same input, computed as one matrix product where they can be.

Few columns take as long as reading the weights, and one product reads them faster than three. The layers keep their
published names: joined layers are views of one tensor, so that they load, save, train and move as before, and a layer
that was replaced (quantised but for `float8`, or with an adapter) is computed apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules import module as every

from dllm.models import float8

Layer: TypeAlias = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Rows:
    """Some of the outputs of a linear layer, those of its rows `low` to `high`."""

    whole: Any
    low: int
    high: int

    def __call__(self, x: Float[Tensor, "*B d"]) -> Float[Tensor, "*B e"]:
        rows = slice(self.low, self.high)
        if not is_plain(self.whole) or self.high - self.low == self.whole.out_features:
            return self.whole(x)[..., rows]
        bias = self.whole.bias
        return F.linear(x, self.whole.weight[rows], None if bias is None else bias[rows])


def outputs(x: Float[Tensor, "*B d"], *layers: Layer) -> tuple[Tensor, ...]:
    """The output of each layer, by as few products as the layers allow.

    Args:
        x: their common input.
        *layers: those that are rows of one layer, or were joined, must follow each other in that order.
    """
    results: list[Tensor] = []
    while len(results) < len(layers):
        results += _leading(x, layers[len(results) :])
    return tuple(results)


def _leading(x: Tensor, layers: Sequence[Layer]) -> Sequence[Tensor]:
    """The outputs of the first layer and of those that are computed with it."""
    first = layers[0]
    if isinstance(first, Rows):
        run = _run(layers, _continues)
        sizes = [each.high - each.low for each in run]
        return Rows(first.whole, first.low, run[-1].high)(x).split(sizes, -1)
    run = [first] if torch.is_grad_enabled() else _run(layers, _is_next)
    if len(run) == 1:
        return [first(x)]
    sizes = [each.out_features for each in run]
    together = [each.as_strided((sum(sizes), *each.shape[1:]), each.stride()) for each in _tensors(first)]
    product = float8.linear if isinstance(first, float8.Float8Linear) else F.linear
    return product(x, *together).split(sizes, -1)


def _run(layers: Sequence[Any], continues: Callable[[Any, Any], bool]) -> list[Any]:
    run = [layers[0]]
    for layer in layers[1:]:
        if not continues(run[-1], layer):
            break
        run.append(layer)
    return run


def _continues(before: Rows, layer: Any) -> bool:
    return isinstance(layer, Rows) and layer.whole is before.whole and layer.low == before.high


def _is_next(before: Any, layer: Any) -> bool:
    """Whether the weights and biases of a layer follow those of another in the same memory."""
    left, right = _tensors(before), _tensors(layer)
    return type(before) is type(layer) and 0 < len(left) == len(right) and all(map(_adjacent, left, right))


def _adjacent(left: Tensor, right: Tensor) -> bool:
    return (
        left.data_ptr() + left.nbytes == right.data_ptr()
        and left.dtype == right.dtype
        and left.shape[1:] == right.shape[1:]
        and left.untyped_storage().data_ptr() == right.untyped_storage().data_ptr()
        and left.is_contiguous()
        and right.is_contiguous()
    )


def _tensors(layer: Any) -> list[Tensor]:
    """The tensors of a layer that have a row for each output; none if it is only computed by itself."""
    if isinstance(layer, float8.Float8Linear) and float8.row_scaled(layer.weight) and not is_hooked(layer):
        own = [*layer.rows, layer.bias]
    elif is_plain(layer):
        own = [layer.weight, layer.bias]
    else:
        own = []
    return [each for each in own if each is not None]


def is_plain(layer: Any) -> bool:
    """Whether a layer is a matrix product with ordinary weights, and nothing else runs with it."""
    return (
        type(layer) is nn.Linear
        and type(layer.weight) is nn.Parameter
        and type(layer.weight.data) is Tensor
        and not is_hooked(layer)
    )


def is_hooked(module: nn.Module) -> bool:
    """Whether something runs with the forward of a module, such as a hook that fetches its weights."""
    of_all = every._global_forward_hooks or every._global_forward_pre_hooks
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module) or of_all)


def joinable(*layers: Any) -> bool:
    """Whether the weights and biases of layers can be stored in one tensor."""
    own = [_tensors(layer) for layer in layers]
    kinds = {(type(layer), len(each)) for layer, each in zip(layers, own, strict=True)}
    if len(kinds) != 1 or not own[0]:
        return False
    alike = [{(each.shape[1:], each.dtype, each.device) for each in same} for same in zip(*own, strict=True)]
    return all(len(each) == 1 for each in alike) and not own[0][0].is_meta


def join(*layers: Any) -> None:
    """Store the weights of `joinable` layers with the same input one after the other in one tensor.

    Without gradients, `outputs` then computes them as one product.
    """
    for same in zip(*map(_tensors, layers), strict=True):
        together = torch.cat([each.data for each in same])
        for each, view in zip(same, together.split([len(each) for each in same]), strict=True):
            each.data = view


def join_products(blocks: Iterable[Any]) -> None:
    """Join the layers of transformer blocks that have the same input, where they can be."""
    for block in blocks:
        float8.adopt(block)
        for layers in block.parts.of_one_input if hasattr(block, "parts") else ():
            if joinable(*layers):
                join(*layers)
