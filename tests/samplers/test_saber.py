"""Saber: what is committed, and what is taken back."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import dllm
from dllm.samplers import Saber, Vanilla
from models import random_dream, random_llada
from sampler_rig import best_at, logits_at

MAKERS = pytest.mark.parametrize("make", [random_llada, random_dream])
PROMPTS = [[3, 4], [5], [7, 8, 9, 10, 11]]
OPTIONS: dict[str, Any] = {"gen_length": 24, "stop_at_eos": False}


def spelt_out(lm: Any, prompt: list[int], n: int, block: int, length: int = 24) -> tuple[list[int], int, int]:
    """Tokens, forwards and revoked tokens of one prompt."""
    mask, start, steps, back = lm.backbone.mask_token_id, len(prompt), 0, 0
    canvas = [*prompt, *[mask] * length]
    committed: dict[int, float] = {}
    for first in range(start, start + length, block):
        places = range(first, min(first + block, start + length))
        last = dict.fromkeys(places, 0.0)
        while left := [place for place in places if canvas[place] == mask]:
            logits, steps = logits_at(lm, canvas), steps + 1
            tokens, confidence = best_at(lm, logits)
            usual = sum(committed.values()) / len(committed) if committed else 1.0
            chosen = [place for place in left if confidence[place] > usual]
            if len(chosen) < n:
                chosen = sorted(left, key=lambda place: -float(confidence[place]))[:n]
            for place in chosen:
                canvas[place], committed[place] = int(tokens[place]), float(confidence[place])
            highest = logits.softmax(-1).amax(-1)
            if mask in canvas[first : places.stop]:
                count = max(len(chosen), n)
                number = min(max(n // 2, -(-count // 8)), count - 1)
                decided = [place for place in places if canvas[place] != mask]
                for place in sorted(decided, key=lambda place: float(highest[place]) - last[place])[:number]:
                    canvas[place], back = mask, back + 1
            last = {place: float(highest[place]) for place in places}
    return canvas[start:], steps, back


@MAKERS
@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("block", [24, 10])
def test_decodes_as_spelt_out(make: Any, count: int, block: int) -> None:
    lm = make()
    out = dllm.generate(lm, PROMPTS, Saber(count), batch_size=2, block_length=block, **OPTIONS)
    backs = 0
    for row, prompt in enumerate(PROMPTS):
        tokens, steps, back = spelt_out(lm, prompt, count, block)
        assert out.completions[row].tolist() == tokens
        assert out.nfe[row] == steps
        backs += back
    assert backs > 0


def test_every_step_gains_a_token_and_several_commit_before_one_goes_back() -> None:
    lm = random_llada()
    left = 24
    for frame in dllm.stream(lm, [PROMPTS[0]], Saber(2), block_length=None, **OPTIONS):
        masks = int((frame.tokens == lm.backbone.mask_token_id).sum())
        assert masks < left
        left = masks
    assert left == 0


@MAKERS
def test_a_number_above_the_block_commits_it_at_once(make: Any) -> None:
    lm = make()
    whole = dllm.generate(lm, PROMPTS, Saber(99), block_length=8, **OPTIONS)
    same = dllm.generate(lm, PROMPTS, Vanilla(steps=3), block_length=8, **OPTIONS)
    assert torch.equal(whole.sequences, same.sequences)
    assert torch.equal(whole.nfe, same.nfe)


@MAKERS
def test_infilled_text_is_kept_and_rows_ignore_whoever_had_their_number(make: Any) -> None:
    lm = make()
    m = lm.backbone.mask_token_id
    rows = [[m, 5, m, m, 8, 9, *[m] * 7], [3, m, m, 4], [1, 2, m, 7, *[m] * 12, 9], [m, m, 8]]
    for size in (1, 2):
        batch = dllm.infill(lm, rows, Saber(), block_length=6, batch_size=size)
        for row, ids in enumerate(rows):
            alone = dllm.infill(lm, [ids], Saber(), block_length=6)
            found = batch.sequences[row, -len(ids) :].tolist()
            assert found == alone.sequences[0].tolist()
            assert batch.nfe[row] == alone.nfe[0]
            assert all(new == old for new, old in zip(found, ids, strict=True) if old != m)


@pytest.mark.parametrize("value", [0, 1.5, None])
def test_values_out_of_range_are_named(value: Any) -> None:
    with pytest.raises(ValueError, match=r"at_least=.*use "):
        Saber(value)


@pytest.mark.parametrize("block_length", [8, 24])
def test_an_end_of_text_that_may_be_revoked_ends_nothing(block_length: int) -> None:
    lm, options = random_dream(vocab=16, seed=1), {"gen_length": 24, "block_length": block_length}
    for seed in range(4):
        stopped, whole = (
            dllm.generate(lm, [[5, 6, 7], [3]], Saber(2), stop_at_eos=stop, seed=seed, **options)
            for stop in (True, False)
        )
        for row, tokens in enumerate(whole.completions.tolist()):
            end = tokens.index(14) + 1 if 14 in tokens else len(tokens)
            assert stopped.completions[row, :end].tolist() == tokens[:end]
