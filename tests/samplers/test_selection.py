"""Shared selection rules."""

from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from dllm.samplers.selection import ranks, top

scores = st.lists(st.sampled_from([-math.inf, 0.0, 0.25, 0.5, 1.0]), min_size=1, max_size=20)


@given(scores)
def test_ranks_order_by_score_then_from_left_to_right(values: list[float]) -> None:
    expected = sorted(range(len(values)), key=lambda i: (-values[i], i))
    assert ranks(torch.tensor([values]))[0].argsort().tolist() == expected


@given(scores, st.integers(0, 25), st.integers(0, 2**20))
def test_top_takes_the_best_of_the_eligible(values: list[float], count: int, bits: int) -> None:
    eligible = [bool(bits >> i & 1) for i in range(len(values))]
    order = sorted((i for i, e in enumerate(eligible) if e), key=lambda i: (-values[i], i))
    got = top(torch.tensor([values]), torch.tensor([count]), torch.tensor([eligible]))
    assert got[0].nonzero()[:, 0].tolist() == sorted(order[:count])
