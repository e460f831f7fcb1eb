"""EB-Sampler: how much entropy one step may commit."""

from __future__ import annotations

from math import log, nan
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import dllm
from dllm.decoding.prediction import Prediction, Sampling
from dllm.samplers import EB, Threshold, Vanilla
from dllm.samplers.base import constant_denoiser
from models import random_dream, random_llada
from sampler_rig import GUESSES, chosen, confidences, window


def entropy(confidence: float) -> float:
    """That of the rig's predictions, whose probability is spread evenly over all tokens but the best."""
    rest = 1 - confidence
    return -confidence * log(confidence) - (rest * log(rest / GUESSES) if rest else 0.0)


def spelt_out(values: list[float], gamma: float, leave_out: str = "largest", at_least: int = 1) -> list[int]:
    order = sorted((k for k, value in enumerate(values) if value == value), key=lambda k: -values[k])
    count = 0
    for n in range(1, len(order) + 1):
        entropies = [entropy(values[k]) for k in order[:n]]
        out = max(entropies) if leave_out == "largest" else entropies[-1]
        count = n if sum(entropies) - out <= gamma else count
    return sorted(order[: max(count, at_least)])


@given(confidences, st.floats(0, 20), st.sampled_from(["largest", "last"]), st.integers(1, 4))
def test_the_longest_prefix_within_the_bound_is_committed(
    values: list[float], gamma: float, leave_out: Any, at_least: int
) -> None:
    values = [round(value, 6) for value in values]
    found = chosen(EB(gamma, leave_out=leave_out, at_least=at_least), values)
    near = [spelt_out(values, max(gamma + off, 0), leave_out, at_least) for off in (-1e-9, 1e-9)]
    assert len(near[0]) <= len(found) <= len(near[1])
    assert found == near[0] or found == near[1] or near[0] != near[1]


def test_the_largest_entropy_does_not_count() -> None:
    bound = entropy(0.9) + 1e-9
    assert chosen(EB(bound), [0.3, 0.9, 0.2, nan]) == [0, 1]
    assert chosen(EB(bound), [0.9, 0.9, 0.9, 0.2]) == [0, 1]


def test_leaving_out_the_last_entropy_is_another_rule() -> None:
    # Of nearly equal confidence; the rest of the second one is spread over many tokens.
    rest = torch.tensor([[0.4, *[0.0] * 9], [0.041] * 10, [0.42, *[0.0] * 9]])
    probabilities = torch.cat((torch.tensor([[0.6], [0.59], [0.58]]), rest, torch.zeros(3, 1)), dim=1)
    view = window(torch.ones(3, dtype=torch.bool))
    prediction = Prediction(probabilities.log(), view.masked, view.masked.flatten().nonzero()[:, 0], 11, Sampling())
    one, spread, other = prediction.entropy[0].tolist()
    assert spread > one + other
    for leave_out, count in (("largest", 3), ("last", 2)):
        sampler = EB((one + other + spread) / 2, leave_out=leave_out)  # type: ignore[arg-type]
        assert sampler.step(view, constant_denoiser(prediction), None).write.sum() == count


@given(confidences, st.floats(0, 20), st.floats(0, 20))
def test_a_larger_bound_commits_at_least_as_much(values: list[float], one: float, other: float) -> None:
    low, high = sorted((one, other))
    assert set(chosen(EB(low), values)) <= set(chosen(EB(high), values))


@pytest.mark.parametrize("make", [random_llada, random_dream])
@pytest.mark.parametrize(
    ("bound", "same"), [(EB(0.0), Vanilla()), (EB(1e9), Threshold(0.0)), (EB(1e9, "entropy"), Threshold(0.0))], ids=repr
)
def test_the_ends_of_the_bound_are_one_token_and_the_whole_block(make: Any, bound: EB, same: Any) -> None:
    lm = make()
    options = {"gen_length": 20, "block_length": 8, "stop_at_eos": False}
    found, plain = (dllm.generate(lm, [[3, 4], [5]], sampler, **options) for sampler in (bound, same))
    assert torch.equal(found.sequences, plain.sequences)
    assert torch.equal(found.commit_step, plain.commit_step)


@pytest.mark.parametrize("order", ["margin", "entropy"])
def test_the_order_ranks_the_positions(order: Any) -> None:
    lm = random_llada()
    options = {"gen_length": 16, "block_length": 8, "stop_at_eos": False}
    found, plain = (dllm.generate(lm, [[3, 4], [5]], s, **options) for s in (EB(0.0, order), Vanilla(order=order)))
    assert torch.equal(found.sequences, plain.sequences)


def test_a_suppressed_end_of_text_is_committed_last() -> None:
    lm = random_llada()
    options: dict[str, Any] = {"gen_length": 12, "block_length": 12, "eos_token_id": list(range(40))}
    out = dllm.generate(lm, [[3, 4]], EB(1e9), stop_at_eos=False, eos_suppression="confidence", **options)
    suppressed = out.completions[0] < 40
    assert suppressed.any()
    assert out.commit_step[0][~suppressed].max() < out.commit_step[0][suppressed].min()


@pytest.mark.parametrize(
    ("name", "value"), [("gamma", -0.1), ("gamma", nan), ("order", "random"), ("leave_out", "none"), ("at_least", 0)]
)
def test_values_out_of_range_are_named(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"{name}=.*(use|expected) "):
        EB(**{name: value})
