"""The cache of sub-blocks: which columns of a block are computed when."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import dllm
from dllm.cache import SubBlocks
from dllm.samplers import SubBlocks as InParts
from dllm.samplers import Threshold, Vanilla
from models import random_dream, random_fast_dllm, random_llada, random_llada2
from toys import Leftmost, Spying

Maker = Callable[..., dllm.LanguageModel]
PROMPTS = [[5, 9, 3], [7], [1, 2, 3, 4, 5, 6, 7, 8, 9], [50, 8, 8, 8, 1, 2, 3, 4]]
OPTIONS: dict[str, Any] = {"gen_length": 25, "block_length": 8, "stop_at_eos": False, "seed": 3}


def computed(make: Maker, prompt: list[int], gen_length: int) -> list[tuple[int, int]]:
    spy = Spying(SubBlocks(length=4))
    dllm.generate(make(), [prompt], InParts(4, Leftmost()), spy, **OPTIONS | {"gen_length": gen_length})
    return [(min(forward[0]), max(forward[0])) for forward in spy.log]


def test_only_the_part_is_computed_once_its_first_position_is_decoded() -> None:
    # Three tokens of the block are given: its first part needs one more.
    found = computed(random_llada2, [5, 9, 3], 13)
    first, second = [(0, 7), (0, 7), *[(4, 7)] * 3], [(0, 15), *[(8, 11)] * 3, (8, 15), *[(12, 15)] * 3]
    assert found == [first[0], *[(0, 7)] * 1, *first[2:], *second]


def test_a_token_that_earlier_blocks_decide_is_computed_with_them() -> None:
    found = computed(random_fast_dllm, [*range(1, 9)], 9)
    assert found[0] == (0, 7)
    assert found[1] == (8, 15)  # the block, since none of its parts is stored yet
    assert found[2:4] == [(8, 11)] * 2
    assert found[4] == (8, 15)
    assert found[5:8] == [(12, 15)] * 3
    assert found[8] == (8, 15)  # finished, for the first token of the next


@pytest.mark.parametrize("make", [random_llada, random_dream, random_llada2, random_fast_dllm])
def test_rows_keep_their_own_parts(make: Maker) -> None:
    lm = make()
    for sampler in (InParts(3, Threshold(0.3)), Vanilla(), Threshold(0.3)):
        batch = dllm.generate(lm, PROMPTS, sampler, SubBlocks(length=3), batch_size=3, **OPTIONS)
        assert not (batch.completions == lm.backbone.mask_token_id).any()
        for row, prompt in enumerate(PROMPTS):
            alone = dllm.generate(lm, [prompt], sampler, SubBlocks(length=3), **OPTIONS)
            assert batch.completions[row].tolist() == alone.completions[0].tolist()


def test_parts_of_one_position_are_stored_by_the_whole_block() -> None:
    lm = random_llada2()
    exact, parted = (dllm.generate(lm, PROMPTS, InParts(1), each, **OPTIONS) for each in ("none", SubBlocks(length=1)))
    assert torch.equal(exact.sequences, parted.sequences)


def test_a_length_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="length=0"):
        SubBlocks(length=0)
