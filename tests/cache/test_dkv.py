"""dKV-Cache: a token is cached one step after it was decoded."""

from __future__ import annotations

import pytest

import dllm
from cache_rig import planned
from dllm.cache import DKVCache
from models import random_dream, random_llada
from toys import Leftmost


def test_computes_the_masks_and_what_was_one() -> None:
    log, result = planned(random_llada(), 3, DKVCache(interval=4), Leftmost(1), gen_length=10, block_length=6)
    whole = [*range(13)]
    # Two full forwards, two partial ones, then step 4 is full again; a new block starts over.
    assert log[:6] == [whole, whole, whole[4:], whole[5:], whole, whole[7:]]
    assert log[6:] == [whole, whole, whole[10:], whole[11:]]
    assert result.stats.cache_refreshes == 5


def test_computes_where_shifted_predictions_are_read() -> None:
    log, _ = planned(random_dream(), 3, DKVCache(interval=9), Leftmost(3), gen_length=9, block_length=9)
    # Masks from column 9 on, of which the first is read in column 8; columns 6 to 8 were masks.
    assert log[2] == [*range(6, 12)]
    log, _ = planned(random_dream(), 3, DKVCache(interval=9), dllm.samplers.Vanilla(), gen_length=9, block_length=9)
    assert all(set(later) <= set(range(2, 12)) for later in log[2:])


def test_a_bad_interval_is_refused() -> None:
    with pytest.raises(ValueError, match="interval=0"):
        DKVCache(interval=0)
