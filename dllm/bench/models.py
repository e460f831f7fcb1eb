"""Models with random weights in the shapes of published ones, and causal models of the same shape."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from dllm.models import DreamConfig, DreamModel, LLaDAConfig, LLaDAModelLM
from dllm.models.base import MaskedDiffusionModel
from dllm.models.linear import join_products
from dllm.models.loading import LanguageModel, quantised


@dataclass(frozen=True)
class Shape:
    """Hidden size, layers, heads, key-value heads, intermediate size, vocabulary size; and the family."""

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


def random_model(
    preset: str,
    max_length: int,
    device: str | torch.device,
    dtype: torch.dtype,
    quantization: Mapping[str, Any] | None = None,
) -> LanguageModel:
    """A model with random weights in one of the `PRESETS`, created on its device in its dtype.

    Args:
        preset: name of the shape.
        max_length: longest sequence.
        device: of the weights.
        dtype: of the weights.
        quantization: as for `dllm.load`.

    Raises:
        ValueError: an unknown preset, or a `quantization` that cannot be used.
    """
    if preset not in PRESETS:
        known = ", ".join(f"random:{each}" for each in PRESETS)
        raise ValueError(f"unknown model='random:{preset}'; expected one of {known}")
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
    if quantization is not None:
        backbone = quantised(backbone, quantization)
    if backbone.device.type == "cuda":
        join_products(backbone.blocks)
    return LanguageModel(backbone.eval(), None, f"random:{preset}", quantization=quantization)


@contextmanager
def _defaults(device: str | torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Create tensors on a device with a dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def causal_model(backbone: MaskedDiffusionModel) -> PreTrainedModel:
    """A causal model (Llama in transformers) of a denoiser's shape with random weights."""
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
