"""S2D2: the tokens of the causal mode, in fewer forwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import dllm
from commands import command
from contract_rig import PROMPTS, Maker
from dllm.decoding.compatibility import unmet
from dllm.resolve import names, resolve
from dllm.samplers import S2D2, Vanilla
from models import random_diffusion_gemma, random_fast_dllm, random_llada2, random_sdar, random_sdar_moe

MAKERS = {"sdar": random_sdar, "sdar_moe": random_sdar_moe, "llada2": random_llada2, "fast_dllm": random_fast_dllm}
families = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
OPTIONS: dict[str, Any] = {"gen_length": 13, "block_length": 1, "stop_at_eos": False}
CACHES = [name for name in names("cache") if not unmet(S2D2(), resolve("cache", name, object))]


@families
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("draft_length", [1, 3, 20])
def test_the_tokens_are_those_of_one_at_a_time(make: Maker, cache: str, draft_length: int) -> None:
    lm = make()
    expected = dllm.generate(lm, PROMPTS, Vanilla(), cache, **OPTIONS)
    found = dllm.generate(lm, PROMPTS, S2D2(draft_length), cache, batch_size=3, **OPTIONS)
    assert torch.equal(found.completions, expected.completions)
    assert (found.nfe <= (1 if draft_length == 1 else 2) * expected.nfe).all()


def test_the_caches_that_keep_their_promise_are_accepted() -> None:
    assert {"none", "block", "prefix", "dual", "freecache"} <= set(CACHES)


@families
def test_a_step_is_a_draft_and_its_verification(make: Maker) -> None:
    """The rule, written out for one row."""
    lm = make()
    mask = lm.backbone.mask_token_id
    row, forwards = [*PROMPTS[2], *[mask] * 9], 0
    while mask in row:
        places = list(range(row.index(mask), min(row.index(mask) + 4, len(row))))
        draft, target = best(lm, row, places, joint=places[0]), []
        for place, token in zip(places, draft, strict=True):
            target += best(lm, row, [place], joint=place)
            row[place] = target[-1]
            if token != target[-1]:
                break
        forwards += 2
    found = dllm.generate(lm, [PROMPTS[2]], S2D2(4), **{**OPTIONS, "gen_length": 9})
    assert found.sequences[0].tolist() == row
    assert int(found.nfe[0]) == forwards


def best(lm: dllm.LanguageModel, row: list[int], places: list[int], joint: int) -> list[int]:
    """The best tokens at some places, where the positions from `joint` on attend to each other and others causally."""
    count = places[-1] + 1
    allowed = torch.ones(count, count).tril().bool()
    allowed[joint:, joint:] = True
    with torch.no_grad():
        logits = lm.backbone(torch.tensor([row[:count]]), attention_mask=allowed[None, None]).logits[0].clone()
    logits[:, lm.backbone.mask_token_id] = -torch.inf
    return [int(logits[max(place - lm.backbone.logits_shift, 0)].argmax()) for place in places]


def test_a_trained_model_needs_fewer_forwards_than_tokens() -> None:
    lm = dllm.load("tiny-block", device="cpu", dtype="float64")
    prompts = [f"Tom has {n} apples. He buys {n - 9}. How many apples does he have?" for n in range(20, 26)]
    expected = dllm.generate(lm, prompts, gen_length=64, block_length=1)
    found = dllm.generate(lm, prompts, "s2d2", "block", gen_length=64, block_length=1)
    assert found.texts == expected.texts
    assert torch.equal(found.completions, expected.completions)  # nothing is written after the end
    assert found.nfe.sum() < 0.6 * expected.nfe.sum()


def test_stop_strings_and_given_text_are_those_of_one_at_a_time() -> None:
    lm = dllm.load("tiny-block", device="cpu", dtype="float64")
    prompt = "Tom has 23 apples. He buys 12. How many apples does he have?"
    options: dict[str, Any] = {"gen_length": 64, "block_length": 1, "stop": " The"}
    assert dllm.generate(lm, prompt, "s2d2", **options).texts == dllm.generate(lm, prompt, **options).texts
    text = f"Tom has {lm.tokenizer.mask_token} apples. He buys 1{lm.tokenizer.mask_token * 3} apples does he have?"
    filled, expected = (dllm.infill(lm, text, sampler, block_length=1) for sampler in ("s2d2", "vanilla"))
    assert torch.equal(filled.sequences, expected.sequences)


def test_above_temperature_0_the_distribution_is_that_of_one_at_a_time() -> None:
    lm = random_sdar()
    options: dict[str, Any] = {**OPTIONS, "gen_length": 2, "temperature": 1.0, "top_k": 3, "seed": 0, "batch_size": 500}
    counts = []
    for sampler in (Vanilla(), S2D2(2)):
        rows = dllm.generate(lm, [PROMPTS[0]] * 1500, sampler, **options).completions
        pairs, number = torch.unique(rows, dim=0, return_counts=True)
        counts.append({tuple(pair): int(n) for pair, n in zip(pairs.tolist(), number, strict=True)})
    seen = counts[0].keys() | counts[1].keys()
    assert len(seen) > 4
    # Two samples of one distribution: chi-square with len(seen) - 1 degrees of freedom, far in its tail.
    chi = sum(
        (counts[0].get(p, 0) - counts[1].get(p, 0)) ** 2 / (counts[0].get(p, 0) + counts[1].get(p, 0)) for p in seen
    )
    assert chi < len(seen) - 1 + 5 * (2 * (len(seen) - 1)) ** 0.5


def test_it_refuses_what_cannot_verify() -> None:
    with pytest.raises(ValueError, match="s2d2 verifies at block length 1, and this is 4; set block_length=1"):
        dllm.generate(random_sdar(), [[1, 2]], S2D2(), gen_length=4)
    for lm in (dllm.load("tiny-llada", device="cpu"), random_diffusion_gemma()):
        with pytest.raises(ValueError, match=r"a policy that verifies one position after the other \(s2d2\)"):
            dllm.generate(lm, [[11, 12]], S2D2(), gen_length=4, block_length=1)
    choice = {"type": "choice", "choice": ["35."]}
    with pytest.raises(ValueError, match="response_format is not compatible with a policy that verifies"):
        dllm.generate(dllm.load("tiny-block", device="cpu"), "1", S2D2(), block_length=1, response_format=choice)
    with pytest.raises(ValueError, match="draft_length=0 is out of range"):
        S2D2(0)
    outcome = command("generate", "sampler=s2d2", "block_length=1")
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert "use ssd or freedave" in outcome.err


@pytest.mark.parametrize("cache", ["block", "prefix", "freecache", "dual"])
@pytest.mark.parametrize("make", [random_fast_dllm, random_sdar, random_llada2])
def test_tokens_that_are_given_between_masks_do_not_see_later_ones(make: Any, cache: str) -> None:
    lm = make(vocab=20)
    mask = lm.backbone.mask_token_id
    text = [[0, 15, 13, mask, mask, mask, 9, 11, 12, mask, mask], [1, 2, mask, 4, mask, mask, 7, mask]]
    expected = dllm.infill(lm, text, "vanilla", "none", seed=0, block_length=1)
    assert torch.equal(dllm.infill(lm, text, "s2d2", cache, seed=0, block_length=1).sequences, expected.sequences)
