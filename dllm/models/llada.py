"""LLaDA (arXiv 2502.09992): a llama block without causal mask or biases, unshifted logits.

Rule:

    p(token at i) = softmax(logits at i),   i attends to every position

Tensor names are the published ones (``model.transformer.blocks.0.attn_out.weight``), so that
checkpoints load and save without conversion.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import PretrainedConfig

from dllm.models.base import MaskedDiffusionModel, check_config
from dllm.models.checkpoint import published
from dllm.models.published import check_fixed, check_special_ids, check_synonyms, is_whole, take_rope_theta
from dllm.models.transformer import BlockInputs, BlockParts, RMSNorm, SwiGLU, block_forward

# Config keys with a single supported value; null means false.
_FIXED = {
    "block_type": "llama",
    "layer_norm_type": "rms",
    "activation_type": "silu",
    "rope": True,
    "rope_full_precision": True,
    "alibi": False,
    "attention_layer_norm": False,
    "include_bias": False,
    "include_qkv_bias": False,
    "bias_for_layer_norm": False,
    "layer_norm_with_affine": True,
    "input_emb_norm": False,
    "scale_logits": False,
    "weight_tying": False,
    "tie_word_embeddings": False,
    "multi_query_attention": None,
}
# Keys of the published config that are not read.
_UNUSED = (
    "alibi_bias_max", "attention_layer_norm_with_affine", "bias_for_layer_norm", "block_group_size",
    "embedding_dropout", "flash_attention", "init_cutoff_factor", "init_device", "init_fn", "layer_norm_with_affine",
    "mlp_ratio", "precision", "residual_dropout", "rope_full_precision",
)  # fmt: skip


class LLaDAConfig(PretrainedConfig):
    """Configuration in the published layout; unread published keys are preserved, others dropped.

    Args:
        vocab_size: entries V of the logits.
        embedding_size: rows of the embedding and the projection; `vocab_size` when None. Rows beyond `vocab_size` are
            padding.
        d_model: hidden size.
        n_heads: attention heads H.
        n_kv_heads: key-value heads; `n_heads` when None.
        n_layers: transformer blocks.
        mlp_hidden_size: width of the feed-forward part.
        max_sequence_length: longest canvas.
        rms_norm_eps: added to the mean square.
        mask_token_id: id of [MASK].
        eos_token_id: end-of-text id or ids; the first one fills the rest of the canvas.
        **kwargs: other published keys, such as `rope_theta`, the base of the rotary embedding (500000 by default).

    Raises:
        ValueError: the config differs from LLaDA's published architecture.
    """

    model_type = "llada"
    attribute_map = {
        "hidden_size": "d_model",
        "num_attention_heads": "n_heads",
        "num_hidden_layers": "n_layers",
        "num_key_value_heads": "n_kv_heads",
        "intermediate_size": "mlp_hidden_size",
        "max_position_embeddings": "max_sequence_length",
        "initializer_range": "init_std",
    }
    base_model_tp_plan = {
        "model.transformer.blocks.*.q_proj": "colwise",
        "model.transformer.blocks.*.k_proj": "colwise",
        "model.transformer.blocks.*.v_proj": "colwise",
        "model.transformer.blocks.*.attn_out": "rowwise",
        "model.transformer.blocks.*.ff_proj": "colwise",
        "model.transformer.blocks.*.up_proj": "colwise",
        "model.transformer.blocks.*.ff_out": "rowwise",
    }

    def __init__(
        self,
        vocab_size: int = 126464,
        embedding_size: int | None = None,
        d_model: int = 4096,
        n_heads: int = 32,
        n_kv_heads: int | None = None,
        n_layers: int = 32,
        mlp_hidden_size: int = 12288,
        max_sequence_length: int = 4096,
        rms_norm_eps: float = 1e-5,
        init_std: float = 0.02,
        mask_token_id: int = 126336,
        eos_token_id: int | list[int] | None = 126081,
        **kwargs: Any,
    ) -> None:
        check_fixed("LLaDA", _FIXED, kwargs)
        check_special_ids("LLaDA", mask_token_id, eos_token_id)
        self.vocab_size = vocab_size
        self.embedding_size = vocab_size if embedding_size is None else embedding_size
        self.d_model = d_model
        self.n_heads = n_heads
        self.n_kv_heads = n_heads if n_kv_heads is None else n_kv_heads
        self.n_layers = n_layers
        self.mlp_hidden_size = mlp_hidden_size
        self.max_sequence_length = max_sequence_length
        self.rope_theta = take_rope_theta("LLaDA", 500000.0, kwargs)
        self.rms_norm_eps = rms_norm_eps
        self.init_std = init_std
        self.mask_token_id = mask_token_id
        check_synonyms("LLaDA", self, kwargs)
        kwargs.setdefault("tie_word_embeddings", False)
        kwargs["eos_token_id"] = eos_token_id
        super().__init__(**published(kwargs, {*_FIXED, *_UNUSED}))
        check_config(self)
        if not is_whole(self.embedding_size) or self.embedding_size < vocab_size:
            raise ValueError(
                f"LLaDA config: embedding_size={embedding_size!r} is less than vocab_size={vocab_size}; give as many "
                "rows as there are tokens, or more"
            )


class LLaDABlock(nn.Module):
    """One block under its published names."""

    def __init__(self, config: LLaDAConfig) -> None:
        super().__init__()
        kv_size = config.d_model // config.n_heads * config.n_kv_heads
        self.attn_norm = RMSNorm(config.d_model, config.rms_norm_eps)
        self.q_proj = nn.Linear(config.d_model, config.d_model, bias=False)
        self.k_proj = nn.Linear(config.d_model, kv_size, bias=False)
        self.v_proj = nn.Linear(config.d_model, kv_size, bias=False)
        self.attn_out = nn.Linear(config.d_model, config.d_model, bias=False)
        self.ff_norm = RMSNorm(config.d_model, config.rms_norm_eps)
        self.ff_proj = nn.Linear(config.d_model, config.mlp_hidden_size, bias=False)
        self.up_proj = nn.Linear(config.d_model, config.mlp_hidden_size, bias=False)
        self.ff_out = nn.Linear(config.mlp_hidden_size, config.d_model, bias=False)

    @property
    def parts(self) -> BlockParts:
        """The modules under their common names."""
        return BlockParts(
            self.attn_norm, self.q_proj, self.k_proj, self.v_proj, self.attn_out,
            self.ff_norm, SwiGLU(self.ff_proj, self.up_proj, self.ff_out),
        )  # fmt: skip

    def forward(self, layer: int, hidden: Tensor, inputs: BlockInputs) -> Tensor:
        """Map hidden states (B, C, d) to the next layer's."""
        return block_forward(self.parts, layer, hidden, inputs)


