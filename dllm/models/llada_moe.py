"""LLaDA-MoE (arXiv 2509.24389): a decoder without causal mask over mixtures of experts; unshifted logits.

Rule:

    p(token at i) = softmax(logits at i),   i attends to every position
    feed-forward(h) = sum of w_e expert_e(h) over the k experts e with the largest w,   w = softmax(W h)

h is the hidden state of a position, W the router's matrix; the weights w are the softmax scores as they are. Its config
has the model_type of the dense LLaDA, "llada"; `architectures` tells them apart. Tensor names are the published ones.
"""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from dllm.models.base import check_config
from dllm.models.checkpoint import published
from dllm.models.experts import SPARSE_TP_PLAN, Experts, MixtureOfExperts, SoftmaxRouter, check_experts
from dllm.models.published import check_fixed, check_special_ids, check_synonyms, take_rope_theta
from dllm.models.qwen import ATTENTION_TP_PLAN, QwenDenoiser

# Config keys with a single supported value; null means false.
_FIXED = {
    "attention_bias": False,
    "hidden_act": "silu",
    "moe_router_enable_expert_bias": False,
    "moe_router_score_function": "softmax",
    "qk_layernorm": True,
    "routed_scaling_factor": 1,
    "router_num_group": None,
    "router_topk_group": None,
    "shared_expert_intermediate_size": None,
    "tie_word_embeddings": False,
}
# Keys of the published config that are not read, here or there.
_UNUSED = (
    "dense_intermediate_size",
    "moe_layer_freq",
    "norm_topk_prob",
    "output_router_logits",
    "router_aux_loss_coef",
)


class LLaDAMoEConfig(PretrainedConfig):
    """Configuration in the published layout; unread published keys are preserved, others dropped.

    Args:
        vocab_size: entries V of the logits.
        hidden_size: width d of the hidden states.
        expert_intermediate_size: width of an expert.
        num_hidden_layers: transformer blocks.
        num_attention_heads: attention heads H.
        num_key_value_heads: key-value heads; `num_attention_heads` when None.
        num_experts: experts of a block.
        num_experts_per_tok: experts of a position.
        max_position_embeddings: longest canvas.
        rms_norm_eps: added to the mean square.
        initializer_range: standard deviation of the initial weights.
        mask_token_id: id of [MASK].
        eos_token_id: end-of-text id or ids; the first one fills the rest of the canvas.
        **kwargs: other published keys, such as `rope_theta`, the base of the rotary embedding (50000 by default).

    Raises:
        ValueError: the config differs from LLaDA-MoE's published architecture.
    """

    model_type = "llada"
    attribute_map = {"intermediate_size": "expert_intermediate_size"}
    default_ids = ("mask_token_id", "eos_token_id")
    base_model_tp_plan = ATTENTION_TP_PLAN | SPARSE_TP_PLAN

    def __init__(
        self,
        vocab_size: int = 157184,
        hidden_size: int = 2048,
        expert_intermediate_size: int = 1024,
        num_hidden_layers: int = 16,
        num_attention_heads: int = 16,
        num_key_value_heads: int | None = None,
        num_experts: int = 64,
        num_experts_per_tok: int = 8,
        max_position_embeddings: int = 8192,
        rms_norm_eps: float = 1e-5,
        initializer_range: float = 0.02,
        mask_token_id: int = 156895,
        eos_token_id: int | list[int] | None = 156892,
        **kwargs: Any,
    ) -> None:
        check_fixed("LLaDA-MoE", _FIXED, kwargs)
        check_special_ids("LLaDA-MoE", mask_token_id, eos_token_id)
        check_experts("LLaDA-MoE", num_experts, num_experts_per_tok)
        layers = kwargs.get("moe_layer_freq")
        if layers is not None and not (isinstance(layers, list) and all(each == 1 for each in layers)):
            raise ValueError(
                f"LLaDA-MoE config: moe_layer_freq={layers!r} is not supported; the published models have experts in "
                "every layer"
            )
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.expert_intermediate_size = expert_intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_attention_heads if num_key_value_heads is None else num_key_value_heads
        self.num_experts = num_experts
        self.num_experts_per_tok = num_experts_per_tok
        self.max_position_embeddings = max_position_embeddings
        self.rope_theta = take_rope_theta("LLaDA-MoE", 50000.0, kwargs)
        self.rms_norm_eps = rms_norm_eps
        self.initializer_range = initializer_range
        self.mask_token_id = mask_token_id
        check_synonyms("LLaDA-MoE", self, kwargs)
        kwargs.setdefault("tie_word_embeddings", False)
        kwargs["eos_token_id"] = eos_token_id
        super().__init__(**published(kwargs, {*_FIXED, *_UNUSED}))
        check_config(self)


class LLaDAMoEModelLM(QwenDenoiser):
    """LLaDA-MoE with its vocabulary projection."""

    config_class = LLaDAMoEConfig
    constants = ("num_experts_per_tok",)
    qkv_bias, qk_norms = False, True

    @classmethod
    def feed_forward(cls, config: LLaDAMoEConfig, layer: int) -> MixtureOfExperts:
        size, count = config.hidden_size, config.num_experts
        router = SoftmaxRouter(size, count, config.num_experts_per_tok, normalised=False)
        return MixtureOfExperts(router, Experts(count, size, config.expert_intermediate_size))
