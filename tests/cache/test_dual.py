"""The dual cache: at each block everything, then the block alone."""

from __future__ import annotations

import pytest

import dllm
from cache_rig import planned
from models import random_dream, random_filter, random_llada
from toys import Leftmost


@pytest.mark.parametrize(("lm", "shift"), [(random_llada(), 0), (random_dream(), 1)], ids=["llada", "dream"])
def test_computes_the_block_after_one_full_forward(lm: dllm.LanguageModel, shift: int) -> None:
    log, result = planned(lm, 3, dllm.cache.Dual(), Leftmost(1), gen_length=6, block_length=4)
    whole, block, last = [*range(9)], [*range(3 - shift, 7 - shift)], [*range(7 - shift, 9 - shift)]
    assert log == [whole, block, block, block, whole, last]
    assert result.stats.cache_refreshes == 2


def test_what_a_policy_asks_for_outside_the_block_is_computed_too() -> None:
    lm = random_llada()
    everywhere = dllm.samplers.Learn2PD(random_filter(), threshold=1.0, eotp="published", allow_mismatch=True)
    log, _ = planned(lm, 3, dllm.cache.Dual(), everywhere, gen_length=8, block_length=4)
    assert log[1] == [*range(3, 11)]
