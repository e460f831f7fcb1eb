"""Base class of the denoiser backbones, a Hugging Face `PreTrainedModel` with the interface of the decode engine."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import MaskedLMOutput

from dllm.identity import checksum
from dllm.models import parallel
from dllm.models.attention import BlockCausal
from dllm.models.checkpoint import ATTENTION, check_folder, read_tensors
from dllm.models.published import is_positive, is_whole
from dllm.models.transformer import (
    AttentionStore,
    BlockInputs,
    FeatureStore,
    KVStore,
    PartedStore,
    QueryStore,
    SparseStore,
    WideningStore,
    rotary_embedding,
)

_MASKS = {"noise": "it has [MASK] at undecided positions"}
_OF_KIND: dict[tuple[type, Any], bool] = {}
# Of models whose attention is causal over blocks of any length.
CAUSAL_REFUSES: Mapping[str, str] = _MASKS


class MaskedDiffusionModel(PreTrainedModel):
    """A bidirectional transformer that predicts the tokens at [MASK] positions.

    A family names its modules after its published tensors and implements the abstract methods;
    mask id, end-of-text ids and the shift of the logits are defined only here.

    Attributes:
        logits_shift: the prediction for column i is read at column i - logits_shift.
        tempered_confidence: the published sampler computes confidences from softmax(logits / temperature).
        end_of_turn: tokens that end a chat turn and count as end-of-text if the tokenizer has them.
        packed_weights: the weights by name, if they are packed.
        constants: entries of the config beside those of every family that change results and not the weights.
        uniform: the model has no [MASK] (`mask_token_id` is the id after its vocabulary) and was trained to denoise
            uniformly random tokens; it implements `Encoder` (`dllm/models/encoder.py`).
        needs: requirements that a cache may not meet, by the names in `dllm.decoding.compatibility`.
        refuses: what it does not support, by the names in `dllm.decoding.compatibility`, with the reason.
        extra_eos_token_ids: end-of-text ids beside the config's; `dllm.load` sets those of `end_of_turn`.
        head_shares: processes that the heads are divided over (tensor parallelism).
        number: of the model where other processes repeat this one's calls (`dllm.models.leading`); None elsewhere.
    """

    logits_shift: ClassVar[int] = 0
    tempered_confidence: ClassVar[bool] = False
    end_of_turn: ClassVar[tuple[str, ...]] = ()
    constants: ClassVar[tuple[str, ...]] = ()
    uniform: ClassVar[bool] = False
    needs: ClassVar[frozenset[str]] = frozenset()
    refuses: ClassVar[Mapping[str, str]] = _MASKS | {"causal": "every position attends to every other"}
    extra_eos_token_ids: tuple[int, ...] = ()
    packed_weights: Mapping[str, Callable[[], Tensor]] | None = None
    head_shares: int = 1
    number: int | None = None
    _supports_sdpa = True

    def __init__(self, config: PretrainedConfig) -> None:
        _check_attention(config._attn_implementation)
        super().__init__(config)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, after validating a local folder.

        Raises:
            ValueError: an invalid folder.
        """
        folder = Path(str(pretrained_model_name_or_path))
        if folder.is_dir():
            cls.check_folder(folder)
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    @classmethod
    def check_folder(cls, folder: Path) -> None:
        """Reject (ValueError) a folder without a complete checkpoint of this family."""
        check_folder(cls, folder)

    def post_init(self) -> None:
        super().post_init()
        parallel.plan_head(self)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """As in transformers.

        Raises:
            ValueError: a model of tensor parallelism, whose parts are in several processes.
        """
        if self.is_divided:
            raise ValueError("a model that is divided by tp=true cannot be saved; load it with tp=false")
        super().save_pretrained(*args, **kwargs)

    def set_attn_implementation(self, attn_implementation: Any, *args: Any, **kwargs: Any) -> None:
        _check_attention(attn_implementation)
        super().set_attn_implementation(attn_implementation, *args, **kwargs)

    @classmethod
    def layer_alone(cls, config: PretrainedConfig, layer: int) -> dict[str, Any]:
        """Entries of the config of a model whose only layer is like this one; none where all layers are alike."""
        return {}

    @property
    @abstractmethod
    def blocks(self) -> nn.ModuleList:
        """The transformer blocks, each called as ``block(layer, hidden, BlockInputs)``."""

    @property
    @abstractmethod
    def final_norm(self) -> nn.Module:
        """The norm before the vocabulary projection."""

    @property
    def mask_token_id(self) -> int:
        """Id of [MASK].

        Raises:
            ValueError: the model does not have it, as after resizing its embeddings.
        """
        return self._own("mask_token_id", self.config.mask_token_id)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Ids that end a text; the first one fills what follows.

        Raises:
            ValueError: there are none, or the model does not have one of them.
        """
        ids = dict.fromkeys((*token_ids(self.config.eos_token_id), *self.extra_eos_token_ids))
        return tuple(self._own("eos_token_id", token) for token in ids or (None,))

    @property
    def _text_config(self) -> PretrainedConfig:
        # `get_text_config` looks for a dozen names, many times in a step.
        return self.config.get_text_config() if self.config.sub_configs else self.config

    def _own(self, name: str, token: int | None) -> int:
        vocabulary = self._text_config.vocab_size
        rows = min(vocabulary, getattr(self.get_input_embeddings(), "num_embeddings", vocabulary))
        if token is None or not 0 <= token < rows:
            raise ValueError(
                f"{name}={token!r} is not an id of this model, which has 0 to {rows - 1}; change it in the config, or "
                "resize the embeddings"
            )
        return token

    @property
    def logits_size(self) -> int:
        """Entries V of the logits."""
        return self._text_config.vocab_size

    @property
    def embedding_size(self) -> int:
        """Width d of the hidden states."""
        return self._text_config.hidden_size

    @property
    def max_length(self) -> int:
        """Maximum canvas length, in tokens."""
        return self._text_config.max_position_embeddings

    @property
    def kv_shape(self) -> tuple[int, int, int]:
        """Layers, key-value heads of this process and head dimension, which determine the size of a KV cache."""
        return self.config.num_hidden_layers, self.config.num_key_value_heads // self.head_shares, self.head_dim

    @property
    def query_heads(self) -> int:
        """Attention heads of this process."""
        heads: int = self._text_config.num_attention_heads
        return heads // self.head_shares

    def all_heads(self, values: Tensor, dim: int) -> Tensor:
        """Join what every process has of its heads, along a dimension."""
        return values if self.head_shares == 1 else parallel.gather(values, dim)

    @property
    def is_divided(self) -> bool:
        """Whether this process holds a part of every layer (tensor parallelism)."""
        return (self.tp_size or 1) > 1

    @property
    def head_dim(self) -> int:
        """Size D of an attention head."""
        return _head_dim(self.config)

    @property
    def rotary_dim(self) -> int:
        """Number of (leading) dimensions of a head with rotary embedding."""
        return self.head_dim

    @property
    def pattern(self) -> BlockCausal | None:
        """The attention pattern; None for full attention."""
        return None

    def pattern_of(self, block_length: int | None) -> BlockCausal | None:
        """The pattern for blocks of another length, where the family allows it; None for the model's own."""
        return self.pattern

    @property
    def own_block_length(self) -> int | None:
        """Positions of the blocks that the model attends in unless told otherwise; None for full attention."""
        own = self.pattern_of(None)
        return None if own is None else own.length

    @classmethod
    def can_generate(cls) -> bool:
        """False: transformers' `generate` decodes from left to right."""
        return False

    def prepare_inputs_for_generation(self, *_: Any, **__: Any) -> NoReturn:
        """Raises an error; PEFT requires this method for adapters of causal language models."""
        raise TypeError(f"{type(self).__name__} does not decode from left to right; use dllm.generate")

    def fingerprint(self) -> str:
        """Sixteen hex digits that identify this model, in any precision from bfloat16 up.

        A hash of every weight, rounded to bfloat16, and of the config's heads, constants and [MASK] id.
        """
        settings = self.settings()
        weights: Iterable[tuple[str, Tensor]]
        if self.is_divided:
            weights = read_tensors(Path(str(self.name_or_path)), self.state_dict(), self.dtype)
        elif self.packed_weights is not None:
            weights = ((name, weight()) for name, weight in self.packed_weights.items())
        else:
            weights = ((name, _at_hand(self, name, weight)) for name, weight in self.state_dict(keep_vars=True).items())
        return checksum(chain([(settings, torch.empty(0, device="cpu"))], weights))

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Cast and move the weights; tables, and what is loaded in float32 whatever the precision, are not cast."""
        kept_wide = self._keep_in_fp32_modules_strict or ()
        places = [
            (each, name)
            for each in self.modules()
            for name in each._buffers
            if name in each._non_persistent_buffers_set or name in kept_wide
        ]
        before = [each._buffers[name] for each, name in places]
        result = super()._apply(fn, recurse)
        for (each, name), kept in zip(places, before, strict=True):
            now = each._buffers[name]
            if kept is None or now is None or kept.is_meta or now.dtype == kept.dtype:
                continue
            if name not in kept_wide or now.dtype.itemsize < kept.dtype.itemsize:
                each._buffers[name] = kept.to(now.device)
        return result

    def settings(self) -> str:
        """What changes results and is not in the weights, as a text."""
        config = self.config
        sizes = config.num_hidden_layers, config.num_key_value_heads, self.head_dim
        constants = [*sizes, config.num_attention_heads, config.rope_theta, config.rms_norm_eps]
        constants += [getattr(config, name) for name in self.constants]
        return ",".join(str(float(value)) for value in (*constants, config.mask_token_id))

    def forward(
        self,
        input_ids: Int[Tensor, "B C"],
        attention_mask: Int[Tensor, "B S"] | Bool[Tensor, "B S"] | Bool[Tensor, "B 1 C S"] | None = None,
        position_ids: Int[Tensor, "B C"] | None = None,
        store: KVStore | None = None,
        select: Int[Tensor, " N"] | None = None,
        **others: Any,
    ) -> MaskedLMOutput:
        """Compute the given columns and project the selected ones to the vocabulary.

        Args:
            input_ids: tokens of the computed columns.
            attention_mask: over the S columns attended to (S = C without a store): nonzero where a
                column is not padding, or a complete boolean mask per query, including the model's own
                attention pattern.
            position_ids: positions of the computed columns; by default counted without padding.
            store: keys and values of columns that are not computed.
            select: flat indices into B * C of the columns to project; None for all.
            **others: arguments passed by wrappers such as PEFT's; only `return_dict` may be set.

        Returns:
            `logits`, unshifted: (B, C, V), or (N, V) with `select`, without padding rows of the projection.

        Raises:
            TypeError: an unsupported argument.
        """
        for name, value in others.items():
            if value is not None and value is not False and name != "return_dict":
                raise TypeError(f"{type(self).__name__}.forward takes no {name}; leave it out")
        if position_ids is None:
            position_ids = _default_positions(input_ids, attention_mask)
        hidden = self.hidden_states(input_ids, attention_mask, position_ids, store, select)
        return MaskedLMOutput(logits=self.project(hidden))

    def hidden_states(
        self,
        input_ids: Int[Tensor, "B C"],
        attention_mask: Tensor | None,
        position_ids: Int[Tensor, "B C"],
        store: KVStore | None,
        select: Int[Tensor, " N"] | None,
    ) -> Float[Tensor, "*N d"]:
        """Output of the last block at the selected columns; arguments are those of `forward`."""
        hidden = self.get_input_embeddings()(input_ids)
        mask = _per_query(attention_mask)
        if self.pattern is not None and (attention_mask is None or attention_mask.ndim == 2):
            own = self.pattern(position_ids, position_ids)
            mask = own if mask is None else _seeing_themselves(own & mask)
        inputs = BlockInputs(
            self.head_dim,
            rotary_embedding(position_ids, self.rotary_dim, self.config.rope_theta, hidden.dtype),
            mask,
            store,
            eager=self.config._attn_implementation == "eager",
            features=_as(store, FeatureStore),
            watch=_as(store, AttentionStore),
            parted=_as(store, PartedStore),
            queries=_as(store, QueryStore),
            sparse=_as(store, SparseStore),
        )
        if (widening := _as(store, WideningStore)) is not None:
            hidden = self._widening(hidden, inputs, widening)
        else:
            for layer, block in enumerate(self.blocks):
                hidden = block(layer, hidden, inputs)
        return hidden if select is None else hidden.flatten(0, 1)[select]

    def _widening(self, hidden: Tensor, inputs: BlockInputs, store: WideningStore) -> Float[Tensor, "B C d"]:
        """Output of the last block, where a block may be computed again for more columns."""
        for layer, block in enumerate(self.blocks):
            store.enter(layer, hidden)
            after = block(layer, hidden, inputs)
            wider = store.wider(layer, hidden, inputs.mask)
            if wider is not None:
                rotation = rotary_embedding(wider.positions, self.rotary_dim, self.config.rope_theta, hidden.dtype)
                inputs = replace(inputs, rotation=rotation, mask=wider.mask)
                after = block(layer, wider.hidden, inputs)
            hidden = after
        return store.narrow(hidden)

    def project(self, hidden: Float[Tensor, "*N d"]) -> Float[Tensor, "*N V"]:
        """Logits of hidden states of the last block."""
        return self.get_output_embeddings()(self.final_norm(hidden))[..., : self.config.vocab_size]


class BlockCausalModel(MaskedDiffusionModel):
    """A family whose attention is causal over blocks.

    Attributes:
        block_length: positions of a block, those of the config unless it is set.
    """

    refuses = CAUSAL_REFUSES
    block_length: int

    @property
    def pattern(self) -> BlockCausal:
        return BlockCausal(self.block_length)

    def pattern_of(self, block_length: int | None) -> BlockCausal:
        return BlockCausal(block_length or self.block_length)


def _at_hand(model: nn.Module, name: str, weight: Tensor) -> Tensor:
    """A weight, loaded from accelerate's offload map if it is not in memory."""
    if not weight.is_meta:
        return weight
    module, _, own = name.rpartition(".")
    kept = getattr(getattr(model.get_submodule(module), "_hf_hook", None), "weights_map", None)
    return weight if kept is None else kept[own]


