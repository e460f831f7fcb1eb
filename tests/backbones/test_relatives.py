"""Families whose blocks are those of a model in transformers: the same logits, over the weights that it saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

import dllm
from dllm.models import MaskedDiffusionModel, SDARMoeConfig, SDARMoeForCausalLM

SIZES: dict[str, Any] = {
    "vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "rope_theta": 5000.0, "rms_norm_eps": 1e-6,
    "initializer_range": 0.3,
    "bos_token_id": None, "eos_token_id": 58, "pad_token_id": None,
}  # fmt: skip
EXPERTS: dict[str, Any] = {
    "head_dim": 12, "moe_intermediate_size": 20, "num_experts": 6, "num_experts_per_tok": 3, "mlp_only_layers": [1],
    "decoder_sparse_step": 2,
}  # fmt: skip
SPECIAL = {"mask_token_id": 59}
# Family, and what says in the config that it is one.
RELATIVES: list[tuple[str, dict[str, Any]]] = [
    ("Fast_dLLM_QwenForCausalLM", {"model_type": "Fast_dLLM_Qwen", "bd_size": 4}),
    ("SDARMoeForCausalLM", {"model_type": "sdar_moe", "block_size": 4, **SPECIAL}),
    ("LLaDAMoEModelLM", {"model_type": "llada", "expert_intermediate_size": 20, **SPECIAL}),
]
ROUNDING = 1e-5  # norms are computed in float32 there
INPUT = torch.tensor([[5, 9, 3, 7, 1, 2, 8, 4, 6, 50, 30, 31]])


def saved(relative: Any, folder: Path, family: str, entries: dict[str, Any]) -> MaskedDiffusionModel:
    """Save a model of transformers, and load its weights as a family."""
    relative.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "generation_config.json").unlink(missing_ok=True)
    config = {**{name: config[name] for name in (*SIZES, *EXPERTS) if name in config}, **SIZES, **entries}
    (folder / "config.json").write_text(json.dumps(config | {"architectures": [family]}))
    backbone = dllm.load(folder, device="cpu", dtype="float64").backbone
    assert type(backbone).__name__ == family
    return backbone


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(INPUT).logits
    return found


@pytest.mark.parametrize("tied", [False, True])
def test_fast_dllm_in_blocks_of_one_is_qwen2(tmp_path: Path, tied: bool) -> None:
    torch.manual_seed(0)
    relative = Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=tied)).double().eval()
    family, entries = RELATIVES[0]
    own = saved(relative, tmp_path, family, entries | {"tie_word_embeddings": tied})
    assert own.mask_token_id == 59  # the last of a small vocabulary, as nothing names it
    assert not torch.allclose(logits(own), logits(relative), atol=1e-3)
    own.block_length = 1
    torch.testing.assert_close(logits(own), logits(relative), rtol=0, atol=ROUNDING)
    own.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()


@pytest.mark.parametrize("normalised", [False, True])
def test_sdar_moe_in_blocks_of_one_is_qwen3_moe(tmp_path: Path, normalised: bool) -> None:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(**SIZES, **EXPERTS, norm_topk_prob=normalised, tie_word_embeddings=False)
    relative = Qwen3MoeForCausalLM(config).eval()
    if hasattr(relative, "set_experts_implementation"):  # grouped products do not take float64
        relative.set_experts_implementation("eager")
    family, entries = RELATIVES[1]
    own = saved(relative.double(), tmp_path, family, EXPERTS | entries | {"norm_topk_prob": normalised})
    assert not torch.allclose(logits(own), logits(relative), atol=1e-3)
    own.block_length = 1
    torch.testing.assert_close(logits(own), logits(relative), rtol=0, atol=ROUNDING)


def test_llada_moe_is_one_block_of_sdar_moe_without_normalised_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    entries = EXPERTS | {"head_dim": 8, "mlp_only_layers": [], "decoder_sparse_step": 1, "norm_topk_prob": False}
    relative = SDARMoeForCausalLM(SDARMoeConfig(**SIZES | entries | SPECIAL)).double().eval()
    relative.block_length = 64
    family, own_entries = RELATIVES[2]
    own = saved(relative, tmp_path, family, own_entries | {"num_experts": 6, "num_experts_per_tok": 3})
    torch.testing.assert_close(logits(own), logits(relative), rtol=0, atol=ROUNDING)
    relative.block_length = 4
    assert not torch.allclose(logits(own), logits(relative), atol=1e-3)
