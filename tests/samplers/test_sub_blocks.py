"""Sub-blocks: blocks are decoded in parts, and a token that earlier blocks decide is committed first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import dllm
from dllm.samplers import FreeDave, SubBlocks, Threshold, Vanilla
from models import random_dream, random_fast_dllm, random_llada, random_llada2

Maker = Callable[..., dllm.LanguageModel]
PROMPTS = [[5, 9, 3], [7], [1, 2, 3, 4, 5, 6, 7, 8, 9], [50, 8, 8, 8, 1, 2, 3, 4]]
OPTIONS: dict[str, Any] = {"gen_length": 25, "block_length": 8, "stop_at_eos": False, "seed": 3}


def spelt_out(lm: dllm.LanguageModel, prompt: list[int], length: int, part: int, threshold: float) -> Any:
    """Fast-dLLM v2's loop over blocks of 8, one full forward at a time."""
    mask, tokens, forwards = lm.backbone.mask_token_id, [*prompt, *[lm.backbone.mask_token_id] * length], 0
    lm.backbone.block_length = 8

    def predicted(end: int) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            logits: Tensor = lm.backbone(torch.tensor([tokens[:end]])).logits[0].double()
        p = logits.softmax(-1)
        logits[:, mask] = -torch.inf
        best = logits.argmax(-1)
        return best, p.gather(1, best[:, None])[:, 0]

    for low in range(len(prompt) // 8 * 8, len(tokens), 8):
        block = range(low, min(low + 8, len(tokens)))
        if low and tokens[low] == mask:
            tokens[low] = int(predicted(low)[0][low - 1])
            forwards += 1
        for start in range(low, block[-1] + 1, part):
            own = range(start, min(start + part, block[-1] + 1))
            while masked := [i for i in own if tokens[i] == mask]:
                best, sure = predicted(block[-1] + 1)
                forwards += 1
                top = max(masked, key=lambda i: float(sure[i - 1]))
                for i in masked:
                    if i == top or sure[i - 1] >= threshold:
                        tokens[i] = int(best[i - 1])
    return tokens, forwards


@pytest.mark.parametrize("part", [2, 3, 4, 8, 100])
@pytest.mark.parametrize("threshold", [0.3, 0.9])
def test_parts_are_those_of_the_published_loop(part: int, threshold: float) -> None:
    lm = random_fast_dllm()
    for reuse in ("none", "block"):
        out = dllm.generate(lm, PROMPTS, SubBlocks(part, Threshold(threshold)), reuse, batch_size=3, **OPTIONS)
        for row, prompt in enumerate(PROMPTS):
            tokens, forwards = spelt_out(lm, prompt, 25, part, threshold)
            assert out.completions[row].tolist() == tokens[len(prompt) :]
            assert int(out.nfe[row]) == forwards


@pytest.mark.parametrize("make", [random_llada, random_dream, random_llada2, random_fast_dllm])
def test_a_part_is_finished_before_the_next(make: Maker) -> None:
    out = dllm.generate(make(), [[*range(1, 9)]], SubBlocks(4, Vanilla()), **OPTIONS | {"gen_length": 16})
    steps = out.commit_step[0].view(4, 4)
    assert (steps[1:].amin(1) > steps[:-1].amax(1)).all()


@pytest.mark.parametrize("make", [random_llada, random_dream, random_llada2])
def test_a_part_as_long_as_the_block_is_the_base(make: Maker) -> None:
    # Where no token is decided by earlier blocks alone.
    for base in (Vanilla(), Threshold(0.3)):
        plain, parted = (dllm.generate(make(), PROMPTS, each, **OPTIONS) for each in (base, SubBlocks(8, base)))
        assert torch.equal(plain.sequences, parted.sequences)
        assert torch.equal(plain.nfe, parted.nfe)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 0}, "length=0 is out of range"),
        ({"base": FreeDave()}, "cannot be a base"),
        ({"base": "unknown"}, "base='unknown'"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SubBlocks(**options)


def test_a_base_with_a_timetable_may_take_more_steps_than_it_has() -> None:
    base = Vanilla(steps=8, schedule="timestep")
    result = dllm.generate(random_llada(), [[5], [6, 7]], SubBlocks(2, base), gen_length=32, block_length=8)
    assert (result.nfe <= 32).all()
    assert not any(result.errors)
