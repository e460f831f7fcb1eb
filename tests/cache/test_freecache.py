"""FreeCache: what is decoded is frozen, and only what lies behind it is computed."""

from __future__ import annotations

from typing import Any

import pytest

import dllm
from cache_rig import planned
from dllm.cache import FreeCache
from models import random_dream, random_llada
from toys import Leftmost, Spying

BOTH = pytest.mark.parametrize(("lm", "shift"), [(random_llada(), 0), (random_dream(), 1)], ids=["llada", "dream"])


def starts(lm: dllm.LanguageModel, cache: FreeCache, count: int = 2, **options: Any) -> list[int]:
    """Where each forward over thirteen columns, three of them given, starts to compute; it never leaves a gap."""
    log, _ = planned(lm, 3, cache, Leftmost(count), **{"gen_length": 10, "block_length": 4} | options)
    assert all(columns == [*range(columns[0], 13)] for columns in log)
    return [columns[0] for columns in log]


@BOTH
def test_finished_blocks_keep_what_the_last_forward_gave_them(lm: dllm.LanguageModel, shift: int) -> None:
    assert starts(lm, FreeCache(freeze="last_forward")) == [0, 3 - shift, 7 - shift, 7 - shift, 11 - shift]


@BOTH
def test_clean_computes_a_finished_block_once_more_and_with_the_first_the_prompt(
    lm: dllm.LanguageModel, shift: int
) -> None:
    # The second block's first forward computes all, the third's the second block.
    assert starts(lm, FreeCache(freeze="clean")) == [0, 3 - shift, 0, 7 - shift, 7 - shift]


@BOTH
def test_token_freezes_what_the_leading_run_of_tokens_has_passed(lm: dllm.LanguageModel, shift: int) -> None:
    last = starts(lm, FreeCache(freeze="last_forward", granularity="token"))
    assert last == [0, *(column - shift for column in (5, 7, 9, 11))]
    # Two tokens a forward are frozen one forward later, when they were computed as tokens.
    clean = starts(lm, FreeCache(freeze="clean", granularity="token"))
    assert clean == [0, 3 - shift, 0, 7 - shift, 9 - shift]


@BOTH
def test_prompt_freezes_the_prompt_alone(lm: dllm.LanguageModel, shift: int) -> None:
    # The first forward decodes the first position; its prediction is never read again.
    assert starts(lm, FreeCache(freeze="last_forward", granularity="prompt")) == [0, 3, 3, 3, 3]


@BOTH
def test_the_column_a_first_mask_is_read_in_is_computed(lm: dllm.LanguageModel, shift: int) -> None:
    # All but the first position of the block are decoded before it: it is read in the prompt's last column.
    log, _ = planned(lm, 3, FreeCache(freeze="last_forward", granularity="prompt"), Rightmost(), gen_length=4)
    assert log == [[*range(7)], *[[*range(3 - shift, 7)]] * 3]


class Rightmost(Leftmost):
    def step(self, window: Any, denoise: Any, state: None) -> Any:
        left = window.masked.flip(-1).cumsum(-1).flip(-1)
        return dllm.samplers.base.commit(window, denoise(), window.masked & (left <= 1))


def test_a_block_without_masks_does_not_keep_the_prompt_from_being_cleaned() -> None:
    lm, spy = random_llada(), Spying(FreeCache(freeze="clean"))
    m = lm.backbone.mask_token_id
    dllm.infill(lm, [[1, 2, 3, *[m] * 4, *[9] * 4, *[m] * 8]], Leftmost(2), spy, block_length=4)
    assert [forward[0][0] for forward in spy.log] == [0, 3, 0, 11, 11, 15]


def test_full_forwards_are_counted_whatever_they_are_for() -> None:
    _, result = planned(random_llada(), 3, FreeCache(freeze="clean"), Leftmost(2), gen_length=10, block_length=4)
    assert result.stats.cache_refreshes == 2


@BOTH
def test_a_window_ends_behind_the_block(lm: dllm.LanguageModel, shift: int) -> None:
    cache = FreeCache(freeze="last_forward", window=2)
    log, _ = planned(lm, 3, cache, Leftmost(2), gen_length=12, block_length=4)
    assert log[0] == [*range(15)]
    # The last block's window reaches the canvas's end.
    assert log[1:] == [
        [*range(3 - shift, 9)], *[[*range(7 - shift, 13)]] * 2, *[[*range(11 - shift, 15)]] * 2
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"freeze": "never"}, "freeze='never'"),
        ({"granularity": "row"}, "granularity='row'"),
        ({"window": -1}, "window=-1"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        FreeCache(**options)
