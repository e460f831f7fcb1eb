"""Token-to-mask remasking."""

from __future__ import annotations

from dataclasses import replace
from math import inf, nan
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import dllm
from dllm.decoding.prediction import Prediction, Sampling
from dllm.samplers import T2M, Threshold
from models import random_dream, random_llada, random_sdar
from revising_rig import Watched, recorded_alike, rows_by_hand, two_way
from sampler_rig import GUESSES, MASK, facts, request, window

MODELS = pytest.mark.parametrize("make", [random_llada, random_dream, random_sdar])
PROMPTS = [[5, 9, 3], [7], [1, 2, 3, 4, 5, 6, 7, 8, 9]]
OPTIONS: dict[str, Any] = {"gen_length": 22, "block_length": 8, "stop_at_eos": False}
HELD, OTHER = 7, 8


class Row:
    """A row whose predictions are given by hand: `step` returns what is committed, taken back, and whether it stays."""

    def __init__(self, sampler: T2M, width: int) -> None:
        self.sampler, self.state = sampler, sampler.start(facts())
        sampler.enter(self.state, 0, request(width))
        self.view = window(torch.ones(width, dtype=torch.bool))

    def step(self, best: list[float], tokens: list[int] | None = None) -> tuple[list[int], list[int], bool]:
        """Take a step with these best tokens, by default those that are there or `HELD`, and their probability."""
        view = self.view
        chosen = torch.full((len(best),), HELD) if tokens is None else torch.tensor(tokens)
        logits = two_way(torch.tensor(best, dtype=torch.float64), chosen, GUESSES + 2)

        def denoise(*args: Any, decided: bool = False, **kwargs: Any) -> Prediction:
            assert decided
            return Prediction(logits, view.inside, torch.arange(len(best)), MASK, Sampling())

        edit = self.sampler.step(view, denoise, self.state)
        back = edit.write & (edit.tokens == MASK)
        after = edit.on(view.tokens)
        self.view = replace(view, tokens=after, masked=after.gather(1, view.columns) == MASK, step=view.step + 1)
        assert edit.held is not None
        assert not edit.final
        committed, revoked = (each[0].nonzero()[:, 0].tolist() for each in (edit.write & ~back, back))
        return committed, revoked, bool(edit.held)


def test_tokens_of_low_probability_are_masked_again_the_lowest_first() -> None:
    row = Row(T2M(0.5, "low_prob", 0.3, share=0.5), 4)
    assert row.step([0.9, 0.6, 0.4, 0.3]) == ([0, 1], [], False)
    assert row.step([0.2, 0.1, 0.9, 0.9]) == ([2, 3], [1], False)  # one of two
    assert row.step([0.2, 0.9, 0.1, 0.9]) == ([1], [2], False)  # one of three
    assert row.step([0.2, 0.9, 0.9, 0.9]) == ([2], [0], False)
    assert row.step([0.9] * 4) == ([0], [], True)
    assert row.step([0.9] * 4) == ([], [], False)


def test_tokens_that_another_would_replace_are_masked_again() -> None:
    row = Row(T2M(0.5, "t2t", 0.6, share=1.0), 3)
    assert row.step([0.9] * 3) == ([0, 1, 2], [], True)
    assert row.step([0.7, 0.8, 0.5], [OTHER, HELD, OTHER]) == ([], [0], False)
    assert row.step([0.9, 0.9, 0.9], [OTHER, HELD, HELD]) == ([0], [], True)
    assert row.step([0.9, 0.9, 0.9], [OTHER, HELD, HELD]) == ([], [], False)


