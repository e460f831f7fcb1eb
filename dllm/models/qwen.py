"""The modules of a Qwen decoder under their published names, shared by several families."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from dllm.models.base import MaskedDiffusionModel
from dllm.models.experts import GatedMLP, MixtureOfExperts
from dllm.models.transformer import BlockInputs, BlockParts, RMSNorm, block_forward

ATTENTION_TP_PLAN = {
    "model.layers.*.self_attn.q_proj": "colwise",
    "model.layers.*.self_attn.k_proj": "colwise",
    "model.layers.*.self_attn.v_proj": "colwise",
    "model.layers.*.self_attn.o_proj": "rowwise",
}
TP_PLAN = ATTENTION_TP_PLAN | {
    "model.layers.*.mlp.gate_proj": "colwise",
    "model.layers.*.mlp.up_proj": "colwise",
    "model.layers.*.mlp.down_proj": "rowwise",
}


class _Attention(nn.Module):
    """Carries the ``self_attn`` prefix of the published names."""

    def __init__(self, config: Any, head_dim: int, bias: bool, norms: bool) -> None:
        super().__init__()
        size, kv_size = head_dim * config.num_attention_heads, head_dim * config.num_key_value_heads
        self.q_proj = nn.Linear(config.hidden_size, size, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=bias)
        self.o_proj = nn.Linear(size, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(head_dim, config.rms_norm_eps) if norms else None
        self.k_norm = RMSNorm(head_dim, config.rms_norm_eps) if norms else None


class QwenBlock(nn.Module):
    """One block.

    Args:
        config: of the model.
        head_dim: size of an attention head.
        bias: whether the projections to queries, keys and values have one.
        norms: whether queries and keys are normalised.
        mlp: its feed-forward part.
    """

    def __init__(self, config: Any, head_dim: int, bias: bool, norms: bool, mlp: GatedMLP | MixtureOfExperts) -> None:
        super().__init__()
        self.self_attn = _Attention(config, head_dim, bias, norms)
        self.mlp = mlp
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    @property
    def parts(self) -> BlockParts:
        """The modules under their common names."""
        attention = self.self_attn
        return BlockParts(
            self.input_layernorm, attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj,
            self.post_attention_layernorm, self.mlp.part, attention.q_norm, attention.k_norm,
        )  # fmt: skip

    def forward(self, layer: int, hidden: Tensor, inputs: BlockInputs) -> Tensor:
        """Map hidden states (B, C, d) to the next layer's."""
        return block_forward(self.parts, layer, hidden, inputs)


class _Inner(nn.Module):
    """Carries the ``model`` prefix of the published names."""

    def __init__(self, config: Any, blocks: Iterable[QwenBlock]) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(blocks)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class QwenDenoiser(MaskedDiffusionModel):
    """A denoiser made of these modules, with its vocabulary projection.

    Attributes:
        qkv_bias: whether the projections to queries, keys and values have a bias.
        qk_norms: whether queries and keys are normalised.
    """

    qkv_bias: bool
    qk_norms: bool
    _no_split_modules = ["QwenBlock"]

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        own = config, self.head_dim, self.qkv_bias, self.qk_norms
        layers = range(config.num_hidden_layers)
        self.model = _Inner(config, (QwenBlock(*own, self.feed_forward(config, layer)) for layer in layers))
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def feed_forward(cls, config: Any, layer: int) -> GatedMLP | MixtureOfExperts:
        """The feed-forward part of a layer."""
        return GatedMLP(config.hidden_size, config.intermediate_size)

    @property
    def blocks(self) -> nn.ModuleList:
        return self.model.layers

    @property
    def final_norm(self) -> nn.Module:
        return self.model.norm

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head
