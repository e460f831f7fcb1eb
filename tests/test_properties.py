"""Invariants over random tiny models, prompts, lengths and blocks."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dllm
from dllm.samplers import T2M, EntropyThreshold, Factor, ReMDM, Threshold, Vanilla, Wino
from models import random_dream, random_llada

SAMPLERS = st.one_of(
    st.builds(
        Vanilla, tokens_per_step=st.integers(1, 5), order=st.sampled_from(["low_confidence", "margin", "entropy"])
    ),
    st.builds(Threshold, threshold=st.floats(0, 1.1), at_least=st.integers(1, 3)),
    st.builds(Factor, factor=st.floats(0.01, 4)),
    st.builds(EntropyThreshold, threshold=st.floats(0, 4)),
    st.builds(Wino, wide_in=st.floats(0, 1.1), narrow_out=st.floats(0, 1.1), at_least=st.integers(1, 3)),
)
REVISING = st.one_of(
    st.builds(
        T2M, threshold=st.floats(0, 1.1), trigger=st.sampled_from(["low_prob", "t2t", "change"]),
        bound=st.floats(0, 1), most=st.integers(0, 7), share=st.floats(0, 1), post_steps=st.integers(0, 20),
    ),
    st.builds(
        ReMDM, schedule=st.sampled_from(["cap", "rescale"]), eta=st.floats(0, 1), by_confidence=st.booleans(),
        loop=st.integers(0, 15), loop_at=st.floats(0.01, 1),
    ),
)  # fmt: skip
PROMPTS = st.lists(st.lists(st.integers(0, 61), min_size=1, max_size=12), min_size=1, max_size=5)


@cache
def model(family: str, seed: int) -> dllm.LanguageModel:
    return {"llada": random_llada, "dream": random_dream}[family](seed=seed, layers=1)


@settings(max_examples=40)
@given(
    st.sampled_from(["llada", "dream"]),
    st.integers(0, 4),
    SAMPLERS,
    PROMPTS,
    st.integers(1, 24),
    st.integers(1, 30),
    st.booleans(),
)
def test_rows_finish_alone_and_together(
    family: str, seed: int, sampler: Any, prompts: list[list[int]], length: int, block: int, stop: bool
) -> None:
    lm = model(family, seed)
    options = {"gen_length": length, "block_length": block, "stop_at_eos": stop, "eos_token_id": [7, 3]}
    batch = dllm.generate(lm, prompts, sampler, **options)
    assert not (batch.completions == lm.backbone.mask_token_id).any()
    assert (batch.nfe >= 1).all() and (batch.nfe <= length).all()
    for row, prompt in enumerate(prompts):
        alone = dllm.generate(lm, [prompt], sampler, **options)
        assert batch.completions[row].tolist() == alone.completions[0].tolist()
        assert batch.nfe[row] == alone.nfe[0]


@settings(max_examples=20)
@given(
    st.sampled_from(["llada", "dream"]),
    st.integers(0, 4),
    SAMPLERS | REVISING,
    PROMPTS,
    st.integers(1, 24),
    st.integers(1, 30),
)
def test_stopping_never_changes_the_text(
    family: str, seed: int, sampler: Any, prompts: list[list[int]], length: int, block: int
) -> None:
    lm = model(family, seed)
    options = {"gen_length": length, "block_length": block, "eos_token_id": [7, 3], "seed": 1}
    stopped = dllm.generate(lm, prompts, sampler, stop_at_eos=True, **options)
    free = dllm.generate(lm, prompts, sampler, stop_at_eos=False, **options)
    assert stopped.stats.tokens == free.stats.tokens
    assert (stopped.nfe <= free.nfe).all()
    decoded = stopped.commit_step >= 0
    assert torch.equal(stopped.completions[decoded], free.completions[decoded])
    assert torch.equal(stopped.commit_step[decoded], free.commit_step[decoded])


@settings(max_examples=25)
@given(
    st.sampled_from(["llada", "dream"]), st.integers(0, 4), REVISING, PROMPTS, st.integers(1, 24), st.integers(1, 30)
)
def test_what_revises_ends_alone_and_together(
    family: str, seed: int, sampler: Any, prompts: list[list[int]], length: int, block: int
) -> None:
    lm = model(family, seed)
    options = {"gen_length": length, "block_length": block, "stop_at_eos": False}
    batch = dllm.generate(lm, prompts, sampler, **options, seed=5)
    assert not (batch.completions == lm.backbone.mask_token_id).any()
    for row, prompt in enumerate(prompts):
        alone = dllm.generate(lm, [prompt], sampler, **options, seed=5 + row)
        assert batch.completions[row].tolist() == alone.completions[0].tolist()
        assert batch.commit_step[row].tolist() == alone.commit_step[0].tolist()
        assert batch.nfe[row] == alone.nfe[0]
