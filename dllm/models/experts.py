"""Mixtures of experts: a router chooses a few feed-forward parts for each position and weights their outputs.

The experts are modules under their published names. Where torch multiplies groups of rows by a matrix each
(`grouped_mm`), the chosen experts of all positions are one such product per projection, over weights that lie side by
side in memory; elsewhere, and where gradients are taken, one expert is computed after the other. The results are the
same up to rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from operator import is_
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from dllm.checks import number
from dllm.models.kernels import gated
from dllm.models.linear import Layer, is_hooked, is_plain
from dllm.models.transformer import SwiGLU

Routed: TypeAlias = tuple[Int[Tensor, "N k"], Float[Tensor, "N k"]]

# Each expert is divided like a dense part; the router is not.
SPARSE_TP_PLAN = {
    "model.layers.*.mlp.experts.*.gate_proj": "colwise",
    "model.layers.*.mlp.experts.*.up_proj": "colwise",
    "model.layers.*.mlp.experts.*.down_proj": "rowwise",
}
_MOST = 4096  # experts of a layer
_GROUPED = {"cpu": (torch.float32, torch.bfloat16, torch.float16), "cuda": (torch.bfloat16,)}
_ALIGNED = 16  # bytes a row must be a multiple of, for grouped products on CUDA


class MixtureOfExperts(nn.Module):
    """A feed-forward part: the weighted sum of the experts that a router chooses, plus shared experts if any.

    Its parts carry their published names.

    Args:
        gate: the router, which maps N positions to their k experts and weights.
        experts: all of them.
        shared_experts: computed at every position, unweighted; None for none.
    """

    def __init__(self, gate: nn.Module, experts: Experts, shared_experts: nn.Module | None = None) -> None:
        super().__init__()
        self.gate, self.experts, self.shared_experts = gate, experts, shared_experts

    @property
    def part(self) -> Layer:
        """What a block computes."""
        return self

    def forward(self, x: Float[Tensor, "B C d"]) -> Float[Tensor, "B C d"]:
        """Apply it."""
        flat = x.flatten(0, 1)
        out: Tensor = self.experts(flat, *self.gate(flat)).view_as(x)
        return out if self.shared_experts is None else out + self.shared_experts(x)


class GatedMLP(nn.Module):
    """A dense feed-forward part under its published names.

    Args:
        size: of the hidden states.
        width: of the part.
    """

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(size, width, bias=False)
        self.up_proj = nn.Linear(size, width, bias=False)
        self.down_proj = nn.Linear(width, size, bias=False)

    @property
    def part(self) -> Layer:
        """What a block computes."""
        return self if is_hooked(self) else self._gated

    @property
    def _gated(self) -> SwiGLU:
        return SwiGLU(self.gate_proj, self.up_proj, self.down_proj)

    def forward(self, x: Float[Tensor, "*B d"]) -> Float[Tensor, "*B d"]:
        """Apply it to any number of positions."""
        return self._gated(x)


class GroupLimitedRouter(nn.Module):
    """Sigmoid scores, experts chosen within the best groups (DeepSeek-V3, arXiv 2412.19437, as LLaDA2 uses it).

    In float32 or wider, with s = sigmoid(W h) and r = s + bias, which only chooses:

        score of a group     sum of its two largest r
        experts              the top k of r in the best groups
        weights              s / (sum of the chosen s + 1e-20) * scale, without the division for k = 1

    Args:
        size: of the hidden states.
        count: experts, in consecutive groups of equal size.
        chosen: experts k of a position.
        groups: number of groups.
        best: groups that experts are chosen from.
        scale: of the weights.
    """

    expert_bias: Tensor

    def __init__(self, size: int, count: int, chosen: int, groups: int, best: int, scale: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count, size))
        self.register_buffer("expert_bias", torch.zeros(count))
        self.chosen, self.groups, self.best, self.scale = chosen, groups, best, scale
        nn.init.normal_(self.weight, std=size**-0.5)

    def forward(self, x: Float[Tensor, "N d"]) -> Routed:
        """The experts of each position and their weights."""
        wide = torch.promote_types(x.dtype, torch.float32)
        score = F.linear(x.to(wide), self.weight.to(wide)).sigmoid()
        rank = score + self.expert_bias.to(wide)
        grouped = rank.view(len(x), self.groups, rank.shape[1] // self.groups)
        best = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(-1).topk(self.best, dim=-1).indices
        outside = torch.ones_like(grouped[..., 0], dtype=torch.bool).scatter_(1, best, False)
        experts = grouped.masked_fill(outside[..., None], -torch.inf).flatten(1).topk(self.chosen, dim=-1).indices
        weights = score.gather(1, experts)
        if self.chosen > 1:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return experts, weights * self.scale


class SoftmaxRouter(nn.Module):
    """Softmax scores, in float32 or wider: the k largest of softmax(W h) and their experts (Qwen3-MoE, OLMoE).

    Args:
        size: of the hidden states.
        count: experts.
        chosen: experts k of a position.
        normalised: whether the weights of a position are divided by their sum.
    """

    def __init__(self, size: int, count: int, chosen: int, normalised: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count, size))
        self.chosen, self.normalised = chosen, normalised
        nn.init.normal_(self.weight, std=size**-0.5)

    def forward(self, x: Float[Tensor, "N d"]) -> Routed:
        """The experts of each position and their weights."""
        wide = torch.promote_types(x.dtype, torch.float32)
        weights, experts = F.linear(x, self.weight).softmax(-1, dtype=wide).topk(self.chosen, dim=-1)
        if self.normalised:
            weights = weights / weights.sum(-1, keepdim=True)
        return experts, weights.to(x.dtype)


class Experts(nn.ModuleList):
    """The experts of a layer, `GatedMLP` of equal size.

    Args:
        count: of experts.
        size: of the hidden states.
        width: of an expert.
    """

    def __init__(self, count: int, size: int, width: int) -> None:
        super().__init__(GatedMLP(size, width) for _ in range(count))
        self._joined: _Joined | None = None

    def forward(
        self, x: Float[Tensor, "N d"], experts: Int[Tensor, "N k"], weights: Float[Tensor, "N k"]
    ) -> Float[Tensor, "N d"]:
        """The weighted sum of the chosen experts."""
        joined = self._side_by_side(x)
        out = self._one_by_one(x, experts) if joined is None else joined(x, experts)
        return (out * weights[..., None]).sum(1).to(x.dtype)

    def _one_by_one(self, x: Float[Tensor, "N d"], experts: Int[Tensor, "N k"]) -> Float[Tensor, "N k d"]:
        """The outputs of the chosen experts, each computed where it is chosen."""
        if x.is_cuda and torch.cuda.is_current_stream_capturing():  # a graph has fixed shapes
            return self._everywhere(x, experts)
        out = x.new_zeros((*experts.shape, x.shape[-1]))
        for index, expert in enumerate(self):
            where = (experts == index).nonzero(as_tuple=True)
            if len(where[0]):
                out = out.index_put(where, expert(x[where[0]]))
        return out

    def _everywhere(self, x: Float[Tensor, "N d"], experts: Int[Tensor, "N k"]) -> Float[Tensor, "N k d"]:
        """The same, with every expert computed at every position."""
        every = torch.stack([expert(x) for expert in self], dim=1)
        return every.gather(1, experts[..., None].expand(-1, -1, x.shape[-1]))

    def _side_by_side(self, x: Tensor) -> _Joined | None:
        """The joined weights, which the experts' own are views of; None where there is no grouped product of them."""
        if torch.is_grad_enabled() or not _has_groups(x):
            return None
        if self._joined is None or not self._joined.current(self):
            self._joined = _Joined.of(self, x)
        return self._joined


