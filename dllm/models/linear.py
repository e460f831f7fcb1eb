"""Linear layers with the same input, computed as one matrix product where they can be.

Few columns take as long as reading the weights, and one product reads them faster than three. The layers keep their
published names: joined layers are views of one tensor, so that they load, save, train and move as before, and a layer
that was replaced (quantised, or with an adapter) is computed apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

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
    run = _run(layers, _is_next) if not torch.is_grad_enabled() and is_plain(first) else [first]
    if len(run) == 1:
        return [first(x)]
    sizes = [each.out_features for each in run]
    bias = None if run[0].bias is None else run[0].bias.as_strided((sum(sizes),), (1,))
    return F.linear(x, run[0].weight.as_strided((sum(sizes), x.shape[-1]), (x.shape[-1], 1)), bias).split(sizes, -1)


def _run(layers: Sequence[Any], continues: Callable[[Any, Any], bool]) -> list[Any]:
    run = [layers[0]]
    for layer in layers[1:]:
        if not continues(run[-1], layer):
            break
        run.append(layer)
    return run


def _continues(before: Rows, layer: Any) -> bool:
    return isinstance(layer, Rows) and layer.whole is before.whole and layer.low == before.high


def _is_next(before: nn.Linear, layer: Any) -> bool:
    """Whether the weights and biases of a layer follow those of another in the same memory."""
    if not is_plain(layer) or (before.bias is None) != (layer.bias is None):
        return False
    pairs = [(before.weight, layer.weight)]
    if before.bias is not None:
        pairs.append((before.bias, layer.bias))
    return all(_adjacent(left, right) for left, right in pairs)


def _adjacent(left: Tensor, right: Tensor) -> bool:
    return (
        left.data_ptr() + left.nbytes == right.data_ptr()
        and left.dtype == right.dtype
        and left.shape[1:] == right.shape[1:]
        and left.untyped_storage().data_ptr() == right.untyped_storage().data_ptr()
        and left.is_contiguous()
        and right.is_contiguous()
    )


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
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def joinable(*layers: Any) -> bool:
    """Whether layers are ordinary, and their weights and biases can be stored in one tensor."""
    if not all(is_plain(layer) and not layer.weight.is_meta for layer in layers):
        return False
    return all(
        len({None if each is None else (each.shape[1:], each.dtype, each.device) for each in own}) == 1
        for own in ([layer.weight for layer in layers], [layer.bias for layer in layers])
    )


def join(*layers: Any) -> None:
    """Store the weights of `joinable` layers with the same input one after the other in one tensor.

    Without gradients, `outputs` then computes them as one product.
    """
    for name in ("weight", "bias"):
        own = [getattr(layer, name) for layer in layers]
        if own[0] is not None:
            together = torch.cat([each.data for each in own])
            for each, view in zip(own, together.split([len(each) for each in own]), strict=True):
                each.data = view


def join_products(blocks: Iterable[Any]) -> None:
    """Join the layers of transformer blocks that have the same input, where they can be."""
    for block in blocks:
        for layers in block.parts.of_one_input if hasattr(block, "parts") else ():
            if joinable(*layers):
                join(*layers)
