"""The transformer shared by all families: pre-norm blocks, RoPE, grouped-query attention, any feed-forward part.

A family names its modules after its published tensors and passes them as `BlockParts`; the
computation is implemented once, here, independent of policies and caches.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from dllm.models.kernels import add_rms_norm, gated, rms_norm, rotate
from dllm.models.linear import Layer, is_hooked, outputs


@runtime_checkable
class KVStore(Protocol):
    """A KV cache: a forward over some columns writes its keys and values and reads those of all columns."""

    def update(
        self, layer: int, keys: Float[Tensor, "B H C D"], values: Float[Tensor, "B H C D"]
    ) -> tuple[Float[Tensor, "B H S D"], Float[Tensor, "B H S D"]]:
        """Store the keys and values of the computed columns; return those of all columns attended to."""
        ...


@runtime_checkable
class PartedStore(KVStore, Protocol):
    """A store whose sequences are not contiguous, and are attended to in parts without copying."""

    def parts(
        self, layer: int, keys: Float[Tensor, "B H C D"], values: Float[Tensor, "B H C D"]
    ) -> list[tuple[Tensor, Tensor]]:
        """As `update`, in parts along the batch dimension."""
        ...


@runtime_checkable
class FeatureStore(KVStore, Protocol):
    """A store that also caches the outputs of attention and feed-forward part, so that a layer can skip columns."""

    def stale(self, layer: int, values: Float[Tensor, "B H C D"]) -> Int[Tensor, "B U"]:
        """Slots of the C columns to compute in this layer, given their fresh values.

        `update` then gets the keys of these and the values of all C.
        """
        ...

    def blend(self, part: str, layer: int, fresh: Float[Tensor, "B U d"]) -> Float[Tensor, "B C d"]:
        """Store the output of a part ("attention" or "mlp") at those slots; return that of all C columns."""
        ...


@runtime_checkable
class AttentionStore(KVStore, Protocol):
    """A store that needs the attention weights."""

    def attended(self, layer: int, weights: Float[Tensor, "B C S"]) -> None:
        """Receive the attention weights of the computed columns, averaged over the heads."""
        ...


@runtime_checkable
class QueryStore(KVStore, Protocol):
    """A store that needs the queries."""

    def queried(self, layer: int, queries: Float[Tensor, "B H C D"]) -> None:
        """Receive the queries of the computed columns, after `update`."""
        ...


@dataclass(frozen=True)
class Wider:
    """The input of a layer for more columns.

    Attributes:
        hidden: of the columns.
        positions: of the columns.
        mask: as in `BlockInputs`.
    """

    hidden: Float[Tensor, "B W d"]
    positions: Int[Tensor, "B W"]
    mask: Bool[Tensor, "B 1 #W S"] | None


@runtime_checkable
class WideningStore(QueryStore, Protocol):
    """A store that may have a layer computed again, for more columns, which are then those of the layers after it."""

    def enter(self, layer: int, hidden: Float[Tensor, "B C d"]) -> None:
        """Receive the input of a layer."""
        ...

    def wider(self, layer: int, hidden: Float[Tensor, "B C d"], mask: Bool[Tensor, "B 1 #C S"] | None) -> Wider | None:
        """The input with which the layer is computed again, given that of its first time; None where it is not."""
        ...

    def narrow(self, hidden: Float[Tensor, "B W d"]) -> Float[Tensor, "B C d"]:
        """The columns that the forward began with."""
        ...


@runtime_checkable
class SparseStore(KVStore, Protocol):
    """A store of which each layer attends to some columns."""

    def mask(self, layer: int, mask: Bool[Tensor, "B 1 #C S"] | None) -> Bool[Tensor, "B 1 #C S"] | None:
        """The attention mask of a layer, given what holds for every layer."""
        ...


@dataclass(frozen=True)
class SwiGLU:
    """The dense feed-forward part: down(silu(gate) * up) (arXiv 2002.05202)."""

    gate: Layer
    up: Layer
    down: Layer

    def __call__(self, x: Float[Tensor, "*B d"]) -> Float[Tensor, "*B d"]:
        return self.down(gated(*outputs(x, self.gate, self.up)))


@dataclass(frozen=True)
class BlockParts:
    """The modules of one transformer block under common names.

    Attributes:
        attention_norm: before attention.
        query: projects to H heads; a layer, or some rows of a layer for all three (`Rows`).
        key: projects to the key-value heads.
        value: as `key`.
        output: output projection of attention.
        feed_forward_norm: before the feed-forward part.
        feed_forward: position-wise, (B, C, d) to the same shape: dense or a mixture of experts.
        query_norm: of each head, before the rotary embedding; None for none.
        key_norm: as `query_norm`.
    """

    attention_norm: RMSNorm
    query: Layer
    key: Layer
    value: Layer
    output: Layer
    feed_forward_norm: RMSNorm
    feed_forward: Layer
    query_norm: nn.Module | None = None
    key_norm: nn.Module | None = None

    @property
    def of_one_input(self) -> list[list[Layer]]:
        """The linear layers that can be computed as one, group by group."""
        dense = self.feed_forward
        return [[self.query, self.key, self.value], *([[dense.gate, dense.up]] if isinstance(dense, SwiGLU) else [])]


@dataclass(frozen=True)
class Rotation:
    """Cosines and sines of the rotary embedding of the computed columns, in float32 or wider.

    It rotates the first R dimensions of a head.
    """

    cos: Float[Tensor, "B 1 C R"]
    sin: Float[Tensor, "B 1 C R"]

    def at(self, slots: Int[Tensor, "B U"]) -> Rotation:
        """The rotation of some of the columns."""
        index = slots[:, None, :, None].expand(-1, -1, -1, self.cos.shape[-1])
        return Rotation(self.cos.gather(2, index), self.sin.gather(2, index))

    def __call__(self, x: Float[Tensor, "B H C D"]) -> Float[Tensor, "B H C D"]:
        return rotate(x, self.cos, self.sin)


@dataclass(frozen=True)
class BlockInputs:
    """Inputs of every block of one forward, beside the hidden states.

    Attributes:
        head_dim: size D of an attention head.
        rotation: rotary embedding of the computed columns.
        mask: attention mask, broadcastable to (B, 1, C, S); None for full attention.
        store: KV cache of the columns that are not computed; None if all are computed.
        eager: eager attention instead of the fused kernel.
        features: the store, if it is a `FeatureStore`.
        watch: the store, if it is an `AttentionStore`.
        parted: the store, if it is a `PartedStore`.
        queries: the store, if it is a `QueryStore`.
        sparse: the store, if it is a `SparseStore`.
    """

    head_dim: int
    rotation: Rotation
    mask: Bool[Tensor, "B 1 C S"] | None = None
    store: KVStore | None = None
    eager: bool = False
    features: FeatureStore | None = None
    watch: AttentionStore | None = None
    parted: PartedStore | None = None
    queries: QueryStore | None = None
    sparse: SparseStore | None = None


class RMSNorm(nn.Module):
    """Root-mean-square norm."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Float[Tensor, "*B d"]) -> Float[Tensor, "*B d"]:
        return rms_norm(x, self.weight, self.eps)

    def of_sum(self, x: Float[Tensor, "*B d"], added: Float[Tensor, "*B d"]) -> tuple[Tensor, Tensor]:
        """The sum, and its norm."""
        if is_hooked(self):
            x = x + added
            return x, self(x)
        return add_rms_norm(x, added, self.weight, self.eps)


