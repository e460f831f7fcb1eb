"""What the denoiser's logits are turned into."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dllm.decoding.prediction import Prediction, Sampling

MASK = 6


def predict(logits: Tensor, **sampling: object) -> Prediction:
    """A prediction about every position of one row."""
    count = len(logits)
    generators = [(torch.Generator().manual_seed(int(sampling.pop("seed", 0))), count)]  # type: ignore[call-overload]
    asked = torch.ones(1, count, dtype=torch.bool)
    return Prediction(logits.clone(), asked, torch.arange(count), MASK, Sampling(**sampling), generators)  # type: ignore[arg-type]


def logits(rows: int = 5, seed: int = 0) -> Tensor:
    values = 3 * torch.randn(rows, 7, generator=torch.Generator().manual_seed(seed))
    values[:, MASK] = -20.0
    return values


def test_confidence_is_the_probability_of_the_token() -> None:
    values = logits()
    exact = values.double().softmax(-1)
    prediction = predict(values)
    assert prediction.tokens[0].tolist() == exact.argmax(-1).tolist()
    torch.testing.assert_close(prediction.confidence[0].double(), exact.amax(-1), rtol=1e-6, atol=0)


def test_confidence_survives_large_logits() -> None:
    values = torch.tensor([[30000.0, 29999.0, 0, 0, 0, 0, 0]])
    assert predict(values).confidence.item() == pytest.approx(1 / (1 + math.exp(-1)), rel=1e-6)


def test_half_precision_logits_are_judged_in_float32() -> None:
    values = logits().to(torch.bfloat16)
    prediction = predict(values)
    torch.testing.assert_close(prediction.confidence[0].float(), values.float().softmax(-1).amax(-1))


def test_probabilities_that_are_all_one_in_float32_are_kept_apart() -> None:
    values = torch.zeros(4, 7)
    values[:, 2] = torch.tensor([24.0, 22.0, 23.0, 21.0])
    prediction = predict(values)
    exact = values.double().softmax(-1)
    assert (exact.amax(-1).float() == 1).all()
    torch.testing.assert_close(1 - prediction.confidence[0], 1 - exact.amax(-1), rtol=1e-5, atol=0)
    torch.testing.assert_close(1 - prediction.margin[0], 1 - (exact[:, 2] - exact[:, 0]), rtol=1e-5, atol=0)
    torch.testing.assert_close(prediction.entropy[0], -(exact * exact.log()).sum(-1), rtol=1e-4, atol=0)


def test_margin_and_entropy_are_those_of_the_softmax() -> None:
    exact = logits().double().softmax(-1)
    best = exact.sort(-1, descending=True).values
    prediction = predict(logits())
    torch.testing.assert_close(prediction.margin[0].double(), best[:, 0] - best[:, 1], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(prediction.entropy[0].double(), -(exact * exact.log()).sum(-1), rtol=1e-5, atol=1e-7)


def test_nothing_is_said_where_nothing_was_asked() -> None:
    asked = torch.tensor([[True, False, True], [False, False, True]])
    prediction = Prediction(logits(3), asked, asked.flatten().nonzero()[:, 0], MASK, Sampling())
    assert (prediction.confidence[~asked] == -torch.inf).all()
    assert (prediction.margin[~asked] == -torch.inf).all()
    assert (prediction.entropy[~asked] == torch.inf).all()
    assert prediction.tokens[asked].tolist() == logits(3).argmax(-1).tolist()


def test_mask_is_never_predicted_but_keeps_its_probability() -> None:
    values = logits()
    values[:, MASK] = 20.0
    prediction = predict(values)
    assert MASK not in prediction.tokens
    assert (prediction.confidence < 0.5).all()
    assert MASK not in predict(values, temperature=2.0).tokens
    # Nothing but the mask is left after top-k; the next best stands in, with probability 0.
    alone = predict(values, temperature=1.0, top_k=1)
    assert alone.tokens.tolist() == prediction.tokens.tolist()
    assert (alone.confidence == 0).all()


def test_logits_are_left_as_they_came() -> None:
    values = logits().double()
    asked = torch.ones(1, 5, dtype=torch.bool)
    Prediction(values, asked, torch.arange(5), MASK, Sampling())
    assert torch.equal(values, logits().double())


def test_top_k_changes_confidence_and_not_the_token() -> None:
    values = logits()
    kept = values.double().topk(2, dim=-1).values.softmax(-1)[:, 0]
    prediction = predict(values, top_k=2)
    assert torch.equal(prediction.tokens, predict(values).tokens)
    torch.testing.assert_close(prediction.confidence[0].double(), kept, rtol=1e-6, atol=0)


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    values = torch.tensor([[0.5, 0.3, 0.15, 0.05, 1e-9, 1e-9, 1e-9]]).log()
    assert predict(values, top_p=0.7).confidence.item() == pytest.approx(0.5 / 0.8, rel=1e-5)
    assert predict(values, top_p=0.4).confidence.item() == pytest.approx(1.0, rel=1e-5)
    assert predict(values, top_p=1.0).confidence.item() == pytest.approx(0.5, rel=1e-5)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_gumbel_max_draws_from_the_tempered_softmax(temperature: float) -> None:
    row = torch.tensor([1.0, 0.0, -1.0, 2.0, 0.5, -0.5, -30.0])
    drawn = predict(row.expand(20_000, -1), temperature=temperature).tokens[0].bincount(minlength=7) / 20_000
    expected = (row.double() / temperature).softmax(-1)
    # Five standard errors.
    assert ((drawn - expected).abs() <= 5 * (expected * (1 - expected) / 20_000).sqrt() + 1e-9).all()


def test_confidence_of_a_drawn_token_is_its_own_probability() -> None:
    values = logits(50)
    prediction = predict(values, temperature=1.5)
    exact = values.double().softmax(-1).gather(-1, prediction.tokens[0][:, None])[:, 0]
    torch.testing.assert_close(prediction.confidence[0].double(), exact, rtol=1e-5, atol=1e-9)
    assert (prediction.tokens[0] != values.argmax(-1)).any()


def test_eos_suppression_logits_never_predicts_the_filling_token() -> None:
    values = logits()
    values[:, 2] = 10.0
    assert 2 not in predict(values, eos_suppression="logits", eos_token_ids=(2, 3)).tokens
    values[:, 3] = 11.0
    assert (predict(values, eos_suppression="logits", eos_token_ids=(2, 3)).tokens == 3).all()


def test_eos_suppression_confidence_predicts_it_with_confidence_zero() -> None:
    values = logits()
    values[1, 2] = values[3, 4] = 10.0
    prediction = predict(values, eos_suppression="confidence", eos_token_ids=(2, 4))
    assert torch.equal(prediction.tokens, predict(values).tokens)
    ended = torch.isin(prediction.tokens, torch.tensor([2, 4]))
    assert ended[0, [1, 3]].all()
    assert torch.equal(prediction.confidence == 0, ended)


@pytest.mark.parametrize("extra", [{}, {"top_p": 0.3}, {"top_k": 1}])
def test_suppressed_end_of_text_comes_last_in_every_order(extra: dict[str, object]) -> None:
    values = logits()
    values[1, 2] = 10.0
    prediction = predict(values, eos_suppression="confidence", eos_token_ids=(2,), **extra)
    assert prediction.tokens[0, 1] == 2
    others = [0, 2, 3, 4]
    assert prediction.confidence[0, 1] == 0 and (prediction.confidence[0, others] > 0).all()
    assert prediction.margin[0, 1] == -torch.inf and (prediction.margin[0, others] > -torch.inf).all()
    assert prediction.entropy[0, 1] == torch.inf and (prediction.entropy[0, others] < torch.inf).all()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("top_k", 0),
        ("eos_suppression", "never"),
    ],
)
def test_values_out_of_range_are_named(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"{name}=.*(use|expected) "):
        Sampling(**{name: value})  # type: ignore[arg-type]
