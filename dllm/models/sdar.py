"""SDAR (arXiv 2510.06303): a Qwen3 decoder trained to denoise blocks, with block-causal attention; unshifted logits.

Rule:

    p(token at i) = softmax(logits at i),   i attends to j  if  floor(j / length) <= floor(i / length)

Tensor names are the published ones. Differences: the published code uses flash-attn; here a position attends to its
block and to those before it, where blocks are counted from the row's first token.
"""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import PretrainedConfig

from dllm.checks import number
from dllm.models.base import BlockCausalModel, check_config
from dllm.models.checkpoint import published
from dllm.models.published import check_fixed, check_special_ids, check_synonyms, take_rope_theta
from dllm.models.qwen import TP_PLAN, QwenDenoiser

# Config keys with a single supported value; null means false.
_FIXED = {
    "attention_bias": False,
    "hidden_act": "silu",
    "use_sliding_window": False,
    "tie_word_embeddings": False,
}
# Keys of the published config that are not read.
_UNUSED = (
    "debug", "ep_size", "fuse_cross_entropy", "max_window_layers", "micro_forward", "skip_checkpoint", "sliding_window",
    "use_deepep",
)  # fmt: skip


class SDARConfig(PretrainedConfig):
    """Configuration in the published layout; unread published keys are preserved, others dropped.

    Args:
        vocab_size: entries V of the logits.
        hidden_size: width d of the hidden states.
        intermediate_size: width of the feed-forward part.
        num_hidden_layers: transformer blocks.
        num_attention_heads: attention heads H.
        num_key_value_heads: key-value heads; `num_attention_heads` when None.
        head_dim: size D of an attention head.
        max_position_embeddings: longest canvas.
        rms_norm_eps: added to the mean square.
        initializer_range: standard deviation of the initial weights.
        block_size: positions of a block.
        mask_token_id: id of [MASK].
        eos_token_id: end-of-text id or ids; the first one fills the rest of the canvas.
        **kwargs: other published keys, such as `rope_theta`, the base of the rotary embedding (1000000 by default).

    Raises:
        ValueError: the config differs from SDAR's published architecture.
    """

    model_type = "sdar"
    base_model_tp_plan = TP_PLAN
    unread: ClassVar[tuple[str, ...]] = _UNUSED

    def __init__(
        self,
        vocab_size: int = 151936,
        hidden_size: int = 2560,
        intermediate_size: int = 9728,
        num_hidden_layers: int = 36,
        num_attention_heads: int = 32,
        num_key_value_heads: int | None = 8,
        head_dim: int = 128,
        max_position_embeddings: int = 32768,
        rms_norm_eps: float = 1e-6,
        initializer_range: float = 0.02,
        block_size: int = 4,
        mask_token_id: int = 151669,
        eos_token_id: int | list[int] | None = 151643,
        **kwargs: Any,
    ) -> None:
        check_fixed("SDAR", _FIXED, kwargs)
        check_special_ids("SDAR", mask_token_id, eos_token_id)
        number("SDAR config: block_size", block_size, "a whole number of at least 1", low=1, whole=True)
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_attention_heads if num_key_value_heads is None else num_key_value_heads
        self.head_dim = head_dim
        self.max_position_embeddings = max_position_embeddings
        self.rope_theta = take_rope_theta("SDAR", 1000000.0, kwargs)
        self.rms_norm_eps = rms_norm_eps
        self.initializer_range = initializer_range
        self.block_size = block_size
        self.mask_token_id = mask_token_id
        check_synonyms("SDAR", self, kwargs)
        kwargs.setdefault("tie_word_embeddings", False)
        kwargs["eos_token_id"] = eos_token_id
        super().__init__(**published(kwargs, {*_FIXED, *self.unread}))
        check_config(self)


class SDARForCausalLM(BlockCausalModel, QwenDenoiser):
    """SDAR with its vocabulary projection."""

    config_class = SDARConfig
    end_of_turn = ("<|im_end|>",)
    qkv_bias, qk_norms = False, True

    def __init__(self, config: SDARConfig) -> None:
        super().__init__(config)
        self.block_length = config.block_size
