"""Fast-dLLM v2 (arXiv 2509.26328): a Qwen2.5 decoder trained to denoise blocks, with block-causal attention.

Rule:

    p(token at i) = softmax(logits at i - 1),   i attends to j  if  floor(j / length) <= floor(i / length)

The prediction for position i is read at position i - 1, as in the autoregressive model that it was initialized from:
the first token of a block is predicted by the blocks before it alone. Tensor names are the published ones; small models
have no projection to the vocabulary of their own. Differences: here a position attends to its block and to those
before it, where blocks are counted from the row's first token; the published code also computes a block in sub-blocks
on stale keys and values (see `samplers/sub_blocks.py` and `cache/sub_blocks.py`).
"""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from dllm.checks import choice, number
from dllm.models.base import BlockCausalModel, check_config
from dllm.models.checkpoint import published
from dllm.models.published import check_fixed, check_special_ids, check_synonyms, take_rope_theta
from dllm.models.qwen import TP_PLAN, QwenDenoiser

_MASK = 151665  # the published [MASK], which no config names
# Config keys with a single supported value; null means false.
_FIXED = {"hidden_act": "silu", "use_sliding_window": False}
# Keys of the published config that are not read.
_UNUSED = ("conplemenrary_mask", "complementary_mask", "layer_types", "max_window_layers", "sliding_window")


class Fast_dLLM_QwenConfig(PretrainedConfig):  # the published name
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
        bd_size: positions of a block.
        mask_token_id: id of [MASK]; the published one when None, or the last one of a smaller vocabulary.
        eos_token_id: end-of-text id or ids; the first one fills the rest of the canvas.
        tie_word_embeddings: project to the vocabulary with the embeddings.
        **kwargs: other published keys, such as `rope_theta`, the base of the rotary embedding (1000000 by default).

    Raises:
        ValueError: the config differs from Fast-dLLM v2's published architecture.
    """

    model_type = "Fast_dLLM_Qwen"
    base_model_tp_plan = TP_PLAN
    default_ids = ("mask_token_id",)

    def __init__(
        self,
        vocab_size: int = 151936,
        hidden_size: int = 3584,
        intermediate_size: int = 18944,
        num_hidden_layers: int = 28,
        num_attention_heads: int = 28,
        num_key_value_heads: int | None = 4,
        max_position_embeddings: int = 32768,
        rms_norm_eps: float = 1e-6,
        initializer_range: float = 0.02,
        bd_size: int = 32,
        mask_token_id: int | None = None,
        eos_token_id: int | list[int] | None = 151645,
        tie_word_embeddings: bool = False,
        **kwargs: Any,
    ) -> None:
        check_fixed("Fast-dLLM", _FIXED, kwargs)
        choice("Fast-dLLM config: tie_word_embeddings", tie_word_embeddings, (True, False))
        number("Fast-dLLM config: bd_size", bd_size, "a whole number of at least 1", low=1, whole=True)
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_attention_heads if num_key_value_heads is None else num_key_value_heads
        self.max_position_embeddings = max_position_embeddings
        self.rope_theta = take_rope_theta("Fast-dLLM", 1000000.0, kwargs)
        self.rms_norm_eps = rms_norm_eps
        self.initializer_range = initializer_range
        self.bd_size = bd_size
        check_synonyms("Fast-dLLM", self, kwargs)
        kwargs |= {"eos_token_id": eos_token_id, "tie_word_embeddings": tie_word_embeddings}
        super().__init__(**published(kwargs, {*_FIXED, *_UNUSED}))
        check_config(self)
        self.mask_token_id = min(_MASK, vocab_size - 1) if mask_token_id is None else mask_token_id
        check_special_ids("Fast-dLLM", self.mask_token_id, eos_token_id)


class Fast_dLLM_QwenForCausalLM(BlockCausalModel, QwenDenoiser):  # the published name
    """Fast-dLLM v2 with its vocabulary projection."""

    config_class = Fast_dLLM_QwenConfig
    logits_shift = 1
    tempered_confidence = True
    end_of_turn = ("<|im_end|>",)
    qkv_bias, qk_norms = True, False
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: Fast_dLLM_QwenConfig) -> None:
        super().__init__(config)
        self.block_length = config.bd_size
