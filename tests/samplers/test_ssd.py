"""SSD: stepwise decoding, token for token, in fewer forwards."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import dllm
from contract_rig import PROMPTS, backbones, more_backbones
from dllm.decoding.compatibility import unmet
from dllm.resolve import names, resolve
from dllm.samplers import EB, SSD, ARGuided, Factor, FreeDave, Learn2PD, LocalLeap, Oracle, Threshold, Vanilla
from dllm.tasks import word_problems
from models import random_dream, random_llada
from sampler_rig import best_at, logits_at

OPTIONS: dict[str, Any] = {"gen_length": 22, "block_length": 8, "stop_at_eos": False}
CACHES = {name: resolve("cache", name, object) for name in names("cache")}
CACHES |= {"freecache-last": dllm.cache.FreeCache(freeze="last_forward")}
CACHES |= {"dual-bounded": replace(dllm.cache.Dual(), measure_every=2, refresh_above=0.05)}
REUSABLE = {name: cache for name, cache in CACHES.items() if not unmet(SSD(), cache)}
REFUSED = {name: cache for name, cache in CACHES.items() if unmet(SSD(), cache)}
BASES = [
    Vanilla(order="margin"), Vanilla(tokens_per_step=2), Vanilla(steps=17), Threshold(0.4), Threshold(0.2, steps=15),
    Factor(2.0), EB(2.0), LocalLeap(0.5, 0.3, 3), Oracle(),
]  # fmt: skip


def by_hand(lm: dllm.LanguageModel, prompt: list[int], draft_length: int) -> tuple[list[int], int, int]:
    """The row that one prompt becomes, its forwards, and the tokens that drafts gave it."""
    mask, row = lm.backbone.mask_token_id, [*prompt, *[lm.backbone.mask_token_id] * 22]
    forwards, given = 0, 0
    for low in range(len(prompt), len(row), 8):
        block = range(low, min(low + 8, len(row)))
        order: list[tuple[float, int, int]] = []
        while any(row[k] == mask for k in block):
            chain = [row]
            for _, place, token in order[:draft_length]:
                chain.append([*chain[-1][:place], token, *chain[-1][place + 1 :]])
            forwards += 1
            for depth, canvas in enumerate(chain):
                best, sure = best_at(lm, logits_at(lm, canvas))
                left = [k for k in block if canvas[k] == mask]
                ranked = sorted((-float(sure[k]), k, int(best[k])) for k in left)
                if not left:  # its last draft completed the block
                    row = canvas
                    break
                _, place, token = ranked[0]
                row = [*canvas[:place], token, *canvas[place + 1 :]]
                order = ranked[1:]
                if depth + 1 == len(chain) or row != chain[depth + 1]:
                    break
                given += 1
    return row, forwards, given


@backbones
@pytest.mark.parametrize("draft_length", [1, 3, 50])
def test_rows_are_decoded_as_by_hand(make: Any, draft_length: int) -> None:
    lm, given = make(), 0
    found = dllm.generate(lm, PROMPTS[:4], SSD(draft_length), **OPTIONS)
    for row, prompt in enumerate(PROMPTS[:4]):
        tokens, forwards, drafted = by_hand(lm, prompt, draft_length)
        assert found.sequences[row, -len(tokens) :].tolist() == tokens
        assert int(found.nfe[row]) == forwards
        given += drafted
    assert given > 0


@backbones
@pytest.mark.parametrize("draft_length", [1, 2, 3, 4, 2**62])
def test_the_tokens_are_those_of_stepwise_decoding_in_fewer_forwards(make: Any, draft_length: int) -> None:
    lm, options = make(sharpness=8.0), OPTIONS | {"stop_at_eos": True, "eos_token_id": [9, 17, 40], "batch_size": 5}
    plain, found = (dllm.generate(lm, PROMPTS, each, **options) for each in ("vanilla", SSD(draft_length)))
    assert torch.equal(plain.sequences, found.sequences)
    assert (found.nfe <= plain.nfe).all()
    assert found.nfe.sum() < plain.nfe.sum()
    assert found.stats.computed_share > 1.1  # every canvas of a forward is counted


@backbones
@pytest.mark.parametrize("cache", REUSABLE.values(), ids=REUSABLE)
def test_with_a_cache_they_are_those_of_stepwise_decoding_with_it(make: Any, cache: Any) -> None:
    lm = make()
    for base in (Vanilla(), Threshold(0.3)):
        plain, found = (dllm.generate(lm, PROMPTS, each, cache, **OPTIONS) for each in (base, SSD(3, base)))
        assert torch.equal(plain.sequences, found.sequences)
        assert (found.nfe <= plain.nfe).all()


@pytest.mark.parametrize("cache", REFUSED.values(), ids=REFUSED)
def test_a_cache_that_would_make_it_lossy_is_refused(cache: Any) -> None:
    with pytest.raises(ValueError, match=r"is not compatible with lossless drafting \(freedave, ssd, s2d2\)"):
        dllm.generate(random_llada(), PROMPTS, SSD(), cache, **OPTIONS)
    assert set(REUSABLE) == {"none", "block", "prefix", "dual", "freecache"}


@backbones
@pytest.mark.parametrize("base", BASES, ids=repr)
def test_any_policy_of_one_forward_is_reproduced(make: Any, base: Any) -> None:
    lm = make()
    plain, found = (dllm.generate(lm, PROMPTS, each, **OPTIONS) for each in (base, SSD(4, base)))
    assert torch.equal(plain.sequences, found.sequences)
    assert (found.nfe <= plain.nfe).all()


@more_backbones
def test_further_families_are_decoded_losslessly(make: Any) -> None:
    lm, cache = make(), "block" if make().backbone.pattern_of(8) is not None else "none"
    plain, found = (
        dllm.generate(lm, PROMPTS[:4], each, cache, gen_length=16, stop_at_eos=False) for each in ("vanilla", "ssd")
    )
    assert torch.equal(plain.sequences, found.sequences)
    assert (found.nfe <= plain.nfe).all()


@backbones
def test_over_one_token_per_step_it_takes_the_forwards_of_freedave(make: Any) -> None:
    lm = make()
    ssd, freedave = (dllm.generate(lm, PROMPTS, each, **OPTIONS) for each in (SSD(3), FreeDave(4)))
    assert torch.equal(ssd.commit_step, freedave.commit_step)
    assert ssd.stats.computed_columns == freedave.stats.computed_columns


@backbones
def test_infilled_text_is_that_of_stepwise_decoding(make: Any) -> None:
    lm = make()
    m = lm.backbone.mask_token_id
    rows = [[m, 5, m, m, 8, 9, *[m] * 7, 3, 3, 3, 3, m, m], [3, m, m, 4], [1, 2, m, 7, *[m] * 12, 9]]
    plain, found = (dllm.infill(lm, rows, each, block_length=8) for each in ("vanilla", SSD(4)))
    assert torch.equal(plain.sequences, found.sequences)
    assert found.nfe.sum() < plain.nfe.sum()


@pytest.mark.parametrize("name", ["tiny-llada", "tiny-dream"])
def test_on_trained_models_it_takes_two_thirds_of_the_forwards_at_most(name: str) -> None:
    lm = dllm.load(name, dtype="float64", device="cpu")
    ask = [problem.question for problem in word_problems.problems(10, 1_500_000)]
    plain, found = (
        dllm.generate(lm, ask, each, gen_length=16, block_length=8, batch_size=10) for each in ("vanilla", "ssd")
    )
    assert torch.equal(plain.sequences, found.sequences)
    assert found.nfe.sum() < 0.67 * plain.nfe.sum()


def test_what_is_drafted_is_the_most_confident_next() -> None:
    seen: list[dllm.Step] = []
    lm = random_dream()
    dllm.generate(lm, PROMPTS[:1], SSD(2), callback=seen.append, **OPTIONS)
    counts = [int((step.drafted != lm.backbone.mask_token_id).sum()) for step in seen]
    assert counts[0] == 0  # nothing was predicted yet
    assert max(counts) == 2


@pytest.mark.parametrize("base", ["ssd", "freedave", ARGuided(), Learn2PD(eotp="safe"), 3, "nothing"], ids=repr)
def test_a_base_that_cannot_be_drafted_is_refused(base: Any) -> None:
    with pytest.raises(ValueError, match="base="):
        SSD(base=base)


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "3", None])
def test_a_draft_length_out_of_range_is_named(value: Any) -> None:
    with pytest.raises(ValueError, match=r"draft_length=.*use a whole number of at least 1"):
        SSD(value)
