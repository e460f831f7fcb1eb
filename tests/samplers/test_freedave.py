"""FreeDave: the result of its base, token for token, in fewer forwards."""

from __future__ import annotations

from collections import Counter
from functools import cache
from typing import Any

import pytest
import torch

import dllm
from dllm.samplers import (
    EB,
    PC,
    ARGuided,
    Certainty,
    EntropyThreshold,
    Factor,
    FreeDave,
    Hierarchical,
    Learn2PD,
    LocalLeap,
    Oracle,
    Threshold,
    Vanilla,
)
from dllm.tasks import word_problems
from models import random_dream, random_filter, random_frequencies, random_llada

BACKBONES = {"llada": random_llada, "dream": random_dream}
BASES = {
    "vanilla": Vanilla(),
    "vanilla-margin": Vanilla(order="margin"),
    "vanilla-2": Vanilla(tokens_per_step=2),
    "vanilla-steps": Vanilla(steps=17),
    "threshold": Threshold(0.4),
    "threshold-paced": Threshold(0.2, steps=15),
    "factor": Factor(2.0),
    "entropy_threshold": EntropyThreshold(1.5),
    "localleap": LocalLeap(0.5, 0.3, 3),
    "eb": EB(2.0),
    "pc": PC(random_frequencies(), steps=15),
    "certainty": Certainty(3.0, 0.2),
    "hierarchical": Hierarchical(0.5, 0.2),
    "learn2pd": Learn2PD(random_filter(), 0.8, allow_mismatch=True),
    "oracle": Oracle(),
}


def prompts(count: int, seed: int) -> list[list[int]]:
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 9, (count,), generator=draw).tolist()
    return [torch.randint(0, 60, (n,), generator=draw).tolist() for n in lengths]


def check_lossless(lm: dllm.LanguageModel, ask: Any, base: Any, sampler: FreeDave, **options: Any) -> Any:
    wanted, found = (dllm.generate(lm, ask, each, **options) for each in (base, sampler))
    assert torch.equal(found.sequences, wanted.sequences)
    assert (found.nfe <= wanted.nfe).all()
    return found, wanted


TWO_HUNDRED: dict[str, Any] = {"gen_length": 20, "block_length": 8, "batch_size": 100, "eos_token_id": [9, 17, 40]}


@cache
def two_hundred(make: Any) -> dllm.Generation:
    """What the base makes of them."""
    return dllm.generate(make(sharpness=8.0), prompts(200, 0), "vanilla", **TWO_HUNDRED)


@pytest.mark.parametrize("make", BACKBONES.values(), ids=BACKBONES)
@pytest.mark.parametrize(
    "sampler",
    [FreeDave(2), FreeDave(4, draft_mode="tree"), FreeDave(8), FreeDave(4, eager=True), FreeDave(1)],
    ids=repr,
)
def test_two_hundred_prompts_on_random_models(make: Any, sampler: FreeDave) -> None:
    wanted, found = two_hundred(make), dllm.generate(make(sharpness=8.0), prompts(200, 0), sampler, **TWO_HUNDRED)
    assert torch.equal(found.sequences, wanted.sequences)
    assert (found.nfe <= wanted.nfe).all()
    if sampler.draft_steps == 1:
        assert torch.equal(found.nfe, wanted.nfe)
    else:
        assert found.nfe.sum() < 0.95 * wanted.nfe.sum()
        assert found.stats.computed_share > 1.1  # what the drafts cost is not hidden


DEPTHS = [FreeDave(2), FreeDave(4), FreeDave(8), FreeDave(4, draft_mode="tree", eager=True)]


@pytest.mark.parametrize("name", ["tiny-llada", "tiny-dream"])
@pytest.mark.parametrize("sampler", DEPTHS, ids=repr)
def test_two_hundred_prompts_over_all_depths_on_trained_models(name: str, sampler: FreeDave) -> None:
    lm, part = dllm.load(name, dtype="float64", device="cpu"), DEPTHS.index(sampler) + 4 * (name == "tiny-dream")
    problems = word_problems.problems(200, 1_500_000)[25 * part : 25 * (part + 1)]
    ask = [problem.question for problem in problems]
    found, wanted = check_lossless(lm, ask, "vanilla", sampler, gen_length=16, block_length=8, batch_size=25)
    assert found.nfe.sum() < 0.7 * wanted.nfe.sum()