def rotary_embedding(position_ids: Int[Tensor, "B C"], size: int, theta: float, dtype: torch.dtype) -> Rotation:
    """Rotary embedding (arXiv 2104.09864) of the given positions over `size` dimensions, in float32 or wider."""
    dtype = torch.promote_types(dtype, torch.float32)
    exponents = torch.arange(0, size, 2, device=position_ids.device, dtype=dtype) / size
    angles = position_ids[:, None, :, None].to(dtype) * (1.0 / theta**exponents)
    angles = torch.cat((angles, angles), dim=-1)
    return Rotation(angles.cos(), angles.sin())


def block_forward(
    parts: BlockParts, layer: int, x: Float[Tensor, "B C d"], inputs: BlockInputs
) -> Float[Tensor, "B C d"]:
    """One pre-norm block: x + attention(norm(x)), then + feed_forward of its norm."""
    features, rotation = inputs.features, inputs.rotation
    h, slots = parts.attention_norm(x), None
    if features is None:
        q, k, v = outputs(h, parts.query, parts.key, parts.value)
        v = _heads(v, inputs.head_dim)
    else:
        v = _heads(parts.value(h), inputs.head_dim)
        slots = features.stale(layer, v)
        if slots is not None:
            h, rotation = _take(h, slots), rotation.at(slots)
            inputs = replace(inputs, mask=_of_queries(inputs.mask, slots))
        q, k = outputs(h, parts.query, parts.key)
    q = _rotated(q, parts.query_norm, rotation, inputs.head_dim)
    k = _rotated(k, parts.key_norm, rotation, inputs.head_dim)
    if inputs.sparse is not None:
        inputs = replace(inputs, mask=inputs.sparse.mask(layer, inputs.mask))
    if inputs.parted is not None and not inputs.eager:
        attended = _attention_in_parts(q, inputs.parted.parts(layer, k, v), inputs.mask)
    else:
        if inputs.store is not None:
            k, v = inputs.store.update(layer, k, v)
        attended = _attention(q, k, v, layer, inputs)
    if inputs.queries is not None:
        inputs.queries.queried(layer, q)
    added = parts.output(rearrange(attended, "b h c d -> b c (h d)"))
    if features is None:
        x, h = parts.feed_forward_norm.of_sum(x, added)
        return x + parts.feed_forward(h)
    x = x + features.blend("attention", layer, added)
    h = parts.feed_forward_norm(x if slots is None else _take(x, slots))
    return x + features.blend("mlp", layer, parts.feed_forward(h))


