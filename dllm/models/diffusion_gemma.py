"""DiffusionGemma: transformers' own modules, in the interface of the decode engine; text only.

Rule:

    p(token at i) = softmax(logits at i),   logits = decoder(x, s, encoder(finished text))
    s = scale * sum over tokens v of p_last(v) E(v),   p_last = softmax(last logits),   E = the embedding

Finished text goes through an encoder, causally; the open block goes through a decoder that attends to all of itself and
to the encoder's keys and values. Both have the same weights but for a scalar of each layer. There is no [MASK]:
undecided positions of the block x hold uniformly random tokens, and each forward is conditioned on the last prediction
of its block, as the mean embedding under softmax(logits). Some layers attend to the last `sliding_window` positions
only; the decoder then to the last `sliding_window` - 1 before its block.

Differences: rows of a batch may be at blocks of different lengths and starts; the conditioning is kept as embeddings,
d numbers a position, where the published code keeps logits, V of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers.models.diffusion_gemma import configuration_diffusion_gemma as published
from transformers.models.diffusion_gemma import modeling_diffusion_gemma as modules

from dllm.checks import number
from dllm.models.attention import OpenBlock
from dllm.models.base import MaskedDiffusionModel, token_ids
from dllm.models.checkpoint import check_ids, check_size, check_values, compare, read_config, read_headers
from dllm.models.encoder import Finished, Open
from dllm.models.transformer import KVStore

_LAYERS = 1024
_SIZES = ("num_experts", "top_k_experts", "moe_intermediate_size", "head_dim", "sliding_window", "global_head_dim")
_WINDOWED = "sliding_attention"
_KINDS = (_WINDOWED, "full_attention")
_ROPES = ("default", "proportional", "axial")
# Entries of the text model's config that change results and not the weights.
_CONSTANTS = ("hidden_activation", "layer_types", "num_attention_heads",
              "rms_norm_eps", "rope_parameters", "sliding_window", "top_k_experts")  # fmt: skip


class DiffusionGemmaConfig(published.DiffusionGemmaConfig):
    """The published configuration; [MASK] is the id after the vocabulary, and end-of-text that of the text model."""

    default_ids = ("mask_token_id", "eos_token_id")

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], **others: Any) -> Any:
        """As in transformers, after validating the entries.

        Raises:
            ValueError: an unsupported entry.
        """
        _check(config_dict)
        return super().from_dict(config_dict, **others)  # type: ignore[arg-type]


class DiffusionGemmaForBlockDiffusion(MaskedDiffusionModel, modules.DiffusionGemmaForBlockDiffusion):
    """DiffusionGemma with its vocabulary projection.

    `forward` is that of transformers; the engine calls `decode` and `signal`.
    """

    config_class = DiffusionGemmaConfig
    uniform = True
    needs = frozenset({"whole_blocks"})
    refuses = {
        "causal": "it decodes blocks of its own length",
        "graphs": "transformers' own layers are launched as they are",
        "guidance": "there is no [MASK] to hide the prompt with",
        "measured": "the caches that it runs with are exact",
        "repeatable": "each forward is conditioned on the last one, and undecided positions are random",
        "shadows": "undecided positions are random, and a position attends to all of its block",
    }

    forward = modules.DiffusionGemmaForBlockDiffusion.forward

    @classmethod
    def check_folder(cls, folder: Path) -> None:
        """Reject a folder whose config and tensors do not fit."""
        config = DiffusionGemmaConfig.from_dict(read_config(folder))
        stored = read_headers(folder)
        text: Any = config.text_config
        try:
            with torch.device("meta"):
                model = cls(config)
        except Exception as error:  # noqa: BLE001  # sizes that do not fit raise errors of any type
            raise ValueError(f"{folder}/config.json cannot be used: {' '.join(str(error).split())}") from None
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        compare(cls.__name__, config, shapes.items(), stored, folder, model.all_tied_weights_keys)
        check_ids(text.vocab_size, None, _ends(config), folder)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        result = super()._apply(fn, recurse)
        embeds: list[Any] = [each for each in self.modules() if hasattr(each, "scalar_embed_scale")]
        for embed in embeds:
            if not embed.embed_scale.is_meta:  # made in the precision of the weights, as when it is loaded
                embed.embed_scale = embed.embed_scale.new_tensor(embed.scalar_embed_scale, dtype=embed.weight.dtype)
        return result

    @property
    def _text(self) -> Any:
        return self.config.text_config

    @property
    def blocks(self) -> nn.ModuleList:
        return self.model.decoder.layers

    @property
    def final_norm(self) -> nn.Module:
        return self.model.decoder.norm

    @property
    def mask_token_id(self) -> int:
        """The id after the vocabulary."""
        return self._text.vocab_size

    @property
    def logits_size(self) -> int:
        """Entries of the logits, with one for [MASK]."""
        return self.mask_token_id + 1

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        ids = dict.fromkeys((*_ends(self.config), *self.extra_eos_token_ids))
        return tuple(self._own("eos_token_id", token) for token in ids or (None,))

    @property
    def pattern(self) -> OpenBlock:
        return self.pattern_of(None)

    def pattern_of(self, block_length: int | None) -> OpenBlock:
        length: Any = block_length or self.config.canvas_length
        return OpenBlock(length)

    @property
    def kv_heads(self) -> list[tuple[int, int]]:
        """Key-value heads of each layer, and their size."""
        layers: Any = self.model.decoder.layers
        parts = [layer.self_attn for layer in layers]
        return [(part.k_proj.out_features // part.head_dim, part.head_dim) for part in parts]

    @property
    def kv_shape(self) -> tuple[int, int, int]:
        """Layers, 1 and the numbers of a position's keys: layers differ in heads, which are stored side by side."""
        return len(self.kv_heads), 1, max(heads * size for heads, size in self.kv_heads)

    def settings(self) -> str:
        text = {name: value for name, value in self._text.to_dict().items() if name in _CONSTANTS}
        own: dict[str, Any] = {"canvas_length": self.config.canvas_length, "softcap": self.final_logit_softcapping}
        own["kv_heads"] = self.kv_heads
        return json.dumps(text | own, sort_keys=True)

    def signal(self, logits: Float[Tensor, "A K V"]) -> Float[Tensor, "A K d"]:
        """The mean embedding under the softmax of these logits."""
        embed = self.model.decoder.embed_tokens
        dtype = embed.weight.dtype
        shares = logits[..., : self.mask_token_id].to(dtype).softmax(-1, dtype=torch.float32).to(dtype)
        return (shares.to(embed.weight.device) @ embed.weight) * embed.embed_scale.to(dtype)

    def decode(self, finished: Finished, block: Open) -> Float[Tensor, "A K V"]:
        """Logits of the open blocks, soft-capped, in float32; -inf at [MASK]."""
        text, decoder = self._text, self.model.decoder
        if self.dtype == torch.float64:  # the grouped product of transformers does not support it
            text._experts_implementation = "eager"
        context = _Context(self.kv_heads, finished)
        if finished.tokens.shape[1]:
            windows = text.sliding_window, None
            self.model.encoder.language_model(
                finished.tokens,
                attention_mask=self._masks(_of_finished(finished, window) for window in windows),
                position_ids=finished.positions,
                past_key_values=context,
            )
        else:
            context.fetch(block.signal)
        hidden = decoder.self_conditioning(decoder.embed_tokens(block.tokens), block.signal)
        rotations = {kind: decoder.rotary_emb(hidden, block.positions, kind) for kind in decoder.unique_layer_types}
        masks = self._masks(_of_block(finished, block, window) for window in (text.sliding_window, None))
        for layer, kind in zip(decoder.layers, text.layer_types, strict=True):
            hidden = layer(
                hidden, position_embeddings=rotations[kind], attention_mask=masks[kind], past_key_values=context
            )
        logits = self.lm_head(decoder.norm(hidden)).to(torch.float32)
        logits = torch.tanh(logits / self.final_logit_softcapping) * self.final_logit_softcapping
        return F.pad(logits, (0, 1), value=-torch.inf)

    def _masks(self, made: Iterable[Bool[Tensor, "A 1 Q S"]]) -> dict[str, Tensor]:
        """By the kind of layer, as the implementation of attention wants them."""
        eager = self._text._attn_implementation == "eager"
        lowest = torch.finfo(self.dtype).min
        return {
            kind: torch.zeros(mask.shape, dtype=self.dtype, device=mask.device).masked_fill(~mask, lowest)
            if eager
            else mask
            for kind, mask in zip(_KINDS, made, strict=True)
        }


