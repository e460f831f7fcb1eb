"""Models with random weights in the shapes of known ones, and causal models of the same shape."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from dllm.models import DreamConfig, DreamModel, LLaDAConfig, LLaDAModelLM
from dllm.models.base import MaskedDiffusionModel
from dllm.models.loading import LanguageModel


@dataclass(frozen=True)
class Shape:
    """Width, layers, heads, key-value heads, width of the feed-forward part, vocabulary; and the family."""

    width: int
    layers: int
    heads: int
    kv_heads: int
    inner: int
    vocabulary: int
    family: str = "llada"


PRESETS = {
    "tiny": Shape(128, 4, 4, 4, 384, 1024),
    "100m": Shape(768, 12, 12, 12, 2048, 16384),
    "llada-8b": Shape(4096, 32, 32, 32, 12288, 126464),
    "dream-7b": Shape(3584, 28, 28, 4, 18944, 152064, "dream"),
}


def random_model(preset: str, max_length: int, device: str | torch.device, dtype: torch.dtype) -> LanguageModel:
    """A model with random weights in one of the `PRESETS`, made where and as it is used.

    Raises:
        ValueError: no such preset.
    """
    if preset not in PRESETS:
        raise ValueError(f"model='random:{preset}' is unknown; use one of {', '.join(f'random:{p}' for p in PRESETS)}")
    shape = PRESETS[preset]
    special = {"mask_token_id": shape.vocabulary - 1, "eos_token_id": shape.vocabulary - 2}
    torch.manual_seed(0)
    backbone: MaskedDiffusionModel
    with _defaults(device, dtype):
        if shape.family == "dream":
            config = DreamConfig(
                shape.vocabulary, shape.width, shape.inner, shape.layers, shape.heads, shape.kv_heads, max_length,
                **special,
            )  # fmt: skip
            backbone = DreamModel(config)
        else:
            backbone = LLaDAModelLM(
                LLaDAConfig(
                    shape.vocabulary, d_model=shape.width, n_heads=shape.heads, n_kv_heads=shape.kv_heads,
                    n_layers=shape.layers, mlp_hidden_size=shape.inner, max_sequence_length=max_length, **special,
                )
            )  # fmt: skip
    return LanguageModel(backbone.eval(), None, f"random:{preset}")


@contextmanager
def _defaults(device: str | torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Make tensors on a device and of a dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def causal_model(backbone: MaskedDiffusionModel) -> PreTrainedModel:
    """A causal model of a denoiser's shape with random weights: a Llama of transformers."""
    config = backbone.config
    shape = LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        max_position_embeddings=config.max_position_embeddings,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=None,
    )
    with _defaults(backbone.device, backbone.dtype):
        return LlamaForCausalLM(shape).eval()
