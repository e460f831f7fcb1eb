"""Dream (arXiv 2508.15487): a Qwen2 decoder without causal mask, whose logits are shifted by one.

Rule:

    p(token at i) = softmax(logits at i - 1),   i attends to every position

The prediction for position i is read at position i - 1, as in the autoregressive model that Dream was
initialized from. Tensor names are the published ones.
"""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from dllm.models.base import check_config
from dllm.models.checkpoint import published
from dllm.models.published import check_fixed, check_special_ids, check_synonyms, take_rope_theta
from dllm.models.qwen import TP_PLAN, QwenDenoiser

# Config keys with a single supported value; null means false.
_FIXED = {"hidden_act": "silu", "use_mrope": False, "use_sliding_window": False, "tie_word_embeddings": False}
# Keys of the published config that are not read.
_UNUSED = ("max_window_layers", "sliding_window")


class DreamConfig(PretrainedConfig):
    """Configuration in the published layout; unread published keys are preserved, others dropped.

    Args:
        vocab_size: entries V of the logits.
        hidden_size: width d of the hidden states.
        intermediate_size: width of the feed-forward part.
        num_hidden_layers: transformer blocks.
        num_attention_heads: attention heads H.
        num_key_value_heads: key-value heads; `num_attention_heads` when None.
        max_position_embeddings: longest canvas.
        rms_norm_eps: added to the mean square.
        initializer_range: standard deviation of the initial weights.
        mask_token_id: id of [MASK].
        eos_token_id: end-of-text id or ids; the first one fills the rest of the canvas.
        **kwargs: other published keys, such as `rope_theta`, the base of the rotary embedding (1000000 by default).

    Raises:
        ValueError: the config differs from Dream's published architecture.
    """

    model_type = "Dream"
    base_model_tp_plan = TP_PLAN

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


class DreamModel(QwenDenoiser):
    """Dream with its vocabulary projection."""

    config_class = DreamConfig
    logits_shift = 1
    tempered_confidence = True
    end_of_turn = ("<|im_end|>",)
    qkv_bias, qk_norms = True, False
