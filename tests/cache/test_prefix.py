"""The prefix cache: at each block everything, then the block and what lies behind it."""

from __future__ import annotations

import pytest

import dllm
from cache_rig import planned
from models import random_dream, random_llada
from toys import Leftmost


@pytest.mark.parametrize(("lm", "shift"), [(random_llada(), 0), (random_dream(), 1)], ids=["llada", "dream"])
def test_computes_the_block_and_the_suffix_after_one_full_forward(lm: dllm.LanguageModel, shift: int) -> None:
    # Three given, ten generated in blocks of four, two a forward.
    log, result = planned(lm, 3, dllm.cache.Prefix(), Leftmost(2), gen_length=10, block_length=4)
    whole = [*range(13)]
    assert log == [whole, whole[3 - shift : 13 - shift], whole, whole[7 - shift : 13 - shift], whole]
    assert result.stats.cache_refreshes == 3
    assert result.stats.computed_columns == sum(map(len, log))


def test_rows_enter_blocks_on_their_own() -> None:
    lm = random_llada()
    batch = dllm.generate(lm, [[1, 2, 3], [4]], dllm.samplers.Threshold(0.3), "prefix", gen_length=20, block_length=4)
    assert batch.commit_step[0].tolist() != batch.commit_step[1].tolist()
    assert batch.stats.cache_refreshes == 10
