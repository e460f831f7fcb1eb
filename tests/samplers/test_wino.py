"""WINO's draft and verification."""

from __future__ import annotations

from math import inf, nan
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import dllm
from dllm.decoding.prediction import Prediction, Sampling
from dllm.samplers import Threshold, Wino
from models import random_dream, random_llada, random_sdar
from revising_rig import Watched, recorded_alike, two_way
from sampler_rig import GUESSES, MASK, facts, window

MODELS = pytest.mark.parametrize("make", [random_llada, random_dream, random_sdar])
PROMPTS = [[5, 9, 3], [7], [1, 2, 3, 4, 5, 6, 7, 8, 9]]
OPTIONS: dict[str, Any] = {"gen_length": 22, "block_length": 8, "stop_at_eos": False}
HELD = 7  # the token of decided positions


def taken(sampler: Wino, masks: list[float], decided: list[float] | None = None) -> tuple[list[int], list[int]]:
    """Offsets that a step commits and takes back.

    Args:
        sampler: with its bounds.
        masks: probability of the best token of each mask; nan where there is none.
        decided: what the shadows give the token that is there; nan at masks.
    """
    confidence = torch.tensor(masks, dtype=torch.float64)
    shadow = torch.full_like(confidence, nan) if decided is None else torch.tensor(decided, dtype=torch.float64)
    view = window(~confidence.isnan())
    view.tokens[0, view.columns[0]] = torch.where(view.masked[0], MASK, HELD)
    asked = torch.stack((view.masked, ~view.masked), dim=1)
    values = torch.cat((confidence[~confidence.isnan()], shadow[~shadow.isnan()]))
    best = torch.tensor([0] * int(view.masked.sum()) + [HELD] * int((~view.masked).sum()))
    logits = two_way(values, best, GUESSES + 2)

    def denoise(*args: Any, attention: str = "", **kwargs: Any) -> Prediction:
        assert attention == "shadow"
        return Prediction(logits, asked, asked.flatten().nonzero()[:, 0], MASK, Sampling())

    edit = sampler.step(view, denoise, sampler.start(facts()))
    back = edit.write & (edit.tokens == MASK)
    assert not (back & view.masked).any()
    return tuple(each[0].nonzero()[:, 0].tolist() for each in (edit.write & ~back, back))  # type: ignore[return-value]


def test_what_the_shadows_doubt_is_taken_back_the_least_probable_first() -> None:
    masks, decided = [0.9, nan, 0.8, nan, nan, 0.7, nan], [nan, 0.3, nan, 0.95, 0.1, nan, 0.2]
    assert taken(Wino(0.6, 0.9), masks, decided) == ([0, 2, 5], [4, 6])
    assert taken(Wino(0.75, 0.9), masks, decided) == ([0, 2], [4])
    assert taken(Wino(0.85, 0.9), masks, decided) == ([0], [])
    assert taken(Wino(0.6, 0.15), masks, decided) == ([0, 2, 5], [4])
    assert taken(Wino(0.6, 0.9, at_least=2), masks, decided) == ([0, 2, 5], [4])


def test_so_many_are_committed_at_most() -> None:
    assert taken(Wino(0.1), [0.5] * 6)[0] == [0, 1, 2, 3, 4]
    assert taken(Wino(0.1), [0.5] * 9)[0] == [*range(6)]
    assert taken(Wino(0.1, at_least=8), [0.5] * 9)[0] == [*range(8)]


@pytest.mark.parametrize("masks", range(1, 17))
def test_the_bound_is_that_of_the_reference(masks: int) -> None:
    most = min(masks, max(5, min(20, int(masks * 0.7))))
    assert len(taken(Wino(0.0), [0.5] * masks)[0]) == most


values = st.floats(0.02, 0.98)
blocks = st.lists(st.tuples(st.booleans(), values), min_size=1, max_size=12).filter(lambda b: any(m for m, _ in b))


@given(blocks, values, values, values, values, st.integers(1, 3))
def test_lower_bounds_commit_more_and_higher_ones_take_more_back(
    block: list[tuple[bool, float]], wide: float, other: float, narrow: float, another: float, least: int
) -> None:
    masks, decided = ([p if m == which else nan for m, p in block] for which in (True, False))
    low, high = sorted((wide, other))
    few, many = (taken(Wino(each, narrow, least), masks, decided) for each in (high, low))
    assert set(few[0]) <= set(many[0])
    low, high = sorted((narrow, another))
    less, more = (taken(Wino(wide, each, least), masks, decided) for each in (low, high))
    assert less[0] == more[0]
    assert set(less[1]) <= set(more[1])
    for committed, revoked in (few, many, less, more):
        assert len(revoked) <= max(0, len(committed) - least)


@MODELS
def test_without_verification_it_is_the_threshold(make: Any) -> None:
    lm, options = make(), OPTIONS | {"block_length": 4}  # blocks too short for the bound
    plain = dllm.generate(lm, PROMPTS, Threshold(0.4), **options)
    wide = dllm.generate(lm, PROMPTS, Wino(0.4, 0.0), **options)
    assert torch.equal(plain.sequences, wide.sequences)
    assert torch.equal(plain.commit_step, wide.commit_step)


