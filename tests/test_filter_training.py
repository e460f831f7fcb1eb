"""The replay that makes a Learn2PD filter's records, its training and its measures."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import dllm
from dllm.filters import ConfidenceFilter, NeighbourFilter
from dllm.filters.training import Records, Training, collect, fit, measure, split
from dllm.samplers import Threshold
from dllm.samplers.base import Policy
from models import random_dream, random_llada

OPTIONS: dict[str, Any] = {"gen_length": 14, "block_length": 6, "stop_at_eos": False}


def by_hand(
    lm: dllm.LanguageModel, prompt: list[int], truth: torch.Tensor
) -> list[tuple[list[float], list[bool], int]]:
    """The replay of one prompt, step by step: confidences of the block, which predictions are right, masks."""
    mask, start = lm.backbone.mask_token_id, len(prompt)
    canvas, found = torch.tensor([[*prompt, *[mask] * 14]]), []
    for low in range(start, start + 14, 6):
        block = range(low, min(low + 6, start + 14))
        while (canvas[0, block] == mask).any():
            with torch.no_grad():
                logits = lm.backbone(canvas).logits[0].roll(lm.backbone.logits_shift, 0)
            probability = logits.softmax(-1)
            probability[:, mask] = -1
            predicted = probability.argmax(-1)
            right = [bool(predicted[i] == truth[i]) for i in block]
            masks = [i for i in block if canvas[0, i] == mask]
            found.append(([float(probability[i, predicted[i]]) for i in block], right, len(masks)))
            good = [i for i in masks if predicted[i] == truth[i]]
            for i in good or masks:  # nothing right: the rest of the block is given away
                canvas[0, i] = truth[i]
    return found


@pytest.mark.parametrize("make", [random_llada, random_dream])
@pytest.mark.parametrize("base", ["vanilla", Threshold(0.3)], ids=repr)
def test_records_are_those_of_the_replay_done_by_hand(make: Any, base: Any) -> None:
    lm, prompts = make(), [[3, 4], [5, 6, 7, 8], [40]]
    truth = dllm.generate(lm, prompts, base, **OPTIONS)
    records = collect(lm, prompts, base, "none", **OPTIONS)
    for number, prompt in enumerate(prompts):
        own = records.where(records.prompt == number)
        wanted = by_hand(lm, prompt, truth.sequences[number, -14 - len(prompt) :])
        assert len(own.prompt) == len(wanted)
        for i, (confidence, right, masks) in enumerate(wanted):
            width = len(confidence)
            torch.testing.assert_close(own.confidence[i, :width], torch.tensor(confidence), atol=1e-6, rtol=0)
            assert own.final[i, :width].tolist() == right
            assert int(own.masked[i].sum()) == masks
            # What a short last block lacks counts as sure and final.
            assert own.inside[i].tolist() == [True] * width + [False] * (6 - width)
            assert own.confidence[i, width:].tolist() == [1.0] * (6 - width)
            assert own.final[i, width:].all()


def test_a_block_where_nothing_is_right_is_given_up_at_once() -> None:
    lm = random_llada()
    mask = lm.backbone.mask_token_id

    class Wrong(Policy):
        """A base whose result the model never predicts."""

        single_forward = True

        def step(self, window: Any, denoise: Any, state: None) -> Any:
            """Write something else than what is predicted."""
            prediction = denoise()
            other = (prediction.tokens + 7) % (mask - 1)
            return dllm.decoding.window.Edit(window.columns, other, window.masked)

    records = collect(lm, [[3, 4]], Wrong(), "none", **OPTIONS)
    assert records.masked.sum(-1).tolist() == [6, 6, 2]
    assert not (records.final & records.masked).any()


def random_records(count: int = 400, width: int = 8, prompts: int = 50) -> Records:
    """Records in which a prediction is final exactly where its confidence is above 0.6."""
    draw = torch.Generator().manual_seed(0)
    confidence = torch.rand((count, width), generator=draw)
    masked = torch.rand((count, width), generator=draw) < 0.7
    return Records(confidence, torch.ones_like(masked), confidence > 0.6, masked, torch.arange(count) % prompts)


@pytest.mark.parametrize(("share", "held_out"), [(0.01, 1), (0.99, 49)])
def test_both_sides_of_the_split_get_a_prompt(share: float, held_out: int) -> None:
    sides = split(random_records(), Training(held_out=share))
    assert [len(side.prompt.unique()) for side in sides] == [50 - held_out, held_out]


def test_no_prompt_is_on_both_sides_of_the_split() -> None:
    learn, held_out = split(random_records(), Training(held_out=0.2, seed=3))
    assert not set(learn.prompt.tolist()) & set(held_out.prompt.tolist())
    assert len(held_out.prompt.unique()) == 10
    assert len(learn.prompt) + len(held_out.prompt) == 400
    again, _ = split(random_records(), Training(held_out=0.2, seed=3))
    assert torch.equal(learn.prompt, again.prompt)


@pytest.mark.parametrize(("architecture", "kind"), [("neighbours", NeighbourFilter), ("published", ConfidenceFilter)])
def test_a_rule_is_learned_and_the_best_epoch_kept(architecture: str, kind: type) -> None:
    learn, held_out = split(random_records(), Training())
    losses: list[float] = []
    how = Training(architecture, epochs=60, patience=60, batch_size=64)
    network, epoch = fit(learn, held_out, how, lambda _, loss: losses.append(loss))
    assert isinstance(network, kind)
    assert len(losses) == 60
    assert epoch == 1 + losses.index(min(losses))
    assert min(losses) < 0.8 * losses[0]
    again, _ = fit(learn, held_out, how)
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), again.parameters(), strict=True))


def test_training_stops_when_the_held_out_loss_has_not_improved_for_long_enough() -> None:
    learn, held_out = split(random_records(), Training())
    held_out.final.logical_not_()  # what is learned makes it only worse
    seen: list[int] = []
    _, epoch = fit(
        learn, held_out, Training(patience=4, epochs=100, batch_size=64), lambda number, _: seen.append(number)
    )
    assert len(seen) == epoch + 4 < 100


class Known(NeighbourFilter):
    """Gives each position the logit that its confidence stands for."""

    def forward(self, confidence: torch.Tensor, masked: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
        """See `NeighbourFilter`."""
        return torch.logit(confidence)


def test_what_is_as_probable_is_accepted_together() -> None:
    confidence, final = torch.tensor([[0.95] * 4]), torch.tensor([[True, True, False, True]])
    everything = torch.ones_like(final)
    quality, _ = measure(Known(), Records(confidence, everything, final, everything, torch.arange(1)))
    assert quality["recall_at_0.99"] == 0.0
    quality, _ = measure(Known(), Records(confidence, everything, ~final, everything, torch.arange(1)))
    assert {row["threshold"]: row["precision"] for row in quality["thresholds"]}[0.9] == 0.25


def test_measures_are_those_worked_out_by_hand() -> None:
    confidence = torch.tensor([[0.95, 0.93, 0.75, 0.2], [0.55, 0.15, 0.98, 0.999]])
    final = torch.tensor([[True, False, True, False], [True, False, True, False]])
    masked = torch.tensor([[True] * 4, [True, True, True, False]])  # the last is decoded and does not count
    quality, calibration = measure(
        Known(), Records(confidence, torch.ones_like(masked), final, masked, torch.arange(2))
    )
    at = {row["threshold"]: (row["precision"], row["recall"]) for row in quality["thresholds"]}
    assert at[0.5] == (0.8, 1.0)
    assert at[0.9] == (round(2 / 3, 4), 0.5)
    assert at[0.96] == (1.0, 0.25)
    assert at[0.99] == (None, 0.0)  # nothing is accepted
    assert quality["recall_at_0.99"] == quality["recall_at_0.999"] == 0.5  # 0.98 and 0.95 are right, 0.93 is not
    assert [(row["final"], row["count"]) for row in calibration] == [
        (0.0, 1),
        (0.0, 1),
        (1.0, 1),
        (1.0, 1),
        (round(2 / 3, 4), 3),
    ]
    assert calibration[-1]["predicted"] == round((0.95 + 0.93 + 0.98) / 3, 4)


def _records(confidence: float = 0.5) -> Records:
    inside = torch.ones(12, 6, dtype=torch.bool)
    return Records(torch.full((12, 6), confidence), inside, inside, inside, torch.arange(12))


@pytest.mark.parametrize("architecture", ["neighbours", "published"])
def test_a_training_that_diverges_gives_no_filter(architecture: str) -> None:
    with pytest.raises(ValueError, match=r"rate=0.003 makes the loss of the filter infinite or NaN; use a lower one"):
        fit(_records(float("nan")), _records(float("nan")), Training(architecture))


@pytest.mark.parametrize("name", ["rate", "held_out"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 0, -1, 1e9, True])
def test_rates_and_shares_out_of_range_are_refused(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name}={value!r} is out of range"):
        Training(**{name: value})
