"""Dream (arXiv 2508.15487): a Qwen2 decoder without causal mask, whose logits are shifted by one.

The prediction for column i is read at column i - 1, as in the autoregressive model Dream was made
from. Tensor names are the published ones.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import PretrainedConfig

from dllm.models.base import MaskedDiffusionModel, check_config
from dllm.models.checkpoint import published
from dllm.models.published import check_fixed, check_special_ids, check_synonyms, take_rope_theta
from dllm.models.transformer import BlockInputs, BlockParts, RMSNorm, SwiGLU, block_forward

# What the published config could say and this implementation does not compute otherwise; null means false.
_FIXED = {"hidden_act": "silu", "use_mrope": False, "use_sliding_window": False, "tie_word_embeddings": False}
# What the published config says beside that, and nothing here reads.
_UNUSED = ("max_window_layers", "sliding_window")


class DreamConfig(PretrainedConfig):
    """Configuration in the published layout; published keys it does not read are kept and written back, others dropped.

    Args:
        vocab_size: entries V of the logits.
        hidden_size: width d of the hidden states.
        intermediate_size: width of the feed-forward part.
        num_hidden_layers: transformer blocks.
        num_attention_heads: attention heads H.
        num_key_value_heads: key-value heads; `num_attention_heads` when None.
        max_position_embeddings: longest canvas.
        rms_norm_eps: added to the mean square.
        initializer_range: standard deviation of fresh weights.
        mask_token_id: id of [MASK].
        eos_token_id: id or ids that end a text; the first one fills what follows.
        **kwargs: what else is published, such as `rope_theta`, the base of the rotary embedding (1000000 by default).

    Raises:
        ValueError: the config asks for something other than Dream's published architecture.
    """

    model_type = "Dream"
    base_model_tp_plan = {
        "model.layers.*.self_attn.q_proj": "colwise",
        "model.layers.*.self_attn.k_proj": "colwise",
        "model.layers.*.self_attn.v_proj": "colwise",
        "model.layers.*.self_attn.o_proj": "rowwise",
        "model.layers.*.mlp.gate_proj": "colwise",
        "model.layers.*.mlp.up_proj": "colwise",
        "model.layers.*.mlp.down_proj": "rowwise",
    }

    def __init__(
        self,
        vocab_size: int = 152064,
        hidden_size: int = 3584,
        intermediate_size: int = 18944,
        num_hidden_layers: int = 28,
        num_attention_heads: int = 28,
        num_key_value_heads: int | None = 4,
        max_position_embeddings: int = 131072,
        rms_norm_eps: float = 1e-6,
        initializer_range: float = 0.02,
        mask_token_id: int = 151666,
        eos_token_id: int | list[int] | None = 151643,
        **kwargs: Any,
    ) -> None:
        check_fixed("Dream", _FIXED, kwargs)
        check_special_ids("Dream", mask_token_id, eos_token_id)
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_attention_heads if num_key_value_heads is None else num_key_value_heads
        self.max_position_embeddings = max_position_embeddings
        self.rope_theta = take_rope_theta("Dream", 1000000.0, kwargs)
        self.rms_norm_eps = rms_norm_eps
        self.initializer_range = initializer_range
        self.mask_token_id = mask_token_id
        check_synonyms("Dream", self, kwargs)
        kwargs.setdefault("tie_word_embeddings", False)
        kwargs["eos_token_id"] = eos_token_id
        super().__init__(**published(kwargs, {*_FIXED, *_UNUSED}))
        check_config(self)


class _Attention(nn.Module):
    """Carries the ``self_attn`` prefix of the published names."""

    def __init__(self, config: DreamConfig) -> None:
        super().__init__()
        kv_size = config.hidden_size // config.num_attention_heads * config.num_key_value_heads
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, kv_size)
        self.v_proj = nn.Linear(config.hidden_size, kv_size)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)


class _MLP(nn.Module):
    """Carries the ``mlp`` prefix of the published names."""

    def __init__(self, config: DreamConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)


class DreamBlock(nn.Module):
    """One block under its published names."""

    def __init__(self, config: DreamConfig) -> None:
        super().__init__()
        self.self_attn = _Attention(config)
        self.mlp = _MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    @property
    def parts(self) -> BlockParts:
        """The modules under the names that all families share."""
        attention, mlp = self.self_attn, self.mlp
        return BlockParts(
            self.input_layernorm, attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj,
            self.post_attention_layernorm, SwiGLU(mlp.gate_proj, mlp.up_proj, mlp.down_proj),
        )  # fmt: skip

    def forward(self, layer: int, hidden: Tensor, inputs: BlockInputs) -> Tensor:
        """Map hidden states (B, C, d) to the next layer's."""
        return block_forward(self.parts, layer, hidden, inputs)


class _Inner(nn.Module):
    """Carries the ``model`` prefix of the published names."""

    def __init__(self, config: DreamConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DreamBlock(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class DreamModel(MaskedDiffusionModel):
    """Dream with its vocabulary projection."""

    config_class = DreamConfig
    logits_shift = 1
    tempered_confidence = True
    end_of_turn = ("<|im_end|>",)
    _no_split_modules = ["DreamBlock"]

    def __init__(self, config: DreamConfig) -> None:
        super().__init__(config)
        self.model = _Inner(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

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
