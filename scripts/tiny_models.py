"""The bundled architectures in configured sizes, initialized randomly or from the weights of a guide."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from dllm.models.dream import DreamConfig, DreamModel
from dllm.models.llada import LLaDAConfig, LLaDAModelLM
from dllm.models.sdar import SDARConfig, SDARForCausalLM


def build_model(cfg: DictConfig, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """Build the model of `cfg.arch`, with the blocks of `cfg.init` if given."""
    size, eos, mask = cfg.model, tokenizer.eos_token_id, tokenizer.mask_token_id
    common = {"vocab_size": len(tokenizer), "eos_token_id": eos, "pad_token_id": eos, "rope_theta": 10000.0}
    if cfg.arch == "llada":
        config = LLaDAConfig(
            d_model=size.hidden_size, n_heads=size.num_heads, n_layers=size.num_layers,
            mlp_hidden_size=size.intermediate_size, max_sequence_length=size.max_length, mask_token_id=mask, **common,
        )  # fmt: skip
        model: PreTrainedModel = LLaDAModelLM._from_config(config, attn_implementation="eager")
    else:
        common |= {
            "hidden_size": size.hidden_size, "intermediate_size": size.intermediate_size,
            "num_hidden_layers": size.num_layers, "num_attention_heads": size.num_heads,
            "num_key_value_heads": size.num_kv_heads, "max_position_embeddings": size.max_length,
        }  # fmt: skip
        if cfg.arch == "dream":
            model = DreamModel._from_config(DreamConfig(mask_token_id=mask, **common), attn_implementation="eager")
        else:
            guide = Qwen2Config(tie_word_embeddings=False, **common)
            model = Qwen2ForCausalLM._from_config(guide, attn_implementation="eager")
    if cfg.init:
        weights = _guide_weights(cfg.init)
        try:
            model.load_state_dict(_as_llada(weights, size) if cfg.arch == "llada" else weights)
        except RuntimeError:
            raise ValueError(f"init={cfg.init!r} has other sizes than model.*; make them equal") from None
    return model


def as_block_diffusion(
    folder: Path, init: str, tokenizer: PreTrainedTokenizerFast, block_length: int
) -> SDARForCausalLM:
    """A trained guide as an SDAR model.

    Its biases are dropped. The norms of queries and keys, which the guide does not have, get the weight that keeps
    their expected size, for inputs of which every direction is equally likely.

    Args:
        folder: of the guide.
        init: its name in errors.
        tokenizer: of the task.
        block_length: of the model.

    Raises:
        ValueError: it is no guide of this vocabulary.
    """
    config: Any
    weights, config = _guide_weights(str(folder), init), Qwen2Config.from_pretrained(folder)
    if config.vocab_size != len(tokenizer):
        raise ValueError(f"init={init!r} has {config.vocab_size} tokens, not the {len(tokenizer)} of the word problems")
    head = config.hidden_size // config.num_attention_heads
    for norm, layer in ((f"{each}_norm", layer) for each in "qk" for layer in range(config.num_hidden_layers)):
        block, projection = f"model.layers.{layer}", f"{norm[0]}_proj"
        scaled = weights[f"{block}.self_attn.{projection}.weight"] * weights[f"{block}.input_layernorm.weight"]
        size = (scaled.square().sum(-1) + weights[f"{block}.self_attn.{projection}.bias"].square()).mean().sqrt()
        weights[f"{block}.self_attn.{norm}.weight"] = size.expand(head).clone()
    model: SDARForCausalLM = SDARForCausalLM._from_config(
        SDARConfig(
            vocab_size=config.vocab_size, hidden_size=config.hidden_size, intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_hidden_layers, num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads, head_dim=head,
            max_position_embeddings=config.max_position_embeddings, rms_norm_eps=config.rms_norm_eps,
            rope_theta=config.rope_parameters["rope_theta"], block_size=block_length,
            mask_token_id=tokenizer.mask_token_id, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
        ),
        attn_implementation="eager",
    )  # fmt: skip
    model.load_state_dict({name: weight for name, weight in weights.items() if not name.endswith(".bias")})
    return model


def _guide_weights(folder: str, init: str | None = None) -> dict[str, Tensor]:
    try:
        kind = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))["model_type"]
        if kind != "qwen2":
            raise ValueError(f"it has a model of type {kind}")
        return dict(Qwen2ForCausalLM.from_pretrained(folder).state_dict())
    except (OSError, ValueError, KeyError, TypeError) as error:
        name = folder if init is None else init
        raise ValueError(f"init={name!r} cannot be used ({error}); give the folder of a trained tiny-guide") from None


def _as_llada(weights: dict[str, Tensor], size: DictConfig) -> dict[str, Tensor]:
    """Rename Qwen2 tensors to LLaDA's, repeat shared key-value heads, drop the biases."""
    names = {
        "model.embed_tokens": "model.transformer.wte", "model.layers": "model.transformer.blocks",
        "model.norm": "model.transformer.ln_f", "lm_head": "model.transformer.ff_out",
        "self_attn.o_proj": "attn_out", "self_attn.": "", "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ff_norm", "mlp.gate_proj": "ff_proj", "mlp.up_proj": "up_proj",
        "mlp.down_proj": "ff_out",
    }  # fmt: skip
    renamed = {}
    for name, value in weights.items():
        if name.endswith(".bias"):
            continue
        if "k_proj" in name or "v_proj" in name:
            heads = value.unflatten(0, (size.num_kv_heads, -1))
            value = heads.repeat_interleave(size.num_heads // size.num_kv_heads, dim=0).flatten(0, 1)
        for old, new in names.items():
            name = name.replace(old, new)
        renamed[name] = value
    return renamed
