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
    Fast_dLLM_QwenConfig,
    Fast_dLLM_QwenForCausalLM,
    LLaDA2MoeConfig,
    LLaDA2MoeModelLM,
    LLaDAConfig,
    LLaDAModelLM,
    LLaDAMoEConfig,
    LLaDAMoEModelLM,
    MaskedDiffusionModel,
    SDARConfig,
    SDARForCausalLM,
    SDARMoeConfig,
    SDARMoeForCausalLM,
)
from dllm.models.experts import GroupLimitedRouter, SoftmaxRouter
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
    config = SDARConfig(**_sizes(vocab, layers, max_length), head_dim=12, block_size=block_length)
    return LanguageModel(_randomise(SDARForCausalLM(config), seed, dtype, sharpness), None, "random-sdar")


def random_llada2(
    vocab: int = 64,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    *,
    layers: int = 2,
    block_length: int = 4,
    max_length: int = 256,
    sharpness: float = 5.0,
) -> LanguageModel:
    """A random LLaDA2, whose first layer is dense and whose others have experts; arguments as for `random_llada`."""
    config = LLaDA2MoeConfig(
        **_sizes(vocab, layers, max_length),
        head_dim=12,
        partial_rotary_factor=0.5,
        moe_intermediate_size=16,
        num_experts=8,
        num_experts_per_tok=3,
        n_group=4,
        topk_group=2,
        block_size=block_length,
    )
    return LanguageModel(_randomise(LLaDA2MoeModelLM(config), seed, dtype, sharpness), None, "random-llada2")


def random_fast_dllm(
    vocab: int = 64,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    *,
    layers: int = 2,
    block_length: int = 4,
    max_length: int = 256,
    sharpness: float = 5.0,
) -> LanguageModel:
    """A random Fast-dLLM v2, causal over blocks with shifted logits; arguments as for `random_llada`."""
    config = Fast_dLLM_QwenConfig(**_sizes(vocab, layers, max_length), bd_size=block_length)
    return LanguageModel(_randomise(Fast_dLLM_QwenForCausalLM(config), seed, dtype, sharpness), None, "random-fast")


def random_sdar_moe(
    vocab: int = 64, seed: int = 0, dtype: torch.dtype = torch.float64, *, layers: int = 2, sharpness: float = 5.0
) -> LanguageModel:
    """A random SDAR-MoE in blocks of 4, whose second layer has experts; arguments as for `random_llada`."""
    config = SDARMoeConfig(
        **_sizes(vocab, layers, 256),
        head_dim=12,
        moe_intermediate_size=16,
        num_experts=6,
        num_experts_per_tok=2,
        decoder_sparse_step=2,
    )
    return LanguageModel(_randomise(SDARMoeForCausalLM(config), seed, dtype, sharpness), None, "random-sdar-moe")


def random_llada_moe(
    vocab: int = 64, seed: int = 0, dtype: torch.dtype = torch.float64, *, layers: int = 2, sharpness: float = 5.0
) -> LanguageModel:
    """A random LLaDA-MoE, which attends to every position; arguments as for `random_llada`."""
    sizes = _sizes(vocab, layers, 256)
    sizes["expert_intermediate_size"] = sizes.pop("intermediate_size")
    config = LLaDAMoEConfig(**sizes, num_experts=6, num_experts_per_tok=2)
    return LanguageModel(_randomise(LLaDAMoEModelLM(config), seed, dtype, sharpness), None, "random-llada-moe")


def random_diffusion_gemma(
    vocab: int = 64,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    *,
    tokenizer: bool = False,
    canvas: int = 8,
    window: int = 6,
    max_length: int = 256,
    sharpness: float = 5.0,
) -> LanguageModel:
    """A random DiffusionGemma, whose first layers see a window; arguments as for `random_llada`."""
    from dllm.models.diffusion_gemma import DiffusionGemmaConfig, DiffusionGemmaForBlockDiffusion

    words = build_tokenizer() if tokenizer else None
    vocab = len(words) if words else vocab
    sizes = _sizes(vocab, 3, max_length)
    del sizes["mask_token_id"], sizes["rope_theta"]
    text = {
        **sizes, "head_dim": 12, "moe_intermediate_size": 16, "num_experts": 4, "top_k_experts": 2,
        "sliding_window": window, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        "per_layer_config": {"2": {"head_dim": 16, "num_key_value_heads": 1}},
        "eos_token_id": words.eos_token_id if words else vocab - 2,
    }  # fmt: skip
    vision = {
        "model_type": "gemma4_vision", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 16, "position_embedding_size": 16,
    }  # fmt: skip
    config = DiffusionGemmaConfig(text_config=text, vision_config=vision, canvas_length=canvas)
    backbone = DiffusionGemmaForBlockDiffusion(config).to(dtype).eval()
    generator = torch.Generator().manual_seed(seed)
    embeddings = backbone.get_input_embeddings().weight
    with torch.no_grad():
        for parameter in backbone.parameters():
            drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if parameter is embeddings:
                parameter.copy_(drawn * sharpness * parameter.shape[1] ** -0.5)
            elif parameter.ndim > 1:
                parameter.copy_(drawn * 1.5 * parameter.shape[-1] ** -0.5)
        for layers in (backbone.model.encoder.language_model.layers, backbone.model.decoder.layers):
            for layer in layers:
                layer.layer_scalar.copy_(0.7 + 0.6 * torch.rand(1, generator=generator))
    return LanguageModel(backbone, words, "random-diffusion-gemma")


def _sizes(vocab: int, layers: int, max_length: int) -> dict[str, Any]:
    """What the configs of the families of Qwen's layout have in common."""
    return {
        "vocab_size": vocab,
        "hidden_size": 32,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": max_length,
        "rope_theta": 10000.0,
        "mask_token_id": vocab - 1,
        "eos_token_id": vocab - 2,
    }


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
            if isinstance(module, (GroupLimitedRouter, SoftmaxRouter)):
                weight = torch.randn(module.weight.shape, generator=generator, dtype=torch.float64)
                module.weight.copy_(weight * 1.5 * weight.shape[1] ** -0.5)
            if isinstance(module, GroupLimitedRouter):
                module.expert_bias.copy_(0.1 * torch.randn(len(module.weight), generator=generator))
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
