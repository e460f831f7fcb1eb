"""LLaDA2.0 and LLaDA2.1 (arXiv 2512.15745): block-causal attention over mixtures of experts; unshifted logits.

Rule:

    p(token at i) = softmax(logits at i),   i attends to j  if  floor(j / length) <= floor(i / length)
    feed-forward(h) = scale * sum of s_e / (sum of these s) expert_e(h) over the k experts e of the best groups with the
                      largest s + bias,   s = sigmoid(W h)

h is the hidden state of a position, W the router's matrix, and a group is good by its two largest s + bias
(`GroupLimitedRouter`). Tensor names are the published ones. Queries, keys and values are one projection; rotary
embedding covers the first part of each head. Difference: the published code attends in blocks only
where it is given such a mask, and to every position without one; here blocks are counted from the row's first token.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from torch import Tensor, nn
from transformers import PretrainedConfig

from dllm.checks import number
from dllm.models.base import BlockCausalModel, check_config
from dllm.models.checkpoint import published
from dllm.models.experts import (
    SPARSE_TP_PLAN,
    Experts,
    GatedMLP,
    GroupLimitedRouter,
    MixtureOfExperts,
    check_experts,
)
from dllm.models.linear import Rows
from dllm.models.published import check_fixed, check_special_ids, check_synonyms, take_rope_theta, take_rotary_share
from dllm.models.transformer import BlockInputs, BlockParts, RMSNorm, block_forward

# Config keys with a single supported value; null means false.
_FIXED = {
    "hidden_act": "silu",
    "moe_router_enable_expert_bias": True,
    "norm_head": False,
    "norm_softmax": False,
    "router_dtype": "fp32",
    "score_function": "sigmoid",
    "tie_word_embeddings": False,
    "use_bias": False,
    "use_qkv_bias": False,
    "use_rmsnorm": True,
    "use_sliding_window": False,
    "using_split_qkv_in_self_attention": False,
}
# Keys of the published config that are not read, here or there.
_UNUSED = (
    "embedding_dropout", "max_window_layers", "norm_topk_prob", "output_dropout", "output_router_logits", "rotary_dim",
)  # fmt: skip


class LLaDA2MoeConfig(PretrainedConfig):
    """Configuration in the published layout; unread published keys are preserved, others dropped.

    Args:
        vocab_size: entries V of the logits.
        hidden_size: width d of the hidden states.
        intermediate_size: width of the dense feed-forward parts.
        moe_intermediate_size: width of an expert.
        num_hidden_layers: transformer blocks.
        first_k_dense_replace: first blocks, with dense feed-forward parts; all others have experts.
        num_attention_heads: attention heads H.
        num_key_value_heads: key-value heads; `num_attention_heads` when None.
        head_dim: size D of an attention head; `hidden_size / num_attention_heads` when None.
        num_experts: experts of a block.
        num_experts_per_tok: experts of a position.
        num_shared_experts: experts that every position has, as one of that many times the width; None for none.
        n_group: groups of experts.
        topk_group: groups that the experts of a position are chosen from.
        routed_scaling_factor: scale of the experts' outputs.
        max_position_embeddings: longest canvas.
        rms_norm_eps: added to the mean square.
        initializer_range: standard deviation of the initial weights.
        block_size: positions of a block.
        mask_token_id: id of [MASK].
        eos_token_id: end-of-text id or ids; the first one fills the rest of the canvas.
        **kwargs: other published keys, such as `rope_theta`, the base of the rotary embedding (600000 by default), and
            `partial_rotary_factor`, the share of a head that has it (0.5 by default).

    Raises:
        ValueError: the config differs from LLaDA2's published architecture.
    """

    model_type = "llada2_moe"
    default_ids = ("mask_token_id", "eos_token_id")
    # Attention is computed everywhere: its joined projection does not divide into consecutive heads.
    base_model_tp_plan = SPARSE_TP_PLAN | {
        f"model.layers.*.mlp.{part}{name}": style
        for part in ("", "shared_experts.")
        for name, style in (("gate_proj", "colwise"), ("up_proj", "colwise"), ("down_proj", "rowwise"))
    }

    def __init__(
        self,
        vocab_size: int = 157184,
        hidden_size: int = 2048,
        intermediate_size: int = 5120,
        moe_intermediate_size: int = 512,
        num_hidden_layers: int = 20,
        first_k_dense_replace: int = 1,
        num_attention_heads: int = 16,
        num_key_value_heads: int | None = 4,
        head_dim: int | None = None,
        num_experts: int = 256,
        num_experts_per_tok: int = 8,
        num_shared_experts: int | None = 1,
        n_group: int = 8,
        topk_group: int = 4,
        routed_scaling_factor: float = 2.5,
        max_position_embeddings: int = 32768,
        rms_norm_eps: float = 1e-6,
        initializer_range: float = 0.02,
        block_size: int = 32,
        mask_token_id: int = 156895,
        eos_token_id: int | list[int] | None = 156892,
        **kwargs: Any,
    ) -> None:
        check_fixed("LLaDA2", _FIXED, kwargs)
        check_special_ids("LLaDA2", mask_token_id, eos_token_id)
        number("LLaDA2 config: block_size", block_size, "a whole number of at least 1", low=1, whole=True)
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.moe_intermediate_size = moe_intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.first_k_dense_replace = first_k_dense_replace
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_attention_heads if num_key_value_heads is None else num_key_value_heads
        if head_dim is not None:
            self.head_dim = head_dim
        self.num_experts = num_experts
        self.num_experts_per_tok = num_experts_per_tok
        self.num_shared_experts = num_shared_experts
        self.n_group = n_group
        self.topk_group = topk_group
        self.routed_scaling_factor = routed_scaling_factor
        self.max_position_embeddings = max_position_embeddings
        self.partial_rotary_factor = take_rotary_share("LLaDA2", 0.5, kwargs)
        self.rope_theta = take_rope_theta("LLaDA2", 600000.0, kwargs)
        self.rms_norm_eps = rms_norm_eps
        self.initializer_range = initializer_range
        self.block_size = block_size
        self.mask_token_id = mask_token_id
        check_synonyms("LLaDA2", self, kwargs)
        kwargs.setdefault("tie_word_embeddings", False)
        kwargs["eos_token_id"] = eos_token_id
        super().__init__(**published(kwargs, {*_FIXED, *_UNUSED}))
        check_config(self)
        _check(self)


def _check(config: LLaDA2MoeConfig) -> None:
    """Reject (ValueError) layers, experts and groups that do not fit together."""
    kind, count = "LLaDA2 config", config.num_experts
    check_experts("LLaDA2", count, config.num_experts_per_tok, config.moe_intermediate_size)
    dense, shared = config.first_k_dense_replace, config.num_shared_experts
    number(f"{kind}: first_k_dense_replace", dense, "a whole number of at least 0", low=0, whole=True)
    if shared is not None:
        use = "a whole number from 0 to 64, or null"
        number(f"{kind}: num_shared_experts", shared, use, low=0, high=64, whole=True)
    groups, best = config.n_group, config.topk_group
    number(f"{kind}: n_group", groups, f"a divisor of num_experts={count}", low=1, high=count, whole=True)
    number(f"{kind}: topk_group", best, f"a whole number from 1 to n_group={groups}", low=1, high=groups, whole=True)
    scale = config.routed_scaling_factor
    number(f"{kind}: routed_scaling_factor", scale, "a positive number", above=0, high=1e6)
    if count % groups:
        raise ValueError(f"{kind}: num_experts={count} is not divisible by n_group={groups}; give a multiple of it")
    if config.num_experts_per_tok > count // groups * best:
        raise ValueError(
            f"{kind}: num_experts_per_tok={config.num_experts_per_tok} is more than topk_group={best} groups hold; "
            "choose from more groups"
        )
    rotated = int((config.head_dim if "head_dim" in vars(config) else config.hidden_size // config.num_attention_heads)
                  * config.partial_rotary_factor)  # fmt: skip
    if rotated < 2 or rotated % 2:
        raise ValueError(
            f"{kind}: partial_rotary_factor={config.partial_rotary_factor} rotates {rotated} dimensions of a head, and "
            "the rotary embedding rotates pairs; make it even"
        )


class _Attention(nn.Module):
    """Carries the ``attention`` prefix of the published names."""

    def __init__(self, config: LLaDA2MoeConfig, head_dim: int) -> None:
        super().__init__()
        heads = config.num_attention_heads + 2 * config.num_key_value_heads
        self.query_key_value = nn.Linear(config.hidden_size, heads * head_dim, bias=False)
        self.dense = nn.Linear(config.num_attention_heads * head_dim, config.hidden_size, bias=False)
        self.query_layernorm = RMSNorm(head_dim, config.rms_norm_eps)
        self.key_layernorm = RMSNorm(head_dim, config.rms_norm_eps)


class LLaDA2MoeDecoderLayer(nn.Module):
    """One block under its published names.

    Args:
        config: of the model.
        head_dim: size of an attention head.
        dense: whether its feed-forward part is dense.
    """

    def __init__(self, config: LLaDA2MoeConfig, head_dim: int, dense: bool) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = _Attention(config, head_dim)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size) if dense else _experts(config)
        heads, shared = config.num_attention_heads, config.num_key_value_heads
        self._starts = [head_dim * each for each in (0, heads, heads + shared, heads + 2 * shared)]

    @property
    def parts(self) -> BlockParts:
        """The modules under their common names."""
        own = self.attention
        query, key, value = (Rows(own.query_key_value, low, high) for low, high in pairwise(self._starts))
        return BlockParts(
            self.input_layernorm, query, key, value, own.dense, self.post_attention_layernorm, self.mlp.part,
            own.query_layernorm, own.key_layernorm,
        )  # fmt: skip

    def forward(self, layer: int, hidden: Tensor, inputs: BlockInputs) -> Tensor:
        """Map hidden states (B, C, d) to the next layer's."""
        return block_forward(self.parts, layer, hidden, inputs)


