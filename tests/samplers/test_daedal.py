"""DAEDAL's growing canvas."""

from __future__ import annotations

from math import inf, nan
from typing import Any

import pytest
import torch
from torch import Tensor

import dllm
from dllm.samplers import Daedal, Threshold
from models import random_dream, random_llada, random_sdar
from revising_rig import Watched, recorded_alike

MODELS = pytest.mark.parametrize("make", [random_llada, random_dream])
PROMPTS = [[5, 9, 3], [7], [1, 2, 3, 4, 5, 6, 7, 8, 9]]
ENDS = [62, *range(0, 60, 5)]  # tokens that random models write now and then, as ends of text
OPTIONS: dict[str, Any] = {"gen_length": 26, "block_length": 6, "stop_at_eos": False, "eos_token_id": ENDS}
GROWING = [
    Daedal(4, 3, 0.1, 0.1, 0.5, 0.4, 4), Daedal(6, 4, 0.05, 0.05, 0.7, 0.9, 3), Daedal(1, 1, 0.9, 0.9, 0.5, 0.5, 2),
    Daedal(40, 2, 0.0, 0.9, 0.5, 0.9, 4), Daedal(7, 5, 0.0, 0.9, 0.0, 0.9, 9),
]  # fmt: skip
samplers = pytest.mark.parametrize("sampler", GROWING, ids=repr)


