"""Remasking by a schedule."""

from __future__ import annotations

from math import nan
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import dllm
from dllm.decoding.prediction import Prediction, Sampling
from dllm.samplers import ReMDM, Vanilla
from models import random_dream, random_llada, random_sdar
from revising_rig import Watched, recorded_alike, two_way
from sampler_rig import GUESSES, MASK, facts, request, window

MODELS = pytest.mark.parametrize("make", [random_llada, random_dream, random_sdar])
PROMPTS = [[5, 9, 3], [7], [1, 2, 3, 4, 5, 6, 7, 8, 9]]
OPTIONS: dict[str, Any] = {"gen_length": 22, "block_length": 8, "stop_at_eos": False, "seed": 3}


def stepped(
    sampler: ReMDM, step: int, masks: list[float], committed: list[float], uniform: list[float]
) -> tuple[list[int], list[int]]:
    """Offsets that a step commits and takes back.

    Args:
        sampler: of the row.
        step: steps of the row in its block so far.
        masks: probability of the best token of each mask; nan where there is none.
        committed: confidence with which each decided position was committed; nan at masks.
        uniform: what the row draws.
    """
    confidence = torch.tensor(masks, dtype=torch.float64)
    view = window(~confidence.isnan(), step, span=len(masks))
    view = type(view)(**vars(view) | {"uniform": lambda: torch.tensor([uniform])})
    state = sampler.start(facts())
    asked = request(len(masks), len(masks))
    sampler.check(state, asked)
    sampler.enter(state, 0, asked)
    state.confidence[0, view.columns[0]] = torch.tensor(committed, dtype=torch.float64).nan_to_num()
    values = confidence[~confidence.isnan()]
    logits = two_way(values, torch.zeros(len(values), dtype=torch.long), GUESSES + 2)
    edit = sampler.step(
        view,
        lambda *_, **__: Prediction(logits, view.masked, view.masked.flatten().nonzero()[:, 0], MASK, Sampling()),
        state,
    )
    back = edit.write & (edit.tokens == MASK)
    assert not (back & view.masked).any()
    return tuple(each[0].nonzero()[:, 0].tolist() for each in (edit.write & ~back, back))  # type: ignore[return-value]


def test_the_probability_is_capped_by_eta_and_by_the_schedule() -> None:
    masks, committed = [nan, nan, nan, nan, 0.9, 0.8, 0.7, 0.6], [0.5] * 4 + [nan] * 4
    uniform = [0.05, 0.3, 0.74, 0.76, 0.0, 0.0, 0.0, 0.0]
    # Four of eight are decided, and five are to be: at most 3 / 4.
    assert stepped(ReMDM(eta=0.0), 4, masks, committed, uniform) == ([4], [])
    assert stepped(ReMDM(eta=0.1), 4, masks, committed, uniform) == ([4, 5], [0])
    assert stepped(ReMDM(eta=0.4), 4, masks, committed, uniform) == ([4, 5, 6], [0, 1])
    assert stepped(ReMDM(eta=1.0), 4, masks, committed, uniform) == ([4, 5, 6, 7], [0, 1, 2])
    assert stepped(ReMDM(schedule="rescale", eta=0.4), 4, masks, committed, uniform) == ([4, 5], [0])
    assert stepped(ReMDM(schedule="rescale", eta=1.0), 4, masks, committed, uniform) == ([4, 5, 6, 7], [0, 1, 2])
    # No more than there are masks left to keep the schedule, those with the lowest draws.
    low = [0.05, 0.1, 0.2, 0.01, 0, 0, 0, 0]
    assert stepped(ReMDM(eta=1.0), 4, masks, committed, low) == ([4, 5, 6, 7], [0, 1, 3])
    assert stepped(ReMDM(steps=2, eta=1.0), 1, masks, committed, low) == ([4, 5, 6, 7], [])


def test_by_confidence_the_least_confident_go_first() -> None:
    masks, committed = [nan, nan, 0.9, 0.8], [0.9, 0.1, nan, nan]
    sampler = ReMDM(eta=0.4, by_confidence=True)
    weights = (-torch.tensor([0.9, 0.1])).exp()
    low, high = (0.4 * weights / weights.mean()).tolist()
    assert low < 0.4 < high
    assert stepped(sampler, 2, masks, committed, [low + 0.01, high - 0.01, 0, 0]) == ([2, 3], [1])
    assert stepped(ReMDM(eta=0.4), 2, masks, committed, [low + 0.01, high - 0.01, 0, 0]) == ([2, 3], [0])
    assert stepped(sampler, 2, masks, committed, [low - 0.01, high + 0.01, 0, 0]) == ([2, 3], [0])