@pytest.mark.parametrize("make", BACKBONES.values(), ids=BACKBONES)
@pytest.mark.parametrize("eager", [False, True], ids=["block", "eager"])
@pytest.mark.parametrize("base", BASES.values(), ids=BASES)
def test_any_policy_of_one_forward_is_reproduced(make: Any, base: Any, eager: bool) -> None:
    options = {"gen_length": 21, "block_length": 8, "batch_size": 20, "stop_at_eos": False}
    check_lossless(make(), prompts(20, 1), base, FreeDave(5, base, eager=eager), **options)


@pytest.mark.parametrize("make", BACKBONES.values(), ids=BACKBONES)
def test_eager_needs_no_more_and_sometimes_fewer_forwards(make: Any) -> None:
    options = {"gen_length": 24, "block_length": 4, "batch_size": 40, "stop_at_eos": False}
    plain, eager = (dllm.generate(make(), prompts(40, 2), FreeDave(6, eager=e), **options) for e in (False, True))
    assert torch.equal(plain.sequences, eager.sequences)
    assert eager.nfe.sum() < plain.nfe.sum()


@pytest.mark.parametrize("make", BACKBONES.values(), ids=BACKBONES)
def test_infilled_text_is_that_of_the_base(make: Any) -> None:
    lm = make()
    m = lm.backbone.mask_token_id
    rows = [[m, 5, m, m, 8, 9, *[m] * 7, 3, 3, 3, 3, m, m], [3, m, m, 4], [1, 2, m, 7, *[m] * 12, 9]]
    wanted, found = (dllm.infill(lm, rows, s, block_length=4) for s in ("vanilla", FreeDave(5, eager=True)))
    assert torch.equal(found.sequences, wanted.sequences)
    assert found.nfe.sum() < wanted.nfe.sum()


def test_tree_and_batch_drafts_are_the_same_step_for_step() -> None:
    options = {"gen_length": 24, "block_length": 8, "batch_size": 30}
    lm = random_llada()
    batch, tree = (dllm.generate(lm, prompts(30, 3), FreeDave(4, draft_mode=m), **options) for m in ("batch", "tree"))
    assert torch.equal(batch.sequences, tree.sequences)
    assert torch.equal(batch.commit_step, tree.commit_step)


def test_a_tree_is_one_sequence_a_row() -> None:
    lm, widths = random_llada(), []
    lm.backbone.register_forward_pre_hook(lambda _, args: widths.append(tuple(args[0].shape)))
    dllm.generate(lm, [[1, 2], [3, 4]], FreeDave(3, draft_mode="tree"), gen_length=8, stop_at_eos=False)
    # At first there is nothing to draft from.
    assert widths[:2] == [(2, 10), (2, 30)]


@pytest.mark.parametrize(
    "base",
    ["freedave", ARGuided(), Learn2PD(eotp="safe"), object(), "nothing"],
    ids=["freedave", "ar", "cut", "no", "?"],
)
def test_a_base_that_cannot_be_drafted_is_refused(base: Any) -> None:
    with pytest.raises(ValueError, match="base="):
        FreeDave(base=base)


@pytest.mark.parametrize(("name", "value"), [("draft_steps", 0), ("draft_mode", "rows"), ("eager", 2)])
def test_values_out_of_range_are_named(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"{name}=.*(use|expected) "):
        FreeDave(**{name: value})