class _Inner(nn.Module):
    """Carries the ``model.transformer`` prefix of the published names."""

    def __init__(self, config: LLaDAConfig) -> None:
        super().__init__()
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.embedding_size, config.d_model),
                "blocks": nn.ModuleList(LLaDABlock(config) for _ in range(config.n_layers)),
                "ln_f": RMSNorm(config.d_model, config.rms_norm_eps),
                "ff_out": nn.Linear(config.d_model, config.embedding_size, bias=False),
            }
        )


class LLaDAModelLM(MaskedDiffusionModel):
    """LLaDA with its vocabulary projection."""

    config_class = LLaDAConfig
    end_of_turn = ("<|eot_id|>",)
    _no_split_modules = ["LLaDABlock"]

    def __init__(self, config: LLaDAConfig) -> None:
        super().__init__(config)
        self.model = _Inner(config)
        self.post_init()

    @property
    def blocks(self) -> nn.ModuleList:
        return self.model.transformer["blocks"]

    @property
    def final_norm(self) -> nn.Module:
        return self.model.transformer["ln_f"]

    def get_input_embeddings(self) -> nn.Module:
        return self.model.transformer["wte"]

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.transformer["wte"] = value

    def get_output_embeddings(self) -> nn.Module:
        return self.model.transformer["ff_out"]

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.model.transformer["ff_out"] = value

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        embedding: Any = super().resize_token_embeddings(*args, **kwargs)
        self.config.embedding_size = len(embedding.weight)
        return embedding