def by_hand(lm: dllm.LanguageModel, prompt: list[int], wide: float, narrow: float) -> tuple[list[int], int]:
    """The tokens of one row and its forwards, from whole forwards over the canvas and a block of shadows."""
    backbone, shift = lm.backbone, lm.backbone.logits_shift
    mask, start, span = backbone.mask_token_id, len(prompt), 22
    row = torch.tensor([*prompt, *[mask] * span])
    length, pattern = 8, backbone.pattern_of(8)
    origin = 0 if pattern is not None else start
    forwards = 0
    while (row == mask).any():
        first = int((row == mask).int().argmax())
        low = origin + (first - origin) // length * length
        block = torch.arange(max(low, start), min(low + length, len(row)))
        # The shadow of a position stands where its prediction is read.
        reads = (block - shift).clamp(min=0)
        positions = torch.cat((torch.arange(len(row)), reads))[None]
        sees = torch.ones(len(row) + len(block), len(row) + len(block), dtype=torch.bool)
        sees[: len(row), len(row) :] = False
        for shadow, (own, place) in enumerate(zip(reads.tolist(), block.tolist(), strict=True), start=len(row)):
            sees[shadow, [own, place]] = False
        if pattern is not None:
            sees &= pattern(positions, positions)[0, 0]
        shadows = torch.where(reads >= block[0], mask, row[reads])
        with torch.no_grad():
            logits = backbone(torch.cat((row, shadows))[None], sees[None, None], positions).logits[0]
        forwards += 1
        masked = row[block] == mask
        mine = torch.where(masked[:, None], logits[reads], logits[len(row) :])
        probability = mine.softmax(-1)
        best = mine.index_fill(-1, torch.tensor([mask]), -inf).argmax(-1)
        sure = probability.gather(1, torch.where(masked, best, row[block])[:, None])[:, 0]
        score = sure.masked_fill(~masked, -1)
        commit = score >= wide
        commit[score.argmax()] = True
        most = max(5, min(20, int(int(masked.sum()) * 0.7)))
        if commit.sum() > most:
            commit = torch.zeros_like(commit).index_fill(0, score.topk(most).indices, True)
        doubts = [k for k in range(len(block)) if not masked[k] and sure[k] < narrow]
        doubts = sorted(doubts, key=lambda k: float(sure[k]))[: int(commit.sum()) - 1]
        row[block[commit]] = best[commit]
        row[block[doubts]] = mask
    return row.tolist(), forwards


@MODELS
@pytest.mark.parametrize("bounds", [(0.6, 0.9), (0.2, 0.5), (0.0, 2.0)], ids=str)
def test_rows_are_decoded_as_by_hand(make: Any, bounds: tuple[float, float]) -> None:
    lm = make()
    found = dllm.generate(lm, PROMPTS, Wino(*bounds), **OPTIONS)
    for row, prompt in enumerate(PROMPTS):
        tokens, forwards = by_hand(lm, prompt, *bounds)
        assert found.sequences[row, -len(tokens) :].tolist() == tokens
        assert int(found.nfe[row]) == forwards


@MODELS
@pytest.mark.parametrize("cache", ["none", "prefix", "dual", "freecache", "dkv"])
def test_the_most_revising_run_ends_within_a_forward_a_token(make: Any, cache: str) -> None:
    watched = Watched()
    options = OPTIONS | {"temperature": 1.0, "seed": 1, "callback": watched}
    result = dllm.generate(make(), PROMPTS, Wino(0.0, 2.0), cache, **options)
    assert (result.nfe <= 22).all()
    assert watched.revoked > 0
    assert all((step.change.gained >= 1).all() for step in watched.steps)


@MODELS
def test_what_is_recorded_is_what_was_done(make: Any) -> None:
    assert recorded_alike(make(), PROMPTS[0], Wino(0.1, 0.95), **OPTIONS) > 0


@MODELS
def test_an_end_of_text_ends_the_row_once_its_block_is_complete(make: Any) -> None:
    lm, options = make(), {"gen_length": 24, "block_length": 8}
    ended = 0
    for seed in range(4):
        prompts = [[seed, 9, 3], [7, seed]]
        free = dllm.generate(lm, prompts, Wino(0.1, 0.95), stop_at_eos=False, eos_token_id=[62, *range(6)], **options)
        stopped = dllm.generate(lm, prompts, Wino(0.1, 0.95), eos_token_id=[62, *range(6)], **options)
        assert stopped.stats.tokens == free.stats.tokens
        decoded = stopped.commit_step >= 0
        assert torch.equal(stopped.completions[decoded], free.completions[decoded])
        ended += int((stopped.nfe < free.nfe).sum())
    assert ended > 0


@pytest.mark.parametrize(("name", "value"), [("wide_in", -0.1), ("narrow_out", nan), ("at_least", 0)])
def test_values_out_of_range_are_named(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"{name}=.*use "):
        Wino(**{name: value})
