"""Fresh random backbones of both families, small enough to compare forwards in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from dllm.models import DreamConfig, DreamModel, LLaDAConfig, LLaDAModelLM, MaskedDiffusionModel

BackboneMaker = Callable[..., MaskedDiffusionModel]


def _llada(heads: int = 4, kv_heads: int = 4) -> LLaDAModelLM:
    return LLaDAModelLM(
        LLaDAConfig(
            vocab_size=40, d_model=32, n_heads=heads, n_kv_heads=kv_heads, n_layers=2, mlp_hidden_size=48,
            max_sequence_length=64, mask_token_id=39, eos_token_id=38, init_std=0.3,
        )
    )  # fmt: skip


def _dream(heads: int = 4, kv_heads: int = 2) -> DreamModel:
    return DreamModel(
        DreamConfig(
            vocab_size=40, hidden_size=32, num_attention_heads=heads, num_key_value_heads=kv_heads,
            num_hidden_layers=2, intermediate_size=48, max_position_embeddings=64, mask_token_id=39,
            eos_token_id=38, initializer_range=0.3,
        )
    )  # fmt: skip


@pytest.fixture(params=[_llada, _dream], ids=["llada", "dream"])
def make_backbone(request: pytest.FixtureRequest) -> BackboneMaker:
    """Makes a backbone with every parameter random, in float64."""

    def make(**sizes: int) -> MaskedDiffusionModel:
        torch.manual_seed(0)
        backbone = request.param(**sizes).double().eval()
        for name, parameter in backbone.named_parameters():
            if name.endswith(("norm.weight", "ln_f.weight", "bias")):
                torch.nn.init.normal_(parameter, mean=1.0, std=0.2)
        return backbone

    return make


@pytest.fixture
def backbone(make_backbone: BackboneMaker) -> MaskedDiffusionModel:
    return make_backbone()
