"""generate, stream, infill and as_completed as a user meets them."""

from __future__ import annotations

import math
import os
import re
from typing import Any

import pytest
import torch

import dllm
from dllm.cache import NoCache
from dllm.cache.base import Cache
from dllm.resolve import resolve
from dllm.samplers import Threshold
from dllm.samplers.base import Sampler
from models import random_dream, random_llada

QUESTION = "Tom has 23 apples. He buys 12. How many apples does he have?"
SHORT = {"gen_length": 12, "block_length": 5}


@pytest.fixture(scope="module")
def lm() -> dllm.LanguageModel:
    return random_llada(tokenizer=True)


def test_every_kind_of_prompt_gives_the_same(lm: dllm.LanguageModel) -> None:
    assert lm.tokenizer is not None
    ids = lm.tokenizer(QUESTION).input_ids
    chat = [{"role": "user", "content": QUESTION}]
    results = [dllm.generate(lm, p, **SHORT) for p in (QUESTION, [QUESTION], chat, [chat], [ids], torch.tensor([ids]))]  # type: ignore[arg-type]
    for result in results:
        assert torch.equal(result.sequences, results[0].sequences)
        assert result.texts == results[0].texts


def test_the_result_has_the_shapes_it_promises(lm: dllm.LanguageModel) -> None:
    prompts = [[4, 5, 6], [7]]
    result = dllm.generate(lm, prompts, stop_at_eos=False, **SHORT)
    assert result.sequences.shape == (2, 15)
    assert result.completions.shape == result.commit_step.shape == (2, 12)
    assert result.sequences[0, :3].tolist() == prompts[0]
    assert result.sequences[1, 2:3].tolist() == prompts[1]
    assert result.nfe.tolist() == [12, 12] and result.guide_nfe.tolist() == [0, 0]
    assert result.sequences.dtype == result.nfe.dtype == result.commit_step.dtype == torch.long


def test_batches_of_any_size_join_into_one_result(lm: dllm.LanguageModel) -> None:
    prompts = [[4], [5, 6, 7, 8], [9, 10], [11, 12, 13], [14]]
    whole = dllm.generate(lm, prompts, batch_size=5, **SHORT)
    parts = dllm.generate(lm, prompts, batch_size=2, **SHORT)
    assert torch.equal(whole.sequences, parts.sequences)
    assert torch.equal(whole.commit_step, parts.commit_step)
    assert whole.stats.tokens == parts.stats.tokens


def test_tokens_are_counted_up_to_end_of_text_and_no_further(lm: dllm.LanguageModel) -> None:
    free = dllm.generate(lm, [[4, 5]], stop_at_eos=False, eos_token_id=140, **SHORT)
    # Whatever stands in the middle is declared to end the text.
    eos = int(free.completions[0, 5])
    first = free.completions[0].tolist().index(eos)
    stopped = dllm.generate(lm, [[4, 5]], eos_token_id=eos, **SHORT)
    unstopped = dllm.generate(lm, [[4, 5]], eos_token_id=eos, stop_at_eos=False, **SHORT)
    assert stopped.completions[0, : first + 1].tolist() == unstopped.completions[0, : first + 1].tolist()
    for result in (stopped, unstopped):
        assert result.stats.tokens == first + 1
        assert result.stats.tpf == pytest.approx((first + 1) / int(result.nfe[0]))
        assert result.stats.tokens_per_second == pytest.approx((first + 1) / result.stats.seconds)
    assert stopped.nfe[0] < unstopped.nfe[0]
    undecoded = stopped.commit_step[0] == -1
    assert undecoded.any() and (stopped.completions[0][undecoded] == eos).all()
    assert stopped.texts == unstopped.texts


def test_only_positions_that_can_be_committed_are_projected(lm: dllm.LanguageModel) -> None:
    rows: list[int] = []
    head = lm.backbone.get_output_embeddings()
    handle = head.register_forward_hook(lambda module, inputs, output: rows.append(output.shape[:-1].numel()))
    try:
        dllm.generate(lm, [[4, 5, 6], [7]], "vanilla", stop_at_eos=False, **SHORT)
    finally:
        handle.remove()
    assert rows == [2 * n for block in (5, 5, 2) for n in range(block, 0, -1)]


def test_names_and_objects_mean_the_same(lm: dllm.LanguageModel) -> None:
    named = dllm.generate(lm, QUESTION, "threshold", "none", **SHORT)
    made = dllm.generate(lm, QUESTION, Threshold(0.9), NoCache(), **SHORT)
    assert torch.equal(named.sequences, made.sequences)


def test_options_change_the_result(lm: dllm.LanguageModel) -> None:
    plain = dllm.generate(lm, QUESTION, seed=0, stop_at_eos=False, **SHORT)
    for option in ({"temperature": 1.0}, {"cfg_scale": 2.0}, {"block_length": None}, {"eos_suppression": "logits"}):
        eos = int(plain.completions[0].mode().values)
        other = dllm.generate(lm, QUESTION, seed=0, stop_at_eos=False, eos_token_id=eos, **SHORT | option)
        assert not torch.equal(plain.sequences, other.sequences), option


