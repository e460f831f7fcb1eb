"""The exact cache of models whose attention is causal over blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import dllm
from dllm.cache import Block
from dllm.samplers import FreeDave, Threshold
from models import random_fast_dllm, random_llada, random_llada2, random_sdar, random_sdar_moe
from toys import Editing, Revoking, Spying

Maker = Callable[..., dllm.LanguageModel]
MAKERS = [random_sdar, random_sdar_moe, random_llada2, random_fast_dllm]
PROMPTS = [[5, 9, 3], [7], [1, 2, 3, 4, 5, 6, 7, 8, 9], [50], [11, 12, 13, 14, 15]]
SAMPLERS: list[Any] = [
    "vanilla", Threshold(0.3), "localleap", "edit", "sub_blocks", Revoking(), Editing(),
    FreeDave(3, Threshold(0.3), "tree"),
]  # fmt: skip
OPTIONS: dict[str, Any] = {"gen_length": 14, "block_length": 4, "stop_at_eos": False, "seed": 3}


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("sampler", SAMPLERS, ids=repr)
def test_it_equals_no_cache_and_computes_less(make: Maker, sampler: Any) -> None:
    exact, kept = (dllm.generate(make(), PROMPTS, sampler, each, batch_size=3, **OPTIONS) for each in ("none", "block"))
    assert torch.equal(exact.sequences, kept.sequences)
    assert torch.equal(exact.commit_step, kept.commit_step)
    assert torch.equal(exact.nfe, kept.nfe)
    assert kept.stats.computed_columns < exact.stats.computed_columns


@pytest.mark.parametrize("make", [random_sdar, random_llada2])
def test_all_of_the_active_block_is_computed_and_nothing_that_is_exact(make: Maker) -> None:
    spy, prompt = Spying(Block()), [*range(1, 10)]
    dllm.generate(make(), [prompt], "vanilla", spy, **OPTIONS | {"gen_length": 7})
    computed = [(min(forward[0]), max(forward[0])) for forward in spy.log]
    # The prompt fills two blocks and begins a third, which is computed once more with the next.
    assert computed == [(0, 11), (8, 11), (8, 11), (8, 15), *[(12, 15)] * 3]


def test_nothing_is_exact_where_every_position_is_attended_to() -> None:
    lm = random_llada()
    exact, kept = (dllm.generate(lm, PROMPTS, "threshold", each, **OPTIONS) for each in ("none", "block"))
    assert torch.equal(exact.sequences, kept.sequences)
    assert kept.stats.computed_columns == exact.stats.computed_columns


def test_it_is_off_by_rounding_only() -> None:
    out = dllm.generate(random_llada2(), PROMPTS, "threshold", Block(measure_every=1), **OPTIONS)
    assert out.stats.drift is not None
    assert out.stats.drift.kv_error < 1e-9
