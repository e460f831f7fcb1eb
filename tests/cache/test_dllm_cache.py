"""dLLM-Cache: the prompt rarely, the response often, in between what changed most."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import dllm
from cache_rig import planned, selected
from dllm.cache import DLLMCache
from dllm.cache.dllm_cache import Features
from models import random_dream, random_llada
from sampler_rig import facts
from toys import Leftmost


@pytest.mark.parametrize(("lm", "shift"), [(random_llada(), 0), (random_dream(), 1)], ids=["llada", "dream"])
def test_the_prompt_is_computed_at_its_own_interval(lm: dllm.LanguageModel, shift: int) -> None:
    log, result = planned(lm, 3, DLLMCache(4, 2, 0.5), Leftmost(), gen_length=9, block_length=4)
    whole = [*range(12)]
    assert log == [whole if forward % 4 == 0 else whole[3 - shift :] for forward in range(9)]
    # Prompt and response together are computed in forwards 0, 4 and 8.
    assert result.stats.cache_refreshes == 3


def test_the_share_computed_is_what_the_ratio_says() -> None:
    lm = random_llada(layers=3)
    log, result = planned(lm, 3, DLLMCache(100, 100, 0.25), Leftmost(), gen_length=8)
    # One forward over everything; then the first layer computes 8 columns and the two others 2.
    assert len(log) == 8
    assert result.stats.computed_columns == 11 + 7 * (8 + 2 * 2) // 3


def store_and_partial(needed: list[int], ratio: float = 0.5) -> tuple[Features, Any]:
    store = Features(ratio, facts())
    columns = np.arange(4, 12)[None]
    store.response[0, 4:] = True
    store.needed[0, needed] = True
    return store, store.bind(selected(columns))


def test_a_layer_computes_the_columns_whose_values_turned_most() -> None:
    store, partial = store_and_partial(needed=[])
    stored = torch.eye(4, dtype=torch.float64)[0].expand(8, 4)
    store.values[:, 0, 0, 4:12] = stored
    angle = torch.tensor([0.0, 0.3, 0.1, 0.9, 0.2, 0.5, 0.0, 0.8], dtype=torch.float64)
    # Length says nothing, direction does.
    fresh = torch.stack((angle.cos(), angle.sin(), 0 * angle, 0 * angle), -1) * torch.arange(1, 9)[:, None]
    assert sorted(partial.stale(1, fresh[None, None])[0].tolist()) == [1, 3, 5, 7]
    # The first layer takes the whole response.
    assert sorted(partial.stale(0, fresh[None, None])[0].tolist()) == [*range(8)]


def test_bfloat16_ranks_as_float64_does() -> None:
    generator = torch.Generator().manual_seed(0)
    picked = []
    stored = torch.randn(8, 4, generator=generator, dtype=torch.float64)
    # Turned by little, so that the similarities lie close together.
    fresh = stored + 0.05 * torch.randn(8, 4, generator=generator, dtype=torch.float64)
    stored, fresh = stored.bfloat16(), fresh.bfloat16()
    for dtype in (torch.float64, torch.bfloat16):
        store, partial = store_and_partial(needed=[])
        store.values = store.values.to(dtype)
        store.values[:, 0, 0, 4:12] = stored.to(dtype)
        picked.append(sorted(partial.stale(1, fresh.to(dtype)[None, None])[0].tolist()))
    assert picked[0] == picked[1]


def test_ties_go_to_the_leftmost_and_what_is_needed_comes_in_any_case() -> None:
    store, partial = store_and_partial(needed=[11])
    store.values[:] = 1
    chosen = partial.stale(1, torch.ones(1, 1, 8, 4, dtype=torch.float64))
    assert sorted(chosen[0].tolist()) == [0, 1, 2, 3, 7]


def test_without_a_ratio_layers_behind_the_first_reuse_everything() -> None:
    _, partial = store_and_partial(needed=[], ratio=0.0)
    assert partial.stale(1, torch.rand(1, 1, 8, 4, dtype=torch.float64)).shape == (1, 0)


@pytest.mark.parametrize("options", [{"prompt_interval": 0}, {"response_interval": 0}, {"ratio": 1.5}, {"ratio": -0.1}])
def test_bad_options_are_refused(options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(ValueError, match=name):
        DLLMCache(**options)