def by_hand(lm: dllm.LanguageModel, prompt: list[int], sampler: Daedal, most: int) -> tuple[list[int], int]:
    """The canvas of one row at the end, and its forwards, with lists that really grow."""
    backbone, mask, start = lm.backbone, lm.backbone.mask_token_id, len(prompt)
    row, forwards = [*prompt, *[mask] * min(sampler.initial, most)], 0

    def predicted() -> tuple[Tensor, Tensor, float]:
        with torch.no_grad():
            logits = backbone(torch.tensor([row])).logits[0]
        logits = logits[(torch.arange(len(row)) - backbone.logits_shift).clamp(min=0)]
        best = logits.index_fill(-1, torch.tensor([mask]), -inf).argmax(-1)
        sure = logits.double().softmax(-1).gather(1, best[:, None])[:, 0]
        ends = [k for k in reversed(range(start, len(row))) if int(best[k]) in ENDS][: sampler.check_positions]
        return best, sure, sum(float(sure[k]) for k in ends) / sampler.check_positions

    while True:
        best, sure, ended = predicted()
        forwards += 1
        room = most - (len(row) - start)
        if ended >= sampler.enough or not room:
            break
        row += [mask] * min(sampler.factor, room)
    added = min(sampler.check_positions // 2, room)
    row += [ENDS[0]] * added
    fresh = added == 0
    while mask in row:
        if not fresh:
            best, sure, ended = predicted()
            forwards += 1
        fresh = False
        low = start + (row.index(mask) - start) // 6 * 6
        masks = [k for k in range(low, min(low + 6, len(row))) if row[k] == mask]
        commit = [k for k in masks if sure[k] > sampler.high] or [max(masks, key=lambda k: (float(sure[k]), -k))]
        left = [k for k in masks if k not in commit and sure[k] < sampler.low]
        for k in commit:
            row[k] = int(best[k])
        if left and ended < sampler.expand and len(row) - start < most:
            at = min(left, key=lambda k: (float(sure[k]), k))
            row[at : at + 1] = [mask] * sampler.factor
            del row[start + most :]
    return row, forwards


@MODELS
@samplers
def test_rows_are_decoded_as_by_hand(make: Any, sampler: Daedal) -> None:
    lm = make()
    found = dllm.generate(lm, PROMPTS, sampler, **OPTIONS)
    for row, prompt in enumerate(PROMPTS):
        tokens, forwards = by_hand(lm, prompt, sampler, 26)
        rest = len(prompt) + 26 - len(tokens)
        assert found.sequences[row, -len(prompt) - 26 :].tolist() == [*tokens, *[ENDS[0]] * rest]
        assert (found.commit_step[row, 26 - rest :] == -1).all()
        assert int(found.nfe[row]) == forwards <= 2 * 26


@MODELS
@samplers
def test_nothing_is_saved_by_positions_that_are_not_there_yet(make: Any, sampler: Daedal) -> None:
    found = dllm.generate(make(), PROMPTS, sampler, batch_size=2, **OPTIONS).stats
    assert (found.computed_share, found.extra_columns) == (1, 0)


@MODELS
def test_regions_of_unequal_length_say_how_long_they_are(make: Any) -> None:
    lm, options = make(max_length=40), OPTIONS | {"gen_length": "auto"}
    found = dllm.generate(lm, PROMPTS, GROWING[0], **options)
    assert found.lengths.tolist() == [40 - len(prompt) for prompt in PROMPTS]
    for row, (prompt, length) in enumerate(zip(PROMPTS, found.lengths.tolist(), strict=True)):
        alone = dllm.generate(lm, [prompt], GROWING[0], **options)
        for name in ("completions", "commit_step"):
            padded, own = getattr(found, name)[row], getattr(alone, name)[0]
            assert padded[-length:].tolist() == own.tolist()
            assert (padded[:-length] == (ENDS[0] if name == "completions" else -1)).all()
        assert found.completions[row, -length:].tolist() == found.sequences[row, -length:].tolist()


def test_the_rows_by_hand_differ_in_length() -> None:
    lengths = {
        len(by_hand(make(), prompt, sampler, 26)[0]) - len(prompt)
        for make in (random_llada, random_dream)
        for sampler in GROWING[:3]
        for prompt in PROMPTS
    }
    assert len(lengths) > 3


@MODELS
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_rows_ignore_their_batchmates(make: Any, temperature: float) -> None:
    lm, options = make(), OPTIONS | {"temperature": temperature}
    for sampler in GROWING[:2]:
        batch = dllm.generate(lm, PROMPTS, sampler, batch_size=2, seed=3, **options)
        for row, prompt in enumerate(PROMPTS):
            alone = dllm.generate(lm, [prompt], sampler, seed=3 + row, **options)
            assert batch.completions[row].tolist() == alone.completions[0].tolist()
            assert batch.commit_step[row].tolist() == alone.commit_step[0].tolist()
            assert batch.nfe[row] == alone.nfe[0]


@MODELS
def test_with_room_enough_from_the_start_it_is_the_threshold(make: Any) -> None:
    lm = make()
    plain = dllm.generate(lm, PROMPTS, Threshold(0.4), **OPTIONS)
    same = dllm.generate(lm, PROMPTS, Daedal(26, high=0.4), **OPTIONS)
    assert torch.equal(plain.sequences, same.sequences)
    assert torch.equal(plain.nfe, same.nfe)


@MODELS
def test_a_lower_demand_on_the_end_of_the_text_begins_with_no_longer_a_canvas(make: Any) -> None:
    lm = make()
    lengths = []
    for enough in (0.0, 0.1, 0.3, 0.9):
        watched = Watched()
        dllm.generate(lm, PROMPTS[:1], Daedal(2, 2, enough, 0.0, check_positions=4), callback=watched, **OPTIONS)
        lengths.append(sum(int(step.change.grown.sum()) for step in watched.steps))
    assert lengths == sorted(lengths)
    assert lengths[-1] == 24
    assert lengths[0] == 2  # only half as many end-of-text tokens as are checked


@MODELS
def test_positions_that_are_not_there_yet_are_neither_computed_nor_attended_to(make: Any) -> None:
    lm, sampler = make(), GROWING[0]
    seen: list[int] = []
    dllm.generate(lm, PROMPTS[:1], sampler, callback=lambda step: seen.append(int(step.computed[0])), **OPTIONS)
    assert seen[0] == 7
    assert max(seen) <= 29
    assert seen == sorted(seen)
    assert len(set(seen)) > 2


@MODELS
@samplers
def test_what_is_recorded_is_what_was_done(make: Any, sampler: Daedal) -> None:
    recorded_alike(make(), PROMPTS[0], sampler, **OPTIONS)


@MODELS
def test_an_end_of_text_or_a_stop_string_ends_a_row_that_might_grow(make: Any) -> None:
    lm = make()
    for sampler in GROWING[:2]:
        free = dllm.generate(lm, PROMPTS, sampler, **OPTIONS)
        stopped = dllm.generate(lm, PROMPTS, sampler, **OPTIONS | {"stop_at_eos": True})
        assert stopped.stats.tokens == free.stats.tokens
        for one, other in zip(stopped.completions.tolist(), free.completions.tolist(), strict=True):
            text = next((k for k, token in enumerate(other) if token in ENDS), len(other))
            assert one[: text + 1] == other[: text + 1]
        assert (stopped.nfe <= free.nfe).all()
    lm = random_llada(tokenizer=True, seed=3)
    sampler, options = Daedal(8, 4, 0.0, 0.9, 0.5, 0.9, 4), {"gen_length": 20, "block_length": 6, "stop_at_eos": False}
    free = dllm.generate(lm, [[4, 5]], sampler, **options)
    stop = str(free.texts[0])[4:8]
    stopped = dllm.generate(lm, [[4, 5]], sampler, stop=stop, **options)
    assert stopped.texts[0] == str(free.texts[0]).partition(stop)[0]


def test_the_next_request_of_a_row_starts_anew() -> None:
    lm, sampler = random_llada(), GROWING[0]
    engine = dllm.Engine(lm, sampler, batch_size=1, max_length=64)
    for prompt in PROMPTS:
        engine.add(prompt, **OPTIONS)
    answers = [event.answer for step in engine.steps() for event in step if event.answer is not None]
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        assert answer.completion == dllm.generate(lm, [prompt], sampler, **OPTIONS).completions[0].tolist()


def test_what_it_cannot_do_is_refused() -> None:
    lm = random_llada()
    with pytest.raises(ValueError, match="cache=dual is not compatible with a canvas that grows"):
        dllm.generate(lm, PROMPTS, "daedal", "dual")
    with pytest.raises(ValueError, match="use another sampler to infill"):
        dllm.infill(lm, [[5, 63, 63]], "daedal")
    with pytest.raises(ValueError, match="attends to blocks in order; use another sampler"):
        dllm.generate(random_sdar(), PROMPTS, "daedal")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("initial", 0), ("factor", 1.5), ("enough", -0.1), ("expand", nan), ("high", -1), ("low", -1),
        ("check_positions", 0),
    ],
)  # fmt: skip
def test_values_out_of_range_are_named(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"{name}=.*use "):
        Daedal(**{name: value})


