"""A model whose embeddings were resized below its special ids."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import dllm
from dllm.evaluation.likelihood import Estimate, is_greedy, loglikelihood
from dllm.filters.training import collect
from models import random_dream, random_guide, random_llada

CALLS: dict[str, Callable[[Any], Any]] = {
    "generate": lambda lm: dllm.generate(lm, [[1, 2]], gen_length=4),
    "a cache": lambda lm: dllm.generate(lm, [[1, 2]], cache="dual", gen_length=4),
    "its own end": lambda lm: dllm.generate(lm, [[1, 2]], gen_length=4, eos_token_id=3),
    "a guide": lambda lm: dllm.generate(lm, [[1, 2]], dllm.samplers.ARGuided(random_guide()), gen_length=4),
    "a filter": lambda lm: dllm.generate(lm, [[1, 2]], "learn2pd", gen_length=4),
    "stream": lambda lm: dllm.stream(lm, [[1, 2]], gen_length=4),
    "as_completed": lambda lm: dllm.as_completed(lm, [[1, 2]], gen_length=4),
    "infill": lambda lm: dllm.infill(lm, [[1, 63, 2]]),
    "loglikelihood": lambda lm: loglikelihood(lm, [1], [2], Estimate(samples=2)),
    "is_greedy": lambda lm: is_greedy(lm, [1], [2]),
    "collect": lambda lm: collect(lm, [[1, 2]], "vanilla", "none", gen_length=4),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("rows", [30, 63])
@pytest.mark.parametrize("make", [random_llada, random_dream])
def test_a_model_without_its_own_special_tokens_is_refused(make: Any, rows: int, call: str) -> None:
    lm = make()
    lm.backbone.resize_token_embeddings(rows)
    with pytest.raises(ValueError, match=f"id.* is not an id of this model, which has 0 to {rows - 1}; "):
        CALLS[call](lm)


def test_a_model_whose_end_of_text_is_cut_off_decodes_up_to_another() -> None:
    lm = random_llada()
    lm.backbone.config.mask_token_id = 20
    lm.backbone.resize_token_embeddings(30)
    with pytest.raises(ValueError, match="eos_token_id=62 is not an id"):
        dllm.generate(lm, [[1, 2]], gen_length=4)
    assert dllm.generate(lm, [[1, 2]], gen_length=4, eos_token_id=3).sequences.max() < 30


@pytest.mark.parametrize("make", [random_llada, random_dream])
@pytest.mark.parametrize("name", ["mask_token_id", "eos_token_id"])
def test_a_model_whose_config_has_no_such_id_is_refused(make: Any, name: str) -> None:
    lm = make()
    setattr(lm.backbone.config, name, None)
    with pytest.raises(ValueError, match=f"{name}=None is not an id of this model"):
        dllm.generate(lm, [[1, 2]], gen_length=4)


def test_a_model_with_a_smaller_embedding_is_refused() -> None:
    lm = random_llada()
    lm.backbone.set_input_embeddings(torch.nn.Embedding(30, 32, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"id=6\d is not an id of this model, which has 0 to 29; "):
        dllm.generate(lm, [[1, 2]], gen_length=4)


def test_a_model_resized_to_more_tokens_decodes() -> None:
    lm = random_llada()
    lm.backbone.resize_token_embeddings(80)
    assert dllm.generate(lm, [[1, 70]], gen_length=4).sequences.shape == (1, 6)
