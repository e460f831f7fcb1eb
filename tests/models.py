"""Tiny random models whose predictions depend on everything they should and whose confidences spread over (0, 1)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from dllm import LanguageModel
from dllm.filters import ConfidenceFilter, Filter, NeighbourFilter
from dllm.frequencies import Frequencies
from dllm.models import (
    DreamConfig,
    DreamModel,
    LLaDAConfig,
    LLaDAModelLM,
    MaskedDiffusionModel,
    SDARConfig,
    SDARForCausalLM,
)
from dllm.tasks.tokenizer import build_tokenizer


def random_llada(
    vocab: int = 64,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    *,
    tokenizer: bool = False,
    hidden: int = 32,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int | None = None,
    max_length: int = 256,
    sharpness: float = 5.0,
) -> LanguageModel:
    """A random LLaDA.

    Args:
        vocab: entries of the logits; the last one is [MASK], the last but one ends a text.
        seed: of the weights.
        dtype: of the weights.
        tokenizer: give it the bundled task's tokenizer, whose vocabulary then replaces `vocab`.
        hidden: width.
        layers: transformer blocks.
        heads: attention heads.
        kv_heads: key-value heads; `heads` when None.
        max_length: longest canvas.
        sharpness: standard deviation of the logits, roughly; more of it makes the model surer.
    """
    words = build_tokenizer() if tokenizer else None
    config = LLaDAConfig(
        vocab_size=len(words) if words else vocab,
        d_model=hidden,
        n_layers=layers,
        n_heads=heads,
        n_kv_heads=kv_heads,
        mlp_hidden_size=2 * hidden,
        max_sequence_length=max_length,
        rope_theta=10000.0,
        mask_token_id=words.mask_token_id if words else vocab - 1,
        eos_token_id=words.eos_token_id if words else vocab - 2,
    )
    return LanguageModel(_randomise(LLaDAModelLM(config), seed, dtype, sharpness), words, "random-llada")


def random_dream(
    vocab: int = 64,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    *,
    tokenizer: bool = False,
    hidden: int = 32,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    max_length: int = 256,
    sharpness: float = 5.0,
) -> LanguageModel:
    """A random Dream, with grouped key-value heads; arguments as for `random_llada`."""
    words = build_tokenizer() if tokenizer else None
    config = DreamConfig(
        vocab_size=len(words) if words else vocab,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=2 * hidden,
        max_position_embeddings=max_length,
        rope_theta=10000.0,
        mask_token_id=words.mask_token_id if words else vocab - 1,
        eos_token_id=words.eos_token_id if words else vocab - 2,
    )
    return LanguageModel(_randomise(DreamModel(config), seed, dtype, sharpness), words, "random-dream")


def random_sdar(
    vocab: int = 64,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    *,
    layers: int = 2,
    block_length: int = 4,
    max_length: int = 256,
    sharpness: float = 5.0,
) -> LanguageModel:
    """A random SDAR, whose attention is causal over blocks; arguments as for `random_llada`."""
    config = SDARConfig(
        vocab_size=vocab,
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        intermediate_size=64,
        max_position_embeddings=max_length,
        rope_theta=10000.0,
        block_size=block_length,
        mask_token_id=vocab - 1,
        eos_token_id=vocab - 2,
    )
    return LanguageModel(_randomise(SDARForCausalLM(config), seed, dtype, sharpness), None, "random-sdar")


def random_guide(vocab: int = 64, seed: int = 0, dtype: torch.dtype = torch.float64, sharpness: float = 2.0) -> Any:
    """A random causal Qwen2 over the same vocabulary, to guide the random denoisers."""
    config = Qwen2Config(
        vocab_size=vocab,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        max_position_embeddings=256,
        eos_token_id=vocab - 2,
        bos_token_id=None,
    )
    model = Qwen2ForCausalLM(config).to(dtype).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                weight = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(weight * sharpness * parameter.shape[1] ** -0.5)
    return model


def random_filter(seed: int = 0, block_length: int | None = None) -> Filter:
    """A random Learn2PD filter that accepts a good part of what it sees; in the published form with a block length."""
    generator = torch.Generator().manual_seed(seed)
    network = NeighbourFilter(8) if block_length is None else ConfidenceFilter(block_length)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return Filter(network, None, "random")


def random_frequencies(seed: int = 0) -> Frequencies:
    """A table over the tokens of the random models, from rare to very frequent ones."""
    draw = torch.rand(60, generator=torch.Generator().manual_seed(seed))
    return Frequencies({str(token): int(10 ** (4 * share)) for token, share in enumerate(draw.tolist())})


def save_folder(lm: LanguageModel, path: Path) -> Path:
    """Write a model, and its tokenizer where it has one, as a folder that `dllm.load` takes; return the folder."""
    lm.backbone.save_pretrained(path)
    if lm.tokenizer is not None:
        lm.tokenizer.save_pretrained(path)
    return path


def _randomise(backbone: MaskedDiffusionModel, seed: int, dtype: torch.dtype, sharpness: float) -> MaskedDiffusionModel:
    """Draw weights large enough that attention is selective and every layer counts."""
    generator = torch.Generator().manual_seed(seed)
    backbone = backbone.to(dtype).eval()
    head = backbone.get_output_embeddings()
    with torch.no_grad():
        for name, module in backbone.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                spread = 1.0 if isinstance(module, nn.Embedding) else module.in_features**-0.5
                gain = sharpness if module is head else 2.0 if name.endswith(("q_proj", "k_proj")) else 1.5
                # Drawn in float64, so that every dtype gets the same numbers.
                weight = torch.randn(module.weight.shape, generator=generator, dtype=torch.float64)
                module.weight.copy_(weight * spread * gain)
                if getattr(module, "bias", None) is not None:
                    module.bias.copy_(0.1 * torch.randn(module.bias.shape, generator=generator, dtype=torch.float64))
        # Otherwise every masked position would predict much the same, whatever stands around it.
        backbone.get_input_embeddings().weight[backbone.mask_token_id] *= 0.1
    return backbone
