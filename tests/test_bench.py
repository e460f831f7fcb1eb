"""`dllm bench`: what a step costs beside the forward it needs."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dllm
from commands import Outcome, command, unread
from dllm.bench import Bench, CommitsPerStep, random_model
from dllm.bench.bare import Call
from dllm.cache import Block, DLLMCache, Dual, NoCache
from dllm.decoding.denoiser import Denoiser
from dllm.decoding.graphs import Forward
from dllm.decoding.prediction import Prediction
from dllm.models.experts import GatedMLP
from dllm.samplers import Learn2PD, LocalLeap, ReMDM, Saber, Threshold, Vanilla, Wino
from dllm.scripts.bench import _costs_table
from models import random_dream, random_llada, random_llada_moe, random_sdar
from toys import Device

SMALL = ["model=random:tiny", "canvas=48", "gen_length=16", "block_length=8", "steps=6"]


@pytest.fixture(scope="module")
def benched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Outcome, Path]:
    out = tmp_path_factory.mktemp("bench") / "new" / "v1.small"
    return command("bench", *SMALL, "batch_size=2", "repeats=2", "references=[causal]", f"out={out}"), out


def tables(text: str) -> list[list[list[str]]]:
    """The cells of each table, the head among them."""
    found: list[list[list[str]]] = [[]]
    for line in text.splitlines():
        if line.startswith("| "):
            found[-1].append([cell.strip() for cell in line.strip("|").split("|")])
        elif found[-1] and not line.startswith("|"):
            found.append([])
    return [each for each in found if each]


def test_every_cache_is_timed(benched: tuple[Outcome, Path]) -> None:
    result, out = benched
    assert (result.code, result.err) == (0, "")
    text = Path(f"{out}.md").read_text()
    assert result.out == f"{text}\nwritten to {out}.md and {out}.json\n"
    caches = ["none", "prefix", "dual", "freecache", "dkv", "dllm_cache", "d2cache", "sparse", "elastic"]
    for head, *rows in tables(text):
        assert [row[0] for row in rows] == [f"threshold + {cache}" for cache in caches]
        assert {len(row) for row in rows} == {len(head)}
    assert "random:tiny, float32, canvas=48, gen_length=16, block_length=8, batch_size=2, " in text
    assert "A causal model of" in text


def test_the_record_holds_what_the_table_shows(benched: tuple[Outcome, Path]) -> None:
    record = json.loads(Path(f"{benched[1]}.json").read_text())
    costs = {label.removeprefix("threshold + "): cost for label, cost in record["costs"].items()}
    assert costs["none"]["columns"] == 48
    # One full forward, then windows of eight columns; six steps saw one block.
    assert costs["dual"]["columns"] == (48 + 5 * 8) / 6
    assert costs["none"]["store_bytes"] == 0
    assert costs["dual"]["store_bytes"] == 2 * 4 * 2 * 4 * (48 + 1) * 32 * 4
    for cost in costs.values():
        assert cost["steps"] == 6
        assert cost["to_bare"] > 0.3
        assert sum(cost["shares"].values()) == pytest.approx(1)
        assert min(cost["shares"][name] for name in ("embedding", "layers", "projection", "selection", "python")) > 0
        assert cost["peak"] >= 0
    assert costs["none"]["shares"]["cache"] == 0
    assert costs["dual"]["shares"]["cache"] > 0
    assert record["causal_tokens_per_second"] > 0
    assert record["memory_floor"] > 0
    assert record["arithmetic_floor"] is None


def test_what_a_gpu_replays_is_told_from_what_it_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device()
    monkeypatch.setattr("dllm.decoding.memory.Forward", lambda backbone, _: Forward(backbone, True, device.capture))
    bench = Bench(random_llada(), 40, 20, 1, 10)
    bench.bare.forward = Forward(bench.lm.backbone, True, device.capture)
    cost = bench.run({"none": (Vanilla(), NoCache()), "some": (Vanilla(), DLLMCache(99, 99, 0.5))}, None, 2)
    assert cost["none"].launched == 0  # its shape was captured while warming up
    assert cost["some"].launched == cost["some"].steps
    assert cost["none"].first > 0
    table = _costs_table(cost, 1, True)
    assert "| first step, ms | steps with launches | whole decode, tokens/s |" in table
    assert [line.split(" | ")[-2] for line in table.splitlines()[2:4]] == ["0", f"{cost['some'].steps}"]
    assert min(each.whole for each in cost.values()) > 0


def test_a_block_causal_model_computes_its_prompt_in_every_repetition() -> None:
    bench = Bench(random_sdar(), 40, 20, 1, None)
    costs = bench.run({"block": (Vanilla(), Block()), "none": (Vanilla(), NoCache())}, None, 2)
    assert costs["block"].to_bare is not None
    assert 1 < costs["block"].columns < costs["none"].columns
    once = bench.run({"block": (Vanilla(), Block())}, None, 1)
    assert once["block"].columns == costs["block"].columns


def test_the_floor_of_arithmetic_is_proportional_to_the_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dllm.bench.timing._MULTIPLIED", 64)
    ticks = iter(range(100))
    monkeypatch.setattr("dllm.bench.timing.now", lambda _: float(next(ticks)))
    bench = Bench(random_llada(), 40, 20, 1, 10)
    layers = sum(each.numel() for block in bench.lm.backbone.blocks for each in block.parameters())
    assert bench.arithmetic_floor(40) == pytest.approx(layers * 40 / 64**3)


def test_experts_that_are_not_chosen_are_not_part_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dllm.bench.timing._MULTIPLIED", 64)
    ticks = count()
    monkeypatch.setattr("dllm.bench.timing.now", lambda _: float(next(ticks)))
    lm = random_llada_moe()
    experts = [part for block in lm.backbone.blocks for part in block.modules() if isinstance(part, GatedMLP)]
    chosen = lm.backbone.config.num_experts_per_tok / lm.backbone.config.num_experts
    expert = sum(each.numel() for part in experts for each in part.parameters())
    layers = sum(each.numel() for block in lm.backbone.blocks for each in block.parameters())
    wanted = (layers - (1 - chosen) * expert) * 40 / 64**3
    assert Bench(lm, 40, 20, 1, 10).arithmetic_floor(40) == pytest.approx(wanted)


def test_a_layer_that_computes_some_columns_is_compared_with_a_forward_of_as_many() -> None:
    bench = Bench(random_llada(), 40, 20, 1, 10)
    shapes: list[tuple[int, ...]] = []
    bench.lm.backbone.register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape)))
    costs = bench.run({"none": (Vanilla(), NoCache()), "some": (Vanilla(), DLLMCache(99, 99, 0.5))}, 4)
    # A first layer of 20 columns and a second of 10.
    assert costs["some"].columns == (40 + 3 * 15) / 4
    assert (1, 15) in shapes


def test_a_bare_forward_attends_to_the_whole_canvas() -> None:
    bench = Bench(random_llada(), 40, 20, 2, 10)
    seen: list[tuple[int, ...]] = []
    inner = torch.nn.functional.scaled_dot_product_attention
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "torch.nn.functional.scaled_dot_product_attention",
            lambda q, k, v, **rest: (seen.append((q.shape[2], k.shape[2])), inner(q, k, v, **rest))[1],
        )
        bench._bare(Call(2, 10, 4, True))
    assert set(seen) == {(10, 40)}


@pytest.mark.parametrize("make", [random_llada, random_dream])
@pytest.mark.parametrize("block_length", [7, None])
def test_reference_implementations_give_what_the_engine_does(
    make: Callable[[], dllm.LanguageModel], block_length: int | None
) -> None:
    bench = Bench(make(), 40, 20, 2, block_length)
    paced = {
        "plain": CommitsPerStep(3, Threshold(2.0)),
        "leap": CommitsPerStep(3, LocalLeap()),
        "filter": CommitsPerStep(3, Learn2PD(filter="tiny-llada", allow_mismatch=True)),
    }
    settings: dict[str, Any] = {
        f"{name} {label}": (sampler, cache)
        for name, sampler in paced.items()
        for label, cache in {"none": NoCache(), "dual": Dual()}.items()
    }
    costs = bench.run(settings, None, references={"straightforward": 3, "dual": 3})
    for name in paced:
        assert costs[f"{name} none"].tokens == costs["straightforward"].tokens
        assert costs[f"{name} dual"].tokens == costs["dual"].tokens
        assert costs[f"{name} dual"].steps == costs["dual"].steps
    assert costs["straightforward"].tokens != costs["dual"].tokens
    assert bench.lm.backbone.mask_token_id not in np.array(costs["dual"].tokens)


def test_nothing_stays_patched_after_looking_into_a_step() -> None:
    bench = Bench(random_llada(), 40, 20, 1, 10)
    sampler = Vanilla()
    before = Vanilla.step, Prediction.__init__, Denoiser.__call__
    assert bench.shares(sampler, Dual()) is not None
    assert (Vanilla.step, Prediction.__init__, Denoiser.__call__) == before
    assert "forward" not in vars(bench.lm.backbone.blocks[0])


def test_quantised_weights_are_named() -> None:
    pytest.importorskip("optimum.quanto")
    result = command("bench", *SMALL, "caches=[none]", "model.quantization={quant_method:quanto,weights:int8}")
    assert result.code == 0, result.err
    assert 'float32 quantised by \\{"quant_method": "quanto", "weights": "int8"\\}, canvas=48' in result.out


@pytest.mark.parametrize("name", ["tiny-llada", "tiny-dream"])
def test_bundled_models_are_timed_on_their_whole_context(name: str) -> None:
    # Their [MASK] is an id among the others; a prompt must not hold it.
    result = command(
        "bench", f"model={name}", "steps=1", "batch_size=1", "gen_length=8", "block_length=null", "caches=[none,dual]"
    )
    assert (result.code, result.err) == (0, "")
    assert "canvas=512" in result.out


def test_a_canvas_beyond_the_context_is_refused() -> None:
    result = command("bench", "model=tiny-llada", "canvas=5000")
    assert (result.code, result.out) == (2, "")
    assert "canvas=5000 is longer than the model's context of 512; use less" in result.err


def test_settings_end_where_the_canvas_is_full() -> None:
    costs = Bench(random_llada(), 20, 8, 1, 4).run({"dual": (Vanilla(tokens_per_step=2), Dual())}, 50)
    assert costs["dual"].steps == 4


def test_rows_that_have_finished_compute_nothing_and_are_not_counted() -> None:
    bench = Bench(random_llada(), 20, 8, 4, 4)
    cost = bench.run({"it": (Threshold(0.3), NoCache())}, None)["it"]
    alone = dllm.generate(bench.lm, bench.prompts, Threshold(0.3), gen_length=8, block_length=4, stop_at_eos=False)
    assert min(alone.nfe) < max(alone.nfe) == cost.steps
    assert cost.columns == 20


@pytest.mark.parametrize("sampler", [Vanilla(), ReMDM(), Saber(), Wino()])
def test_a_token_that_is_written_again_counts_once(sampler: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = count()
    monkeypatch.setattr("dllm.bench.timing.now", lambda device: next(clock))  # a step takes a second, a decode too
    bench = Bench(random_llada(), 24, 16, 2, 8)
    cost = bench.run({"it": (sampler, NoCache())}, None)["it"]
    assert cost.tokens_per_second * cost.steps == pytest.approx(2 * 16)
    assert bench._whole(*bench._engine(sampler, NoCache())) == 2 * 16


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["canvas=0"], "canvas=0"),
        (["gen_length=48"], "gen_length=48 leaves no prompt in canvas=48"),
        (["steps=0"], "steps=0"),
        (["repeats=0"], "repeats=0"),
        (["model=random:huge"], "random:huge"),
        (["model.dtype=int8"], "dtype='int8'"),
        (["caches=[]"], "caches=[] is empty"),
        (["samplers=[nothing]"], "unknown samplers[0]='nothing'; expected one of adablock"),
        (["caches=[{dual:{measure_every:0}}]"], "caches[0].measure_every=0"),
        (["caches=[none,{dual:{speed:1}}]"], "unknown option 'caches[1].dual.speed'; expected one of measure_every"),
        (["caches=[5]"], "caches[0]=5 is not a cache; give a name, or {name: {option: value}}"),
        (["samplers=[freedave]", "caches=[d2cache]"], "cache=d2cache is not compatible with lossless drafting"),
        (["samplers=[freedave]", "commits_per_step=2"], "commits_per_step=2 does not apply to FreeDave"),
        (["commits_per_step=0"], "commits_per_step=0"),
        (["references=[tomorrow]"], "references[0]='tomorrow'"),
        (["cuda_graphs=true", "caches=[dual]"], "cuda_graphs=true needs a CUDA device"),
        (["cuda_graphs=true", "caches=[d2cache]"], "cache=d2cache is not compatible with CUDA graphs"),
        (["threads=0"], "threads=0"),
        (["repeats=9223372036854775807"], "repeats=9223372036854775807 is out of range; use 1 to 1000000"),
        (["model.device=foo"], "device='foo'"),
        (["model.revision=abc"], "model.revision='abc' has no effect on a random model"),
        (["caches=null"], "caches"),
        (["out=/dev/null/x"], "out='/dev/null/x' cannot be written"),
        (["+speed=1"], "unknown option 'speed'; expected one of "),
        (["block_length=x"], "block_length='x'"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], named: str) -> None:
    result = command("bench", *SMALL, *arguments)
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("dllm bench: error: ")
    assert result.err.count("\n") == 1
    assert named in result.err


def test_timings_are_written_even_if_nobody_reads_what_is_printed(tmp_path: Path) -> None:
    assert unread("bench", *SMALL, "caches=[none]", f"out={tmp_path}/costs") == 1
    assert json.loads((tmp_path / "costs.json").read_text())["costs"]
    assert (tmp_path / "costs.md").is_file()


@pytest.mark.parametrize(("preset", "parameters"), [("llada-8b", 8.0e9), ("dream-7b", 7.6e9), ("100m", 110e6)])
def test_the_presets_have_the_published_shapes(preset: str, parameters: float) -> None:
    lm = random_model(preset, 64, "meta", torch.bfloat16)
    assert sum(p.numel() for p in lm.backbone.parameters()) == pytest.approx(parameters, rel=0.02)
    assert lm.backbone.dtype == torch.bfloat16


def test_forwards_that_are_replayed_are_timed_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device()
    monkeypatch.setattr(
        "dllm.decoding.memory.Forward", lambda backbone, wanted: Forward(backbone, True, device.capture)
    )
    bench = Bench(random_llada(), 40, 20, 1, 10)
    bench.bare.forward = Forward(bench.lm.backbone, True, Device().capture)
    costs = bench.run({"dual": (Vanilla(), Dual())}, None)
    assert device.made
    assert costs["dual"].steps == 20
    assert costs["dual"].to_bare is not None
    # Every step has a forward to be compared with, replayed where it was.
    ratios = [timing.bare for timing in islice(bench._decoding("dual", {}, *bench._engine(Vanilla(), Dual())), 20)]
    assert all(ratios)
