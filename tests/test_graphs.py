"""Forwards replayed from graphs, with a graph that runs what it captured again, as a device would."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch

import dllm
from dllm.decoding import graphs
from dllm.models.experts import GatedMLP
from engine_rig import waiting_engine
from models import random_dream, random_guide, random_llada, random_llada_moe
from toys import Device

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12], [5, 9], [6, 6, 6]]


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    found = Device()

    def start(backbone: Any, wanted: Any = None) -> graphs.Forward:
        return graphs.Forward(backbone, True, found.capture)

    monkeypatch.setattr("dllm.decoding.memory.Forward", start)
    return found


@pytest.mark.parametrize("make", [random_llada, random_dream])
@pytest.mark.parametrize(
    "cache", ["prefix", "dual", "freecache", "dkv", "dllm_cache", "d2cache", "sparse", "elastic", "none"]
)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_replayed_forwards_give_what_launched_ones_do(
    make: Callable[..., dllm.LanguageModel], cache: str, batch_size: int, device: Device
) -> None:
    lm, options = make(), {"gen_length": 18, "block_length": 6, "batch_size": batch_size}
    replayed = dllm.generate(lm, PROMPTS, "threshold", cache, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dllm.decoding.memory.Forward", graphs.Forward)
        lm.spare.clear()
        launched = dllm.generate(lm, PROMPTS, "threshold", cache, **options)
    assert torch.equal(replayed.sequences, launched.sequences)
    assert torch.equal(replayed.nfe, launched.nfe)
    # Those that choose within the layers or look at attention have no memory that stays where it is.
    assert bool(device.made) == (cache in ("none", "prefix", "dual", "freecache", "dkv", "sparse"))


def test_graphs_of_layers_that_were_changed_are_captured_again(device: Device) -> None:
    lm, options = random_llada(), {"gen_length": 18, "block_length": 6}

    def decoded(engine: dllm.Engine) -> list[list[int]]:
        engine.add(PROMPTS[0], **options)
        return [answer.completion for step in engine.steps() for answer in step.answers.values()]

    with dllm.Engine(lm, "threshold", "dual", batch_size=1, max_length=32) as engine:
        before, made = decoded(engine), len(device.made)
        lm.backbone.model.transformer.blocks[0].v_proj.register_forward_hook(lambda module, given, out: 0 * out)
        after = decoded(engine)
    assert made
    assert len(device.made) > made
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dllm.decoding.memory.Forward", graphs.Forward)
        lm.spare.clear()
        with dllm.Engine(lm, "threshold", "dual", batch_size=1, max_length=32) as engine:
            assert decoded(engine) == after != before


@pytest.mark.parametrize("accept", ["argmax", "ratio", "sample"])
@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("cache", ["none", "dual"])
def test_a_guide_is_replayed_too(cache: str, batch_size: int, accept: Any, device: Device) -> None:
    lm, policy = random_llada(), dllm.samplers.ARGuided(random_guide(), accept)
    options: dict[str, Any] = {"gen_length": 16, "block_length": 8, "batch_size": batch_size, "seed": 0}
    replayed = dllm.generate(lm, PROMPTS, policy, cache, **options)
    shapes = {each.result.shape[-1] for each in device.made}
    assert shapes == {lm.backbone.embedding_size, lm.backbone.logits_size}  # hidden states, and the guide's logits
    made = []
    for _ in range(4):  # the first of them capture what has not come often enough
        assert torch.equal(dllm.generate(lm, PROMPTS, policy, cache, **options).sequences, replayed.sequences)
        made.append(len(device.made))
    assert made[2] == made[3]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dllm.decoding.memory.Forward", graphs.Forward)
        lm.spare.clear()
        launched = dllm.generate(lm, PROMPTS, policy, cache, **options)
    assert torch.equal(replayed.sequences, launched.sequences)
    assert torch.equal(replayed.guide_nfe, launched.guide_nfe)


def test_positions_that_share_a_column_are_all_answered(device: Device) -> None:
    # The first two positions of a canvas without a prompt are both read at its first column.
    lm, filtered = random_dream(), dllm.samplers.Learn2PD(filter="tiny-llada", allow_mismatch=True)
    options: dict[str, Any] = {"gen_length": 18, "block_length": 6, "stop_at_eos": False}
    replayed = dllm.generate(lm, [[]], filtered, "dual", **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dllm.decoding.memory.Forward", graphs.Forward)
        lm.spare.clear()
        launched = dllm.generate(lm, [[]], filtered, "dual", **options)
    assert device.made
    assert torch.equal(replayed.sequences, launched.sequences)


def test_a_shape_is_captured_once_it_comes_again(device: Device) -> None:
    seen: list[int] = []
    dllm.generate(
        random_llada(), [[5, 6, 7]], "vanilla", "dual", gen_length=16, block_length=8, stop_at_eos=False,
        callback=lambda step: seen.append(len(device.made)),
    )  # fmt: skip
    # Each block begins with everything, which here is a narrow forward as well; each shape is launched once.
    assert seen == [0, 0, *[1] * 6, *[2] * 8]


def test_what_cannot_be_captured_is_launched(device: Device) -> None:
    lm = random_llada()
    options: dict[str, Any] = {"gen_length": 16, "block_length": 8}
    expected = dllm.generate(lm, PROMPTS, "threshold", "dual", **options)
    hook = lm.backbone.blocks[0].register_forward_hook(lambda *given: print(given[-1].sum().item()))
    device.made.clear()
    with pytest.warns(UserWarning, match="launched kernel by kernel, which is slower: .* cuda_graphs=false") as warned:
        found = dllm.generate(lm, PROMPTS, "threshold", "dual", **options)
    assert len(warned) == 1
    assert not device.made
    assert torch.equal(found.sequences, expected.sequences)
    hook.remove()
    dllm.generate(lm, PROMPTS, "threshold", "dual", **options)
    assert device.made


def test_a_capture_ends_with_the_collector_as_it_was() -> None:
    for wanted in (gc.disable, gc.enable):
        wanted()
        was_on = gc.isenabled()
        with graphs._without_collection():
            assert not gc.isenabled()
        assert gc.isenabled() == was_on


def test_a_wide_shape_is_captured_later(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "NARROW", 8)
    seen: list[int] = []
    dllm.generate(
        random_llada(), [[5, 6, 7]], "vanilla", "none", gen_length=8, block_length=8, stop_at_eos=False,
        callback=lambda step: seen.append(len(device.made)),
    )  # fmt: skip
    assert seen == [0, 0, 0, *[1] * 5]


def test_what_is_there_already_is_not_copied(device: Device) -> None:
    engine = waiting_engine(
        random_llada(), [[5, 6, 7]], "vanilla", "dual", gen_length=16, block_length=16, stop_at_eos=False
    )
    given = [next(iter(engine.denoiser._run.replays._captured.values())).given for _ in engine.steps() if device.made]
    for before, after in pairwise(given):
        same = [left is right for left, right in zip(before, after, strict=True)]
        assert same == [False, False, True, True]  # selected, tokens, positions, columns


def test_experts_that_are_computed_everywhere_are_not_captured_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = random_llada_moe(dtype=torch.float64).backbone
    assert graphs.Forward(backbone, True).widest == graphs.NARROW
    assert graphs.Forward(random_llada().backbone, True).widest == graphs._WIDEST
    assert graphs.Forward(backbone, False).widest == 0
    grouped = random_llada_moe(dtype=torch.float32).backbone  # in one product for all experts
    assert graphs.Forward(grouped, True).widest == graphs._WIDEST
    expert = next(part for part in grouped.modules() if isinstance(part, GatedMLP))
    expert.up_proj.register_forward_hook(lambda *_: None)  # as an adapter might
    assert graphs.Forward(grouped, True).widest == graphs.NARROW


def launches(lm: dllm.LanguageModel, patch: pytest.MonkeyPatch) -> list[int]:
    """The columns of each launched forward from now on."""
    widths, forward = [], lm.backbone.forward

    def counted(tokens: Any, *inputs: Any, **options: Any) -> Any:
        widths.append(tokens.numel())
        return forward(tokens, *inputs, **options)

    patch.setattr(lm.backbone, "forward", counted)
    return widths


@pytest.mark.parametrize("cache", ["prefix", "dual", "freecache", "dkv"])
def test_later_requests_are_replayed_whatever_their_lengths(
    cache: str, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = random_llada(max_length=128)
    launched = launches(lm, monkeypatch)
    engine = dllm.Engine(lm, "threshold", cache, batch_size=3, max_length=128)
    generator = random.Random(0)

    def decode(count: int) -> None:
        for _ in range(count):
            prompt = [generator.randrange(60) for _ in range(generator.randrange(1, 30))]
            engine.add(prompt, gen_length=generator.randrange(8, 40), block_length=8)
        for _ in engine.steps():
            pass

    decode(24)
    made, before = len(device.made), len(launched)
    decode(24)
    again = [width for width in launched[before:] if width <= graphs._WIDEST]
    assert len(device.made) - made <= 4
    assert len(again) <= 8


def test_rows_that_are_not_asked_about_keep_their_keys_and_values(device: Device) -> None:
    # With a batch of four at different blocks, the rows of a forward are seldom neighbours.
    lm, options = random_llada(), {"gen_length": 30, "block_length": 6, "batch_size": 4}
    prompts = [[5, 6, 7], [8], [9, 10, 11, 12], [5, 9], [6, 6, 6], [7, 1], [3], [12, 40, 2, 8]]
    for cache in ("dual", "freecache", "prefix", "sparse"):
        together = dllm.generate(lm, prompts, "threshold", cache, **options)
        alone = [dllm.generate(lm, [prompt], "threshold", cache, **options) for prompt in prompts]
        assert [each.completions[0].tolist() for each in alone] == together.completions.tolist()
    assert device.made


def test_wide_forwards_are_launched(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "_WIDEST", 15)
    dllm.generate(random_llada(), PROMPTS[:2], "vanilla", "dual", gen_length=16, block_length=8)
    assert not device.made


def test_the_oldest_graphs_are_given_up(monkeypatch: pytest.MonkeyPatch, device: Device) -> None:
    monkeypatch.setattr(graphs, "_MOST", 1)
    options: dict[str, Any] = {"gen_length": 16, "block_length": 8, "stop_at_eos": False}
    engine = waiting_engine(random_llada(), PROMPTS[:2], "vanilla", "prefix", **options)
    assert len(list(engine.steps())) == 16
    assert len(engine.denoiser._run.replays._captured) == 1
    assert len(device.made) > 1


@pytest.mark.parametrize("cache", ["dllm_cache", "d2cache", "elastic"])
def test_graphs_that_would_have_no_effect_are_refused(cache: str) -> None:
    with pytest.raises(ValueError, match=f"cache={cache} is not compatible with CUDA graphs .*; use cuda_graphs=null"):
        dllm.generate(random_llada(), PROMPTS, cache=cache, cuda_graphs=True)


def test_graphs_need_a_device_that_has_them() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(ValueError, match="cuda_graphs=true needs a CUDA device, and the model is on cpu; use null"):
        dllm.generate(random_llada(), PROMPTS, cache="dual", cuda_graphs=True)


@pytest.mark.parametrize("what", ["hook", "adapter", "weight"])
def test_what_runs_with_the_weights_is_part_of_a_graph(what: str, device: Device) -> None:
    lm = random_llada()
    if what == "adapter":
        peft = pytest.importorskip("peft")
        kind = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
        adapted = peft.get_peft_model(lm.backbone, kind)
    options: dict[str, Any] = {"gen_length": 8, "block_length": 8, "stop_at_eos": False}
    made = []
    for _ in range(3):
        dllm.generate(lm, [[5, 6, 7]], "vanilla", "dual", **options)
        made.append(len(device.made))
    assert 0 < made[1] == made[2]
    match what:
        case "hook":
            lm.backbone.blocks[0].register_forward_hook(lambda *_: None)
        case "adapter":
            adapted.base_model.disable_adapter_layers()
        case _:
            layer = lm.backbone.get_output_embeddings()
            layer.weight = torch.nn.Parameter(layer.weight.detach().clone())
    dllm.generate(lm, [[5, 6, 7]], "vanilla", "dual", **options)
    assert len(device.made) > made[2]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_graphs_of_a_device_give_what_launched_forwards_do() -> None:
    lm = random_llada()
    lm.backbone.to("cuda")
    options: dict[str, Any] = {"gen_length": 18, "block_length": 6, "batch_size": 2}
    replayed, launched = (
        dllm.generate(lm, PROMPTS, "threshold", "dual", cuda_graphs=wanted, **options) for wanted in (True, False)
    )
    assert torch.equal(replayed.sequences, launched.sequences)
