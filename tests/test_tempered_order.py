"""Above temperature 0: what the published samplers order positions by, and drawing that order."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import dllm
from contract_rig import PROMPTS, Maker, backbones
from dllm.decoding.prediction import Prediction, Sampling
from dllm.samplers import FreeDave, Vanilla
from dllm.samplers.selection import perturbed, ranks
from models import random_dream, random_llada

MASK = 6


def published(
    logits: Tensor, tokens: Tensor, temperature: float, top_p: float | None, top_k: int | None
) -> dict[str, Tensor]:
    """Dream's `sample_tokens`, spelt out: probabilities of the tokens drawn, margins and entropies."""
    logits = logits.double() / temperature
    if top_p is not None:
        ranked, order = logits.sort(descending=True)
        remove = ranked.softmax(-1).cumsum(-1) > top_p
        remove[:, 1:] = remove[:, :-1].clone()
        remove[:, 0] = False
        logits = logits.masked_fill(torch.zeros_like(remove).scatter(-1, order, remove), -torch.inf)
    if top_k is not None:
        logits = logits.masked_fill(logits < logits.topk(top_k)[0][..., -1, None], -torch.inf)
    probabilities = logits.softmax(-1)
    best = probabilities.sort(descending=True).values
    return {
        "confidence": probabilities.gather(-1, tokens[:, None])[:, 0],
        "margin": best[:, 0] - best[:, 1],
        "entropy": -(probabilities * (probabilities + 1e-10).log()).sum(-1),
    }


def predicted(logits: Tensor, **sampling: Any) -> Prediction:
    """What is predicted at each of the positions."""
    count = len(logits)
    generators = [(torch.Generator().manual_seed(0), count)]
    asked = torch.ones(1, count, dtype=torch.bool)
    return Prediction(logits.clone(), asked, torch.arange(count), MASK, Sampling(**sampling), generators)


