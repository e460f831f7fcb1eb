"""Log-likelihoods of models whose attention is causal over blocks: block after block, each after clean earlier ones."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import combinations, permutations
from typing import Any

import pytest
import torch
from torch import Tensor

import dllm
from dllm import LanguageModel
from dllm.cache import NoCache
from dllm.evaluation.journal import Journal
from dllm.evaluation.likelihood import (
    Asked,
    Estimate,
    along_orders,
    block_sizes,
    is_greedy,
    loglikelihood,
    stratified_masks,
)  # fmt: skip
from dllm.evaluation.runner import Runner, Setting
from dllm.models.attention import BlockCausal
from dllm.samplers import Vanilla
from dllm.tasks.tokenizer import build_tokenizer
from models import random_fast_dllm, random_llada, random_llada2, random_sdar, random_sdar_moe

K = 4
MAKERS = {
    "sdar": lambda: random_sdar(sharpness=2.0),
    "sdar-moe": lambda: random_sdar_moe(sharpness=2.0),
    "llada2": lambda: random_llada2(sharpness=2.0),
    "fast-dllm": lambda: random_fast_dllm(sharpness=2.0),
}
# A target that starts a block, shares the first one with the prefix, has no prefix, and lies in a single block.
TEXTS = [
    ([5, 9, 2, 31], [7, 7, 40, 12, 3, 50, 21]),
    ([5, 9, 2, 31, 8, 8], [7, 7, 40, 12, 3, 50, 21]),
    ([], [7, 7, 40, 12, 3, 50]),
    ([5], [7, 40, 12]),
]
PREFIX, TARGET = TEXTS[1]


@pytest.fixture(params=MAKERS)
def lm(request: pytest.FixtureRequest) -> LanguageModel:
    return MAKERS[request.param]()


def blocks(prefix: Sequence[int], target: Sequence[int], length: int = K) -> Iterator[list[int]]:
    """The places of the target in each block, block after block."""
    by_block: dict[int, list[int]] = {}
    for place in range(len(target)):
        by_block.setdefault((len(prefix) + place) // length, []).append(place)
    yield from by_block.values()


def reference(
    lm: LanguageModel,
    prefix: Sequence[int],
    target: Sequence[int],
    masked: Sequence[int],
    end: int,
    cfg_scale: float = 0.0,
    length: int = K,
) -> Tensor:
    """(end, V) log-probabilities at the target up to its block's end, with places of that block masked."""
    mask, shift = lm.backbone.mask_token_id, lm.backbone.logits_shift
    seen = [mask if i in masked else token for i, token in enumerate(target[:end])]
    at = torch.arange(len(prefix) + end)
    pattern = (at[None] // length <= at[:, None] // length)[None, None]

    def logits(given: Sequence[int]) -> Tensor:
        found: Tensor = lm.backbone(torch.tensor([[*given, *seen]]), attention_mask=pattern).logits[0]
        return torch.cat((found[:1], found[:-1])) if shift else found

    with torch.no_grad():
        guided = logits(prefix)
        if cfg_scale:
            blind = logits([mask] * len(prefix))
            guided = blind + (cfg_scale + 1) * (guided - blind)
    return guided[len(prefix) :].log_softmax(-1)


def along(
    lm: LanguageModel, prefix: Sequence[int], target: Sequence[int], order: Sequence[int], **options: Any
) -> float:
    """The chain rule along an order of one block's places."""
    end = max(order) + 1
    return sum(
        float(reference(lm, prefix, target, order[j:], end, **options)[place, target[place]])
        for j, place in enumerate(order)
    )


def bound(lm: LanguageModel, prefix: Sequence[int], target: Sequence[int], **options: Any) -> float:
    """The sum over blocks of the mean over all numbers of masks and all masks of L / l sum of log-probabilities."""
    total = 0.0
    for places in blocks(prefix, target, options.get("length", K)):
        size, end = len(places), places[-1] + 1
        for count in range(1, size + 1):
            for masked in combinations(places, count):
                found = reference(lm, prefix, target, masked, end, **options)
                answers = sum(float(found[place, target[place]]) for place in masked)
                total += answers / count / math.comb(size, count)
    return total


def over_all_orders(lm: LanguageModel, prefix: Sequence[int], target: Sequence[int]) -> list[list[float]]:
    return [[along(lm, prefix, target, order) for order in permutations(p)] for p in blocks(prefix, target)]


def every_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the random draws of each block by all of them: every permutation with every first number of masks."""

    def asked(estimate: Estimate, length: int, generator: torch.Generator) -> Any:
        orders = torch.tensor(list(permutations(range(length))))
        if estimate.method == "chain":
            return along_orders(orders)
        drawn = [stratified_masks(rank[None], first) for rank in orders for first in range(1, length + 1)]
        return Asked(
            torch.cat([one.masked for one in drawn]),
            torch.cat([one.state + number for number, one in enumerate(drawn)]),
            torch.cat([one.place for one in drawn]),
            torch.cat([one.weight for one in drawn]) / len(drawn),
        )

    monkeypatch.setattr("dllm.evaluation.likelihood._asked", asked)


@pytest.mark.parametrize(("prefix", "target"), TEXTS)
@pytest.mark.parametrize("method", ["monte_carlo", "chain"])
def test_its_expectation_is_the_sum_of_the_bounds_of_blocks(
    lm: LanguageModel, prefix: list[int], target: list[int], method: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    every_draw(monkeypatch)
    result = loglikelihood(lm, prefix, target, Estimate(method))
    assert result == pytest.approx(bound(lm, prefix, target), abs=1e-9)


@pytest.mark.parametrize(("prefix", "target"), TEXTS)
@pytest.mark.parametrize("cfg_scale", [0.0, 1.5])
def test_left_to_right_is_the_chain_rule_block_after_block(
    lm: LanguageModel, prefix: list[int], target: list[int], cfg_scale: float
) -> None:
    exact = sum(along(lm, prefix, target, places, cfg_scale=cfg_scale) for places in blocks(prefix, target))
    result = loglikelihood(lm, prefix, target, Estimate("chain", order="left_to_right", cfg_scale=cfg_scale))
    assert result == pytest.approx(exact, abs=1e-9)


@pytest.mark.parametrize("cfg_scale", [0.0, 1.5])
def test_confidence_is_compared_within_a_block(lm: LanguageModel, cfg_scale: float) -> None:
    exact = 0.0
    for places in blocks(PREFIX, TARGET):
        left, order = [*places], []
        while left:
            found = reference(lm, PREFIX, TARGET, left, places[-1] + 1, cfg_scale)
            found[:, lm.backbone.mask_token_id] = -math.inf
            order.append(max(left, key=lambda place: float(found[place].max())))
            left.remove(order[-1])
        exact += along(lm, PREFIX, TARGET, order, cfg_scale=cfg_scale)
    result = loglikelihood(lm, PREFIX, TARGET, Estimate("chain", order="confidence", cfg_scale=cfg_scale))
    assert result == pytest.approx(exact, abs=1e-9)


def test_samples_are_a_lower_bound_of_the_mean_over_orders(lm: LanguageModel) -> None:
    orders = [torch.tensor(block, dtype=torch.float64) for block in over_all_orders(lm, PREFIX, TARGET)]
    exact = sum(float(block.logsumexp(0)) - math.log(len(block)) for block in orders)
    for method in ("monte_carlo", "chain"):
        result = loglikelihood(lm, PREFIX, TARGET, Estimate(method, samples=20_000))
        assert result == pytest.approx(sum(float(block.mean()) for block in orders), abs=0.1)
        assert result < exact


@pytest.mark.parametrize("method", ["monte_carlo", "chain"])
def test_batches_do_not_change_the_result_and_blocks_share_forwards(
    lm: LanguageModel, method: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = random.Random(0).choices(range(60), k=19)
    whole = loglikelihood(lm, PREFIX, target, Estimate(method, samples=100, batch_size=1000))
    rows, inner = [], lm.backbone.forward

    def forward(input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        rows.append(len(input_ids))
        return inner(input_ids, *args, **kwargs)

    monkeypatch.setattr(lm.backbone, "forward", forward)
    assert loglikelihood(lm, PREFIX, target, Estimate(method, samples=100, batch_size=1)) == pytest.approx(whole)
    assert sum(rows) == 2**K - 1  # all states of one block


@pytest.mark.parametrize("method", ["monte_carlo", "chain"])
def test_blocks_of_one_token_are_scored_exactly(lm: LanguageModel, method: Any) -> None:
    single = loglikelihood(lm, PREFIX, TARGET, Estimate(method, samples=3, block_length=1))
    exact = sum(along(lm, PREFIX, TARGET, [place], length=1) for place in range(len(TARGET)))
    assert single == pytest.approx(exact, abs=1e-9)


@pytest.mark.parametrize("length", [2, 3])
def test_blocks_of_another_length(lm: LanguageModel, length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    every_draw(monkeypatch)
    result = loglikelihood(lm, PREFIX, TARGET, Estimate(block_length=length))
    assert result == pytest.approx(bound(lm, PREFIX, TARGET, length=length), abs=1e-9)
    assert result != pytest.approx(loglikelihood(lm, PREFIX, TARGET, Estimate()), abs=1e-3)


@pytest.mark.parametrize("length", [None, 2, 3])
def test_the_greedy_answer_is_that_of_the_blocks(lm: LanguageModel, length: int | None) -> None:
    options = {"gen_length": 8, "block_length": length or K, "stop_at_eos": False}
    target = dllm.generate(lm, [PREFIX], **options).completions[0].tolist()
    assert is_greedy(lm, PREFIX, target, block_length=length)
    assert not is_greedy(lm, PREFIX, [*target[:-1], (target[-1] + 1) % 60], block_length=length)


@pytest.mark.parametrize("before", range(9))
@pytest.mark.parametrize("length", [1, 3, 4, 9])
def test_sizes_of_blocks_are_counted_from_the_first_token_of_the_prefix(before: int, length: int) -> None:
    assert block_sizes(BlockCausal(K), before, length) == [len(p) for p in blocks([0] * before, [0] * length)]
    assert block_sizes(None, before, length) == [length]


def test_full_attention_takes_no_blocks() -> None:
    for score in (
        lambda lm: loglikelihood(lm, PREFIX, TARGET, Estimate(block_length=4)),
        lambda lm: is_greedy(lm, PREFIX, TARGET, block_length=4),
    ):
        with pytest.raises(ValueError, match=r"^block_length=4 has no effect on a bidirectional model; leave it out$"):
            score(random_llada())
    with pytest.raises(ValueError, match=r"^block_length=0 is out of range; use a whole number of at least 1"):
        Estimate(block_length=0)


@pytest.mark.parametrize("options", [{}, {"block_length": "auto"}, {"block_length": 2}])
def test_a_run_scores_in_the_blocks_that_it_decodes(options: dict[str, Any]) -> None:
    length = 2 if options.get("block_length") == 2 else None
    lm, estimate = random_sdar(sharpness=2.0), Estimate(samples=5)
    runner = Runner(Setting(lm, Vanilla(), NoCache(), options, estimate), Journal(None))
    target = dllm.generate(lm, [PREFIX], gen_length=6, stop_at_eos=False, **options).completions[0].tolist()
    value = loglikelihood(lm, PREFIX, target, replace(estimate, block_length=length))
    assert runner.score("one", PREFIX, target, greedy=True) == (value, True)


def test_full_attention_is_scored_as_a_whole_whatever_blocks_are_decoded() -> None:
    lm, estimate = random_llada(sharpness=2.0), Estimate(samples=5)
    runner = Runner(Setting(lm, Vanilla(), NoCache(), {"block_length": 2}, estimate), Journal(None))
    value = loglikelihood(lm, PREFIX, TARGET, estimate)
    assert runner.score("one", PREFIX, TARGET, greedy=False) == (value, False)


def test_lm_eval_scores_requests_block_by_block() -> None:
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance

    from dllm.evaluation.lm_eval import DLLM

    words = build_tokenizer()
    lm = replace(random_sdar(vocab=len(words), sharpness=2.0), tokenizer=words)
    lm.backbone.config.mask_token_id, lm.backbone.config.eos_token_id = words.mask_token_id, words.eos_token_id
    model = DLLM(Runner(Setting(lm, Vanilla(), NoCache(), {}, Estimate(samples=4)), Journal(None)))
    question, answer = "Tom has 3 apples.", " He has 3 apples left."
    prefix, target = model._encode_pair(question, answer)
    request = Instance("loglikelihood", {}, (question, answer), 0, metadata=("toy", 0, 1))
    ((value, _),) = model.loglikelihood([request])
    assert value == loglikelihood(lm, prefix, target, Estimate(samples=4))
    chain = replace(model.runner.setting, estimate=Estimate("chain", order="left_to_right"))
    ((value, _),) = DLLM(Runner(chain, Journal(None))).loglikelihood([request])
    exact = sum(along(lm, prefix, target, places) for places in blocks(prefix, target))
    assert value == pytest.approx(exact, abs=1e-9)