def _experts(config: LLaDA2MoeConfig) -> MixtureOfExperts:
    size, width, count = config.hidden_size, config.moe_intermediate_size, config.num_experts
    router = GroupLimitedRouter(
        size, count, config.num_experts_per_tok, config.n_group, config.topk_group, config.routed_scaling_factor
    )
    shared = GatedMLP(size, width * config.num_shared_experts) if config.num_shared_experts else None
    return MixtureOfExperts(router, Experts(count, size, width), shared)


class _Inner(nn.Module):
    """Carries the ``model`` prefix of the published names."""

    def __init__(self, config: LLaDA2MoeConfig, head_dim: int) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            LLaDA2MoeDecoderLayer(config, head_dim, layer < config.first_k_dense_replace)
            for layer in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class LLaDA2MoeModelLM(BlockCausalModel):
    """LLaDA2 with its vocabulary projection."""

    config_class = LLaDA2MoeConfig
    tempered_confidence = True
    constants = ("num_experts_per_tok", "n_group", "topk_group", "routed_scaling_factor", "partial_rotary_factor")
    _no_split_modules = ["LLaDA2MoeDecoderLayer"]

    def __init__(self, config: LLaDA2MoeConfig) -> None:
        super().__init__(config)
        self.model = _Inner(config, self.head_dim)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.block_length = config.block_size
        self.post_init()
        # As published beside bfloat16 weights. Set here: transformers 4 rejects a buffer in the list of the class.
        self._keep_in_fp32_modules_strict = {"expert_bias"}

    @classmethod
    def layer_alone(cls, config: PretrainedConfig, layer: int) -> dict[str, Any]:
        return {"first_k_dense_replace": int(layer < config.first_k_dense_replace)}

    @property
    def blocks(self) -> nn.ModuleList:
        return self.model.layers

    @property
    def final_norm(self) -> nn.Module:
        return self.model.norm

    @property
    def rotary_dim(self) -> int:
        return int(self.head_dim * self.config.partial_rotary_factor)

    def get_input_embeddings(self) -> nn.Module:
        return self.model.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.word_embeddings = value

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.lm_head = value
