"""`dllm bench`: what a step costs beside the forward it needs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from commands import Outcome, command
from dllm.bench import Bench, Call, random_model
from dllm.cache import DLLMCache, Dual, NoCache
from dllm.samplers import Vanilla
from models import random_llada

SMALL = ["model=random:tiny", "canvas=48", "gen_length=16", "block_length=8", "steps=6"]


@pytest.fixture(scope="module")
def benched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Outcome, Path]:
    out = tmp_path_factory.mktemp("bench") / "new" / "v1.small"
    return command("bench", *SMALL, "batch_size=2", f"out={out}"), out


def test_every_cache_is_timed(benched: tuple[Outcome, Path]) -> None:
    result, out = benched
    assert (result.code, result.err) == (0, "")
    text = Path(f"{out}.md").read_text()
    assert result.out == f"{text}\nwritten to {out}.md and {out}.json\n"
    head, *rows = [line.strip("|").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    assert [row[0].strip() for row in rows] == ["none", "prefix", "dual", "freecache", "dkv", "dllm_cache", "d2cache"]
    assert {len(row) for row in rows} == {len(head)}
    assert "random:tiny, float32, canvas=48, gen_length=16, block_length=8, batch_size=2, Vanilla(" in text


def test_the_record_holds_what_the_table_shows(benched: tuple[Outcome, Path]) -> None:
    costs = json.loads(Path(f"{benched[1]}.json").read_text())["costs"]
    assert costs["none"]["columns"] == 48
    # One full forward, then seven columns of eight-column blocks, of which six steps saw one block.
    assert costs["dual"]["columns"] == (48 + 5 * 8) / 6
    assert costs["none"]["store_bytes"] == 0
    assert costs["dual"]["store_bytes"] == 2 * 4 * 2 * 4 * 48 * 32 * 4
    for cost in costs.values():
        assert cost["steps"] == 6
        assert cost["to_bare"] > 0.3
        assert cost["tokens_per_second"] == pytest.approx(2 / cost["step"], rel=0.01)


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
        bench._bare(Call(2, 10, 4, True), attend=True)
        bench._bare(Call(2, 10, 4, True), attend=False)
    assert set(seen[:2]) == {(10, 40)}
    assert set(seen[2:]) == {(10, 10)}


@pytest.mark.parametrize("name", ["tiny-llada", "tiny-dream"])
def test_bundled_models_are_timed_on_their_whole_context(name: str) -> None:
    # Their [MASK] is an id among the others; a prompt must not hold it.
    result = command("bench", f"model={name}", "steps=1", "gen_length=8", "block_length=null")
    assert (result.code, result.err) == (0, "")
    assert "canvas=512" in result.out


def test_a_canvas_beyond_the_context_is_refused() -> None:
    result = command("bench", "model=tiny-llada", "canvas=5000")
    assert (result.code, result.out) == (2, "")
    assert "canvas=5000 is longer than the model's context of 512; use less" in result.err


def test_settings_end_where_the_canvas_is_full() -> None:
    costs = Bench(random_llada(), 20, 8, 1, 4).run({"dual": (Vanilla(tokens_per_step=2), Dual())}, 50)
    assert costs["dual"].steps == 4


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["canvas=0"], "canvas=0"),
        (["gen_length=48"], "gen_length=48 leaves no prompt in canvas=48"),
        (["steps=0"], "steps=0"),
        (["model=random:huge"], "random:huge"),
        (["model.dtype=int8"], "dtype='int8'"),
        (["~caches.none"], "lack none"),
        (["+caches.dual.measure_every=0"], "measure_every=0"),
        (["threads=0"], "threads=0"),
        (["model.device=foo"], "device='foo'"),
        (["model.revision=abc"], "model.revision='abc' has no effect on a random model"),
        (["caches=null"], "caches"),
        (["+caches.x=5"], "caches.x=5 is no cache"),
        (["+caches.x={_target_: dllm.samplers.Threshold}"], "caches.x"),
        (["+caches.x={_target_: dllm.cache.DKVCache, interval: 0}"], "caches.x: interval=0"),
        (["+caches.x={_target_: dllm.cache.Foo}"], "caches.x: Error locating target 'dllm.cache.Foo'"),
        (["out=/dev/null/x"], "out='/dev/null/x' cannot be written"),
        (["+speed=1"], "speed is no option"),
        (["block_length=x"], "block_length='x'"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], named: str) -> None:
    result = command("bench", *SMALL, *arguments)
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("dllm bench: error: ")
    assert result.err.count("\n") == 1
    assert named in result.err


def test_the_largest_preset_has_the_published_shape() -> None:
    with torch.device("meta"):
        lm = random_model("llada-8b", 64, "meta", torch.bfloat16)
    assert sum(p.numel() for p in lm.backbone.parameters()) == pytest.approx(8.0e9, rel=0.02)
