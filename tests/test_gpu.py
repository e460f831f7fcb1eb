"""What a CUDA device decodes: the tokens of the CPU in float64, and those of the reference implementations.

    pytest -m gpu

`DLLM_TEST_DEVICE=cpu` runs these tests on the CPU, to try them where there is no such device; nothing is captured then.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

import dllm
from contract_rig import BACKBONES, BY_NAME, PROMPTS
from dllm.decoding.compatibility import unmet
from dllm.decoding.graphs import Capture
from dllm.filters.training import collect
from dllm.models import kernels
from dllm.models.linear import join_products
from dllm.resolve import names, resolve
from dllm.samplers import ARGuided, Learn2PD
from golden_batches import decoded
from golden_plan import Plan
from models import random_filter, random_guide, random_sdar
from test_golden import BLOCK, HERE, LOSSY, SHARED, cases, compare

DEVICE = os.environ.get("DLLM_TEST_DEVICE", "cuda")
if DEVICE == "cuda" and not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)  # before thousands of cases are collected
pytestmark = pytest.mark.gpu
MAKERS = {**BACKBONES, "sdar": random_sdar}
CACHES: dict[str, Any] = {name: resolve("cache", name, object) for name in names("cache")}
DRAWING = {"remdm"}  # each device has random numbers of its own for a seed: compared with launched forwards
GRAPHS = (False, True) if DEVICE == "cuda" else (False,)


def settings() -> Iterator[Any]:
    for sampler, cache_name, graphs in product(BY_NAME, CACHES, GRAPHS):
        if not unmet(BY_NAME[sampler], CACHES[cache_name], cuda_graphs=graphs):
            yield pytest.param(sampler, cache_name, graphs, id=f"{sampler}-{cache_name}-{'replayed' if graphs else ''}")


def sampler_of(name: str, device: str) -> Any:
    """A sampler whose models are its own, and on the device of the denoiser."""
    if name == "learn2pd":
        return Learn2PD(random_filter(), threshold=0.8, allow_mismatch=True)
    if name == "ar_guided":
        return ARGuided(random_guide().to(device), accept="topk", top_k=9)
    return BY_NAME[name]


@cache
def models(family: str, dtype: torch.dtype) -> tuple[dllm.LanguageModel, dllm.LanguageModel]:
    """A model on the CPU, and the same on the device as `dllm.load` leaves it there."""
    cpu, device = MAKERS[family](dtype=dtype), MAKERS[family](dtype=dtype)
    device.backbone.to(DEVICE)
    join_products(device.backbone.blocks)
    return cpu, device


@pytest.mark.parametrize("family", MAKERS)
@pytest.mark.parametrize(("sampler", "cache_name", "graphs"), list(settings()))
@pytest.mark.parametrize("batch_size", [1, 3])
def test_tokens_are_those_of_the_cpu(family: str, sampler: str, cache_name: str, graphs: bool, batch_size: int) -> None:
    options: dict[str, Any] = {"gen_length": 24, "block_length": 8, "batch_size": batch_size, "seed": 0}
    cpu, device = models(family, torch.float64)
    if sampler == "daedal" and device.backbone.pattern is not None:
        pytest.skip("it needs the whole canvas")
    reference = device if sampler in DRAWING else cpu
    expected = dllm.generate(
        reference, PROMPTS, sampler_of(sampler, reference.device.type), CACHES[cache_name],
        cuda_graphs=None if reference is cpu else False, **options,
    )  # fmt: skip
    for _ in range(2 if graphs else 1):  # the second time everything is captured
        found = dllm.generate(
            device, PROMPTS, sampler_of(sampler, DEVICE), CACHES[cache_name], cuda_graphs=graphs or None, **options
        )
        assert torch.equal(found.sequences.cpu(), expected.sequences.cpu())
        assert torch.equal(found.nfe.cpu(), expected.nfe.cpu())


@cache
def golden(folder: Path) -> dllm.LanguageModel:
    return dllm.load(folder, device=DEVICE)


FAMILIES = [(BLOCK / name, ("cases.jsonl",)) for name in ("sdar",)]
FILES: list[tuple[Path, tuple[str, ...]]] = [
    (HERE, ("cases.jsonl",)), (SHARED, ("llada_cases.jsonl", "dream_cases.jsonl")), *FAMILIES,
]  # fmt: skip
CASES = [case for file in FILES for case in cases(*file) if case.id not in LOSSY]


@pytest.mark.parametrize(("folder", "case", "planned"), CASES)
def test_decodes_as_the_reference(folder: Path, case: dict[str, Any], planned: Plan) -> None:
    lm = golden(folder / case["checkpoint"])
    found = dllm.generate(lm, [case["prompt"]], planned.sampler, planned.cache, **planned.options)
    compare(case, planned, decoded(found))


@pytest.mark.parametrize("family", MAKERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_decodes_to_the_end(family: str, dtype: torch.dtype) -> None:
    lm = MAKERS[family](dtype=dtype)
    lm.backbone.to(DEVICE)
    for cache_name in CACHES:
        result = dllm.generate(lm, PROMPTS, "threshold", cache_name, gen_length=24, block_length=8)
        assert not any(result.errors)
        assert lm.backbone.mask_token_id not in result.completions


@pytest.mark.skipif(DEVICE != "cuda", reason="captures on a CUDA device only")
def test_garbage_is_not_collected_during_a_capture() -> None:
    def capture() -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(gc, "collect", lambda *_: 0)  # `torch.cuda.graph` may, before it begins
            graph, result = Capture(torch.device(DEVICE))(lambda: many(numbers))
        graph.replay()
        assert torch.equal(result, expected)
        ring: list[Any] = [graph]  # is freed by the garbage collector alone
        ring.append(ring)

    def many(numbers: torch.Tensor) -> torch.Tensor:
        kept = [[numbers + each] for each in range(99)]  # the collector runs as objects are made
        return sum((one for (one,) in kept), numbers)

    numbers = torch.ones(4, device=DEVICE)
    expected = many(numbers)
    before = gc.get_threshold()
    gc.set_threshold(1)
    try:
        for _ in range(20):
            capture()
    finally:
        gc.set_threshold(*before)


@pytest.mark.skipif(DEVICE != "cuda", reason="captures on a CUDA device only")
def test_a_model_with_a_hook_that_waits_is_launched() -> None:
    lm = random_sdar()
    lm.backbone.to(DEVICE)
    options: dict[str, Any] = {"gen_length": 24, "block_length": 8}
    expected = dllm.generate(lm, PROMPTS, "threshold", "dual", cuda_graphs=False, **options)
    lm.backbone.blocks[0].register_forward_hook(lambda *given: print(given[-1].sum().item()))
    with pytest.warns(UserWarning, match="forwards are launched kernel by kernel"):
        found = dllm.generate(lm, PROMPTS, "threshold", "dual", **options)
    assert torch.equal(found.sequences, expected.sequences)
    assert torch.cuda.current_stream() == torch.cuda.default_stream()


@pytest.mark.skipif(DEVICE != "cuda", reason="compiles for a CUDA device only")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_compiled_kernels_compute_what_they_say(dtype: torch.dtype) -> None:
    hidden, other = torch.randn(2, 2, 7, 64, dtype=dtype, device=DEVICE)
    weight = torch.randn(64, dtype=dtype, device=DEVICE)
    heads, angles = hidden.unflatten(-1, (4, 16)).transpose(1, 2), torch.randn(2, 1, 7, 16, device=DEVICE)
    calls: list[tuple[Any, ...]] = [
        (kernels.rms_norm, hidden, weight, 1e-5), (kernels.add_rms_norm, hidden, other, weight, 1e-5),
        (kernels.rotate, heads, angles.cos(), angles.sin()), (kernels.gated, hidden, other),
    ]  # fmt: skip
    with torch.inference_mode():
        for kernel, *inputs in calls:
            compiled = kernel(*[each.clone() if isinstance(each, torch.Tensor) else each for each in inputs])
            torch.testing.assert_close(compiled, kernel.function(*inputs))
            assert not kernel._failed


def test_a_filter_is_trained_on_the_device() -> None:
    options: dict[str, Any] = {"base": "vanilla", "cache": "none", "gen_length": 16, "block_length": 8}
    expected, found = (collect(lm, PROMPTS[:2], **options) for lm in models("llada", torch.float64))
    for left, right in zip(vars(expected).values(), vars(found).values(), strict=True):
        torch.testing.assert_close(left, right.cpu())
