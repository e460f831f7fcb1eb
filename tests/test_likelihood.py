"""Log-likelihoods: equal to the published algorithm looped, to enumeration, and independent of how they are batched."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from itertools import permutations
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import dllm
from dllm import LanguageModel
from dllm.evaluation.likelihood import Asked, Estimate, along_orders, is_greedy, loglikelihood, stratified_masks
from dllm.tasks.word_problems import problems
from models import random_dream, random_llada

FAMILIES = {"llada": random_llada, "dream": random_dream}
PREFIX, TARGET = [5, 9, 2, 31], [7, 7, 40, 12]


@pytest.fixture(params=FAMILIES)
def lm(request: pytest.FixtureRequest) -> LanguageModel:
    return FAMILIES[request.param](sharpness=2.0)


def reference(
    lm: LanguageModel, prefix: Sequence[int], target: Sequence[int], masked: Sequence[int], cfg_scale: float = 0.0
) -> Tensor:
    """(L, V) log-probabilities behind each position of the target with some of it masked, in plain steps."""
    mask, shift = lm.backbone.mask_token_id, lm.backbone.logits_shift
    seen = [mask if i in masked else token for i, token in enumerate(target)]
    with torch.no_grad():
        logits = lm.backbone(torch.tensor([[*prefix, *seen]])).logits
        if cfg_scale:
            blind = lm.backbone(torch.tensor([[mask] * len(prefix) + seen])).logits
            logits = blind + (cfg_scale + 1) * (logits - blind)
    if shift:
        logits = torch.cat((logits[:, :1], logits[:, :-1]), dim=1)
    return logits[0, len(prefix) :].log_softmax(-1)


def along(
    lm: LanguageModel, prefix: Sequence[int], target: Sequence[int], order: Sequence[int], cfg_scale: float = 0.0
) -> float:
    total = 0.0
    for j, place in enumerate(order):
        total += float(reference(lm, prefix, target, order[j:], cfg_scale)[place, target[place]])
    return total


def answered(lm: LanguageModel, asked: Asked) -> float:
    total = 0.0
    for state, place, weight in zip(asked.state.tolist(), asked.place.tolist(), asked.weight.tolist(), strict=True):
        masked = asked.masked[state].nonzero()[:, 0].tolist()
        total += weight * float(reference(lm, PREFIX, TARGET, masked)[place, TARGET[place]])
    return total


def over_all_orders(lm: LanguageModel, prefix: Sequence[int], target: Sequence[int]) -> list[float]:
    return [along(lm, prefix, target, order) for order in permutations(range(len(target)))]


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> Callable[[LanguageModel], list[Tensor]]:
    """Tokens of each forward of a model, from now on."""

    def watch(lm: LanguageModel) -> list[Tensor]:
        inputs: list[Tensor] = []
        inner = lm.backbone.forward

        def forward(input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
            inputs.append(input_ids)
            return inner(input_ids, *args, **kwargs)

        monkeypatch.setattr(lm.backbone, "forward", forward)
        return inputs

    return watch


class TestChain:
    @pytest.mark.parametrize("prefix", [PREFIX, []])
    @pytest.mark.parametrize("cfg_scale", [0.0, 1.5])
    def test_left_to_right_is_the_chain_rule_spelt_out(
        self, lm: LanguageModel, prefix: list[int], cfg_scale: float
    ) -> None:
        result = loglikelihood(lm, prefix, TARGET, Estimate("chain", order="left_to_right", cfg_scale=cfg_scale))
        assert result == pytest.approx(along(lm, prefix, TARGET, range(4), cfg_scale), abs=1e-10)

    @pytest.mark.parametrize("cfg_scale", [0.0, 1.5])
    def test_confidence_reveals_next_where_the_best_token_is_surest(self, lm: LanguageModel, cfg_scale: float) -> None:
        target, left, order = [*TARGET, 3, 50], list(range(6)), []
        while left:
            predicted = reference(lm, PREFIX, target, left, cfg_scale)
            predicted[:, lm.backbone.mask_token_id] = -math.inf
            order.append(max(left, key=lambda place: float(predicted[place].max())))
            left.remove(order[-1])
        assert order != sorted(order)
        result = loglikelihood(lm, PREFIX, target, Estimate("chain", order="confidence", cfg_scale=cfg_scale))
        assert result == pytest.approx(along(lm, PREFIX, target, order, cfg_scale), abs=1e-10)

    def test_random_orders_average_to_the_mean_over_all_orders(self, lm: LanguageModel) -> None:
        every = over_all_orders(lm, PREFIX, TARGET)
        result = loglikelihood(lm, PREFIX, TARGET, Estimate("chain", samples=20_000))
        assert result == pytest.approx(sum(every) / 24, abs=4 * torch.tensor(every).std().item() / math.sqrt(20_000))

    def test_orders_share_the_states_they_have_in_common(self, lm: LanguageModel, forwards: Any) -> None:
        seen = forwards(lm)
        loglikelihood(lm, PREFIX, TARGET, Estimate("chain", samples=500, batch_size=100))
        assert list(map(len, seen)) == [15]  # every state of four tokens but the one without a mask


class TestMonteCarlo:
    def test_its_expectation_is_that_of_random_orders_exactly(self, lm: LanguageModel) -> None:
        every = torch.tensor(list(permutations(range(4))))
        drawn = [stratified_masks(rank[None], first) for rank in every for first in (1, 2, 3, 4)]
        expected = sum(answered(lm, asked) for asked in drawn) / len(drawn)
        assert answered(lm, along_orders(every)) == pytest.approx(expected, abs=1e-10)
        assert sum(over_all_orders(lm, PREFIX, TARGET)) / 24 == pytest.approx(expected, abs=1e-10)

    @pytest.mark.parametrize("cfg_scale", [0.0, 1.5])
    def test_it_is_the_published_sum_over_its_states(self, lm: LanguageModel, forwards: Any, cfg_scale: float) -> None:
        target = random.Random(0).choices(range(60), k=12)
        seen = forwards(lm)
        result = loglikelihood(lm, PREFIX, target, Estimate(samples=8, seed=3, cfg_scale=cfg_scale))
        states = [
            [place for place, token in enumerate(row[4:]) if token == lm.backbone.mask_token_id]
            for row in seen[0][:8].tolist()
        ]
        assert sorted(len(masked) for masked in states) in ([1, 3, 4, 6, 7, 9, 10, 12], [1, 2, 4, 5, 7, 8, 10, 11])
        total = 0.0
        for masked in states:
            answers = reference(lm, PREFIX, target, masked, cfg_scale)
            total += 12 / len(masked) * sum(float(answers[place, target[place]]) for place in masked) / 8
        assert result == pytest.approx(total, abs=1e-10)

    @pytest.mark.parametrize(("length", "samples"), [(3, 2), (4, 128), (7, 10), (10, 3), (5, 5), (1, 4), (12, 8)])
    def test_the_number_of_masks_is_uniform_for_every_sample_and_stratified_over_all(
        self, length: int, samples: int
    ) -> None:
        rank = torch.arange(length).expand(samples, -1)
        tables = [stratified_masks(rank, first).masked.sum(-1).tolist() for first in range(1, length + 1)]
        for sample in zip(*tables, strict=True):
            assert sorted(sample) == list(range(1, length + 1))
        for first, table in enumerate(tables, 1):
            often = [table.count(count) for count in range(1, length + 1)]
            assert max(often) - min(often) <= 1
            published = torch.linspace(first, first + (samples - 1) * length / samples, samples, dtype=torch.float64)
            halves = (published % 1 - 0.5).abs() < 1e-9
            rounded = (published.round().long() - 1) % length + 1
            assert torch.equal(rounded[~halves], torch.tensor(table)[~halves])

    def test_it_nears_the_mean_over_all_orders_and_so_a_lower_bound(self, lm: LanguageModel) -> None:
        every = torch.tensor(over_all_orders(lm, PREFIX, TARGET), dtype=torch.float64)
        result = loglikelihood(lm, PREFIX, TARGET, Estimate(samples=50_000))
        assert result == pytest.approx(float(every.mean()), abs=0.05)
        assert result < float(every.logsumexp(0)) - math.log(24)

    def test_one_token_is_scored_exactly_in_one_forward(self, lm: LanguageModel, forwards: Any) -> None:
        exact = float(reference(lm, PREFIX, [7], [0])[0, 7])
        seen = forwards(lm)
        assert loglikelihood(lm, PREFIX, [7], Estimate()) == pytest.approx(exact, abs=1e-10)
        assert list(map(len, seen)) == [1]


class TestEstimates:
    @pytest.mark.parametrize("method", ["monte_carlo", "chain"])
    def test_batches_do_not_change_the_result(self, lm: LanguageModel, method: Any, forwards: Any) -> None:
        target = random.Random(0).choices(range(60), k=9)
        whole = loglikelihood(lm, PREFIX, target, Estimate(method, samples=40, batch_size=1000))
        seen = forwards(lm)
        for size in (1, 7, 32):
            result = loglikelihood(lm, PREFIX, target, Estimate(method, samples=40, batch_size=size))
            assert result == pytest.approx(whole, abs=1e-10)
            assert max(map(len, seen)) == size
            seen.clear()

    @pytest.mark.parametrize("method", ["monte_carlo", "chain"])
    def test_the_seed_and_nothing_else_decides(self, lm: LanguageModel, method: Any) -> None:
        target = random.Random(1).choices(range(60), k=9)

        def score(seed: int) -> float:
            return loglikelihood(lm, PREFIX, target, Estimate(method, samples=6, seed=seed))

        first = score(0)
        torch.manual_seed(5)
        loglikelihood(lm, TARGET, PREFIX, Estimate())
        assert score(0) == first
        assert len({score(seed) for seed in range(4)}) == 4

    def test_sums_are_wide_where_the_model_is_narrow(self) -> None:
        target = random.Random(2).choices(range(60), k=30)
        exact = loglikelihood(random_llada(sharpness=2.0), PREFIX, target, Estimate(samples=20))
        single = loglikelihood(random_llada(sharpness=2.0, dtype=torch.float32), PREFIX, target, Estimate(samples=20))
        assert single == pytest.approx(exact, rel=1e-5)
        assert single != exact

    @pytest.mark.parametrize("order", ["left_to_right", "confidence"])
    def test_a_target_longer_than_a_chunk_of_logits(self, monkeypatch: pytest.MonkeyPatch, order: Any) -> None:
        lm, estimate = random_dream(), Estimate("chain", order=order, batch_size=100)
        target = random.Random(3).choices(range(60), k=20)
        whole = loglikelihood(lm, PREFIX, target, estimate)
        monkeypatch.setattr("dllm.evaluation.likelihood._CHUNK", 3)
        assert loglikelihood(lm, PREFIX, target, estimate) == pytest.approx(whole, abs=1e-10)

    def test_an_empty_target_is_certain(self, lm: LanguageModel) -> None:
        for estimate in (Estimate(), Estimate("chain"), Estimate("chain", order="confidence")):
            assert loglikelihood(lm, PREFIX, [], estimate) == 0.0
            assert loglikelihood(lm, [], [], estimate) == 0.0


class TestGreedy:
    def generated(self, lm: LanguageModel, prefix: list[int], **options: Any) -> list[int]:
        options = {"gen_length": 8, "block_length": None, "stop_at_eos": False} | options
        return dllm.generate(lm, [prefix], **options).completions[0].tolist()

    @pytest.mark.parametrize("prefix", [PREFIX, []])
    @pytest.mark.parametrize("cfg_scale", [0.0, 1.5])
    def test_what_is_generated_is_greedy_and_nothing_else(
        self, lm: LanguageModel, prefix: list[int], cfg_scale: float
    ) -> None:
        target = self.generated(lm, prefix, cfg_scale=cfg_scale)
        assert is_greedy(lm, prefix, target, cfg_scale)
        for place in range(8):
            other = [token if i != place else (token + 1) % 60 for i, token in enumerate(target)]
            assert not is_greedy(lm, prefix, other, cfg_scale)

    def test_it_stops_at_the_first_token_that_differs(self, lm: LanguageModel, forwards: Any) -> None:
        target = self.generated(lm, PREFIX)
        seen = forwards(lm)
        assert is_greedy(lm, PREFIX, target)
        assert list(map(len, seen)) == [1] * 8
        seen.clear()
        assert not is_greedy(lm, PREFIX, [(token + 1) % 60 for token in target])
        assert list(map(len, seen)) == [1]

    def test_an_empty_target_is_greedy(self, lm: LanguageModel) -> None:
        assert is_greedy(lm, PREFIX, [])
        assert is_greedy(lm, [], [])


def one_digit_changed(rng: random.Random, text: str) -> str:
    places = [i for i, character in enumerate(text) if character.isdigit()]
    place = rng.choice(places)
    return text[:place] + rng.choice([digit for digit in "0123456789" if digit != text[place]]) + text[place + 1 :]


@pytest.mark.parametrize("name", ["tiny-llada", "tiny-dream"])
@pytest.mark.parametrize("method", ["monte_carlo", "chain"])
def test_right_answers_are_likelier_than_answers_with_a_digit_changed(name: str, method: Any) -> None:
    lm, rng, better = dllm.load(name), random.Random(0), 0
    assert lm.tokenizer is not None
    estimate = Estimate(method, samples=32 if method == "monte_carlo" else 2, batch_size=32)
    for problem in problems(20, seed=1_234_567):
        prefix = lm.tokenizer(problem.question).input_ids
        right, wrong = (
            loglikelihood(lm, prefix, lm.tokenizer(text).input_ids, estimate)
            for text in (problem.solution, one_digit_changed(rng, problem.solution))
        )
        better += right > wrong
    assert better >= 19


class TestErrors:
    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"method": "exact"}, "unknown method='exact'; expected one of monte_carlo, chain"),
            ({"order": "sideways"}, "unknown order='sideways'"),
            ({"samples": 0}, "samples=0 is out of range"),
            ({"seed": -1}, "seed=-1 is out of range"),
            ({"batch_size": 0}, "batch_size=0 is out of range"),
            ({"cfg_scale": -1}, "cfg_scale=-1 is out of range"),
            ({"order": "left_to_right"}, "order=left_to_right has no effect on method=monte_carlo"),
            ({"method": "chain", "order": "confidence", "samples": 5}, "samples=5 has no effect on order=confidence"),
            ({"method": "chain", "order": "left_to_right", "seed": 5}, "seed=5 has no effect on order=left_to_right"),
        ],
    )
    def test_options_that_cannot_be_or_do_nothing(self, options: dict[str, Any], words: str) -> None:
        with pytest.raises(ValueError, match=words) as caught:
            Estimate(**options)
        assert "\n" not in str(caught.value)

    def scorers(self) -> Iterator[Callable[..., object]]:
        yield is_greedy
        for estimate in (Estimate(), Estimate("chain"), Estimate("chain", order="confidence")):
            yield lambda lm, prefix, target, estimate=estimate: loglikelihood(lm, prefix, target, estimate)

    @pytest.mark.parametrize(
        ("prefix", "target", "words"),
        [
            (PREFIX, [3, 64], r"target has token id 64; this model's ids are 0 to 63"),
            ([-1], TARGET, r"prefix has token id -1; this model's ids are 0 to 63"),
            (PREFIX, [3, 63], r"target contains \[MASK\] \(id 63\)"),
            ([63], TARGET, r"prefix contains \[MASK\] \(id 63\)"),
            (
                [1] * 17,
                TARGET,
                r"target has 4 tokens; the model's context of 20 leaves room for 3 beside a prefix of 17",
            ),
            ([], [1] * 21, r"target has 21 tokens; the model's context of 20 leaves room for 20"),
            ([1] * 21, [], r"target has 0 tokens; the model's context of 20 leaves room for 0 beside a prefix of 21"),
        ],
    )
    def test_texts_that_the_model_cannot_take(self, prefix: list[int], target: list[int], words: str) -> None:
        lm = random_llada(max_length=20)
        for score in self.scorers():
            with pytest.raises(ValueError, match=words) as caught:
                score(lm, prefix, target)
            assert "\n" not in str(caught.value)


def test_more_states_than_memory_holds_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dllm.evaluation.likelihood._MOST", 4 * len(TARGET) ** 2)
    lm = random_llada()
    loglikelihood(lm, PREFIX, TARGET, Estimate("chain", samples=4))
    with pytest.raises(ValueError, match=r"^samples=5 of method=chain is too many for 4 tokens; use at most 4, or "):
        loglikelihood(lm, PREFIX, TARGET, Estimate("chain", samples=5))


@pytest.mark.parametrize("wrong", ["text", [5.5], [[5]], None, [True], torch.tensor([5.0])], ids=repr)
def test_what_is_no_token_ids_is_refused(wrong: Any) -> None:
    for pair in ((wrong, [5]), ([5], wrong)):
        with pytest.raises(ValueError, match=r"^(prefix|target) is a \w+, not token ids; give a list"):
            loglikelihood(random_llada(), *pair, Estimate(samples=2))


def test_tensors_and_arrays_are_token_ids() -> None:
    lm, one = random_llada(), Estimate(samples=2)
    for make in (torch.tensor, np.array):
        assert loglikelihood(lm, make([5, 6]), make([7]), one) == loglikelihood(lm, [5, 6], [7], one)
        assert is_greedy(lm, make([5, 6]), make([7])) == is_greedy(lm, [5, 6], [7])
