"""d2Cache: the masks about to be decoded and the tokens most looked at."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import dllm
from cache_rig import planned, selected
from dllm.cache import D2Cache
from dllm.cache.d2cache import Watched, density, inflate, nucleus
from engine_rig import observed
from models import random_dream, random_fast_dllm, random_llada, random_sdar
from sampler_rig import facts
from toys import Leftmost

flags = st.lists(st.booleans(), min_size=1, max_size=20)


@given(flags, st.floats(0.5, 6))
def test_density_is_the_gaussian_mean_of_what_is_known(known: list[bool], sigma: float) -> None:
    found = density(np.array([known]), np.array([len(known)]), sigma)[0]
    reach = range(-60, len(known) + 60)
    for j in range(len(known)):
        weight = {i: np.exp(-((i - j) ** 2) / (2 * sigma**2)) for i in reach}
        # Left of the canvas all is known; right of it what its last column is.
        there = {i: 1.0 if i < 0 else float(known[min(i, len(known) - 1)]) for i in reach}
        assert found[j] == pytest.approx(sum(weight[i] * there[i] for i in reach) / sum(weight.values()), abs=1e-6)


def test_density_continues_the_last_generated_column() -> None:
    row = [True, False, True, False, False]
    found = density(np.array([row]), np.array([3]), 2.0)
    assert found == pytest.approx(density(np.array([[*row[:3], True, True]]), np.array([5]), 2.0))


@given(st.lists(st.floats(0, 1), min_size=1, max_size=15), st.floats(0, 1), st.data())
def test_the_nucleus_is_the_heaviest_and_no_heavier_than_its_share(
    scores: list[float], share: float, data: st.DataObject
) -> None:
    among = np.array(data.draw(st.lists(st.booleans(), min_size=len(scores), max_size=len(scores))))
    chosen = nucleus(np.array([scores]), share, among[None])[0]
    assert not (chosen & ~among).any()
    if not among.any() or np.where(among, scores, 0).max() == 0:
        return
    kept, left = np.array(scores)[chosen], np.array(scores)[among & ~chosen]
    assert len(kept) > 0
    assert not len(left) or kept.min() >= left.max()
    total = np.array(scores)[among].sum()
    assert len(kept) == 1 or kept.sum() <= share * total + 1e-9
    assert not len(left) or kept.sum() + left.max() > share * total - 1e-9


@given(st.lists(st.floats(0, 1), min_size=1, max_size=40))
def test_the_nucleus_of_everything_is_everything(scores: list[float]) -> None:
    assert nucleus(np.array([scores]), 1.0, np.ones((1, len(scores)), dtype=bool)).all()


@given(flags, st.integers(0, 6))
def test_gaps_up_to_a_width_are_filled(chosen: list[bool], width: int) -> None:
    filled = inflate(np.array([chosen]), width)[0]
    places = np.flatnonzero(chosen)
    expected = set(places.tolist())
    for first, second in pairwise(places):
        expected |= set(range(first, second)) if second - first <= width else set()
    assert set(np.flatnonzero(filled).tolist()) == expected


def test_influence_is_the_column_sum_of_the_rollout() -> None:
    run = facts()
    store = Watched(run)
    store.layers, store.visible[0, :2] = 3, False
    generator = np.random.default_rng(0)
    columns = np.array([2, 5, 6, 11, 11])  # the last fills up
    binding: Any = store.bind(selected(columns[None]))
    rollout = np.eye(20)
    for layer in range(3):
        weights = generator.random((5, 20)) * store.visible[0]
        weights[4] = weights[3]
        weights /= weights.sum(1, keepdims=True)
        binding.attended(layer, torch.as_tensor(weights)[None])
        attention = np.eye(20)
        attention[columns[:4]] = weights[:4]
        rollout = (attention + np.eye(20)) / 2 @ rollout
    assert store.influence[0] == pytest.approx(rollout[2:].sum(0))


@pytest.mark.parametrize(("lm", "shift"), [(random_llada(), 0), (random_dream(), 1)], ids=["llada", "dream"])
def test_new_tokens_and_all_masks_of_the_block_are_computed(lm: dllm.LanguageModel, shift: int) -> None:
    cache = D2Cache(current_k=1, rollout_p=0.0, inflate_w=0)
    log, _ = planned(lm, 3, cache, Leftmost(2), gen_length=8, block_length=4)
    assert log[0] == [*range(11)]
    masks, new = {5 - shift, 6 - shift}, {3, 4}
    assert masks | new <= set(log[1])
    assert len(log[1]) <= len(masks | new) + 1  # and the one most looked at


def test_confidences_are_renewed() -> None:
    lm, seen = random_llada(), []
    cache = D2Cache(current_k=2)

    def watch(engine: dllm.Engine, step: dllm.Step) -> None:
        cache_run: Any = engine.denoiser.cache
        seen.append(cache_run.rule.confidence[0].copy())

    observed(watch, lm, [[5, 6, 7]], Leftmost(1), cache, gen_length=8)
    assert (seen[0][3:] > 0).all()
    assert (seen[1][4:] != seen[0][4:]).any()


@pytest.mark.parametrize(
    "options", [{"current_k": 0}, {"sigma": 0.0}, {"sigma": float("inf")}, {"rollout_p": 1.2}, {"inflate_w": -1}]
)
def test_bad_options_are_refused(options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(ValueError, match=name):
        D2Cache(**options)


@pytest.mark.parametrize("make", [random_fast_dllm, random_sdar])
def test_confidences_are_not_asked_of_finished_blocks(make: Any) -> None:
    for prompt in ([5, 11], [1, 2, 3, 4, 5]):  # the first mask may be read in the finished block before it
        out = dllm.generate(make(), [prompt], "lopa", "d2cache", gen_length=13, seed=0)
        assert not (out.completions == 63).any()