def test_each_row_may_have_its_own_seed(lm: dllm.LanguageModel) -> None:
    options = {"temperature": 1.0, **SHORT}
    both = dllm.generate(lm, [QUESTION, QUESTION], seed=[5, 9], **options)
    assert not torch.equal(both.completions[0], both.completions[1])
    assert torch.equal(both.completions[1], dllm.generate(lm, QUESTION, seed=9, **options).completions[0])
    assert torch.equal(both.completions[1], dllm.generate(lm, [QUESTION] * 5, seed=5, **options).completions[4])


def test_stream_shows_every_step_and_ends_with_the_result(lm: dllm.LanguageModel) -> None:
    prompts = [[4, 5, 6], [7]]
    result = dllm.generate(lm, prompts, "threshold", **SHORT)
    mask = lm.backbone.mask_token_id
    before = None
    for frame in dllm.stream(lm, prompts, "threshold", **SHORT):
        if before is not None:
            changed = frame.tokens != before
            assert torch.equal(changed & frame.committed, frame.committed)
            # What changed without a commit was filled behind end-of-text.
            assert torch.isin(frame.tokens[changed & ~frame.committed], torch.tensor(lm.backbone.eos_token_ids)).all()
        assert not frame.revoked.any()
        guessed = frame.provisional != mask
        assert (frame.tokens[guessed] == mask).all()
        before = frame.tokens
    assert torch.equal(frame.tokens, result.sequences)
    assert torch.equal(frame.nfe, result.nfe)


def test_stream_shows_guesses_that_are_not_committed_yet(lm: dllm.LanguageModel) -> None:
    first = next(dllm.stream(lm, [[4, 5, 6]], "vanilla", **SHORT))
    assert int(first.committed.sum()) == 1
    assert int((first.provisional != lm.backbone.mask_token_id).sum()) == 4


def test_a_callback_sees_every_step(lm: dllm.LanguageModel) -> None:
    seen: list[int] = []
    result = dllm.generate(lm, [[4], [5]], callback=lambda step: seen.append(len(step)), stop_at_eos=False, **SHORT)
    assert seen == [2] * int(result.nfe[0])


def test_a_progress_bar_is_drawn_to_the_end(lm: dllm.LanguageModel, capsys: pytest.CaptureFixture[str]) -> None:
    dllm.generate(lm, [[4], [5], [6]], progress=True, batch_size=2, **SHORT)
    assert "36/36" in capsys.readouterr().out


def test_as_completed_yields_each_row_once_as_it_finishes(lm: dllm.LanguageModel) -> None:
    prompts = [[4], [5, 6, 7, 8], [9, 10], [11, 12, 13], [14]]
    eos = int(dllm.generate(lm, prompts, stop_at_eos=False, **SHORT).completions.flatten().mode().values)
    options = {"eos_token_id": eos, "batch_size": 3, **SHORT}
    result = dllm.generate(lm, prompts, **options)
    answers = list(dllm.as_completed(lm, prompts, **options))
    assert sorted(a.index for a in answers) == [0, 1, 2, 3, 4]
    assert sum(a.tokens for a in answers) == result.stats.tokens
    for answer in answers:
        assert answer.completion == result.completions[answer.index].tolist()
        assert answer.text == result.texts[answer.index]
        assert answer.nfe == int(result.nfe[answer.index])
    # Within a batch rows come in the order of their last forward.
    assert [a.nfe for a in answers if a.index < 3] == sorted(a.nfe for a in answers if a.index < 3)


@pytest.mark.parametrize("make", [random_llada, random_dream])
@pytest.mark.parametrize("sampler", ["vanilla", "threshold"])
def test_infill_fills_masks_anywhere_and_nothing_else(make: Any, sampler: str) -> None:
    lm = make()
    m = lm.backbone.mask_token_id
    rows = [[m, 5, m, m, 8, 9, m], [3, m, m, 4], [1, 2, 3, 4, 5, 6, m, 7, m, m, m, 9]]
    result = dllm.infill(lm, rows, sampler, block_length=2)
    assert result.stats.tokens == 10
    for row, filled, steps in zip(rows, result.sequences.tolist(), result.commit_step.tolist(), strict=True):
        filled, steps = filled[len(filled) - len(row) :], steps[: len(row)]
        assert m not in filled
        assert all(new == old for new, old in zip(filled, row, strict=True) if old != m)
        assert [step >= 0 for step in steps] == [old == m for old in row]
        alone = dllm.infill(lm, [row], sampler, block_length=2)
        assert alone.sequences[0].tolist() == filled


def test_infill_of_the_end_is_generation(lm: dllm.LanguageModel) -> None:
    prompt = [4, 5, 6]
    filled = dllm.infill(lm, [prompt + [lm.backbone.mask_token_id] * 12], block_length=5)
    assert torch.equal(filled.sequences, dllm.generate(lm, [prompt], stop_at_eos=False, **SHORT).sequences)


