"""The oracle: the result of another policy, in as few forwards as its own predictions allow."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

import dllm
from dllm.resolve import build, options_of
from dllm.samplers import Oracle, Threshold
from dllm.samplers.base import Sampler
from models import random_dream, random_llada

PROMPTS = [[5, 9, 3], [7], [1, 2, 3, 4, 5, 6, 7], [50]]


@pytest.mark.parametrize("make", [random_llada, random_dream])
@pytest.mark.parametrize("base", ["vanilla", Threshold(0.4)], ids=repr)
@pytest.mark.parametrize("stop", [True, False])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_the_result_is_that_of_the_base_in_at_most_as_many_forwards(
    make: Any, base: Any, stop: bool, temperature: float
) -> None:
    lm = make()
    options: dict[str, Any] = {"gen_length": 24, "block_length": 8, "temperature": temperature, "seed": 4}
    options |= {"stop_at_eos": stop, "eos_token_id": [17, 40]}
    wanted = dllm.generate(lm, PROMPTS, base, **options)
    found = dllm.generate(lm, PROMPTS, Oracle(base), **options)
    assert torch.equal(found.sequences, wanted.sequences)
    assert (found.nfe <= 24).all()
    if temperature == 0:
        assert found.nfe.sum() < dllm.generate(lm, PROMPTS, "vanilla", **options).nfe.sum()


def test_a_model_that_is_right_at_once_needs_one_forward_a_block() -> None:
    lm = random_llada()
    with torch.no_grad():
        lm.backbone.get_output_embeddings().weight.zero_()  # every token is as good; the first is predicted always
    assert dllm.generate(lm, PROMPTS, "oracle", gen_length=24, block_length=8).nfe.tolist() == [3] * 4


def test_what_the_base_needs_is_not_counted() -> None:
    lm, calls = random_llada(), [0]
    lm.backbone.register_forward_pre_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    found = dllm.generate(lm, [[3, 4]], "oracle", gen_length=16, block_length=8, stop_at_eos=False)
    assert calls[0] == 16 + int(found.nfe[0])
    assert found.stats.computed_columns == 18 * int(found.nfe[0])


def test_nor_is_its_time() -> None:
    lm = random_llada()
    options: dict[str, Any] = {"gen_length": 96, "block_length": 32, "stop_at_eos": False}
    started = time.perf_counter()
    found = dllm.generate(lm, [[3, 4]], "oracle", **options)
    elapsed = time.perf_counter() - started
    # 96 forwards beforehand against the few of its own; a share of the same run, so load does not decide.
    assert int(found.nfe[0]) < 72
    assert 0 < found.stats.seconds < 0.8 * elapsed


def test_an_unknown_base_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown base='best'"):
        Oracle("best")


def test_one_over_another_over_another_is_made_at_once() -> None:
    nested: Any = "vanilla"
    for _ in range(60):  # each would take twice as long as the one before
        nested = Oracle(nested)
    assert nested.needs == frozenset()


@pytest.mark.parametrize("name", ["anchored", "edit", "sub_blocks", "multiblock"])
def test_it_is_no_base_of_policies_that_edit_a_block(name: str) -> None:
    with pytest.raises(ValueError, match=r"base='oracle' cannot .*: it edits the whole canvas, not the active block"):
        build("sampler", {**options_of("sampler", name), "base": "oracle"}, Sampler)
