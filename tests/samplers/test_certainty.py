"""The certainty prior: confidence times the share of decoded positions nearby."""

from __future__ import annotations

from math import exp, nan
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import dllm
from dllm.samplers import Certainty, Threshold, Vanilla
from models import random_dream, random_llada
from sampler_rig import best_at, chosen, confidences, logits_at

MAKERS = pytest.mark.parametrize("make", [random_llada, random_dream])
PROMPTS = [[3, 4], [5], [7, 8, 9, 10, 11]]
OPTIONS: dict[str, Any] = {"gen_length": 20, "block_length": 8, "stop_at_eos": False}


def density(known: list[bool], place: int, sigma: float) -> float:
    length = len(known)
    around = [True] * length + known + [known[-1]] * length
    weights = [exp(-((i - length - place) ** 2) / (2 * sigma**2)) for i in range(-9 * length, 12 * length)]
    inside = [exp(-((i - length - place) ** 2) / (2 * sigma**2)) for i in range(3 * length)]
    return sum(weight for weight, one in zip(inside, around, strict=True) if one) / sum(weights)


def spelt_out(
    lm: Any, prompt: list[int], sampler: Certainty, length: int = 20, block: int = 8
) -> tuple[list[int], int]:
    mask, start, steps = lm.backbone.mask_token_id, len(prompt), 0
    canvas = [*prompt, *[mask] * length]
    for first in range(start, start + length, block):
        places = range(first, min(first + block, start + length))
        while left := [place for place in places if canvas[place] == mask]:
            (tokens, confidence), steps = best_at(lm, logits_at(lm, canvas)), steps + 1
            known = [token != mask for token in canvas[start:]]
            score = {place: float(confidence[place]) * density(known, place - start, sampler.sigma) for place in left}
            best = sorted(left, key=lambda place: -score[place])[: sampler.at_least]
            for place in {*best, *(place for place in left if score[place] >= sampler.threshold)}:
                canvas[place] = int(tokens[place])
    return canvas[start:], steps


@MAKERS
@pytest.mark.parametrize(
    "sampler", [Certainty(2.0), Certainty(10.0, at_least=2), Certainty(5.0, 0.15), Certainty(0.5, 0.1, 2)], ids=repr
)
def test_decodes_as_spelt_out(make: Any, sampler: Certainty) -> None:
    lm = make()
    out = dllm.generate(lm, PROMPTS, sampler, batch_size=2, **OPTIONS)
    for row, prompt in enumerate(PROMPTS):
        tokens, steps = spelt_out(lm, prompt, sampler)
        assert out.completions[row].tolist() == tokens
        assert out.nfe[row] == steps


@MAKERS
def test_a_narrow_gaussian_decodes_from_the_decoded_text_on(make: Any) -> None:
    out = dllm.generate(make(), PROMPTS, Certainty(0.1), **OPTIONS)
    assert out.commit_step.tolist() == [list(range(20))] * len(PROMPTS)


@MAKERS
def test_without_a_threshold_a_block_is_one_step(make: Any) -> None:
    lm = make()
    once, same = (dllm.generate(lm, PROMPTS, each, **OPTIONS) for each in (Certainty(10.0, 0.0), Threshold(0.0)))
    assert torch.equal(once.sequences, same.sequences)
    assert torch.equal(once.nfe, same.nfe)


def test_a_wide_gaussian_prefers_confidence() -> None:
    # Ten positions generated, none decoded: the density hardly falls over them.
    values = [0.5, 0.6, 0.7, 0.4, 0.2]
    assert chosen(Certainty(0.5), values) == [0]
    assert chosen(Certainty(1000.0), values) == [2]


@given(confidences, st.floats(0, 1), st.floats(0, 1))
def test_a_lower_threshold_commits_at_least_as_much(values: list[float], one: float, other: float) -> None:
    low, high = sorted((one, other))
    assert set(chosen(Certainty(3.0, high), values)) <= set(chosen(Certainty(3.0, low), values))


@MAKERS
def test_infilled_text_counts_as_decoded(make: Any) -> None:
    lm = make()
    m = lm.backbone.mask_token_id
    rows = [[m, m, m, m, 8, m], [3, m, m, 4, 5, 6, 7, m], [1, 2, m, 7, *[m] * 12, 9]]
    batch = dllm.infill(lm, rows, Certainty(0.3), block_length=None)
    for row, ids in enumerate(rows):
        alone = dllm.infill(lm, [ids], Certainty(0.3), block_length=None)
        assert batch.sequences[row, -len(ids) :].tolist() == alone.sequences[0].tolist()
    plain = dllm.infill(lm, rows, Vanilla(), block_length=None)
    assert not torch.equal(batch.commit_step, plain.commit_step)


@pytest.mark.parametrize(
    ("name", "value"), [("sigma", 0), ("sigma", nan), ("sigma", 1001), ("threshold", -1), ("at_least", 0)]
)
def test_values_out_of_range_are_named(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"{name}=.*(use|above) "):
        Certainty(**{name: value})
