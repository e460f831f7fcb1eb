"""Fixed schedules."""

from __future__ import annotations

from math import nan
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import dllm
from dllm.samplers import EntropyThreshold, Vanilla
from dllm.samplers.base import Sampler
from models import random_dream, random_llada, random_sdar
from sampler_rig import chosen, facts, request, window


def test_commits_the_quota_of_the_step() -> None:
    # Two blocks of 8 masks share 5 steps: two in the first (4, 4), three in the second (3, 3, 2).
    vanilla = Vanilla(steps=5)
    values = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]
    assert chosen(vanilla, values, step=0) == [4, 5, 6, 7]
    assert chosen(vanilla, [*values[:4], *[nan] * 4], step=1) == [0, 1, 2, 3]
    assert chosen(vanilla, values, step=0, block=1) == [5, 6, 7]
    assert chosen(vanilla, [*values[:5], *[nan] * 3], step=1, block=1) == [2, 3, 4]
    assert chosen(vanilla, [*values[:2], *[nan] * 6], step=2, block=1) == [0, 1]


def test_ties_go_to_the_leftmost() -> None:
    assert chosen(Vanilla(tokens_per_step=2), [0.4, 0.5, 0.5, 0.5]) == [1, 2]


@given(st.integers(1, 24), st.integers(1, 24), st.sampled_from(["uniform", "timestep"]))
def test_quotas_use_up_the_masks_without_an_empty_step(masks: int, steps: int, schedule: str) -> None:
    quotas = quotas_of(Vanilla(steps=steps, schedule=schedule), 24, masks)  # type: ignore[arg-type]
    used = [quota for quota in quotas if quota]
    assert sum(quotas) == masks
    # No zero before the last token is out: a step that commits nothing would cost a forward.
    assert quotas[: len(used)] == used
    assert len(used) <= steps


def quotas_of(sampler: Vanilla, length: int, masks: int) -> list[int]:
    """What each step commits of the only block, entered with that many masks."""
    state, whole = sampler.start(facts()), request(length, length)
    sampler.check(state, whole)
    sampler.enter(state, 0, whole)
    assert sampler.steps is not None
    quotas: list[int] = []
    for step in range(sampler.steps):
        left = torch.arange(length) < masks - sum(quotas)
        quotas.append(int(sampler._quota(window(left, step, entry_masks=masks, span=length), state)))
    return quotas


def test_the_uniform_schedule_gives_the_remainder_to_the_first_steps() -> None:
    assert quotas_of(Vanilla(steps=5), 16, 13) == [3, 3, 3, 2, 2]


def test_the_timestep_schedule_is_dreams() -> None:
    # t = linspace(1, 0.001, 5): int(m (1 - s/t)) of 10 masks, the last step all.
    assert quotas_of(Vanilla(steps=4, schedule="timestep"), 16, 10) == [2, 2, 2, 4]


@pytest.mark.parametrize("others", [[], [7]])
def test_steps_beyond_the_timestep_schedule_commit_one_token(others: list[int]) -> None:
    sampler = Vanilla(steps=2, schedule="timestep")
    state, whole = sampler.start(facts()), request(16, 16)
    sampler.enter(state, 0, whole)
    for steps in others:  # of rows beside it
        state.add(steps, 16)
    view = window(torch.arange(16) < 5, 4, entry_masks=16, span=16)
    assert int(sampler._quota(view, state)) == 1


@pytest.mark.parametrize("order", ["low_confidence", "margin", "entropy"])
def test_every_order_prefers_the_surest(order: str) -> None:
    assert chosen(Vanilla(order=order), [0.5, 0.9, nan, 0.7]) == [1]  # type: ignore[arg-type]


def test_orders_differ_where_they_should() -> None:
    lm = random_llada()
    runs = {
        order: dllm.generate(lm, [[1, 2]], Vanilla(order=order), gen_length=16, stop_at_eos=False, seed=0).commit_step
        for order in ("low_confidence", "margin", "entropy", "random")
    }
    assert len({tuple(steps[0].tolist()) for steps in runs.values()}) == 4


