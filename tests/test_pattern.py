"""Models whose attention is causal over blocks: the decode loop follows the pattern that the backbone states."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

import dllm
from contract_rig import IN_ORDER
from dllm.cache import FreeCache
from dllm.cache.base import Flags, Metered, Plan, Question
from dllm.cache.store import PerRow, Reuse
from dllm.decoding.compatibility import unmet
from dllm.decoding.setup import Setup
from dllm.samplers import FreeDave, Threshold
from models import random_llada, random_sdar
from toys import Editing, Revoking, Spying

PROMPTS = [[5, 9, 3], [7], [1, 2, 3, 4, 5, 6, 7, 8, 9], [50], [11, 12, 13, 14, 15]]
K = 4
FROZEN = FreeCache(freeze="clean", granularity="block", window=0)
OPTIONS: dict[str, Any] = {"gen_length": 10, "block_length": K, "stop_at_eos": False, "seed": 3}


@dataclass(frozen=True)
class Everything(Metered):
    """Asks for every column at every forward: what is exact need not be computed again."""

    def start(self, setup: Setup) -> Reuse:
        return Reuse(setup, _Everything(setup))


class _Everything(PerRow):
    def plan(self, question: Question, due: Flags, stale: Flags) -> Plan:
        return Plan(np.ones_like(question.read))


@cache
def block_model(layers: int = 2) -> dllm.LanguageModel:
    return random_sdar(layers=layers)


def logits(tokens: list[int], **inputs: Any) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = block_model().backbone(torch.tensor([tokens]), **inputs).logits[0]
    return found


def test_a_block_sees_itself_and_what_is_before_it() -> None:
    tokens = [5, 9, 3, 63, 7, 63, 8, 1, 2, 63]
    for i in range(len(tokens)):
        other = [*tokens]
        other[i] = 40
        same = (logits(tokens) == logits(other)).all(-1).tolist()
        first = i // K * K
        assert same[:first] == [True] * first
        assert not any(same[first:])


def test_padding_changes_nothing() -> None:
    tokens = [5, 9, 3, 63, 7, 63, 8]
    for left, right in ((3, 0), (0, 3)):
        mask = torch.tensor([[0] * left + [1] * len(tokens) + [0] * right])
        padded = logits([62] * left + tokens + [62] * right, attention_mask=mask)
        torch.testing.assert_close(padded[left : left + len(tokens)], logits(tokens))


def test_blocks_are_counted_from_the_first_token() -> None:
    steps: list[dllm.Step] = []
    dllm.generate(block_model(), [[5, 9, 3]], "vanilla", callback=steps.append, **OPTIONS | {"gen_length": 6})
    committed = [int(step.change.committed[0].argmax()) for step in steps]
    assert committed[0] == 3  # shares its block with the prompt
    assert sorted(committed[1:5]) == [4, 5, 6, 7]
    assert committed[5] == 8


@pytest.mark.parametrize("name", IN_ORDER)
def test_a_row_ignores_its_batchmates(name: str) -> None:
    sampler, place = IN_ORDER[name], list(IN_ORDER).index(name)
    for reuse in ("none", FROZEN, ("dual", "prefix", "d2cache")[place % 3]):
        if unmet(sampler, dllm.resolve.resolve("cache", reuse, object)):
            continue
        batch = dllm.generate(block_model(), PROMPTS, sampler, reuse, batch_size=3, **OPTIONS)
        assert not (batch.completions == 63).any()
        row = len(PROMPTS) - 1  # begins beside others
        alone = dllm.generate(block_model(), PROMPTS[row:], sampler, reuse, **OPTIONS | {"seed": [3 + row]})
        assert batch.completions[row].tolist() == alone.completions[0].tolist()
        assert batch.nfe[row] == alone.nfe[0]


def test_it_is_not_what_the_bidirectional_model_writes() -> None:
    causal, bidirectional = (dllm.generate(lm, PROMPTS, "vanilla", **OPTIONS) for lm in (block_model(), random_llada()))
    assert not torch.equal(causal.sequences, bidirectional.sequences)


@pytest.mark.parametrize("sampler", ["vanilla", Threshold(0.3), "localleap"], ids=repr)
def test_finished_blocks_that_are_frozen_are_exact(sampler: Any) -> None:
    exact, frozen = (dllm.generate(block_model(), PROMPTS, sampler, each, **OPTIONS) for each in ("none", FROZEN))
    assert torch.equal(exact.sequences, frozen.sequences)
    assert torch.equal(exact.commit_step, frozen.commit_step)
    assert frozen.stats.computed_share < 0.9
    # Over the bidirectional model the same cache is an approximation.
    exact, frozen = (dllm.generate(random_llada(), PROMPTS, sampler, each, **OPTIONS) for each in ("none", FROZEN))
    assert not torch.equal(exact.commit_step, frozen.commit_step)


@pytest.mark.parametrize("draft_mode", ["batch", "tree"])
@pytest.mark.parametrize("reuse", ["none", "prefix", "dual", FROZEN], ids=str)
def test_drafts_are_lossless(draft_mode: Any, reuse: Any) -> None:
    for base in ("vanilla", Threshold(0.3)):
        plain = dllm.generate(block_model(), PROMPTS, base, reuse, **OPTIONS)
        drafted = dllm.generate(block_model(), PROMPTS, FreeDave(3, base, draft_mode), reuse, **OPTIONS)
        assert torch.equal(plain.sequences, drafted.sequences)
        assert (drafted.nfe <= plain.nfe).all()
        assert base != "vanilla" or (drafted.nfe < plain.nfe).any()


def test_steps_are_shared_by_the_blocks_that_are_generated() -> None:
    for prompt in PROMPTS:
        out = dllm.generate(block_model(), [prompt], "vanilla", **OPTIONS)
        assert int(out.nfe[0]) == OPTIONS["gen_length"]
        paced = dllm.generate(block_model(), [prompt], dllm.samplers.Vanilla(steps=7), **OPTIONS)
        assert int(paced.nfe[0]) <= 7
        assert not (paced.completions == 63).any()


@pytest.mark.parametrize(
    "sampler", ["vanilla", Threshold(0.3), "localleap", "remdm", "t2m", "wino", Revoking(), Editing()], ids=repr
)
def test_what_is_exact_is_computed_once(sampler: Any) -> None:
    exact, reused = (dllm.generate(block_model(), PROMPTS, sampler, each, **OPTIONS) for each in ("none", Everything()))
    assert torch.equal(exact.sequences, reused.sequences)
    assert torch.equal(exact.commit_step, reused.commit_step)
    assert reused.stats.computed_columns < exact.stats.computed_columns


def test_nothing_after_the_active_block_is_computed_nor_what_is_exact() -> None:
    spy, prompt = Spying(Everything()), [*range(1, 10)]
    dllm.generate(block_model(), [prompt], "vanilla", spy, **OPTIONS | {"gen_length": 9})
    computed = [(min(forward[0]), max(forward[0])) for forward in spy.log]
    # The prompt fills two blocks and begins a third; a finished block is computed once more, with the next one.
    assert computed == [(0, 11), (8, 11), (8, 11), (8, 15), *[(12, 15)] * 3, (12, 17), (16, 17)]


@pytest.mark.parametrize("name", ["prefix", "dual", "freecache", "dkv", "dllm_cache", "d2cache", "sparse", "elastic"])
def test_every_cache_fills_what_is_masked(name: str) -> None:
    batch = dllm.generate(block_model(), PROMPTS, "threshold", name, batch_size=3, **OPTIONS)
    assert not (batch.completions == 63).any()
    for row, prompt in enumerate(PROMPTS):
        alone = dllm.generate(block_model(), [prompt], "threshold", name, **OPTIONS)
        assert batch.completions[row].tolist() == alone.completions[0].tolist()


def test_the_length_of_a_block_is_that_of_the_model_unless_it_is_given() -> None:
    options = OPTIONS | {"sampler": "threshold"}
    own, auto, longer = (
        dllm.generate(block_model(), PROMPTS, **options | {"block_length": length}) for length in (K, "auto", 8)
    )
    assert torch.equal(own.sequences, auto.sequences)
    assert not torch.equal(own.commit_step, longer.commit_step)
    made_for_8 = dllm.generate(random_sdar(block_length=8), PROMPTS, **options | {"block_length": "auto"})
    assert torch.equal(longer.sequences, made_for_8.sequences)


def test_masks_anywhere_are_filled() -> None:
    rows = [[63, 5, 63, 63, 8, 63, 9, 63, 63, 63], [3, 63, 63, 4], [1, 2, 3, 4, 5, 6, 63, 7, *[63] * 9, 9], [8, 63]]
    for reuse in ("none", FROZEN, "dual", "dkv"):
        batch = dllm.infill(block_model(), rows, "threshold", reuse, seed=5)
        for i, row in enumerate(rows):
            alone = dllm.infill(block_model(), [row], "threshold", reuse, seed=5 + i)
            assert batch.sequences[i, -len(row) :].tolist() == alone.sequences[0].tolist()
            assert batch.nfe[i] == alone.nfe[0]


def test_a_block_of_one_position_is_computed_alone() -> None:
    options = OPTIONS | {"gen_length": 6}
    for reuse in (FreeCache(freeze="last_forward"), FreeCache(granularity="token"), "dual", FROZEN):
        out = dllm.generate(block_model(), [[5, 9, 3]], "vanilla", reuse, **options)
        assert not (out.completions == 63).any()
        single = dllm.generate(block_model(), [[5, 9, 3]], "vanilla", reuse, **options | {"block_length": 1})
        assert not (single.completions == 63).any()


@pytest.mark.parametrize("schedule", ["uniform", "timestep"])
def test_a_budget_of_steps_is_kept_wherever_the_prompt_ends(schedule: Any) -> None:
    for given in range(1, 9):
        for length in (5, 6, 9):
            least = (given + length - 1) // K - given // K + 1
            for steps in range(least, length + 1):
                sampler = dllm.samplers.Vanilla(steps=steps, schedule=schedule)
                out = dllm.generate(
                    block_model(1), [[*range(1, given + 1)]], sampler, **OPTIONS | {"gen_length": length}
                )
                assert int(out.nfe[0]) <= steps
                assert not (out.completions == 63).any()


def test_a_length_that_is_not_the_engines_is_refused() -> None:
    with dllm.Engine(block_model(), "threshold") as engine, pytest.raises(ValueError, match=r"block_length=8 differs"):
        engine.add([5, 9, 3], block_length=8)
    with pytest.raises(ValueError, match="block_length=8 has no effect"):
        dllm.Engine(random_llada(), block_length=8)


def test_a_length_beyond_the_context_is_that_of_the_context() -> None:
    out = dllm.generate(block_model(), [[5, 9, 3]], "threshold", **OPTIONS | {"block_length": 10**9})
    assert not (out.completions == 63).any()


class _Sparse(PerRow):
    """Computes only what is read, and the first column of the block before the active one."""

    def plan(self, question: Question, due: Flags, stale: Flags) -> Plan:
        return Plan(~question.since(question.low - K + 1) & question.since(question.low - K))


@dataclass(frozen=True)
class Sparse(Metered):
    """A cache that never computes a finished block as a whole."""

    def start(self, setup: Setup) -> Reuse:
        return Reuse(setup, _Sparse(setup))


def test_a_column_is_not_exact_before_its_whole_block_is() -> None:
    spy = Spying(Sparse())
    dllm.generate(block_model(), [[5, 9, 3, 4]], "vanilla", spy, **OPTIONS | {"gen_length": 8})
    # The others of its block were computed last when there were masks among them, and so it may be off.
    assert all(4 in forward[0] for forward in spy.log[4:])
