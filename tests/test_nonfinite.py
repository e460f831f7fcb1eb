"""Logits that are no numbers: never an answer, and nobody else's business."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import dllm
from commands import command
from contract_rig import BY_NAME, GUIDED, LEARNED, Maker, backbones
from dllm.cache import D2Cache, DKVCache, DLLMCache, Dual, FreeCache, NoCache, Prefix
from dllm.decoding.compatibility import unmet
from dllm.evaluation.likelihood import Estimate, is_greedy, loglikelihood
from dllm.evaluation.word_problems import evaluate
from dllm.filters.training import collect
from dllm.resolve import names
from dllm.samplers import FreeDave, Threshold, Vanilla
from dllm.tasks.word_problems import problems
from models import random_guide, random_llada, save_folder

FLOAT16 = r"logits that are NaN or infinite in float16; use dtype=bfloat16 or dtype=float32"
BAD = 40  # the token that makes a prompt unreadable
# The unreadable one is longer than what comes into its slot, so that its keys and values lie in the other's padding.
PROMPTS = [[5, 9, 3], [1, 2, BAD, 4, 5, 6, 7, 8, 9], [7], [11, 12], [8, 8, 8]]
GOOD = [0, 2, 3, 4]
SAMPLERS: dict[str, Any] = {
    **BY_NAME,
    "threshold-0.3": Threshold(0.3),
    "learn2pd-published": replace(LEARNED, eotp="published"),
    "freedave-tree": FreeDave(3, draft_mode="tree"),
    "freedave-threshold": FreeDave(4, Threshold(0.3), eager=True),
}
OPTIONS: dict[str, Any] = {"gen_length": 10, "block_length": 4, "seed": [3, 4, 5, 6, 7], "stop_at_eos": False}


def overflowing(make: Maker = random_llada, **options: Any) -> dllm.LanguageModel:
    """A model whose feed-forward parts overflow in float16."""
    lm = make(dtype=torch.float16, **options)
    with torch.no_grad():
        for block in lm.backbone.blocks:
            block.parts.feed_forward.up.weight.mul_(2000)
            block.parts.feed_forward.down.weight.mul_(2000)
    return lm


def spoilt(make: Maker = random_llada, token: int = BAD, value: float = math.nan, **options: Any) -> dllm.LanguageModel:
    """A model that has no numbers for texts with a token, which it does not write by itself."""
    lm = make(**options)
    head = lm.backbone.get_output_embeddings()
    head.bias = torch.nn.Parameter(torch.zeros_like(head.weight[:, 0]))
    with torch.no_grad():
        lm.backbone.get_input_embeddings().weight[token] = value
        head.bias[token] = -1e4
    return lm


@backbones
@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
def test_weights_that_overflow_are_refused_by_every_sampler(make: Maker, sampler: Any) -> None:
    lm = overflowing(make)
    for options in ({}, {"temperature": 0.7, "top_p": 0.9, "top_k": 5, "eos_suppression": "both"}):
        with pytest.raises(ValueError, match=rf"^prompts\[0\] has no answer: the model gives {FLOAT16}"):
            dllm.generate(lm, [[5, 6]], sampler, gen_length=8, **options)


@pytest.mark.parametrize("cache", names("cache"))
def test_weights_that_overflow_are_refused_with_every_cache(cache: str) -> None:
    with pytest.raises(ValueError, match=FLOAT16):
        dllm.generate(overflowing(), [[5, 6], [7]], "threshold", cache, gen_length=8)


def test_every_way_to_decode_refuses_or_tells() -> None:
    lm = overflowing()
    mask = lm.backbone.mask_token_id
    with pytest.raises(ValueError, match=FLOAT16):
        dllm.infill(lm, [[5, mask, 6]])
    with pytest.raises(ValueError, match=FLOAT16):
        dllm.generate(lm, [[5]], cfg_scale=1.0, gen_length=4)
    frames = dllm.stream(lm, [[5]], gen_length=4)
    assert next(frames).errors[0] is not None
    with pytest.raises(ValueError, match=FLOAT16):
        next(frames)
    answers = list(dllm.as_completed(lm, [[5], [6]], gen_length=4))
    assert [answer.index for answer in answers] == [0, 1]
    for answer in answers:
        assert answer.error is not None and "float16" in answer.error
        assert (answer.text, answer.tokens, answer.nfe) == (None, 0, 1)
        assert answer.completion == [mask] * 4


@pytest.mark.parametrize(
    ("dtype", "fix"), [(torch.bfloat16, "use dtype=float32"), (torch.float32, "use other weights")]
)
def test_the_fix_suits_the_dtype(dtype: torch.dtype, fix: str) -> None:
    with pytest.raises(ValueError, match=fix):
        dllm.generate(spoilt(dtype=dtype), [[BAD]], gen_length=4)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_one_number_that_is_none_is_enough(value: float) -> None:
    lm = random_llada()
    with torch.no_grad():
        lm.backbone.get_output_embeddings().weight[3] = value
    with pytest.raises(ValueError, match="NaN or infinite"):
        dllm.generate(lm, [[5]], gen_length=4)


def limited(*tokens: int) -> dllm.LanguageModel:
    """A model that can write some tokens alone."""
    lm = random_llada()
    head = lm.backbone.get_output_embeddings()
    head.bias = torch.nn.Parameter(torch.full_like(head.weight[:, 0], -math.inf))
    with torch.no_grad():
        head.bias[list(tokens)] = 0
    return lm


@pytest.mark.parametrize(("token", "suppression"), [(63, None), (62, "logits"), (62, "both")])
def test_where_no_token_is_left_to_predict_there_is_no_answer(token: int, suppression: str | None) -> None:
    for temperature in (0.0, 1.0):
        with pytest.raises(ValueError, match="NaN or infinite"):
            dllm.generate(limited(token), [[5]], gen_length=4, temperature=temperature, eos_suppression=suppression)


def test_tokens_that_a_model_cannot_write_are_no_fault_of_the_others() -> None:
    result = dllm.generate(limited(4, 7, 9), [[5], [6, 8]], "threshold", Dual(measure_every=1), gen_length=8)
    assert set(result.completions.unique().tolist()) <= {4, 7, 9}
    assert result.errors == (None, None)
    assert result.stats.drift is not None and math.isfinite(result.stats.drift.kl)


def check_mates(lm: dllm.LanguageModel, sampler: Any, cache: Any, **options: Any) -> None:
    """The bad row fails and tells; the others are what they are without it."""
    options = OPTIONS | options
    mixed = dllm.generate(lm, PROMPTS, sampler, cache, batch_size=2, **options)
    seeds = [options["seed"][i] for i in GOOD]
    clean = dllm.generate(lm, [PROMPTS[i] for i in GOOD], sampler, cache, **options | {"seed": seeds})
    assert [error is None for error in mixed.errors] == [i in GOOD for i in range(len(PROMPTS))]
    assert torch.equal(mixed.completions[GOOD], clean.completions)
    assert torch.equal(mixed.commit_step[GOOD], clean.commit_step)
    assert (mixed.completions[1] == lm.backbone.mask_token_id).any()
    assert mixed.texts[1] is None
    assert mixed.stats.tokens == clean.stats.tokens


@backbones
@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
def test_a_row_that_fails_leaves_its_mates_alone(make: Maker, sampler: Any) -> None:
    lm = spoilt(make)
    for cache in (NoCache(), Dual()):
        if not unmet(sampler, cache):
            check_mates(lm, sampler, cache)


@backbones
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(
    "cache",
    [Prefix(), Dual(), FreeCache(), FreeCache(granularity="token", window=2), DKVCache(), DLLMCache(3, 2), D2Cache(4)],
    ids=repr,
)
def test_what_a_row_that_failed_leaves_in_a_cache_reaches_nobody(make: Maker, cache: Any, value: float) -> None:
    lm = spoilt(make, value=value)
    check_mates(lm, "threshold", cache)
    check_mates(lm, Vanilla(tokens_per_step=3), replace(cache, measure_every=2))


@backbones
def test_a_guided_or_drawn_row_that_fails_leaves_its_mates_alone(make: Maker) -> None:
    lm = spoilt(make)
    check_mates(lm, "threshold", "none", cfg_scale=1.0)
    check_mates(lm, "threshold", "dual", temperature=0.8, top_k=9, eos_suppression="confidence")


@backbones
@pytest.mark.parametrize("sampler", ["vanilla", "oracle", "freedave", FreeDave(3, "oracle")], ids=repr)
def test_a_row_may_fail_on_its_way(make: Maker, sampler: Any) -> None:
    lm, prompts = make(), [[5, 9, 3], [7], [1, 2]]
    clean = dllm.generate(lm, prompts, "vanilla", **OPTIONS | {"seed": 0})
    written = int(clean.completions[0][clean.commit_step[0] == 0])
    with torch.no_grad():
        lm.backbone.get_input_embeddings().weight[written] = math.nan
    rows = dllm.as_completed(lm, prompts, sampler, batch_size=2, **OPTIONS | {"seed": 0})
    answers = {each.index: each for each in rows}
    assert sorted(answers) == [0, 1, 2]
    assert answers[0].error is not None and answers[0].nfe <= 2
    for answer in answers.values():
        failed = answer.error is not None
        assert (lm.backbone.mask_token_id in answer.completion) == failed
        assert (answer.tokens == 0) == failed


def test_a_result_with_a_row_that_failed_goes_on_like_any_other() -> None:
    lm = spoilt()
    first = dllm.generate(lm, PROMPTS, **OPTIONS)
    assert first.attention_mask.sum(1).tolist() == [len(p) + (BAD not in p) * 10 for p in PROMPTS]
    again = dllm.generate(lm, first.sequences, attention_mask=first.attention_mask, **OPTIONS)
    assert [error is not None for error in again.errors] == [BAD in p for p in PROMPTS]


def test_masks_of_a_text_that_failed_count_as_nothing() -> None:
    lm = spoilt()
    mask = lm.backbone.mask_token_id
    result = dllm.infill(lm, [[5, mask, 6], [BAD, mask, mask], [mask]])
    assert [error is None for error in result.errors] == [True, False, True]
    assert result.stats.tokens == 2


def test_drift_is_that_of_the_rows_that_have_answers() -> None:
    result = dllm.generate(spoilt(), PROMPTS, "threshold", Dual(measure_every=1), **OPTIONS)
    drift = result.stats.drift
    assert drift is not None
    assert all(math.isfinite(value) for value in (drift.kv_error, drift.worst_kv_error, drift.kl, drift.flips))
    refreshed = dllm.generate(spoilt(), PROMPTS, "threshold", Dual(measure_every=1, refresh_above=0.01), **OPTIONS)
    assert refreshed.stats.drift is not None and math.isfinite(refreshed.stats.drift.kl)


@pytest.mark.parametrize("accept", ["argmax", "topk", "ratio"])
def test_a_guide_without_numbers_fails_the_rows_that_it_reads(accept: str) -> None:
    lm, guide = random_llada(), random_guide()
    with torch.no_grad():
        guide.get_input_embeddings().weight[BAD] = math.nan
    policy = replace(GUIDED, guide=guide, accept=accept, top_k=None)
    for order in (PROMPTS, PROMPTS[1:] + PROMPTS[:1]):  # in the first entry, what it leaves would be taken over
        mixed = dllm.generate(lm, order, policy, batch_size=2, **OPTIONS)
        assert [error is not None for error in mixed.errors] == [BAD in prompt for prompt in order]
        assert "guide=" in str(next(filter(None, mixed.errors)))
        for i, prompt in enumerate(order):
            if BAD not in prompt:
                alone = dllm.generate(lm, [prompt], policy, **OPTIONS | {"seed": [OPTIONS["seed"][i]]})
                assert torch.equal(mixed.completions[i], alone.completions[0])
    with pytest.raises(ValueError, match=r"guide=.*NaN or infinite"):
        dllm.generate(lm, [[BAD]], policy, **OPTIONS | {"seed": 0})


@pytest.mark.parametrize(
    "estimate",
    [Estimate(samples=4), Estimate("chain", 2), Estimate("chain", order="confidence"), Estimate(cfg_scale=1.0)],
)
def test_likelihoods_are_refused(estimate: Estimate) -> None:
    with pytest.raises(ValueError, match=FLOAT16):
        loglikelihood(overflowing(), [5], [6, 7], estimate)
    with pytest.raises(ValueError, match=FLOAT16):
        is_greedy(overflowing(), [5], [6, 7])


def test_figures_and_records_are_refused_for_one_row_that_fails() -> None:
    lm = spoilt()
    with pytest.raises(ValueError, match="a prompt has no answer: the model gives"):
        collect(lm, PROMPTS, "vanilla", "none", gen_length=8, block_length=4, seed=0)
    words = random_llada(tokenizer=True)
    asked = problems(2, seed=0)
    assert words.tokenizer is not None
    only = set(words.tokenizer(asked[1].question).input_ids) - set(words.tokenizer(asked[0].question).input_ids)
    with torch.no_grad():
        words.backbone.get_input_embeddings().weight[min(only)] = math.nan
    with pytest.raises(ValueError, match="a problem has no answer"):
        evaluate(words, asked, "threshold", gen_length=8)


class TestCommands:
    def test_a_prompt_without_an_answer_ends_with_one_line(self, tmp_path: Path) -> None:
        folder = save_folder(overflowing(tokenizer=True), tmp_path / "model")
        done = command("generate", f"model={folder}", "prompt=Sam has 3 pens.", "gen_length=8", "show=none")
        assert done.code == 2
        assert done.err.count("\n") == 1 and "dllm generate: error: prompt has no answer" in done.err
        assert "in float16; use model.dtype=bfloat16 or model.dtype=float32" in done.err
        done = command("evaluate", f"model={folder}", "task.limit=2", "gen_length=8", f"out={tmp_path / 'out'}")
        assert done.code == 2
        assert done.err.count("\n") == 1 and "has no answer: the model gives" in done.err
        assert not list((tmp_path / "out").rglob("results.json"))

    def test_lines_without_an_answer_are_told_and_tried_again(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        words = random_llada(tokenizer=True)
        asked, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
        assert words.tokenizer is not None
        sam = words.tokenizer("Sam has 3 pens.").input_ids[0]
        monkeypatch.setattr(dllm, "load", lambda *_, **__: spoilt(token=sam, tokenizer=True))
        rows = [{"id": "a", "prompt": "Tom has 3 pens."}, {"id": "b", "prompt": "Sam has 3 pens."}, {"prompt": "Tom"}]
        asked.write_text("".join(json.dumps(row) + "\n" for row in rows))
        ask = ["generate", f"input={asked}", f"output={out}", "gen_length=8", "show=none"]
        done = command(*ask)
        assert done.code == 2
        lines = done.err.splitlines()
        assert len(lines) == 2 and "(id 'b') has no answer: the model gives" in lines[0]
        assert "1 of 3 prompts failed" in lines[1]
        assert [json.loads(line)["id"] for line in out.read_text().splitlines()] == ["a", 2]
        monkeypatch.setattr(dllm, "load", lambda *_, **__: words)
        assert command(*ask, "resume=mixed").code == 0  # by weights that are mended
        assert [json.loads(line)["id"] for line in out.read_text().splitlines()] == ["a", 2, "b"]