def test_infill_takes_the_mask_as_text(lm: dllm.LanguageModel) -> None:
    assert lm.tokenizer is not None
    text = QUESTION.replace("23", f"{lm.tokenizer.mask_token}{lm.tokenizer.mask_token}")
    result = dllm.infill(lm, text)
    assert result.stats.tokens == 2
    assert result.texts[0] is not None and result.texts[0].startswith("Tom has") and result.texts[0].endswith("have?")


@pytest.mark.parametrize(
    ("prompts", "options", "words"),
    [
        ([], {}, "prompts is empty"),
        ([[1, 999]], {}, r"prompts\[0\] has token id 999.*0 to 143"),
        ([[1, 1]], {}, r"prompts\[0\] contains \[MASK\]; use infill"),
        ([[4] * 300], {}, r"prompts\[0\] has 300 tokens.*256.*128"),
        (torch.zeros(3), {}, r"shape \(3,\).*LongTensor"),
        ([[4]], {"steps": 3}, "unknown option 'steps'; expected one of gen_length, "),
        ([[4]], {"gen_length": 0}, "gen_length=0"),
        ([[4]], {"block_length": 0}, "block_length=0"),
        ([[4]], {"batch_size": 0}, "batch_size=0"),
        ([[4]], {"temperature": -1}, "temperature=-1"),
        ([[4]], {"cfg_scale": -1}, "cfg_scale=-1"),
        ([[4]], {"cfg_scale": math.nan}, "cfg_scale=nan"),
        ([[4]], {"cfg_scale": math.inf}, "cfg_scale=inf"),
        (torch.zeros(0, 3, dtype=torch.long), {}, "prompts is empty"),
        ([[4]], {"seed": -1}, "seed=-1"),
        ([[4]], {"seed": [1, 2]}, "seed has 2 entries for 1 prompts"),
        ([[4]], {"eos_token_id": 500}, "eos_token_id=500"),
        ([[4]], {"eos_token_id": []}, r"eos_token_id=\[\] is empty"),
        ([[4]], {"sampler": "best"}, "unknown sampler='best'; expected one of .*threshold"),
        ([[4]], {"cache": "big"}, "unknown cache='big'"),
    ],
)
def test_bad_input_is_named_before_any_forward(
    lm: dllm.LanguageModel, prompts: Any, options: dict[str, Any], words: str
) -> None:
    handle = lm.backbone.register_forward_pre_hook(lambda *_: pytest.fail("a forward was run"))
    try:
        with pytest.raises(ValueError, match=words) as caught:
            dllm.generate(lm, prompts, **options)
    finally:
        handle.remove()
    assert "\n" not in str(caught.value)


@pytest.mark.skipif("DLLM_SHAPES" in os.environ, reason="annotations are checked, which a user's program does not do")
@pytest.mark.parametrize(
    ("prompts", "options", "said"),
    [
        ([[1, 2], 3], {}, "prompts[1] is a int"),
        ([[4]], {"gen_length": 2.5}, "gen_length=2.5"),
        ([[4]], {"temperature": "hot"}, "temperature='hot'"),
        ([[4]], {"stop_at_eos": "maybe"}, "unknown stop_at_eos='maybe'"),
        ([[4]], {"top_k": True}, "top_k=True"),
        ({4}, {}, "prompts"),
        ([[4]], {"seed": 1.5}, "seed=1.5"),
    ],
)
def test_values_of_another_type_are_named_too(prompts: Any, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)) as caught:
        dllm.generate(random_llada(), prompts, **options)
    assert str(caught.value).startswith(said)


def test_settings_a_sampler_refuses_cost_no_forward(lm: dllm.LanguageModel) -> None:
    handle = lm.backbone.register_forward_pre_hook(lambda *_: pytest.fail("a forward was run"))
    try:
        with pytest.raises(ValueError, match="steps=99"):
            dllm.generate(lm, [[4]], dllm.samplers.Vanilla(steps=99), **SHORT)
    finally:
        handle.remove()


def test_text_needs_a_tokenizer() -> None:
    with pytest.raises(ValueError, match=r"prompts\[0\] is text.*token ids"):
        dllm.generate(random_llada(), QUESTION)


def test_infill_refuses_what_has_no_effect_or_no_mask(lm: dllm.LanguageModel) -> None:
    with pytest.raises(ValueError, match="gen_length has no effect"):
        dllm.infill(lm, QUESTION, gen_length=5)
    with pytest.raises(ValueError, match=r"no \[MASK\]; put one \(<\|mdm_mask\|>\)"):
        dllm.infill(lm, QUESTION)


@pytest.mark.parametrize("wrong", [3, Threshold, None, NoCache])
def test_what_is_no_sampler_or_cache_is_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"sampler=.* is not a sampler; use one of"):
        resolve("sampler", wrong, Sampler)
    with pytest.raises(ValueError, match=r"cache=.* is not a cache; use one of"):
        resolve("cache", wrong, Cache)


def test_stream_refuses_bad_input_at_the_call(lm: dllm.LanguageModel) -> None:
    with pytest.raises(ValueError, match="batch_size has no effect on stream"):
        dllm.stream(lm, QUESTION, batch_size=2)
    with pytest.raises(ValueError, match="gen_length=0"):
        dllm.stream(lm, QUESTION, gen_length=0)