@torch.inference_mode()
def spelt_out(lm: dllm.LanguageModel, prompt: list[int], depth: int, generated: int) -> tuple[list[int], int]:
    """FreeDave over one token per step in one block, confidences by a softmax in float64; tokens and forwards."""
    mask = lm.backbone.mask_token_id

    def predict(canvases: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        probabilities = lm.backbone(canvases).logits.double().softmax(-1)
        probabilities[..., mask] = 0
        best = probabilities.max(-1)
        return best.values.masked_fill(canvases != mask, -1), best.indices

    def filled(canvas: torch.Tensor, surest: torch.Tensor, tokens: torch.Tensor, count: int) -> torch.Tensor:
        places = surest.sort(descending=True, stable=True).indices[: min(count, int((canvas == mask).sum()))]
        return canvas.scatter(0, places, tokens[places])

    canvas = torch.tensor([*prompt, *[mask] * generated])
    (surest, tokens), forwards = (part[0] for part in predict(canvas[None])), 1
    while int((canvas == mask).sum()) > 1:
        drafts = torch.stack([filled(canvas, surest, tokens, 1 + k) for k in range(depth)])
        judged, at = predict(drafts), 0
        forwards += 1
        while at + 1 < depth and (drafts[at + 1] != drafts[at]).any():
            if not torch.equal(filled(drafts[at], judged[0][at], judged[1][at], 1), drafts[at + 1]):
                break
            at += 1
        canvas, surest, tokens = drafts[at], judged[0][at], judged[1][at]
    return filled(canvas, surest, tokens, 1)[len(prompt) :].tolist(), forwards


@pytest.mark.parametrize("depth", [2, 8])
def test_a_trained_model_takes_the_forwards_of_the_published_rule(depth: int) -> None:
    # Its probabilities are 1 in float32 nearly everywhere: the order that drafts are made in must not be lost there.
    lm = dllm.load("tiny-llada", device="cpu")
    for problem in word_problems.problems(6, 1_600_000):
        prompt = lm.tokenizer(problem.question).input_ids  # type: ignore[misc]
        result = dllm.generate(lm, [prompt], FreeDave(depth), gen_length=24, block_length=24, stop_at_eos=False)
        assert (result.completions[0].tolist(), int(result.nfe[0])) == spelt_out(lm, prompt, depth, 24)


def test_a_row_that_another_left_begins_anew() -> None:
    lm = random_llada()
    engine = dllm.Engine(lm, FreeDave(base="threshold"), batch_size=2, max_length=32)
    engine.add([5, 6, 7], gen_length=24)
    left = engine.add([8, 9], gen_length=12)
    for stop in (False, True, False):
        for _ in range(2):
            engine.step()
        if not stop:
            engine.abort(left)
    late = engine.add([4, 10], gen_length=8)
    answers = {number: answer for step in engine.steps() for number, answer in step.answers.items()}
    alone = dllm.generate(lm, [[4, 10]], FreeDave(base="threshold"), gen_length=8)
    assert answers[late].completion == alone.completions[0].tolist()


@pytest.mark.parametrize("base", [Vanilla(order="random"), Vanilla(alg_temp=0.3)], ids=["random", "drawn"])
def test_an_order_that_is_drawn_has_the_distribution_of_the_base(base: Vanilla) -> None:
    lm, rows = random_llada(dtype=torch.float32, sharpness=3.0), 600
    counts, nfe = [], []
    for sampler in (base, FreeDave(4, base)):
        result = dllm.generate(
            lm, [[5, 9, 3]] * rows, sampler, gen_length=4, block_length=4, batch_size=100, stop_at_eos=False, seed=0
        )
        counts.append(Counter(map(tuple, result.completions.tolist())))
        nfe.append(float(result.nfe.double().mean()))
    found = counts[0] | counts[1]
    assert len(found) > 3
    # Two samples of one distribution: of as many degrees of freedom as outcomes, less one.
    square = sum((counts[0][each] - counts[1][each]) ** 2 / (counts[0][each] + counts[1][each]) for each in found)
    chance = torch.special.gammaincc(torch.tensor((len(found) - 1) / 2), torch.tensor(square / 2))
    assert chance > 0.01
    assert nfe[1] < nfe[0]