@dataclass(frozen=True)
class _Joined:
    """The weights of all experts, in memory side by side.

    Attributes:
        gate_up: (E, 2 f, d) to the gates, then to what they multiply.
        down: (E, d, f) back.
        layers: the linear layers of the experts.
        parts: their weights.
        places: the addresses of these when they were joined.
    """

    gate_up: Float[Tensor, "E f2 d"]
    down: Float[Tensor, "E d f"]
    layers: list[Any]
    parts: list[nn.Parameter]
    places: list[int]

    @classmethod
    def of(cls, experts: Experts, x: Tensor) -> _Joined | None:
        """Join them; None where they are not all plain weights like the input, or too odd in size."""
        if not _can_be_joined(experts, x):
            return None
        layers = _layers(experts)
        width, size = layers[0].weight.shape
        parts = [layer.weight for layer in layers]
        # Not inference tensors: the model may be trained later.
        with torch.inference_mode(False), torch.no_grad():
            gate_up, down = x.new_empty((len(experts), 2 * width, size)), x.new_empty((len(experts), size, width))
            views = (view for gate, back in zip(gate_up, down, strict=True) for view in (*gate.split(width), back))
            for part, view in zip(parts, views, strict=True):
                part.data = view.copy_(part)
        return cls(gate_up, down, layers, parts, [part.data_ptr() for part in parts])

    def current(self, experts: Experts) -> bool:
        """Whether the experts are these layers with these weights alone: not moved, converted, replaced or hooked."""
        # At every forward: `is_hooked` and `is_plain` of each layer would take several times as long.
        return (
            self.parts[0].dtype == self.gate_up.dtype
            and all(map(is_, _layers(experts), self.layers))
            and all(
                own["_parameters"].get("weight") is part
                and own["_parameters"].get("bias") is None
                and not (own["_forward_hooks"] or own["_forward_pre_hooks"] or "forward" in own)
                and part.data_ptr() == place
                for own, part, place in zip(map(vars, self.layers), self.parts, self.places, strict=True)
            )
            and not any(map(is_hooked, experts))
        )

    def __call__(self, x: Float[Tensor, "N d"], experts: Int[Tensor, "N k"]) -> Float[Tensor, "N k d"]:
        """The outputs of the chosen experts: positions sorted by expert, a product for each group, sorted back."""
        index, order = experts.flatten().sort(stable=True)
        ends = torch.searchsorted(index, torch.arange(len(self.down), device=x.device), right=True).int()
        gate, up = F.grouped_mm(x[order // experts.shape[1]], self.gate_up.mT, offs=ends).chunk(2, dim=-1)
        out = F.grouped_mm(gated(gate, up), self.down.mT, offs=ends)
        return torch.empty_like(out).index_copy_(0, order, out).view(*experts.shape, -1)


def everywhere(module: nn.Module) -> bool:
    """Whether these are experts that, in a CUDA graph, are computed at every position, chosen there or not."""
    if not isinstance(module, Experts):
        return False
    weight = next(module.parameters())
    return not (_has_groups(weight) and _can_be_joined(module, weight))


def _layers(experts: Experts) -> list[Any]:
    """The linear layers of all experts in turn."""
    return [layer for expert in experts for layer in expert._modules.values()]


def _can_be_joined(experts: Experts, x: Tensor) -> bool:
    """Whether all are plain weights like the input, of equal sizes that grouped products take."""
    layers = _layers(experts)
    if any(map(is_hooked, experts)) or not all(_is_plain(layer, x) for layer in layers):
        return False
    shapes = [layer.weight.shape for layer in layers]
    if shapes != shapes[:3] * len(experts):
        return False
    return not x.is_cuda or all(size * x.element_size() % _ALIGNED == 0 for size in shapes[0])


def _has_groups(x: Tensor) -> bool:
    """Whether torch multiplies groups of such rows."""
    able = not x.is_cuda or torch.cuda.get_device_capability(x.device) >= (8, 0)
    return able and x.dtype in _GROUPED.get(x.device.type, ()) and hasattr(F, "grouped_mm")


def _is_plain(layer: Any, x: Tensor) -> bool:
    """Whether a layer is no more than a weight like the input: not quantised, packed, offloaded, sharded or adapted."""
    return is_plain(layer) and layer.bias is None and layer.weight.dtype == x.dtype and layer.weight.device == x.device


def check_experts(kind: str, count: Any, chosen: Any, width: Any = 1) -> None:
    """Reject numbers of experts that make no sense.

    Args:
        kind: of the model, for errors.
        count: experts of a layer.
        chosen: experts of a position.
        width: of an expert (`moe_intermediate_size`).

    Raises:
        ValueError: one that is out of range.
    """
    number(f"{kind} config: num_experts", count, f"a whole number from 1 to {_MOST}", low=1, high=_MOST, whole=True)
    use = f"a whole number from 1 to num_experts={count}"
    number(f"{kind} config: num_experts_per_tok", chosen, use, low=1, high=count, whole=True)
    use = "a whole number from 1 to 2**24"
    number(f"{kind} config: moe_intermediate_size", width, use, low=1, high=2**24, whole=True)