def token_ids(ids: int | Sequence[int] | None) -> tuple[int, ...]:
    """The ids of a config entry that may be one id, a list of them or nothing."""
    if ids is None:
        return ()
    return (ids,) if isinstance(ids, int) else tuple(ids)


def _check_attention(implementation: Any) -> None:
    # For other names, transformers would download and import a compiled kernel.
    if implementation not in (None, *ATTENTION):
        raise ValueError(f"unknown attn_implementation={implementation!r}; expected one of {', '.join(ATTENTION)}")


def check_config(config: PretrainedConfig) -> None:
    """Reject an invalid config.

    Raises:
        ValueError: a size or a constant is not a positive number, or the heads do not divide the hidden size.
    """
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
             "num_key_value_heads", "max_position_embeddings")  # fmt: skip
    kind, names = config.model_type, {size: config.attribute_map.get(size, size) for size in sizes}
    for size, name in names.items():
        value = getattr(config, size)
        if not is_whole(value) or value < 1:
            raise ValueError(f"{kind} config: {name}={value!r} is not a valid size; give an integer of at least 1")
    for name in ("rope_theta", "rms_norm_eps"):
        value = getattr(config, name)
        if not is_positive(value):
            raise ValueError(f"{kind} config: {name}={value!r} is out of range; give a positive number")
    shared = [("num_attention_heads", "num_key_value_heads")]
    if "head_dim" in vars(config):
        if not is_whole(config.head_dim) or config.head_dim < 1 or config.head_dim % 2:
            raise ValueError(f"{kind} config: head_dim={config.head_dim!r} is out of range; give an even integer")
    else:
        shared.insert(0, ("hidden_size", "num_attention_heads"))
    for whole, part in shared:
        if getattr(config, whole) % getattr(config, part):
            raise ValueError(
                f"{kind} config: {names[whole]}={getattr(config, whole)} is not divisible by "
                f"{names[part]}={getattr(config, part)}; give a multiple of it"
            )
    head_dim = _head_dim(config)
    if head_dim % 2:
        raise ValueError(
            f"{kind} config: {names['hidden_size']}={config.hidden_size} gives heads of {head_dim}, and the rotary "
            "embedding rotates pairs; make it even"
        )


