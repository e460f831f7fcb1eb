"""Requests that begin alike share the keys and values of their first blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import pytest
import torch

import dllm
from dllm.cache import Block, SubBlocks
from models import random_fast_dllm, random_llada, random_llada2, random_sdar, random_sdar_moe

Maker = Callable[..., dllm.LanguageModel]
MAKERS = [random_sdar, random_sdar_moe, random_llada2, random_fast_dllm]
SYSTEM = [*range(2, 14)]  # three blocks of 4
OPTIONS: dict[str, Any] = {"gen_length": 9, "block_length": 4, "stop_at_eos": False}


def decoded(
    lm: dllm.LanguageModel,
    prompts: Sequence[Sequence[int]],
    gen_length: int = 9,
    kind: str = "block",
    shared: int | None = None,
) -> list[Any]:
    """The answers to prompts that come one after the other."""
    found = []
    cache: Any = {"block": Block, "sub_blocks": SubBlocks}[kind](shared=shared)
    with dllm.Engine(lm, "vanilla", cache, batch_size=2, max_length=48, block_length=4) as engine:
        for number, prompt in enumerate(prompts):
            engine.add(list(prompt), **OPTIONS | {"gen_length": gen_length}, seed=number)
            found += [answer for step in engine.steps() for answer in step.answers.values()]
    return found


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("kind", ["block", "sub_blocks"])
def test_results_are_those_of_an_engine_that_shares_nothing(make: Maker, kind: str) -> None:
    prompts = [[*SYSTEM, 20], [*SYSTEM, 21, 22, 23, 24, 25], [7], SYSTEM, [*SYSTEM[:6], 30], [*SYSTEM, 20, 5, 6, 7, 8]]
    lm = make()
    shared, alone = (decoded(lm, prompts, kind=kind, shared=columns) for columns in (None, 0))
    for own, other in zip(shared, alone, strict=True):
        assert own.completion == other.completion
        assert own.commit_step == other.commit_step
        # The last one of a shared block is computed where the next token is predicted there.
        assert other.positions - own.positions in (own.reused, own.reused - lm.backbone.logits_shift)
    assert [each.reused for each in shared] == [0, 12, 0, 12, 4, 12]
    assert not any(each.reused for each in alone)


def test_an_answer_is_shared_with_the_request_that_continues_it() -> None:
    lm = random_sdar()
    (first,) = decoded(lm, [SYSTEM])
    both = decoded(lm, [SYSTEM, [*SYSTEM, *first.completion, 40]])
    # The last block of an answer was never computed complete.
    assert both[1].reused == 20


def test_a_batch_takes_what_earlier_batches_left() -> None:
    prompts = [[*SYSTEM, 20 + number] for number in range(5)]
    options = OPTIONS | {"batch_size": 2}
    out = dllm.generate(random_sdar(), prompts, "vanilla", "block", **options)
    assert out.stats.reused_columns == 3 * 12
    assert dllm.generate(random_sdar(), prompts, "vanilla", "none", **options).stats.reused_columns == 0


def test_what_was_not_used_for_the_longest_time_leaves_and_ends_before_beginnings() -> None:
    one, two, three = ([*range(start, start + 8), 9] for start in (2, 20, 30))
    again = decoded(random_sdar(), [one, two, one, three, one, two], 1, shared=20)  # five blocks
    # The first block of the second text stays where its second one left.
    assert [each.reused for each in again] == [0, 0, 8, 0, 8, 4]


def test_a_text_longer_than_the_pool_keeps_its_beginning() -> None:
    again = decoded(random_sdar(), [[*SYSTEM, 20], [*SYSTEM, 21]], 1, shared=11)
    assert [each.reused for each in again] == [0, 8]


def test_blocks_that_were_edited_are_not_shared_as_they_were() -> None:
    lm = random_llada2()
    with dllm.Engine(lm, dllm.samplers.Editing(0.0), Block(), batch_size=1, max_length=64, block_length=4) as engine:
        engine.add(SYSTEM, **OPTIONS)
        (first,) = [answer for step in engine.steps() for answer in step.answers.values()]
        engine.add([*SYSTEM, *first.completion, 5], **OPTIONS)
        (second,) = [answer for step in engine.steps() for answer in step.answers.values()]
    with dllm.Engine(lm, dllm.samplers.Editing(0.0), "none", batch_size=1, max_length=64, block_length=4) as engine:
        engine.add([*SYSTEM, *first.completion, 5], **OPTIONS)
        (alone,) = [answer for step in engine.steps() for answer in step.answers.values()]
    assert second.reused >= 12
    assert second.completion == alone.completion


def test_the_pool_counts_in_the_memory_of_an_engine() -> None:
    lm = random_sdar()
    sizes = {}
    for columns in (0, 16, None):
        with dllm.Engine(lm, "vanilla", Block(shared=columns), batch_size=2, max_length=48) as engine:
            sizes[columns] = sum(each.nbytes for each in engine._memory._tensors.values())
            lm.spare.clear()
    layers, heads, size = lm.backbone.kv_shape
    a_column = 2 * layers * heads * size * 8
    assert sizes[16] - sizes[0] == 16 * a_column
    assert sizes[None] - sizes[0] == 48 * a_column


def test_more_than_there_is_memory_for_is_refused() -> None:
    for columns, length in product((2**43, 2**62), (48, None)):
        with pytest.raises(ValueError, match=rf"shared={columns}\b.* takes [\d,]+ (GiB|bytes).*; use less$"):
            dllm.Engine(random_sdar(), "vanilla", Block(shared=columns), max_length=length)


def test_bidirectional_models_share_nothing() -> None:
    lm = random_llada()
    with pytest.raises(ValueError, match="shared=8 has no effect on a model that attends to every position"):
        dllm.Engine(lm, "vanilla", Block(shared=8))
    with pytest.raises(ValueError, match="shared=-1 is out of range"):
        Block(shared=-1)
    out = dllm.generate(lm, [SYSTEM] * 3, "vanilla", "block", batch_size=1, **OPTIONS)
    assert out.stats.reused_columns == 0
    assert torch.equal(out.sequences[0], out.sequences[2])


def _in_place(model: Any) -> None:
    with torch.no_grad():
        model.model.layers[0].self_attn.v_proj.weight.mul_(2)


def _other(model: Any) -> None:
    layer = model.model.layers[0].self_attn.v_proj
    layer.weight = torch.nn.Parameter(2 * layer.weight.detach())


def _hooked(model: Any) -> None:
    model.model.layers[0].self_attn.v_proj.register_forward_hook(lambda module, given, out: 2 * out)


def _through_data(model: Any) -> None:
    model.model.layers[0].self_attn.v_proj.weight.data *= 2


def _forward(model: Any) -> None:
    layer = model.model.layers[0].self_attn.v_proj
    layer.forward = lambda x: 2 * type(layer).forward(layer, x)


@pytest.mark.parametrize("change", [_in_place, _other, _hooked, _through_data, _forward])
@pytest.mark.parametrize("running", [False, True])
def test_blocks_of_weights_that_were_changed_are_not_shared(change: Callable[[Any], None], running: bool) -> None:
    lm = random_sdar()
    with dllm.Engine(lm, "vanilla", Block(), batch_size=1, max_length=48, block_length=4) as engine:
        engine.add([*SYSTEM, 20], **OPTIONS)
        if running:  # while a request is decoded, which then leaves nothing
            engine.step()
            change(lm.backbone)
            list(engine.steps())
        else:
            list(engine.steps())
            change(lm.backbone)
        found = []
        for _ in range(2):
            engine.add([*SYSTEM, 20], **OPTIONS)
            found += [answer for step in engine.steps() for answer in step.answers.values()]
    (alone,) = decoded(lm, [[*SYSTEM, 20]])
    assert [each.completion for each in found] == [alone.completion] * 2
    assert [each.reused for each in found] == [0, 12]
