"""What holds for every sampler and cache holds over every family: a selection of the contract suites."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

import dllm
from contract_rig import IN_ORDER, PROMPTS, Maker, common_token, more_backbones
from dllm.cache.base import Cache
from dllm.decoding.compatibility import unmet
from dllm.evaluation.likelihood import Estimate, loglikelihood
from dllm.resolve import names, resolve
from dllm.samplers import FreeDave, Threshold
from models import random_fast_dllm, random_llada2, random_llada_moe
from toys import Drafting, Refreshing, Revoking

SAMPLERS: dict[str, Any] = {
    **IN_ORDER, "freedave-tree": FreeDave(3, Threshold(0.3), "tree"), "drafting": Drafting(), "revoking": Revoking()
}  # fmt: skip
OPTIONS: dict[str, Any] = {"gen_length": 11, "block_length": 4, "batch_size": 2, "seed": 50}


@cache
def model(make: Maker) -> dllm.LanguageModel:
    return make()


# The others have the pattern of one of these, and the shift.
@pytest.mark.parametrize("make", [random_llada2, random_fast_dllm, random_llada_moe])
@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
def test_rows_that_draw_and_stop_ignore_their_batchmates(make: Maker, sampler: Any) -> None:
    lm, prompts = model(make), PROMPTS[:3]
    options = OPTIONS | {"eos_token_id": common_token(make), "temperature": 0.7, "top_p": 0.95}
    batch = dllm.generate(lm, prompts, sampler, **options)
    assert not (batch.completions == lm.backbone.mask_token_id).any()
    for row, prompt in enumerate(prompts):
        assert batch.sequences[row, -11 - len(prompt) : -11].tolist() == prompt
    for row in (1, 2):
        alone = dllm.generate(lm, [prompts[row]], sampler, **options | {"seed": [50 + row]})
        assert batch.completions[row].tolist() == alone.completions[0].tolist()
        assert batch.nfe[row] == alone.nfe[0]


@more_backbones
@pytest.mark.parametrize("sampler", ["vanilla", Threshold(0.3), Revoking()], ids=repr)
def test_a_cache_that_is_refreshed_at_every_step_is_no_cache(make: Maker, sampler: Any) -> None:
    exact, refreshed = (
        dllm.generate(model(make), PROMPTS, sampler, each, **OPTIONS) for each in ("none", Refreshing())
    )
    assert torch.equal(exact.sequences, refreshed.sequences)
    assert torch.equal(exact.nfe, refreshed.nfe)


@more_backbones
@pytest.mark.parametrize("name", [name for name in names("cache") if name != "none"])
def test_a_row_ignores_its_batchmates_with_every_cache(make: Maker, name: str) -> None:
    lm, reuse = model(make), resolve("cache", name, Cache)
    for sampler in (Threshold(0.3), Revoking(), FreeDave(3)):
        if unmet(sampler, reuse):
            continue
        batch = dllm.generate(lm, PROMPTS[:3], sampler, reuse, **OPTIONS)
        assert not (batch.completions == lm.backbone.mask_token_id).any()
        for row in (1, 2):
            alone = dllm.generate(lm, [PROMPTS[row]], sampler, reuse, **OPTIONS)
            assert batch.completions[row].tolist() == alone.completions[0].tolist()


@more_backbones
def test_likelihood_and_infilling_work(make: Maker) -> None:
    lm = model(make)
    m = lm.backbone.mask_token_id
    rows = [[m, 5, m, m, 8, 9, m], [3, m, m, 4], [8, m]]
    batch = dllm.infill(lm, rows, "threshold", seed=5)
    for i, row in enumerate(rows):
        alone = dllm.infill(lm, [row], "threshold", seed=5 + i)
        assert batch.sequences[i, -len(row) :].tolist() == alone.sequences[0].tolist()
    found = [loglikelihood(lm, [5, 9, 3], target, Estimate(samples=2)) for target in ([7, 1], [8, 20])]
    assert found[0] != found[1] and max(found) < 0