def _head_dim(config: PretrainedConfig) -> int:
    own: int = vars(config).get("head_dim") or config.hidden_size // config.num_attention_heads
    return own


def _default_positions(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    if attention_mask is not None and attention_mask.ndim == 2:
        return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
    return torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)


def _seeing_themselves(mask: Bool[Tensor, "B 1 C C"]) -> Bool[Tensor, "B 1 C C"]:
    """The same, where padding attends to itself: a query without keys would give NaN."""
    return mask | torch.eye(mask.shape[-1], dtype=torch.bool, device=mask.device)


def _as(store: KVStore | None, kind: Any) -> Any:
    """The store if it is of a kind; asked once for each class of stores, since a protocol takes long to compare."""
    cls = type(store)
    if (cls, kind) not in _OF_KIND:
        _OF_KIND[cls, kind] = isinstance(store, kind)
    return store if _OF_KIND[cls, kind] else None


def _per_query(attention_mask: Tensor | None) -> Tensor | None:
    # Padded queries attend to all other columns: a query without keys would give NaN.
    if attention_mask is None or attention_mask.ndim == 4:
        return attention_mask
    return attention_mask.bool()[:, None, None, :]


def own_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Without autocast, whatever is on outside: a model computes in the precision of its weights."""
    on = torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if on else nullcontext()