def _rotated(
    x: Float[Tensor, "B C d"], norm: nn.Module | None, rotation: Rotation, head_dim: int
) -> Float[Tensor, "B H C D"]:
    heads = _heads(x, head_dim)
    return rotation(heads if norm is None else norm(heads))


def _heads(x: Float[Tensor, "B C d"], head_dim: int) -> Float[Tensor, "B H C D"]:
    return rearrange(x, "b c (h d) -> b h c d", d=head_dim)


def _take(x: Float[Tensor, "B C d"], slots: Int[Tensor, "B U"]) -> Float[Tensor, "B U d"]:
    return x.gather(1, slots[..., None].expand(-1, -1, x.shape[-1]))


def _of_queries(mask: Bool[Tensor, "B 1 C S"] | None, slots: Int[Tensor, "B U"]) -> Bool[Tensor, "B 1 #U S"] | None:
    """The attention mask of some of the queries; a mask shared by all queries is unchanged."""
    if mask is None or mask.shape[2] == 1:
        return mask
    return mask.gather(2, slots[:, None, :, None].expand(-1, -1, -1, mask.shape[3]))


def _attention(q: Tensor, k: Tensor, v: Tensor, layer: int, inputs: BlockInputs) -> Float[Tensor, "B H C D"]:
    if inputs.watch is None and not inputs.eager:
        return _sdpa(q, k, v, inputs.mask)
    attended, weights = _eager_attention(q, k, v, inputs.mask)
    if inputs.watch is not None:
        inputs.watch.attended(layer, weights.mean(1))
    return attended


def _attention_in_parts(q: Tensor, parts: list[tuple[Tensor, Tensor]], mask: Tensor | None) -> Tensor:
    sizes = [len(k) for k, _ in parts]
    masks = [None] * len(parts) if mask is None else mask.split(sizes)
    return torch.cat([_sdpa(own, k, v, m) for own, (k, v), m in zip(q.split(sizes), parts, masks, strict=True)])


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    shared = q.shape[1] // k.shape[1]
    if shared > 1 and mask is not None and q.is_cuda:  # no fused kernel takes both shared heads and a mask
        k, v, shared = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1), 1
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=shared > 1)


def _eager_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    weights = attention_weights(q, k, mask)
    v = v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
    return weights.to(v.dtype) @ v, weights


def attention_weights(
    q: Float[Tensor, "B Q C D"], k: Float[Tensor, "B H S D"], mask: Bool[Tensor, "B 1 #C S"] | None
) -> Float[Tensor, "B Q C S"]:
    """The attention of each query, in float32 or wider."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(-1)
