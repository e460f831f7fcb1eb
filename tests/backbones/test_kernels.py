"""Compiled kernels, with a compiler that needs no GPU: the same values, few variants, and no failure."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import dllm
from dllm.models import kernels
from dllm.models.kernels import Kernel
from models import random_dream, random_llada

EVERY = [kernels.rms_norm, kernels.add_rms_norm, kernels.rotate, kernels.gated, kernels.write]


class Compiler:
    """Stands in for the GPU's compiler: runs the traced graphs as they are, and counts them."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: Any, _: Any) -> Any:
        self.graphs += 1
        return graph.forward


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Compiler:
    own, compile = Compiler(), torch.compile
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", lambda function, **options: compile(function, backend=own, **options))
    monkeypatch.setattr(Kernel, "devices", frozenset({"cpu"}))
    for kernel in EVERY:
        monkeypatch.setattr(kernel, "_compiled", None)
        monkeypatch.setattr(kernel, "_failed", False)
    return own


def inputs(width: int, dtype: torch.dtype) -> dict[Kernel[Any, Any], tuple[Any, ...]]:
    torch.manual_seed(width)
    hidden, other, weight = torch.randn(2, width, 8), torch.randn(2, width, 8), torch.randn(8)
    heads, angles = torch.randn(2, width, 2, 8).transpose(1, 2), torch.randn(2, 1, width, 6)
    tensors: dict[Kernel[Any, Any], tuple[Any, ...]] = {
        kernels.rms_norm: (hidden, weight),
        kernels.add_rms_norm: (hidden, other, weight),
        kernels.rotate: (heads, angles.cos(), angles.sin()),
        kernels.gated: (hidden, other),
        kernels.write: (heads, heads + 1, *torch.randn(2, 2, 2, 600, 8)),
    }
    last = dict.fromkeys(EVERY[:2], (1e-5,)) | {kernels.write: (torch.randperm(600)[: 2 * width].view(2, -1),)}
    return {kernel: (*(each.to(dtype) for each in own), *last.get(kernel, ())) for kernel, own in tensors.items()}


@pytest.mark.parametrize("kernel", EVERY, ids=lambda kernel: kernel.function.__name__)
def test_values_are_those_of_the_function(kernel: Kernel[Any, Any], compiler: Compiler) -> None:
    with torch.inference_mode():
        for width in (5, 1, 7):
            given, plain = inputs(width, torch.float64)[kernel], inputs(width, torch.float64)[kernel]
            results = kernel(*given), kernel.function(*plain)
            if kernel is kernels.write:  # into two of its inputs
                results = given[2:4], plain[2:4]
            torch.testing.assert_close(*results, rtol=0, atol=1e-12)
    assert compiler.graphs > 0


@pytest.mark.parametrize("kernel", EVERY, ids=lambda kernel: kernel.function.__name__)
def test_widths_share_variants(kernel: Kernel[Any, Any], compiler: Compiler) -> None:
    with torch.inference_mode():
        for width in (*range(1, 40), 5, 300):
            kernel(*inputs(width, torch.float32)[kernel])
    assert compiler.graphs <= 3
    assert not kernel._failed


@pytest.mark.parametrize("make", [random_llada, random_dream])
@pytest.mark.parametrize("cache", ["none", "freecache", "dllm_cache"])
def test_decodes_are_the_same(make: Callable[..., Any], cache: str, compiler: Compiler) -> None:
    lm = make(dtype=torch.float64)

    def decode() -> Tensor:
        prompts = [[1, 2, 3], [4, 5, 6, 7, 8]]
        return dllm.generate(lm, prompts, "threshold", cache, gen_length=16, block_length=8).sequences

    compiled, graphs = decode(), compiler.graphs
    Kernel.devices = frozenset()
    assert torch.equal(compiled, decode())
    assert 0 < compiler.graphs == graphs < 40


def test_gradients_take_the_function(compiler: Compiler) -> None:
    x = torch.randn(2, 3, 8, requires_grad=True)
    kernels.rms_norm(x, torch.ones(8), 1e-5).sum().backward()
    assert x.grad is not None
    assert compiler.graphs == 0


def test_without_a_compiler_the_function_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no compiler\nof any kind")

    monkeypatch.setattr(torch, "compile", lambda function, **_: fails)
    monkeypatch.setattr(Kernel, "devices", frozenset({"cpu"}))
    kernel, x = Kernel(lambda x: x + 1), torch.ones(2)
    kernel.function.__name__ = "plus_one"
    with torch.inference_mode():
        with pytest.warns(UserWarning, match=r"plus_one runs uncompiled.*\(no compiler\); TORCH_COMPILE_DISABLE=1"):
            assert torch.equal(kernel(x), x + 1)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert torch.equal(kernel(x), x + 1)
