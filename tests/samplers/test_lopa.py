"""LoPA's branches."""

from __future__ import annotations

from math import inf, nan
from typing import Any

import pytest
import torch
from torch import Tensor

import dllm
from dllm.samplers import LoPA, Threshold
from models import random_dream, random_llada, random_sdar
from revising_rig import Watched, recorded_alike

MODELS = pytest.mark.parametrize("make", [random_llada, random_dream, random_sdar])
PROMPTS = [[5, 9, 3], [7], [1, 2, 3, 4, 5, 6, 7, 8, 9]]
OPTIONS: dict[str, Any] = {"gen_length": 22, "block_length": 8, "stop_at_eos": False}


def by_hand(lm: dllm.LanguageModel, prompt: list[int], sampler: LoPA) -> tuple[list[int], int, int]:
    """The tokens of one row, its steps, and how often a branch other than the canvas was taken."""
    backbone, pattern = lm.backbone, lm.backbone.pattern_of(8)
    mask, start = backbone.mask_token_id, len(prompt)
    row, steps, branched = [*prompt, *[mask] * 22], 0, 0
    origin = 0 if pattern is not None else start
    positions = torch.arange(len(row))[None]
    sees = None if pattern is None else pattern(positions, positions)

    def predicted(tokens: list[int]) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            logits = backbone(torch.tensor([tokens]), sees, positions).logits[0]
        logits = logits[(torch.arange(len(row)) - backbone.logits_shift).clamp(min=0)]
        best = logits.index_fill(-1, torch.tensor([mask]), -inf).argmax(-1)
        return best, logits.double().softmax(-1).gather(1, best[:, None])[:, 0]

    kept: dict[int, tuple[float, int]] = {}
    while mask in row:
        low = origin + (row.index(mask) - origin) // 8 * 8
        masks = [k for k in range(low, min(low + 8, len(row))) if row[k] == mask]
        ahead = sorted((k for k in masks if k in kept), key=lambda k: (-kept[k][0], k))[: sampler.branches]
        candidates = [(1.0, row)]
        made = ahead if len(masks) > 1 else []
        candidates += [(kept[k][0], [*row[:k], kept[k][1], *row[k + 1 :]]) for k in made]
        looks = []
        for creation, tokens in candidates:
            best, sure = predicted(tokens)
            left = sorted(float(sure[k]) for k in masks if tokens[k] == mask)
            half = left[: (len(left) + 1) // 2]
            score = sampler.weight * creation + (1 - sampler.weight) * sum(half) / len(half)
            looks.append((score, tokens, best, sure))
        taken = max(range(len(looks)), key=lambda number: (looks[number][0], -number))
        branched += taken > 0
        _, tokens, best, sure = looks[taken]
        left = [k for k in masks if tokens[k] == mask]
        surest = max(left, key=lambda k: (float(sure[k]), -k))
        row, steps = list(tokens), steps + 1
        kept = {}
        for k in left:
            if k == surest or sure[k] >= sampler.threshold:
                row[k] = int(best[k])
            else:
                kept[k] = float(sure[k]), int(best[k])
    return row, steps, branched


@MODELS
@pytest.mark.parametrize("sampler", [LoPA(0.5, 4, 0.1), LoPA(0.9, 2, 0.2), LoPA(2.0, 9, 0.1)], ids=repr)
def test_rows_are_decoded_as_by_hand(make: Any, sampler: LoPA) -> None:
    lm, branches = make(), 0
    found = dllm.generate(lm, PROMPTS, sampler, **OPTIONS)
    for row, prompt in enumerate(PROMPTS):
        tokens, steps, branched = by_hand(lm, prompt, sampler)
        assert found.sequences[row, -len(tokens) :].tolist() == tokens
        assert int(found.nfe[row]) == steps  # all branches of a row are one forward
        branches += branched
    assert branches > 0


@MODELS
@pytest.mark.parametrize("cache", ["none", "dual"])
def test_if_only_the_creation_counts_it_is_the_threshold(make: Any, cache: str) -> None:
    lm = make()
    plain, same = (dllm.generate(lm, PROMPTS, each, cache, **OPTIONS) for each in (Threshold(0.4), LoPA(0.4, weight=1)))
    assert torch.equal(plain.sequences, same.sequences)
    assert torch.equal(plain.nfe, same.nfe)
    assert same.stats.computed_columns > plain.stats.computed_columns


@MODELS
@pytest.mark.parametrize(
    "cache", ["none", "prefix", "dual", "freecache", "dkv", "dllm_cache", "d2cache", "sparse", "elastic"]
)
def test_rows_ignore_their_batchmates(make: Any, cache: str) -> None:
    lm, sampler = make(), LoPA(0.5, 3, 0.1)
    batch = dllm.generate(lm, PROMPTS, sampler, cache, batch_size=2, temperature=0.6, seed=3, **OPTIONS)
    for row, prompt in enumerate(PROMPTS):
        alone = dllm.generate(lm, [prompt], sampler, cache, temperature=0.6, seed=3 + row, **OPTIONS)
        assert batch.completions[row].tolist() == alone.completions[0].tolist()
        assert batch.nfe[row] == alone.nfe[0]


@MODELS
def test_every_step_commits_one_token_or_two_where_no_other_is_sure(make: Any) -> None:
    watched = Watched()
    result = dllm.generate(make(), PROMPTS, LoPA(2.0, 3, 0.0), callback=watched, **OPTIONS)
    gained = {int(each) for step in watched.steps for each in step.change.gained}
    assert gained == {1, 2}
    assert (result.nfe < 22).all()


@MODELS
def test_what_is_recorded_is_what_was_done(make: Any) -> None:
    seen = []
    lm = make()
    dllm.generate(lm, PROMPTS[:1], LoPA(0.5, 2, 0.0), callback=seen.append, **OPTIONS)
    mask = lm.backbone.mask_token_id
    assert all((step.drafted != mask).sum() <= 2 for step in seen)
    assert any(((step.drafted != mask) & (step.drafted == step.tokens)).any() for step in seen)
    assert recorded_alike(lm, PROMPTS[0], LoPA(0.5, 2, 0.0), **OPTIONS) == 0


@MODELS
def test_texts_with_gaps_are_filled(make: Any) -> None:
    lm = make()
    mask = lm.backbone.mask_token_id
    rows = [[mask, 5, mask, mask, 8, 9, mask], [1, 2, mask, 4, *[mask] * 12, 9], [8, mask]]
    options = {} if make is random_sdar else {"block_length": 4}
    batch = dllm.infill(lm, rows, LoPA(0.5), **options)
    for number, row in enumerate(rows):
        alone = dllm.infill(lm, [row], LoPA(0.5), **options)
        assert alone.sequences[0].tolist() == batch.sequences[number, -len(row) :].tolist()
        assert mask not in alone.sequences[0].tolist()


@pytest.mark.parametrize(
    ("name", "value"), [("threshold", -0.1), ("branches", 0), ("branches", 65), ("weight", 1.1), ("weight", nan)]
)
def test_values_out_of_range_are_named(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"{name}=.*use "):
        LoPA(**{name: value})
