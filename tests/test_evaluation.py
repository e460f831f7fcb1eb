"""Scores: the interval, the counting, and what is asked of a model."""

from __future__ import annotations

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

import dllm
from dllm.evaluation import word_problems as evaluation
from dllm.evaluation.metrics import wilson
from dllm.evaluation.word_problems import evaluate, evaluate_causal, score
from dllm.samplers import Vanilla
from dllm.tasks.tokenizer import build_tokenizer
from dllm.tasks.word_problems import Grade, Problem, grade, problems
from models import random_llada

RIGHT, ANSWER_ONLY, WRONG = Grade(True, True), Grade(True, False), Grade(False, False)


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    # Newcombe (1998), table I, method 3, and the closed forms z2 / (n + z2) at the ends.
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (10, 10, 0.7225, 1.0),
    ],
)
def test_intervals_are_the_published_ones(right: int, n: int, low: float, high: float) -> None:
    assert wilson(right, n) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize("n", [1, 7, 500])
def test_an_interval_holds_its_share_and_mirrors_its_complement(n: int) -> None:
    for right in range(n + 1):
        low, high = wilson(right, n)
        assert 0 <= low <= right / n + 1e-12
        assert right / n - 1e-12 <= high <= 1
        assert (1 - high, 1 - low) == pytest.approx(wilson(n - right, n))


def test_final_and_chain_are_counted_apart() -> None:
    result = score([RIGHT, ANSWER_ONLY, ANSWER_ONLY, WRONG], nfe=3.0, tpf=2.0)
    assert (result.n, result.final, result.chain) == (4, 0.75, 0.25)
    assert result.interval == wilson(3, 4)


class Perfect(dllm.samplers.base.Policy):
    """Commits the right answer at once, one block a step: what evaluate must score as 100%."""

    def __init__(self, lm: dllm.LanguageModel, asked: list[Problem], right: int) -> None:
        self.rows = [lm.tokenizer(p.solution if i < right else "Tom").input_ids for i, p in enumerate(asked)]
        self.eos = lm.backbone.eos_token_ids[0]

    def step(self, window, denoise, state):  # type: ignore[no-untyped-def]
        denoise()
        length = window.columns.shape[1]
        tokens = [(self.rows[row] + [self.eos] * length)[:length] for row in window.rows.tolist()]
        return dllm.decoding.window.Edit(window.columns, torch.tensor(tokens), window.masked)


def test_evaluate_grades_what_the_sampler_wrote() -> None:
    lm, asked = random_llada(tokenizer=True, layers=1), problems(5, seed=3)
    result = evaluate(lm, asked, Perfect(lm, asked, right=3), gen_length=64, block_length=None, batch_size=5)
    assert (result.n, result.final, result.chain) == (5, 0.6, 0.6)
    assert result.nfe == 1.0
    lengths = [len(lm.tokenizer(p.solution).input_ids) + 1 for p in asked[:3]] + [2, 2]
    assert result.tpf == pytest.approx(sum(lengths) / 5)


def test_evaluate_agrees_with_generate() -> None:
    lm, asked = random_llada(tokenizer=True), problems(3, seed=4)
    options = {"gen_length": 16, "block_length": 8, "batch_size": 2}
    finished = []
    result = evaluate(lm, asked, Vanilla(tokens_per_step=4), callback=lambda s: finished.append(s.finished), **options)
    expected = dllm.generate(lm, [p.question for p in asked], Vanilla(tokens_per_step=4), **options)
    assert result.nfe == expected.nfe.double().mean().item()
    assert result.tpf == pytest.approx(expected.stats.tpf)
    assert result.final == sum(grade(text, p).final for text, p in zip(expected.texts, asked, strict=True)) / 3
    assert sum(finished) == 3


def random_guide() -> Qwen2ForCausalLM:
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, initializer_range=0.5, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return Qwen2ForCausalLM(config).double().eval()


@torch.no_grad()
def greedy(model: Qwen2ForCausalLM, prompt: list[int], eos: int) -> list[int]:
    written: list[int] = []
    while len(written) < 64 and (not written or written[-1] != eos):
        written.append(int(model(torch.tensor([prompt + written])).logits[0, -1].argmax()))
    return written


def test_the_causal_score_is_that_of_each_greedy_continuation(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, model, asked, seen, done = build_tokenizer(), random_guide(), problems(5, seed=5), [], []
    verdicts = iter([RIGHT, ANSWER_ONLY, WRONG, RIGHT, WRONG])
    monkeypatch.setattr(evaluation, "grade", lambda text, problem: (seen.append((text, problem)), next(verdicts))[1])
    tokenizer.padding_side = "right"  # as most tokenizers come
    result = evaluate_causal(model, tokenizer, asked, batch_size=3, progress=done.append)
    for (text, graded), problem in zip(seen, asked, strict=True):
        ids = greedy(model, tokenizer(problem.question).input_ids, tokenizer.eos_token_id)
        assert text == tokenizer.decode(ids, skip_special_tokens=True)
        assert graded is problem
    assert (result.n, result.final, result.chain) == (5, 0.6, 0.4)
    assert done == [3, 5]