@MODELS
def test_an_automatic_length_is_what_the_context_leaves(make: Any) -> None:
    lm, options = make(max_length=40), OPTIONS | {"eos_token_id": ENDS}
    for prompt in PROMPTS:
        auto, given = (
            dllm.generate(lm, [prompt], GROWING[0], **options | {"gen_length": length})
            for length in ("auto", 40 - len(prompt))
        )
        assert torch.equal(auto.sequences, given.sequences)
    with pytest.raises(ValueError, match="gen_length=auto needs a sampler that finds the length"):
        dllm.generate(lm, PROMPTS, "threshold", gen_length="auto")
    with pytest.raises(ValueError, match="gen_length=auto needs a sampler that finds the length"):
        dllm.Engine(lm, "vanilla").add([5], gen_length="auto")
    with pytest.raises(ValueError, match="has 40 tokens; the model's context of 40 leaves room for 39"):
        dllm.generate(lm, [[5] * 40], "daedal", gen_length="auto")
    for wrong in ("long", 0, None):
        with pytest.raises(ValueError, match=r"gen_length=.*or auto"):
            dllm.Options(gen_length=wrong)


def test_the_longest_length_is_what_the_engine_holds() -> None:
    engine = dllm.Engine(random_llada(), "daedal", batch_size=2, max_length=40)
    engine.add([5, 6, 7], gen_length="auto")
    answers = [answer for step in engine.steps() for answer in step.answers.values()]
    assert [len(answer.completion) for answer in answers] == [37]
