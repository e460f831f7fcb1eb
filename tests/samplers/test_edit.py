"""Token editing: committed tokens of a block are replaced until the model agrees with them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import dllm
from dllm.cache import FreeCache
from dllm.samplers import Editing, Factor, FreeDave, LocalLeap, Threshold, Vanilla
from models import random_dream, random_fast_dllm, random_llada, random_llada2, random_sdar

Maker = Callable[..., dllm.LanguageModel]
MAKERS = [random_llada2, random_sdar, random_fast_dllm, random_llada, random_dream]
BLOCKWISE = [random_llada2, random_sdar]  # unshifted
PROMPTS = [[5, 9, 3], [7], [1, 2, 3, 4, 5, 6, 7, 8, 9], [50, 8, 8, 8]]
OPTIONS: dict[str, Any] = {"gen_length": 13, "block_length": 4, "stop_at_eos": False, "seed": 3}


def spelt_out(lm: dllm.LanguageModel, prompt: list[int], policy: Editing, length: int, base: Threshold) -> Any:
    """LLaDA2.1's loop over whole blocks of 4, one full forward at a time."""
    mask, tokens, forwards = lm.backbone.mask_token_id, [*prompt, *[lm.backbone.mask_token_id] * length], 0
    for low in range(len(prompt) // 4 * 4, len(tokens), 4):
        post, block = 0, range(low, min(low + 4, len(tokens)))
        while True:
            masked = [i for i in block if tokens[i] == mask]
            post += not masked
            if post > policy.max_post_steps:
                break
            forwards += 1
            with torch.no_grad():
                logits: Tensor = lm.backbone(torch.tensor([tokens[: block[-1] + 1]])).logits[0].double()
            p = logits.softmax(-1)
            logits[:, mask] = -torch.inf
            best = logits.argmax(-1)
            sure = {i: float(p[i, best[i]]) for i in block}
            chosen = [i for i in masked if sure[i] >= base.threshold]
            if len(chosen) < base.at_least:
                chosen = sorted(masked, key=lambda i: -sure[i])[: base.at_least]
            decided = [i for i in block if tokens[i] != mask and i >= len(prompt)]
            replaced = [i for i in decided if int(best[i]) != tokens[i] and sure[i] > policy.editing_threshold]
            for i in (*chosen, *replaced):
                tokens[i] = int(best[i])
            if not masked and not replaced:
                break
    return tokens, forwards


@pytest.mark.parametrize("make", BLOCKWISE)
@pytest.mark.parametrize("most", [0, 1, 4])
@pytest.mark.parametrize(("threshold", "at_least", "editing"), [(0.3, 1, 0.0), (0.9, 2, 0.3)])
def test_edits_are_those_of_the_published_loop(
    make: Maker, most: int, threshold: float, at_least: int, editing: float
) -> None:
    lm, base = make(), Threshold(threshold, at_least)
    policy = Editing(editing, most, base)
    for reuse in ("block", FreeCache(window=0)):
        batch = dllm.generate(lm, PROMPTS, policy, reuse, batch_size=3, **OPTIONS)
        for row, prompt in enumerate(PROMPTS):
            tokens, forwards = spelt_out(lm, prompt, policy, 13, base)
            assert batch.completions[row].tolist() == tokens[len(prompt) :]
            assert int(batch.nfe[row]) == forwards


@pytest.mark.parametrize("make", MAKERS)
def test_something_is_edited_after_the_last_mask_and_the_prompt_is_not(make: Maker) -> None:
    lm, changes = make(), []

    def watch(step: dllm.Step) -> None:
        changes.append((step.change.edited.any(), (step.tokens == lm.backbone.mask_token_id).any()))

    out = dllm.generate(lm, PROMPTS, Editing(0.0), callback=watch, **OPTIONS)
    plain = dllm.generate(lm, PROMPTS, "threshold", **OPTIONS)
    assert any(edited for edited, _ in changes)
    assert (out.nfe > plain.nfe).any()
    assert not (out.completions == lm.backbone.mask_token_id).any()
    for row, prompt in enumerate(PROMPTS):
        assert out.sequences[row, -13 - len(prompt) : -13].tolist() == prompt


@pytest.mark.parametrize("make", MAKERS)
def test_without_edits_it_is_the_base(make: Maker) -> None:
    lm = make()
    for base in (Vanilla(tokens_per_step=2), Factor(3.0), LocalLeap(0.5, 0.2, 2)):
        plain = dllm.generate(lm, PROMPTS, base, **OPTIONS)
        never = dllm.generate(lm, PROMPTS, Editing(1.0, 0, base), **OPTIONS)
        assert torch.equal(plain.sequences, never.sequences)
        assert torch.equal(plain.nfe, never.nfe)
        checked = dllm.generate(lm, PROMPTS, Editing(1.0, 5, base), **OPTIONS)  # one forward a block finds nothing
        assert torch.equal(plain.sequences, checked.sequences)


@pytest.mark.parametrize("make", BLOCKWISE)
def test_a_row_ends_with_the_block_of_its_end_of_text(make: Maker) -> None:
    lm, policy = make(), Editing(0.0, 4, Threshold(0.3))
    whole = dllm.generate(lm, PROMPTS, policy, **OPTIONS | {"gen_length": 32})
    for eos in whole.completions[0, ::11].tolist():
        ended = dllm.generate(
            lm, PROMPTS, policy, **OPTIONS | {"gen_length": 32, "stop_at_eos": True, "eos_token_id": eos}
        )
        for row, count in enumerate((whole.completions == eos).int().argmax(1).tolist()):
            assert ended.completions[row, : count + 1].tolist() == whole.completions[row, : count + 1].tolist()
            assert int(ended.nfe[row]) <= int(whole.nfe[row])


def test_rows_leave_their_batch_at_different_times() -> None:
    lm, policy = random_llada2(), Editing(0.0, 3, Threshold(0.3))
    options = OPTIONS | {"stop_at_eos": True, "temperature": 0.7}
    batch = dllm.generate(lm, PROMPTS * 2, policy, batch_size=3, **options)
    for row, prompt in enumerate(PROMPTS * 2):
        alone = dllm.generate(lm, [prompt], policy, **options | {"seed": [3 + row]})
        assert batch.completions[row].tolist() == alone.completions[0].tolist()
        assert batch.nfe[row] == alone.nfe[0]


def test_masks_in_a_text_are_filled_and_its_tokens_kept() -> None:
    lm = random_llada2()
    m = lm.backbone.mask_token_id
    rows = [[m, 5, m, m, 8, 9, m], [3, m, m, 4], [1, 2, 3, 4, 5, 6, m, 7, *[m] * 12, 9]]
    out = dllm.infill(lm, rows, Editing(0.0), seed=5)
    for i, row in enumerate(rows):
        filled = out.sequences[i, -len(row) :].tolist()
        assert m not in filled
        assert [token for token, given in zip(filled, row, strict=True) if given != m] == [t for t in row if t != m]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"editing_threshold": -0.1}, "editing_threshold=-0.1 is out of range"),
        ({"max_post_steps": -1}, "max_post_steps=-1 is out of range"),
        ({"base": FreeDave()}, "cannot be a base"),
        ({"base": Editing()}, "cannot be a base"),
        ({"base": "unknown"}, "base='unknown'"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Editing(**options)


def test_more_steps_than_a_row_may_take_are_refused() -> None:
    lm, options = random_llada(), {"gen_length": 32, "block_length": 4}
    with pytest.raises(ValueError, match="max_post_steps=64 is out of range; use at most 48"):
        dllm.generate(lm, [[5]], Editing(max_post_steps=64), **options)
    result = dllm.generate(lm, [[5], [6]], Editing(0.0, 48), temperature=1.0, seed=0, **options)
    assert not any(result.errors)
