"""SDAR-MoE (arXiv 2510.06303): SDAR over Qwen3's mixtures of experts.

Rule:

    feed-forward(h) = sum of w_e expert_e(h) over the k experts e with the largest w,   w = softmax(W h),
                      divided by the sum of these k if `norm_topk_prob`

h is the hidden state of a position, W the router's matrix. Tensor names are the published ones. All else is that of
SDAR.
"""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from dllm.checks import choice, number
from dllm.models.experts import SPARSE_TP_PLAN, Experts, GatedMLP, MixtureOfExperts, SoftmaxRouter, check_experts
from dllm.models.published import is_whole
from dllm.models.qwen import TP_PLAN
from dllm.models.sdar import SDARConfig, SDARForCausalLM


class SDARMoeConfig(SDARConfig):
    """Configuration in the published layout; unread published keys are preserved, others dropped.

    Args:
        moe_intermediate_size: width of an expert.
        num_experts: experts of a block.
        num_experts_per_tok: experts of a position.
        norm_topk_prob: whether the weights of a position sum to 1.
        decoder_sparse_step: every such block has experts; the others, and those of `mlp_only_layers`, are dense.
        mlp_only_layers: numbers of dense blocks; None for none.
        **kwargs: those of `SDARConfig`.

    Raises:
        ValueError: the config differs from SDAR's published architecture.
    """

    model_type = "sdar_moe"
    default_ids = ("mask_token_id",)
    base_model_tp_plan = TP_PLAN | SPARSE_TP_PLAN
    unread = (*SDARConfig.unread, "output_router_logits", "router_aux_loss_coef")

    def __init__(
        self,
        moe_intermediate_size: int = 768,
        num_experts: int = 128,
        num_experts_per_tok: int = 8,
        norm_topk_prob: bool = True,
        decoder_sparse_step: int = 1,
        mlp_only_layers: list[int] | None = None,
        **kwargs: Any,
    ) -> None:
        check_experts("SDAR", num_experts, num_experts_per_tok, moe_intermediate_size)
        choice("SDAR config: norm_topk_prob", norm_topk_prob, (True, False))
        use = "a whole number of at least 1"
        number("SDAR config: decoder_sparse_step", decoder_sparse_step, use, low=1, whole=True)
        dense = [] if mlp_only_layers is None else mlp_only_layers
        if not isinstance(dense, list) or not all(map(is_whole, dense)):
            raise ValueError(f"SDAR config: mlp_only_layers={dense!r} is not a list of numbers; give those of blocks")
        self.moe_intermediate_size = moe_intermediate_size
        self.num_experts = num_experts
        self.num_experts_per_tok = num_experts_per_tok
        self.norm_topk_prob = norm_topk_prob
        self.decoder_sparse_step = decoder_sparse_step
        self.mlp_only_layers = dense
        super().__init__(**kwargs)

    def is_sparse(self, layer: int) -> bool:
        """Whether a block has experts."""
        return layer not in self.mlp_only_layers and (layer + 1) % self.decoder_sparse_step == 0


class SDARMoeForCausalLM(SDARForCausalLM):
    """SDAR-MoE with its vocabulary projection."""

    config_class = SDARMoeConfig  # type: ignore[assignment]  # a config of the same kind
    constants = ("num_experts_per_tok", "norm_topk_prob")

    @classmethod
    def feed_forward(cls, config: SDARMoeConfig, layer: int) -> GatedMLP | MixtureOfExperts:
        if not config.is_sparse(layer):
            return super().feed_forward(config, layer)
        size, count = config.hidden_size, config.num_experts
        router = SoftmaxRouter(size, count, config.num_experts_per_tok, config.norm_topk_prob)
        return MixtureOfExperts(router, Experts(count, size, config.moe_intermediate_size))

    @classmethod
    def layer_alone(cls, config: PretrainedConfig, layer: int) -> dict[str, Any]:
        return {"decoder_sparse_step": 1, "mlp_only_layers": [] if config.is_sparse(layer) else [0]}
