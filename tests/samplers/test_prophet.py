"""Prophet: when the answer is decided, and what is committed then."""

from __future__ import annotations

from itertools import pairwise
from math import nan
from typing import Any

import pytest
import torch

import dllm
from dllm.samplers import Prophet, Vanilla
from models import random_dream, random_llada
from sampler_rig import best_at, logits_at

MAKERS = pytest.mark.parametrize("make", [random_llada, random_dream])
PROMPTS = [[3, 4], [5], [7, 8, 9, 10, 11]]
OPTIONS: dict[str, Any] = {"gen_length": 24, "block_length": 8, "stop_at_eos": False}


def spelt_out(lm: Any, prompt: list[int], sampler: Prophet, length: int = 24, block: int = 8) -> tuple[list[int], int]:
    """Tokens and forwards of one prompt; the steps are a multiple of the blocks."""
    mask, start, number = lm.backbone.mask_token_id, len(prompt), 0
    steps = sampler.steps or length
    canvas, each = [*prompt, *[mask] * length], steps * block // length
    for first in range(start, start + length, block):
        for step in range(each):
            logits, number = logits_at(lm, canvas), number + 1
            tokens, confidence = best_at(lm, logits)
            two = logits.topk(2).values
            begin, count = (
                (0, length) if sampler.answer_start is None else (sampler.answer_start, sampler.answer_length or 5)
            )
            answer = (two[:, 0] - two[:, 1])[start + begin : start + begin + count]
            progress = number / steps
            bound = sampler.early if progress < 0.33 else sampler.mid if progress < 0.67 else sampler.late
            if answer.mean() >= bound:
                return [int(new) if old == mask else old for old, new in zip(canvas, tokens, strict=True)][
                    start:
                ], number
            left = sorted(
                (place for place in range(first, first + block) if canvas[place] == mask),
                key=lambda place: -float(confidence[place]),
            )
            for place in left[: block // each + (step < block % each)]:
                canvas[place] = int(tokens[place])
    return canvas[start:], number


@MAKERS
@pytest.mark.parametrize(
    "sampler",
    [
        Prophet(None, 2.2, 1.9, 1.5), Prophet(9, 9.0, 9.0, 1.8), Prophet(12, 9.0, 1.9, 1.0, answer_start=20),
        Prophet(24, 6.0, 4.0, 3.0, 3, 2), Prophet(6, 3.0, 2.0, 9.0, 22, 99),
    ],
    ids=repr,
)  # fmt: skip
def test_decodes_as_spelt_out(make: Any, sampler: Prophet) -> None:
    lm = make()
    out = dllm.generate(lm, PROMPTS, sampler, batch_size=2, **OPTIONS)
    for row, prompt in enumerate(PROMPTS):
        tokens, forwards = spelt_out(lm, prompt, sampler)
        assert out.completions[row].tolist() == tokens
        assert out.nfe[row] == forwards


def test_some_rows_end_early_and_others_do_not() -> None:
    prompts = [[k] for k in range(12)]
    out = dllm.generate(random_llada(), prompts, Prophet(12, 9.0, 4.0, 3.0, 4, 2), **OPTIONS)
    assert out.nfe.min() < 12 == out.nfe.max()


@MAKERS
def test_the_ends_of_the_bounds_are_the_schedule_and_everything_at_once(make: Any) -> None:
    lm = make()
    for steps in (None, 10):
        never, plain = (dllm.generate(lm, PROMPTS, each, **OPTIONS) for each in (
            Prophet(steps, 1e9, 1e9, 1e9), Vanilla(steps=steps)))  # fmt: skip
        assert torch.equal(never.sequences, plain.sequences)
        assert torch.equal(never.commit_step, plain.commit_step)
    once = dllm.generate(lm, PROMPTS, Prophet(None, 0, 0, 0), **OPTIONS)
    whole = dllm.generate(lm, PROMPTS, Vanilla(steps=1), **OPTIONS | {"block_length": None})
    assert torch.equal(once.sequences, whole.sequences)
    assert (once.nfe == 1).all()


@pytest.mark.parametrize("start", [None, 2])
def test_lower_bounds_take_no_more_forwards(start: int | None) -> None:
    prompts = [[k] for k in range(8)]
    runs = [
        dllm.generate(random_llada(), prompts, Prophet(None, bound, bound, bound, start), **OPTIONS).nfe
        for bound in (1.0, 2.0, 3.0, 4.0)
    ]
    assert all((few <= many).all() for few, many in pairwise(runs))
    assert runs[0].sum() < runs[-1].sum()


@MAKERS
def test_infilled_text_is_kept_and_rows_ignore_their_batchmates(make: Any) -> None:
    lm = make()
    m = lm.backbone.mask_token_id
    rows = [[m, 5, m, m, 8, 9, *[m] * 7], [3, m, m, 4], [1, 2, m, 7, *[m] * 12, 9], [m, m, 8]]
    sampler = Prophet(None, 2.5, 2.0, 1.5, answer_start=1)
    batch = dllm.infill(lm, rows, sampler, block_length=4, batch_size=2)
    for row, ids in enumerate(rows):
        alone = dllm.infill(lm, [ids], sampler, block_length=4)
        found = batch.sequences[row, -len(ids) :].tolist()
        assert found == alone.sequences[0].tolist()
        assert batch.nfe[row] == alone.nfe[0]
        assert all(new == old for new, old in zip(found, ids, strict=True) if old != m)


def test_the_answer_lies_within_what_is_generated() -> None:
    lm = random_llada()
    lm.backbone.register_forward_pre_hook(lambda *_: pytest.fail("a forward was run"))
    with pytest.raises(ValueError, match=r"answer_start=24 is out of range; use 0 to 23 \(the last"):
        dllm.generate(lm, PROMPTS, Prophet(answer_start=24), **OPTIONS)
    with pytest.raises(ValueError, match="steps=2 is out of range; use between 3"):
        dllm.generate(lm, PROMPTS, Prophet(steps=2), **OPTIONS)


@pytest.mark.parametrize(
    ("name", "value"),
    [("steps", 0), ("early", -1), ("mid", nan), ("late", "x"), ("answer_start", -1), ("answer_length", 0),
     ("answer_length", 3)],
)  # fmt: skip
def test_values_out_of_range_or_without_effect_are_named(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"{name}=.*(use|set) "):
        Prophet(**{name: value})
