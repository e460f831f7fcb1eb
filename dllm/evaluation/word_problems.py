"""Quality and forwards of a model on the bundled word problems."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from dllm.api import generate
from dllm.evaluation.metrics import wilson
from dllm.models.loading import LanguageModel
from dllm.models.tokenizers import text_of
from dllm.tasks.word_problems import Grade, Problem, grade


@dataclass(frozen=True)
class Score:
    """Results over n problems.

    Attributes:
        n: number of problems.
        final: share of correct final answers.
        chain: share with every equation correct as well.
        interval: 95% Wilson interval of `final`.
        nfe: mean denoiser forwards per problem.
        tpf: generated tokens up to end-of-text over forwards.
        guide_nfe: mean guide forwards per problem.
    """

    n: int
    final: float
    chain: float
    interval: tuple[float, float]
    nfe: float
    tpf: float
    guide_nfe: float = 0.0


def evaluate(
    lm: LanguageModel, problems: Sequence[Problem], sampler: Any, cache: Any = "none", **options: Any
) -> Score:
    """Answer problems with a denoiser and grade the answers.

    Args:
        lm: a loaded model that knows the task.
        problems: the problems.
        sampler: as for `dllm.generate`.
        cache: as for `dllm.generate`.
        **options: fields of `dllm.Options`, and `callback`.

    Raises:
        ValueError: as `dllm.generate`, or a failed problem, which does not count as a wrong answer.
    """
    result = generate(lm, [problem.question for problem in problems], sampler, cache, **options)
    if error := next(filter(None, result.errors), None):
        raise ValueError(f"a problem has no answer: {error}")
    grades = [grade(text or "", problem) for text, problem in zip(result.texts, problems, strict=True)]
    nfe, guide_nfe = (float(each.double().mean()) for each in (result.nfe, result.guide_nfe))
    return score(grades, nfe, result.stats.tpf, guide_nfe)


def evaluate_causal(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    batch_size: int = 100,
    progress: Callable[[int], object] = lambda done: None,
) -> Score:
    """Answer problems greedily with a causal model and grade the answers; one forward is one token."""
    grades: list[Grade] = []
    for start in range(0, len(problems), batch_size):
        batch = problems[start : start + batch_size]
        questions = [problem.question for problem in batch]
        inputs = tokenizer(questions, padding=True, padding_side="left", return_tensors="pt").to(model.device)
        with torch.inference_mode():
            out = model.generate(
                input_ids=inputs.input_ids, attention_mask=inputs.attention_mask, max_new_tokens=64, do_sample=False
            )
        answers = out[:, inputs.input_ids.shape[1] :].tolist()
        texts = [text_of(tokenizer, answer, skip_special_tokens=True) for answer in answers]
        grades += [grade(text, problem) for text, problem in zip(texts, batch, strict=True)]
        progress(len(grades))
    return score(grades, nfe=math.nan, tpf=1.0)


def score(grades: Sequence[Grade], nfe: float, tpf: float, guide_nfe: float = 0.0) -> Score:
    """Aggregate graded answers."""
    right = sum(g.final for g in grades)
    return Score(
        n=len(grades),
        final=right / len(grades),
        chain=sum(g.chain for g in grades) / len(grades),
        interval=wilson(right, len(grades)),
        nfe=nfe,
        tpf=tpf,
        guide_nfe=guide_nfe,
    )