def test_tokens_whose_probability_moves_are_masked_again() -> None:
    row = Row(T2M(0.5, "change", 0.25, share=1.0), 2)
    assert row.step([0.9, 0.3]) == ([0], [], False)
    assert row.step([0.6, 0.9]) == ([1], [0], False)  # from 0.9
    assert row.step([0.6, 0.8]) == ([0], [], True)
    assert row.step([0.4, 0.56]) == ([], [], False)
    row = Row(T2M(0.5, "change", 0.25, share=1.0), 2)
    assert row.step([0.9, 0.9]) == ([0, 1], [], True)
    assert row.step([0.7, 0.6]) == ([], [1], False)
    assert row.step([0.5, 0.6]) == ([1], [], True)  # nothing to compare the second one with; the first moved by 0.2


def test_a_position_is_masked_again_so_many_times() -> None:
    row = Row(T2M(0.5, "low_prob", 2.0, most=2, share=1.0), 1)
    seen = [row.step([0.9]) for _ in range(6)]
    assert seen == [([0], [], True), ([], [0], False)] * 2 + [([0], [], True), ([], [], False)]


@pytest.mark.parametrize("steps", range(4))
def test_a_complete_block_is_looked_at_so_many_times(steps: int) -> None:
    row = Row(T2M(0.0, "low_prob", 2.0, most=7, share=1.0, post_steps=steps), 3)
    seen = [row.step([0.9] * 3)]
    while seen[-1][2] or seen[-1][1]:
        seen.append(row.step([0.9] * 3))
    assert seen == [([0, 1, 2], [], steps > 0)] + [
        each for step in range(steps) for each in (([], [0, 1, 2], False), ([0, 1, 2], [], step < steps - 1))
    ]


probabilities = st.lists(st.floats(0.02, 0.98), min_size=5, max_size=5)


@given(probabilities, probabilities, st.sampled_from(["low_prob", "change"]), st.floats(0, 1), st.floats(0, 1))
def test_a_wider_bound_or_share_takes_at_least_as_much_back(
    first: list[float], second: list[float], trigger: Any, one: float, other: float
) -> None:
    def taken(bound: float, share: float, most: int = 3) -> set[int]:
        row = Row(T2M(0.4, trigger, bound, most, share), 5)
        row.step(first)
        return set(row.step(second)[1])

    low, high = sorted((one, other))
    tight, wide = (low, high) if trigger == "low_prob" else (high, low)
    assert taken(tight, 1.0) <= taken(wide, 1.0)
    assert taken(wide, low) <= taken(wide, high)
    assert taken(wide, high, 0) == set()


@MODELS
def test_without_remasking_it_is_the_threshold(make: Any) -> None:
    lm = make()
    plain = dllm.generate(lm, PROMPTS, Threshold(0.4), **OPTIONS)
    for same in (T2M(0.4, most=0, post_steps=0), T2M(0.4, bound=0.0, post_steps=0), T2M(0.4, "t2t", 1.0, post_steps=0)):
        revised = dllm.generate(lm, PROMPTS, same, **OPTIONS)
        assert torch.equal(plain.sequences, revised.sequences)
        assert torch.equal(plain.commit_step, revised.commit_step)
        assert torch.equal(plain.nfe, revised.nfe)


class ByHand:
    """The rule of one row, spelt out."""

    def __init__(self, sampler: T2M, mask: int) -> None:
        self.sampler, self.mask = sampler, mask
        self.bound = {"low_prob": 0.1, "t2t": 0.9, "change": 0.3}[sampler.trigger]
        self.bound = self.bound if sampler.bound is None else sampler.bound

    def step(self, tokens: Tensor, logits: Tensor, number: int) -> Tensor:
        if number == 0:
            self.count, self.post, self.last = [0] * len(tokens), 0, None
        probability, new, scores = logits.double().softmax(-1), tokens.clone(), {}
        best = logits.index_fill(-1, torch.tensor([self.mask]), -inf).argmax(-1)
        masks = [k for k in range(len(tokens)) if tokens[k] == self.mask]
        for k in range(len(tokens)):
            if k in masks:
                continue
            mine = float(probability[k, tokens[k]])
            if self.sampler.trigger == "low_prob":
                doubtful, score = mine < self.bound, mine
            elif self.sampler.trigger == "t2t":
                top = float(probability[k, best[k]])
                doubtful, score = top > self.bound and best[k] != tokens[k], -top
            else:
                move = abs(mine - float(self.last[k, tokens[k]])) if self.last is not None else 0.0
                doubtful, score = move > self.bound, -move
            if doubtful and self.count[k] < self.sampler.most:
                scores[k] = score
        most = max(1, int((len(tokens) - len(masks)) * self.sampler.share))
        back = sorted(scores, key=lambda k: scores[k])[:most]
        if masks:
            sure = [float(probability[k, best[k]]) for k in masks]
            for k, each in zip(masks, sure, strict=True):
                if each > self.sampler.threshold or each == max(sure):
                    new[k] = best[k]
        for k in back:
            new[k], self.count[k] = self.mask, self.count[k] + 1
        self.post += not masks
        self.again = (bool(masks) or bool(back)) and self.post < self.sampler.post_steps
        self.last = probability
        return new

    def stays(self) -> bool:
        return self.again


