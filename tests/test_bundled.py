"""The bundled models do what their cards say, so that policies have something to win and to lose."""

from __future__ import annotations

from functools import cache

import pytest
from transformers import Qwen2ForCausalLM

import dllm
from dllm.evaluation.word_problems import Score, evaluate, evaluate_causal
from dllm.files import BUNDLED
from dllm.models.tokenizers import load_tokenizer
from dllm.samplers import Learn2PD, Vanilla
from dllm.tasks import word_problems

# Held out: models were trained on seeds below 1,000,000, filters on seed 3,000,001.
PROBLEMS = word_problems.problems(24, seed=4_000_001)
OPTIONS = {"gen_length": 64, "block_length": 32, "batch_size": 40}
BOTH = [
    pytest.param("tiny-llada", 0.95, marks=pytest.mark.xdist_group("tiny-llada"), id="tiny-llada"),
    pytest.param("tiny-dream", 0.90, marks=pytest.mark.xdist_group("tiny-dream"), id="tiny-dream"),
]


@cache
def one_token_per_step(name: str) -> Score:
    """What several tests compare with."""
    return evaluate(dllm.load(name, device="cpu"), PROBLEMS, Vanilla(), **OPTIONS)


@pytest.mark.parametrize(("name", "least"), BOTH)
def test_one_token_per_step_is_nearly_always_right_and_four_visibly_worse(name: str, least: float) -> None:
    slow = one_token_per_step(name)
    fast = evaluate(dllm.load(name, device="cpu"), PROBLEMS, Vanilla(tokens_per_step=4), **OPTIONS)
    # Three standard errors of room below what 500 problems must show.
    assert slow.final >= least - 3 * (least * (1 - least) / len(PROBLEMS)) ** 0.5
    assert fast.final <= slow.final - 0.10
    assert fast.nfe < slow.nfe / 3


@pytest.mark.parametrize(("name", "least"), BOTH)
def test_the_filter_is_found_and_saves_most_forwards_at_nearly_the_same_accuracy(name: str, least: float) -> None:
    slow = one_token_per_step(name)
    fast = evaluate(dllm.load(name, device="cpu"), PROBLEMS, Learn2PD(threshold=0.99), **OPTIONS)
    assert fast.nfe < 0.6 * slow.nfe
    assert fast.final >= max(slow.final, least) - 0.1  # 24 problems


def test_the_guide_is_nearly_always_right() -> None:
    folder = BUNDLED / "tiny-guide"
    score = evaluate_causal(Qwen2ForCausalLM.from_pretrained(folder).eval(), load_tokenizer(folder), PROBLEMS)
    assert score.final >= 0.90


def test_the_block_model_is_nearly_always_right_and_whole_blocks_at_once_visibly_worse() -> None:
    lm = dllm.load("tiny-block", device="cpu")
    options = {"cache": "block", "gen_length": 64, "batch_size": 10}
    slow = evaluate(lm, PROBLEMS, Vanilla(), **options)
    fast = evaluate(lm, PROBLEMS, Vanilla(tokens_per_step=4), **options)
    assert slow.final >= 0.90
    assert fast.final <= slow.final - 0.10
    assert fast.nfe < slow.nfe / 3


def test_together_they_are_small() -> None:
    assert sum(path.stat().st_size for path in BUNDLED.rglob("*")) < 25e6
