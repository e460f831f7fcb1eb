"""Work is bounded by what is asked: an enormous option is refused, or is as good as the largest one of use."""

from __future__ import annotations

from typing import Any

import pytest

import dllm
from dllm.evaluation.likelihood import Estimate
from dllm.resolve import build, names, options_of
from dllm.samplers.base import Sampler
from models import random_llada
from policies import over_masks

LM = random_llada()
HUGE = 2**62
SAMPLERS: list[tuple[Any, Any]] = [
    (dllm.samplers.FreeDave(HUGE), dllm.samplers.FreeDave(13)),
    (dllm.samplers.SSD(HUGE), dllm.samplers.SSD(12)),
    (dllm.samplers.Vanilla(tokens_per_step=HUGE), dllm.samplers.Vanilla(tokens_per_step=12)),
    (dllm.samplers.Threshold(at_least=HUGE), dllm.samplers.Threshold(at_least=12)),
    (dllm.samplers.EB(at_least=HUGE), dllm.samplers.EB(at_least=12)),
    (dllm.samplers.KLASS(history=HUGE, at_least=HUGE), dllm.samplers.KLASS(history=99, at_least=12)),
    (dllm.samplers.Credit(at_least=HUGE), dllm.samplers.Credit(at_least=12)),
    (
        dllm.samplers.Prophet(answer_start=0, answer_length=HUGE),
        dllm.samplers.Prophet(answer_start=0, answer_length=12),
    ),
    (dllm.samplers.SlowFast(exploration=HUGE, window=HUGE), dllm.samplers.SlowFast(exploration=99, window=99)),
    (dllm.samplers.Certainty(at_least=HUGE), dllm.samplers.Certainty(at_least=12)),
    (dllm.samplers.Saber(HUGE), dllm.samplers.Saber(12)),
    (dllm.samplers.LocalLeap(radius=HUGE), dllm.samplers.LocalLeap(radius=12)),
]
CACHES: list[tuple[Any, Any]] = [
    (dllm.cache.DKVCache(interval=HUGE), dllm.cache.DKVCache(interval=100)),
    (dllm.cache.DLLMCache(HUGE, HUGE), dllm.cache.DLLMCache(100, 100)),
    (dllm.cache.D2Cache(current_k=HUGE, inflate_w=HUGE), dllm.cache.D2Cache(current_k=100, inflate_w=100)),
    (dllm.cache.FreeCache(window=HUGE), dllm.cache.FreeCache(window=100)),
    (dllm.cache.Dual(measure_every=HUGE), dllm.cache.Dual(measure_every=100)),
    (dllm.cache.Sparse(0.5, HUGE - 1, HUGE), dllm.cache.Sparse(0.5, 99, 99)),
    (dllm.cache.Sparse(0.5, HUGE - 1), dllm.cache.Sparse(0.5, 99)),
    (dllm.cache.Elastic(window=HUGE, track=HUGE), dllm.cache.Elastic(window=99, track=99)),
]


def decoded(sampler: Any, cache: Any, **options: Any) -> Any:
    out = dllm.generate(LM, [[5, 6, 7], [8]], sampler, cache, gen_length=12, **options)
    return out.sequences.tolist(), out.nfe.tolist()


@pytest.mark.parametrize(("sampler", "other"), SAMPLERS, ids=lambda each: type(each).__name__)
@pytest.mark.parametrize("block_length", [5])
def test_more_of_an_option_of_a_sampler_than_is_of_use(sampler: Any, other: Any, block_length: int | None) -> None:
    found = decoded(sampler, "none", block_length=block_length)
    assert found == decoded(other, "none", block_length=block_length)


@pytest.mark.parametrize(("cache", "other"), CACHES, ids=lambda each: type(each).__name__)
def test_more_of_an_option_of_a_cache_than_is_of_use(cache: Any, other: Any) -> None:
    found = decoded("threshold", cache, block_length=5)
    assert found == decoded("threshold", other, block_length=5)


@pytest.mark.parametrize("name", sorted(names("sampler")))
@pytest.mark.parametrize("value", [10**20, 1e39, -1e39, 2**63])
def test_numbers_that_a_tensor_cannot_hold_are_refused(name: str, value: Any) -> None:
    options = options_of("sampler", name)
    for option in (each for each, default in options.items() if type(default) in (int, float)):
        with pytest.raises(ValueError, match=rf"^(sampler\.)?{option}=.* (is out of range|has no effect)"):
            build("sampler", options | {option: value}, Sampler)


@pytest.mark.parametrize("name", [each for each in over_masks() if each not in ("learn2pd", "pc", "ar_guided")])
@pytest.mark.parametrize("value", [2**63 - 1, 3e38])
def test_numbers_that_it_can_hold_are_refused_or_decode(name: str, value: Any) -> None:
    options = options_of("sampler", name)
    for option in (each for each, default in options.items() if type(default) in (int, float)):
        try:
            found = decoded(build("sampler", options | {option: value}, Sampler), "none")
        except ValueError as error:
            assert str(error).removeprefix("sampler.").startswith(f"{option}=")  # noqa: PT017
        else:
            assert LM.backbone.mask_token_id not in found[0][0][-12:]


def test_more_of_an_option_of_a_run_than_is_of_use() -> None:
    found = decoded("vanilla", "none", block_length=HUGE, batch_size=HUGE, top_k=HUGE, temperature=0.5, seed=1)
    assert found == decoded("vanilla", "none", block_length=12, batch_size=2, temperature=0.5, seed=1)


@pytest.mark.parametrize("gen_length", [1000, HUGE, 2**63, 10**400])
def test_a_length_that_does_not_fit_is_refused_before_there_is_room_for_it(gen_length: int) -> None:
    with pytest.raises(ValueError, match="gen_length="):
        dllm.generate(LM, [[5]], gen_length=gen_length)


def test_steps_beyond_the_positions_are_refused() -> None:
    with pytest.raises(ValueError, match=f"steps={HUGE} is out of range"):
        dllm.generate(LM, [[5]], dllm.samplers.Vanilla(steps=HUGE), gen_length=8)


def test_samples_of_an_estimate_are_bounded() -> None:
    with pytest.raises(ValueError, match="samples=1000000000 is out of range; use a whole number from 1 to 100000"):
        Estimate(samples=10**9)
