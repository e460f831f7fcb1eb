"""CreditDecoding: what was predicted before counts again."""

from __future__ import annotations

from math import nan
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import dllm
from dllm.samplers import Credit, Threshold
from models import random_dream, random_llada
from sampler_rig import best_at, chosen, confidences, logits_at

MAKERS = pytest.mark.parametrize("make", [random_llada, random_dream])
PROMPTS = [[3, 4], [5], [7, 8, 9, 10, 11]]
OPTIONS: dict[str, Any] = {"gen_length": 20, "block_length": 8, "stop_at_eos": False}


def spelt_out(lm: Any, prompt: list[int], sampler: Credit, length: int = 20, block: int = 8) -> tuple[list[int], int]:
    """Tokens and forwards of one prompt, with a number for every position and entry of the vocabulary."""
    mask, start, steps = lm.backbone.mask_token_id, len(prompt), 0
    canvas = [*prompt, *[mask] * length]
    for first in range(start, start + length, block):
        places = range(first, min(first + block, start + length))
        credits = torch.zeros(len(canvas), lm.backbone.config.vocab_size, dtype=torch.float64)
        while left := [place for place in places if canvas[place] == mask]:
            logits, steps = logits_at(lm, canvas), steps + 1
            credits *= sampler.decay
            for place in left:
                best = int(logits[place].argmax())
                credits[place, best] += logits[place].softmax(-1)[best] ** sampler.power
            tokens, confidence = best_at(lm, logits + sampler.strength * credits.log1p())
            ready = [place for place in left if confidence[place] >= sampler.threshold]
            best_places = sorted(left, key=lambda place: -float(confidence[place]))[: sampler.at_least]
            for place in {*ready, *best_places}:
                canvas[place] = int(tokens[place])
    return canvas[start:], steps


@MAKERS
@pytest.mark.parametrize(
    "sampler",
    [
        Credit(0.6), Credit(0.7, 2.0, 0.5, 0.9, at_least=2), Credit(0.9, 3.0, 0.0, 1.0), Credit(0.8, 1.0, 1.0, 0.0),
        Credit(2.0, 5.0),
    ],
    ids=repr,
)  # fmt: skip
def test_decodes_as_spelt_out(make: Any, sampler: Credit) -> None:
    lm = make()
    out = dllm.generate(lm, PROMPTS, sampler, batch_size=2, **OPTIONS)
    for row, prompt in enumerate(PROMPTS):
        tokens, steps = spelt_out(lm, prompt, sampler)
        assert out.completions[row].tolist() == tokens
        assert out.nfe[row] == steps


def test_credit_changes_what_is_committed_and_when() -> None:
    lm = random_llada()
    plain, credited = (dllm.generate(lm, PROMPTS, Credit(0.9, strength), **OPTIONS) for strength in (0.0, 3.0))
    assert credited.nfe.sum() < plain.nfe.sum()
    assert not torch.equal(credited.sequences, plain.sequences)


@MAKERS
@pytest.mark.parametrize("bound", [2.0, 0.5, 0.0])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_without_strength_it_is_the_threshold(make: Any, bound: float, temperature: float) -> None:
    # From one token per step over a bound to the whole block at once. Credit draws twice, so drawn tokens differ.
    lm = make()
    credit, plain = (
        dllm.generate(lm, PROMPTS, sampler, temperature=temperature, seed=1, **OPTIONS)
        for sampler in (Credit(bound, 0.0), Threshold(bound))
    )
    if temperature == 0:
        assert torch.equal(credit.sequences, plain.sequences)
        assert torch.equal(credit.commit_step, plain.commit_step)
    elif bound != 0.5:
        assert torch.equal(credit.nfe, plain.nfe)


@given(confidences, st.floats(0.1, 1.0), st.floats(0, 9), st.floats(0, 9))
def test_more_strength_commits_at_least_as_much(values: list[float], bound: float, one: float, other: float) -> None:
    low, high = sorted((one, other))
    assert set(chosen(Credit(bound, low), values)) <= set(chosen(Credit(bound, high), values))


@given(confidences, st.floats(0, 1), st.floats(0, 1))
def test_a_lower_threshold_commits_at_least_as_much(values: list[float], one: float, other: float) -> None:
    low, high = sorted((one, other))
    assert set(chosen(Credit(high), values)) <= set(chosen(Credit(low), values))


@MAKERS
def test_infilled_rows_ignore_batchmates_and_whoever_had_their_number(make: Any) -> None:
    lm = make()
    m = lm.backbone.mask_token_id
    rows = [[m, 5, m, m, 8, 9, *[m] * 7], [3, m, m, 4], [1, 2, m, 7, *[m] * 12, 9], [m, m, 8]]
    for size in (1, 2):
        batch = dllm.infill(lm, rows, Credit(0.6, 2.0), block_length=4, batch_size=size)
        for row, ids in enumerate(rows):
            alone = dllm.infill(lm, [ids], Credit(0.6, 2.0), block_length=4)
            assert batch.sequences[row, -len(ids) :].tolist() == alone.sequences[0].tolist()
            assert batch.nfe[row] == alone.nfe[0]


def test_requests_of_one_engine_have_their_own_options() -> None:
    lm = random_llada()
    engine = dllm.Engine(lm, Credit(0.6, 2.0), batch_size=3, max_length=32)
    each: list[dict[str, Any]] = [{"temperature": 0.0}, {"temperature": 0.9, "top_k": 9}, {"eos_suppression": "both"}]
    for prompt, own in zip(PROMPTS, each, strict=True):
        engine.add(prompt, seed=4, gen_length=16, block_length=8, stop_at_eos=False, **own)
    answers = {event.id: event.answer for step in engine.steps() for event in step if event.answer is not None}
    for number, (prompt, own) in enumerate(zip(PROMPTS, each, strict=True)):
        alone = dllm.generate(
            lm, [prompt], Credit(0.6, 2.0), seed=4, gen_length=16, block_length=8, stop_at_eos=False, **own
        )
        assert list(answers[number].completion) == alone.completions[0].tolist()


def test_the_state_holds_a_few_tokens_a_position_and_not_the_vocabulary() -> None:
    lm = random_llada(max_length=512)
    engine = dllm.Engine(lm, Credit(), batch_size=2, max_length=400)
    for block_length, sizes in ((8, (2, 8, 8)), (4, (2, 8, 8)), (200, (2, 200, 128))):
        engine.add([5, 6], gen_length=200, block_length=block_length, max_forwards=3)
        while engine.busy:
            engine.step()
        assert engine._state.credit.shape == engine._state.tokens.shape == sizes


def test_options_of_sampling_apply_once() -> None:
    # top_k=1 leaves one token to draw from, so the temperature of the tempered confidence has no say.
    lm = random_dream()
    options = OPTIONS | {"temperature": 2.0, "top_k": 1, "tempered_confidence": True}
    drawn = dllm.generate(lm, PROMPTS, Credit(2.0, 0.0), seed=0, **options)
    assert (drawn.nfe == 20).all()
    greedy = dllm.generate(lm, PROMPTS, Threshold(2.0), top_k=1, **OPTIONS)
    assert torch.equal(drawn.sequences, greedy.sequences)


@pytest.mark.parametrize(
    ("name", "value"),
    [("threshold", -0.1), ("strength", -1), ("power", nan), ("decay", 1.1), ("at_least", 0)],
)
def test_values_out_of_range_are_named(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"{name}=.*use "):
        Credit(**{name: value})