def test_a_loop_takes_back_what_it_commits_and_at_least_one() -> None:
    masks, committed = [nan, nan, 0.9, 0.8], [0.9, 0.1, nan, nan]
    sampler = ReMDM(eta=0.0, loop=3, loop_at=0.5)
    assert stepped(sampler, 1, [nan, 0.8, 0.9, 0.7], [0.9, nan, nan, nan], [0.5] * 4) == ([2], [])
    for step in (2, 3, 4):
        assert stepped(sampler, step, masks, committed, [0.7, 0.6, 0, 0]) == ([2], [1])
    assert stepped(sampler, 5, masks, committed, [0.7, 0.6, 0, 0]) == ([2], [])


@given(
    st.integers(1, 12), st.integers(1, 12), st.integers(0, 4), st.floats(0.01, 1), st.floats(0, 1), st.floats(0, 1),
    st.booleans(), st.sampled_from(["cap", "rescale"]), st.integers(0, 99),
)  # fmt: skip
def test_every_block_keeps_to_its_schedule_whatever_is_taken_back(
    length: int, steps: int, loop: int, at: float, eta: float, other: float, sure: bool, schedule: Any, seed: int
) -> None:
    steps, draws = min(steps, length), torch.Generator().manual_seed(seed)
    masks, left, low, high = [0.5] * length, [], *sorted((eta, other))
    for step in range(steps + loop):
        committed = [0.3 if value != value else nan for value in masks]
        uniform = torch.rand(length, generator=draws).tolist()
        few, many = (
            stepped(ReMDM(steps, schedule, each, sure, loop, at), step, masks, committed, uniform)
            for each in (low, high)
        )
        assert set(few[1]) <= set(many[1])
        for place in many[0]:
            masks[place] = nan
        for place in many[1]:
            masks[place] = 0.5
        left.append(sum(value == value for value in masks))
        if left[-1] == 0:
            break
    decided = [length - each for each in left]
    plain = [length * (step + 1) // steps for step in range(steps)]
    assert [each for number, each in enumerate(decided) if number == 0 or each != decided[number - 1]] == plain
    assert len(left) in (steps, steps + loop)


@MODELS
@pytest.mark.parametrize("steps", [None, 10])
def test_without_remasking_it_is_the_fixed_schedule(make: Any, steps: int | None) -> None:
    lm, options = make(), OPTIONS | {"block_length": 8}
    plain = dllm.generate(lm, PROMPTS, Vanilla(steps=steps), **options)
    same = dllm.generate(lm, PROMPTS, ReMDM(steps, eta=0), **options)
    assert torch.equal(plain.nfe, same.nfe)
    if steps is None:
        assert torch.equal(plain.sequences, same.sequences)
        assert torch.equal(plain.commit_step, same.commit_step)


@MODELS
@pytest.mark.parametrize("cache", ["none", "dual"])
def test_it_takes_as_many_forwards_as_it_is_told(make: Any, cache: str) -> None:
    lm = make()
    for eta in (0.0, 0.3, 1.0):
        watched = Watched()
        options = OPTIONS | {"callback": watched}
        result = dllm.generate(lm, PROMPTS, ReMDM(eta=eta), cache, **options)
        assert result.nfe.tolist() == [22] * 3
        assert (watched.revoked > 0) == (eta > 0)
        assert all((step.change.gained == 1).all() for step in watched.steps)
        looped = dllm.generate(lm, PROMPTS, ReMDM(eta=eta, loop=3, loop_at=0.5), cache, **options)
        assert set(looped.nfe.tolist()) <= {22 + 3 * blocks for blocks in (2, 3, 4)}


@MODELS
def test_what_is_taken_back_depends_on_the_seed_alone(make: Any) -> None:
    lm, sampler = make(), ReMDM(eta=0.5)
    first, again, other = (dllm.generate(lm, PROMPTS, sampler, **OPTIONS | {"seed": seed}) for seed in (1, 1, 2))
    assert torch.equal(first.sequences, again.sequences)
    assert not torch.equal(first.sequences, other.sequences)
    alone = dllm.generate(lm, PROMPTS[1:2], sampler, **OPTIONS | {"seed": 2})
    assert alone.completions[0].tolist() == first.completions[1].tolist()


@MODELS
def test_what_is_recorded_is_what_was_done(make: Any) -> None:
    options = {name: value for name, value in OPTIONS.items() if name != "seed"}
    assert recorded_alike(make(), PROMPTS[0], ReMDM(eta=0.5, by_confidence=True), **options) > 0


def test_loops_beyond_what_the_engine_allows_are_refused_and_the_largest_runs() -> None:
    lm = random_llada()
    options = {"gen_length": 3, "block_length": 3, "stop_at_eos": False}
    with pytest.raises(ValueError, match="loop=46 is out of range; use at most 45 "):
        dllm.generate(lm, [[5]], ReMDM(loop=46), **options)
    assert dllm.generate(lm, [[5]], ReMDM(loop=45), **options).nfe.tolist() == [48]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 0), ("eta", 1.5), ("eta", nan), ("loop", -1), ("loop_at", 0), ("loop_at", 1.1), ("schedule", "sine"),
        ("by_confidence", 2),
    ],
)  # fmt: skip
def test_values_out_of_range_are_named(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"{name}=.*(use|expected) "):
        ReMDM(**{name: value})