def some_logits() -> Tensor:
    values = 2 * torch.randn(40, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    values[:, MASK] = -20.0
    return values


@pytest.mark.parametrize("top_k", [None, 3])
@pytest.mark.parametrize("top_p", [None, 0.8])
@pytest.mark.parametrize("temperature", [0.1, 0.5, 2.0])
def test_dreams_scores_are_those_of_what_it_draws_from(
    temperature: float, top_p: float | None, top_k: int | None
) -> None:
    options: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
    tempered = predicted(some_logits(), tempered_confidence=True, **options)
    for name, expected in published(some_logits(), tempered.tokens[0], temperature, top_p, top_k).items():
        torch.testing.assert_close(getattr(tempered, name)[0], expected, rtol=1e-6, atol=1e-8)
    # The same tokens, with the probabilities of the logits as they are.
    plain = predicted(some_logits(), **options)
    assert torch.equal(plain.tokens, tempered.tokens)
    if top_p is None:
        for name, expected in published(some_logits(), plain.tokens[0], 1.0, None, top_k).items():
            torch.testing.assert_close(getattr(plain, name)[0], expected, rtol=1e-6, atol=1e-8)
    assert not torch.allclose(plain.confidence, tempered.confidence)


def replayed(lm: dllm.LanguageModel, order: str, temperature: float) -> tuple[list[int], list[int]]:
    """Columns as they were committed one by one, and as the published score puts them, step by step."""
    committed, expected = [], []
    columns = {"low_confidence": "confidence", "margin": "margin", "entropy": "entropy"}
    frames = dllm.stream(
        lm, [[5, 9, 3]], Vanilla(order=order), gen_length=12, block_length=None, temperature=temperature, seed=0,  # type: ignore[arg-type]
        stop_at_eos=False,
    )  # fmt: skip
    before = torch.tensor([[5, 9, 3, *[lm.backbone.mask_token_id] * 12]])
    generator = torch.Generator().manual_seed(0)
    for frame in frames:
        masked = (before[0] == lm.backbone.mask_token_id).nonzero()[:, 0]
        with torch.no_grad():
            logits = lm.backbone(before).logits[0, masked - lm.backbone.logits_shift]
        noise = torch.rand(logits.shape, generator=generator, dtype=torch.float64)
        noisy = logits - temperature * (-noise.log()).log()
        noisy[:, lm.backbone.mask_token_id] = -torch.inf
        scale = temperature if lm.backbone.logits_shift else 1.0
        score = published(logits, noisy.argmax(-1), scale, None, None)[columns[order]]
        expected.append(int(masked[(-score if order == "entropy" else score).argmax()]))
        committed.append(int(frame.committed[0].nonzero()[0]))
        before = frame.tokens
    return committed, expected


@backbones
@pytest.mark.parametrize("order", ["low_confidence", "margin", "entropy"])
@pytest.mark.parametrize("temperature", [0.1, 0.5, 2.0])
def test_a_model_is_decoded_in_the_order_of_its_own_published_sampler(
    make: Maker, order: str, temperature: float
) -> None:
    committed, expected = replayed(make(), order, temperature)
    assert committed == expected


@backbones
def test_an_option_names_the_other_order(make: Maker) -> None:
    lm = make()
    own = lm.backbone.tempered_confidence
    assert own == (make is random_dream)
    run = lambda **options: dllm.generate(lm, PROMPTS, seed=0, gen_length=16, **options).sequences  # noqa: E731
    assert torch.equal(run(temperature=2.0), run(temperature=2.0, tempered_confidence=own))
    assert not torch.equal(run(temperature=2.0), run(temperature=2.0, tempered_confidence=not own))
    assert torch.equal(run(temperature=1.0), run(temperature=1.0, tempered_confidence=not own))
    for value in (True, False):
        with pytest.raises(
            ValueError, match=f"tempered_confidence={str(value).lower()} has no effect at temperature=0"
        ):
            run(tempered_confidence=value)
    with pytest.raises(ValueError, match="unknown tempered_confidence='yes'"):
        run(tempered_confidence="yes")


@pytest.mark.parametrize("temperature", [0.1, 0.5, 2.0])
def test_positions_are_drawn_without_replacement(temperature: float) -> None:
    score = torch.tensor([0.9, 0.5, 0.7, 0.1])
    uniform = torch.rand(40_000, 4, generator=torch.Generator().manual_seed(0))
    drawn = perturbed(score.expand(40_000, -1), temperature, uniform).argsort(-1, descending=True)[:, :2]
    weight = (score.double() / temperature).softmax(-1)
    for first in range(4):
        for second in range(4):
            expected = 0.0 if first == second else float(weight[first] * weight[second] / (1 - weight[first]))
            found = float(((drawn[:, 0] == first) & (drawn[:, 1] == second)).float().mean())
            assert abs(found - expected) <= 5 * (expected * (1 - expected) / 40_000) ** 0.5 + 1e-9


def test_numbers_at_the_end_of_their_range_draw_something() -> None:
    score = perturbed(torch.tensor([[0.5, 0.5]]), 0.1, torch.tensor([[0.0, 1 - 2.0**-24]]))
    assert score.isfinite().all()
    assert ranks(score).tolist() == [[1, 0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [1e-20, 1e-38, 5e-324])
def test_the_smallest_temperatures_are_as_good_as_none(temperature: float, dtype: torch.dtype) -> None:
    values = some_logits().to(dtype)
    values[0] = torch.tensor([3e38, -3e38, 1, 2, 3e38, 0, -20])
    greedy = values.argmax(-1)
    for top_p in (None, 0.9):
        drawn = predicted(values, temperature=temperature, tempered_confidence=True, top_p=top_p)
        assert drawn.tokens[0].tolist()[1:] == greedy.tolist()[1:]
        expected = torch.tensor([0.5, *[1.0] * 39], dtype=torch.float64)
        torch.testing.assert_close(drawn.confidence[0], expected)
        assert drawn.margin[0].tolist() == [0.0, *[1.0] * 39] and drawn.entropy[0, 1:].tolist() == [0.0] * 39
    score = torch.tensor([[0.5, 0.9, 0.7]], dtype=torch.float64)
    assert ranks(perturbed(score, temperature, torch.rand(1, 3))).tolist() == [[2, 0, 1]]


@backbones
@pytest.mark.parametrize("order", ["low_confidence", "margin", "entropy"])
def test_a_drawn_order_is_the_rows_own(make: Maker, order: Any) -> None:
    lm, prompts = make(), PROMPTS[:3]
    options: dict[str, Any] = {"gen_length": 12, "block_length": 6, "stop_at_eos": False}
    for sampler in (
        Vanilla(order=order, alg_temp=0.3),
        Vanilla(steps=10, schedule="timestep", order=order, alg_temp=2.0),
    ):
        batch = dllm.generate(lm, prompts, sampler, batch_size=2, seed=5, **options)
        for row, prompt in enumerate(prompts):
            alone = dllm.generate(lm, [prompt], sampler, seed=5 + row, **options)
            assert torch.equal(batch.completions[row], alone.completions[0])
            assert torch.equal(batch.commit_step[row], alone.commit_step[0])
    drawn, certain = (
        dllm.generate(lm, prompts, Vanilla(order=order, alg_temp=each), seed=5, **options) for each in (0.3, 0.0)
    )
    assert not torch.equal(drawn.commit_step, certain.commit_step)


def test_a_drawn_order_can_be_drafted() -> None:
    sampler = FreeDave(3, Vanilla(alg_temp=0.3))
    first, again = (dllm.generate(random_llada(), [[5, 9, 3]], sampler, seed=0, gen_length=12) for _ in range(2))
    assert torch.equal(first.sequences, again.sequences)
    assert int(first.nfe[0]) <= 12


def test_hardly_any_temperature_is_none() -> None:
    lm = random_llada()
    drawn, certain = (dllm.generate(lm, PROMPTS, Vanilla(alg_temp=each), seed=0, gen_length=12) for each in (1e-6, 0.0))
    assert torch.equal(drawn.sequences, certain.sequences)
    assert torch.equal(drawn.commit_step, certain.commit_step)


def test_values_without_effect_are_refused() -> None:
    with pytest.raises(ValueError, match=r"alg_temp=0\.5 has no effect with order=random"):
        Vanilla(order="random", alg_temp=0.5)
    with pytest.raises(ValueError, match="alg_temp=-1 is out of range"):
        Vanilla(alg_temp=-1)