@dataclass(frozen=True)
class _Layer:
    """The keys and values of finished text in one layer, under the names of transformers' caches."""

    keys: Float[Tensor, "A H S D"]
    values: Float[Tensor, "A H S D"]


class _Context:
    """What the encoder writes and the decoder reads, in the interface of transformers' caches.

    Args:
        heads: key-value heads of each layer, and their size.
        finished: what is encoded now, and the store of the rest.
    """

    is_compileable = False

    def __init__(self, heads: list[tuple[int, int]], finished: Finished) -> None:
        self._finished, self._heads = finished, heads
        self._width = max(count * size for count, size in heads)
        self.layers: list[_Layer] = []

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Store keys and values of what is encoded; return those of all finished text."""
        store = self._finished.store
        if store is not None:
            keys, values = self._through(store, layer, self._flat(keys), self._flat(values))
        self.layers.append(_Layer(keys, values))
        return keys, values

    def fetch(self, like: Tensor) -> None:
        """Give the decoder what is stored, where nothing is encoded now."""
        store, count = self._finished.store, self._finished.keys
        for layer, (heads, size) in enumerate(self._heads):
            if store is None:
                nothing = like.new_zeros((len(count), heads, 0, size))
                self.layers.append(_Layer(nothing, nothing))
            else:  # written after the end of the canvas
                unused = like.new_zeros((len(count), 1, 1, self._width))
                self.layers.append(_Layer(*self._through(store, layer, unused, unused)))

    def _through(self, store: KVStore, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        heads, size = self._heads[layer]
        found = store.update(layer, keys, values)
        k, v = (rearrange(each[:, 0, :, : heads * size], "a s (h d) -> a h s d", h=heads) for each in found)
        return k, v

    def _flat(self, each: Float[Tensor, "A H P D"]) -> Float[Tensor, "A 1 P W"]:
        side_by_side = rearrange(each, "a h p d -> a 1 p (h d)")
        return F.pad(side_by_side, (0, self._width - side_by_side.shape[-1]))


def _of_finished(finished: Finished, window: int | None) -> Bool[Tensor, "A 1 P S"]:
    """Where the encoder attends: causally, within the window."""
    back = finished.positions[:, :, None] - finished.keys[:, None]
    seen = finished.visible[:, None] & (back >= 0)
    if window is not None:
        seen &= back < window
    return (seen | ~finished.real[:, :, None])[:, None]  # a query without keys would give NaN


def _of_block(finished: Finished, block: Open, window: int | None) -> Bool[Tensor, "A 1 1 T"]:
    """Where the decoder attends: finished text within the window before the block, and all of the block."""
    seen = finished.visible
    if window is not None:
        seen = seen & (block.positions[:, :1] - finished.keys < window)
    return torch.cat((seen, block.real), dim=1)[:, None, None]


def _ends(config: Any) -> list[int]:
    """Ids that end a text: of the text model, and those beside it."""
    return [*token_ids(config.text_config.eos_token_id), *token_ids(getattr(config, "eos_token_id", None))]


def _check(content: Mapping[str, Any]) -> None:
    """Reject (ValueError) entries that are not supported, or would make transformers build anything else."""
    for name, kind in (("text_config", "diffusion_gemma_text"), ("vision_config", "gemma4_vision")):
        part = content.get(name)
        if not isinstance(part, Mapping) or part.get("model_type", kind) != kind:
            raise ValueError(f"{name} is not one of {kind}; copy it again from the published model")
        for key, value in part.items():
            if isinstance(value, int) and value and key.startswith(("num_", "hidden_", "patch", "position")):
                check_size(f"{name}.{key}", value)  # 0 says that there are none of them
        layers = part.get("num_hidden_layers", 1)
        if not 1 <= layers <= _LAYERS:  # they are built before the weights are looked at
            raise ValueError(f"{name}.num_hidden_layers={layers} is not a number of layers; use at most {_LAYERS}")
    text: Mapping[str, Any] = content["text_config"]
    for key in _SIZES:
        if text.get(key) is not None or key in _SIZES[:3]:
            check_size(f"text_config.{key}", text.get(key))
    count, chosen = text.get("num_experts"), text.get("top_k_experts")
    if count is not None and chosen is not None and chosen > count:
        raise ValueError(f"text_config.top_k_experts={chosen} is more than num_experts={count}; use at most {count}")
    check_size("canvas_length", content.get("canvas_length", 256))
    check_values(DiffusionGemmaConfig, text)
    both = text.get("use_bidirectional_attention")
    if both not in (None, "vision"):
        raise ValueError(f"use_bidirectional_attention={both!r} is not supported; use vision or null")
    kinds = text.get("layer_types")
    if kinds is not None and not (isinstance(kinds, list) and all(each in _KINDS for each in kinds)):
        raise ValueError(f"layer_types={kinds!r} is not supported; use {' and '.join(_KINDS)}")
    if kinds is not None and len(kinds) != text.get("num_hidden_layers", len(kinds)):
        raise ValueError(f"layer_types names {len(kinds)} layers; copy it again from the published model")
    _check_rope(text.get("rope_parameters"), content["vision_config"].get("rope_parameters"), kinds or _KINDS)


def _check_rope(text: Any, vision: Any, kinds: Iterable[str]) -> None:
    """Reject (ValueError) rotary embeddings other than those of the published model, with other constants at most."""
    name = "text_config.rope_parameters"
    if text is not None and not (isinstance(text, Mapping) and {*kinds} <= set(text) <= {*_KINDS}):
        raise ValueError(f"{name}={text!r} is not supported; give those of {' and '.join(_KINDS)}, or null")
    parts = {f"{name}.{kind}": own for kind, own in (text or {}).items()}
    for place, own in (parts | {"vision_config.rope_parameters": {} if vision is None else vision}).items():
        if not isinstance(own, Mapping) or not own.keys() <= {"rope_type", "rope_theta", "partial_rotary_factor"}:
            raise ValueError(f"{place}={own!r} is not supported; give rope_type and rope_theta")
        if (kind := own.get("rope_type", "default")) not in _ROPES:
            raise ValueError(f"{place}.rope_type={kind!r} is not supported; use {', '.join(_ROPES)}")
        number(f"{place}.rope_theta", own.get("rope_theta", 1.0), "a positive number", above=0, high=1e15)
        share = own.get("partial_rotary_factor", 1.0)
        number(f"{place}.partial_rotary_factor", share, "a number above 0, at most 1", above=0, high=1)