@MODELS
@pytest.mark.parametrize(
    "sampler", [T2M(0.3), T2M(0.2, "low_prob", 0.4), T2M(0.3, "t2t", 0.4, 2, 0.5, 3), T2M(0.3, "change", 0.1)], ids=repr
)
def test_rows_are_decoded_as_by_hand(make: Any, sampler: T2M) -> None:
    lm = make()
    found = dllm.generate(lm, PROMPTS, sampler, **OPTIONS)
    for row, prompt in enumerate(PROMPTS):
        hand = ByHand(sampler, lm.backbone.mask_token_id)
        tokens, forwards = rows_by_hand(lm, prompt, 22, 8, hand.step, hand.stays)
        assert found.sequences[row, -len(tokens) :].tolist() == tokens
        assert int(found.nfe[row]) == forwards


@MODELS
@pytest.mark.parametrize("most", [1, 7])
@pytest.mark.parametrize("length", [1, 8, None])
def test_the_most_revising_run_ends_within_its_bound(make: Any, most: int, length: int | None) -> None:
    watched = Watched()
    sampler = T2M(2.0, "low_prob", 2.0, most, 1.0, 10**6)
    lengths = {} if make is random_sdar and length is None else {"block_length": length}
    options = OPTIONS | lengths | {"temperature": 1.0, "seed": 1, "callback": watched, "gen_length": 9}
    result = dllm.generate(make(), PROMPTS, sampler, "dual", **options)
    blocks = 9 // (length or 9) + 2
    assert (result.nfe <= (1 + 2 * most) * 9 + blocks).all()
    assert watched.revoked == most * 9 * len(PROMPTS)  # as often as is allowed, and everything


@MODELS
@pytest.mark.parametrize("trigger", ["low_prob", "t2t", "change"])
def test_what_is_recorded_is_what_was_done(make: Any, trigger: Any) -> None:
    assert recorded_alike(make(), PROMPTS[0], T2M(0.2, trigger, 0.3), **OPTIONS) > 0


def test_the_next_request_of_a_row_starts_anew() -> None:
    lm, sampler = random_llada(), T2M(0.2, "change", 0.2, 1)
    engine = dllm.Engine(lm, sampler, batch_size=1, max_length=32)
    for prompt in PROMPTS:
        engine.add(prompt, **OPTIONS)
    answers = [event.answer for step in engine.steps() for event in step if event.answer is not None]
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        alone = dllm.generate(lm, [prompt], sampler, **OPTIONS)
        assert answer.completion == alone.completions[0].tolist()
        assert answer.nfe == int(alone.nfe[0])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("threshold", -0.1), ("bound", nan), ("most", 8), ("most", -1), ("share", 1.5), ("post_steps", 2.5),
        ("trigger", "often"),
    ],
)  # fmt: skip
def test_values_out_of_range_are_named(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"{name}=.*(use|expected) "):
        T2M(**{name: value})