def test_a_random_order_is_uniform() -> None:
    first = torch.zeros(4)
    lm = random_llada()
    for seed in range(200):
        result = dllm.generate(lm, [[1]], Vanilla(order="random"), gen_length=4, stop_at_eos=False, seed=seed)
        first[result.commit_step[0].argmin()] += 1
    assert first.min() > 25


def test_steps_cost_what_they_say() -> None:
    lm = random_llada()
    for steps in (3, 7, 20):
        result = dllm.generate(
            lm, [[1], [2, 3]], Vanilla(steps=steps), gen_length=20, block_length=8, stop_at_eos=False
        )
        assert result.nfe.tolist() == [steps, steps]


@pytest.mark.parametrize(
    ("sampler", "forwards"),
    [
        (Vanilla(tokens_per_step=2, order="margin"), 8),
        (Vanilla(order="entropy", alg_temp=0.5), 16),
        (EntropyThreshold(0.1), 16),
    ],
)
def test_suppressed_end_of_text_is_committed_where_nothing_else_is_left(sampler: Sampler, forwards: int) -> None:
    lm = random_dream()
    head = lm.backbone.get_output_embeddings()
    head.bias = torch.nn.Parameter(torch.zeros_like(head.weight[:, 0]))
    with torch.no_grad():
        head.bias[62] = 1e4
    result = dllm.generate(
        lm, [[5, 6], [7]], sampler, gen_length=16, block_length=8, stop_at_eos=False, seed=0,
        eos_suppression="confidence",
    )  # fmt: skip
    assert (result.completions == 62).all()
    assert result.nfe.tolist() == [forwards, forwards]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"steps": 0}, "steps=0"),
        ({"tokens_per_step": 0}, "tokens_per_step=0"),
        ({"steps": 4, "tokens_per_step": 2}, "mutually exclusive"),
        ({"order": "best"}, "order='best'.*low_confidence"),
        ({"schedule": "cosine"}, "schedule='cosine'.*timestep"),
        ({"schedule": "timestep"}, "needs steps"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Vanilla(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize("steps", [1, 17])
def test_steps_that_do_not_fit_the_run_are_refused(steps: int) -> None:
    with pytest.raises(ValueError, match=rf"steps={steps} .*between 2 .* and 16"):
        Vanilla(steps=steps).check(Vanilla().start(facts()), request())


@pytest.mark.parametrize(("steps", "counts"), [(1, [8]), (3, [3, 3, 2]), (4, [2, 2, 2, 2]), (20, [1] * 8)])
def test_steps_of_each_block_share_its_length_the_remainder_first(steps: int, counts: list[int]) -> None:
    out = dllm.generate(
        random_llada(), [[5, 9, 3]], Vanilla(steps_per_block=steps), gen_length=16, block_length=8, stop_at_eos=False
    )
    for block in range(2):
        committed = out.commit_step[0, 8 * block : 8 * block + 8] - len(counts) * block
        assert committed.bincount().tolist() == counts


def test_steps_of_a_block_that_holds_some_of_the_prompt_are_those_of_its_length() -> None:
    lm = random_sdar()
    out = dllm.generate(lm, [[5, 9, 3]], Vanilla(steps_per_block=2), gen_length=5, block_length=4, stop_at_eos=False)
    assert out.commit_step[0].bincount().tolist() == [1, 2, 2]


@pytest.mark.parametrize("make", [random_llada, random_sdar])
def test_from_left_to_right(make: Any) -> None:
    sampler = Vanilla(tokens_per_step=2, order="left_to_right")
    out = dllm.generate(make(), [[5, 9, 3, 4]], sampler, gen_length=8, block_length=4, stop_at_eos=False)
    assert out.commit_step[0].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps_per_block": 0}, "steps_per_block=0 is out of range"),
        ({"steps_per_block": 2, "steps": 8}, "steps_per_block=2 and steps=8 are mutually exclusive"),
        (
            {"steps_per_block": 2, "tokens_per_step": 2},
            "steps_per_block=2 and tokens_per_step=2 are mutually exclusive",
        ),
        ({"alg_temp": 0.5, "order": "left_to_right"}, "alg_temp=0.5 has no effect with order=left_to_right"),
    ],
)
def test_bad_steps_of_a_block_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Vanilla(**options)
