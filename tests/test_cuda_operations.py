"""Nothing is computed that a CUDA device cannot: found out without one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import dllm
from contract_rig import BACKBONES, BY_NAME, GUIDED, LEARNED, Maker, backbones, more_backbones
from dllm.decoding.compatibility import unmet
from dllm.evaluation.likelihood import Estimate, is_greedy, loglikelihood
from dllm.filters.training import collect
from dllm.guide import Guide
from dllm.resolve import names, resolve
from dllm.samplers import FreeDave, Vanilla
from models import random_guide, random_llada
from test_alignment import bpe

_WHOLE = frozenset({torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64})
_HALF = frozenset({torch.float16, torch.bfloat16})
# What torch implements on CPUs and not on CUDA devices: where `dtypes` and `dtypesIfCUDA` differ in `op_db` of
# torch.testing._internal.common_methods_invocations (2.13), which only torch's own test environment can import.
_MISSING = [
    # No reduction of booleans into places that occur more than once; a sum there is one.
    ("scatter_reduce scatter_reduce_ index_reduce index_reduce_", frozenset({torch.bool})),
    # Matrix products of whole numbers.
    ("mm addmm bmm baddbmm addbmm mv addmv dot vdot inner matmul linear bilinear einsum tensordot", _WHOLE),
    # Convolutions and pooling of whole numbers.
    ("convolution conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d", _WHOLE),
    ("avg_pool1d avg_pool2d avg_pool3d max_pool1d max_pool2d max_pool3d max_pool2d_with_indices", _WHOLE),
    # Some functions of half precision, and histograms of anything.
    ("histc igamma igammac angle", _HALF),
    ("histogram histogramdd", frozenset({torch.float32, torch.float64})),
]
MISSING = {name: dtypes for listed, dtypes in _MISSING for name in listed.split()}


class OnCuda(TorchDispatchMode):
    """Refuses what no CUDA device could compute."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.partition(".")[0]
        dtypes = {each.dtype for each in args if isinstance(each, torch.Tensor)}
        if dtypes & MISSING.get(name, frozenset()) and "sum" not in args:
            raise NotImplementedError(f"{name} of {args[0].dtype} is not implemented on CUDA devices")
        return func(*args, **(kwargs or {}))


SAMPLERS: dict[str, Any] = {
    **BY_NAME,
    "vanilla-margin": Vanilla(order="margin", tokens_per_step=2),
    "vanilla-entropy": Vanilla(steps=4, schedule="timestep", order="entropy"),
    "vanilla-random": Vanilla(order="random"),
    "learn2pd-published": replace(LEARNED, eotp="published"),
    "learn2pd-accepted": replace(LEARNED, eotp="accepted"),
    "learn2pd-safe": replace(LEARNED, eotp="safe"),
    "freedave-tree": FreeDave(3, draft_mode="tree"),
    "freedave-eager": FreeDave(3, eager=True),
    "ar_guided-argmax": replace(GUIDED, accept="argmax", top_k=None),
    "ar_guided-ratio": replace(GUIDED, accept="ratio", ratio=0.2, on_reject="guide"),
    "ar_guided-sample": replace(GUIDED, accept="sample", top_k=None),
}


@backbones
@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_and_cache_asks_for_nothing_that_cuda_lacks(make: Maker, name: str) -> None:
    lm, drawn = make(), {"temperature": 0.7, "top_p": 0.9, "top_k": 9, "eos_suppression": "both"}
    sampler, turn = SAMPLERS[name], list(SAMPLERS).index(name) + list(BACKBONES.values()).index(make)
    for number, cache in enumerate(names("cache")):
        # Of other caches every third one: other samplers and the other backbone meet the rest.
        both = cache in ("none", "dual")
        if (both or (number + turn) % 3 == 0) and not unmet(sampler, resolve("cache", cache, object)):
            for options in ({}, drawn) if both else ({},):
                with OnCuda():
                    dllm.generate(lm, [[5], [6, 7, 8]], sampler, cache, gen_length=5, block_length=3, seed=0, **options)


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
def test_defaults_that_the_user_set_for_tensors_change_no_tokens(sampler: Any) -> None:
    lm = random_llada()
    options: dict[str, Any] = {"gen_length": 5, "block_length": 3, "seed": 0, "temperature": 0.7}
    _same_whatever_the_defaults(
        lambda: [frame.tokens.tolist() for frame in dllm.stream(lm, [[5], [6, 7, 8]], sampler, **options)]
    )


@backbones
def test_defaults_that_the_user_set_for_tensors_change_no_scores(make: Maker) -> None:
    lm, estimate = make(), Estimate(samples=2)
    _same_whatever_the_defaults(
        lambda: (
            [loglikelihood(lm, [5], [6, 7], each) for each in (estimate, replace(estimate, method="chain"))]
            + [is_greedy(lm, [5], [6, 7]), lm.backbone.fingerprint()]
        )
    )


def _same_whatever_the_defaults(results: Callable[[], list[Any]]) -> None:
    expected, before = results(), torch.get_default_dtype()
    try:
        for dtype in (torch.bfloat16, torch.float64):
            torch.set_default_dtype(dtype)
            assert results() == expected, dtype
    finally:
        torch.set_default_dtype(before)
    with torch.device("meta"):  # stands in for a GPU, whose values do not mix with those of the CPU
        assert results() == expected


@backbones
def test_guidance_measuring_scoring_and_replays_ask_for_nothing_that_cuda_lacks(make: Maker) -> None:
    lm = make()
    measured = dllm.cache.FreeCache(measure_every=1, refresh_above=0.01)
    with OnCuda():
        dllm.generate(lm, [[5, 6]], cfg_scale=1.0, gen_length=6)
        dllm.generate(lm, [[5, 6]], "threshold", measured, gen_length=6, block_length=3)
        for estimate in (Estimate(samples=2), Estimate("chain", 2), Estimate("chain", 128, "confidence")):
            loglikelihood(lm, [5], [6, 7], estimate)
        is_greedy(lm, [5], [6, 7])
        collect(lm, [[5, 6]], "vanilla", "none", gen_length=6, block_length=3, seed=0)


def test_a_guide_that_reads_the_text_asks_for_nothing_that_cuda_lacks() -> None:
    lm = random_llada(tokenizer=True)
    tokenizer = bpe([], eos_token="<|endoftext|>")
    guide = Guide(random_guide(len(tokenizer)), tokenizer)
    with OnCuda():
        dllm.generate(lm, ["Sam has 3 pens."], replace(GUIDED, guide=guide), gen_length=6, seed=0)


@pytest.mark.parametrize(
    ("reduce", "dtype", "missing"),
    [("amax", torch.bool, True), ("amax", torch.int32, False), ("sum", torch.bool, False)],
)
def test_what_a_cuda_device_cannot_reduce_is_refused(reduce: str, dtype: torch.dtype, missing: bool) -> None:
    flags, index = torch.zeros(2, 3, dtype=dtype), torch.zeros(2, 2, dtype=torch.long)
    with OnCuda():
        if missing:
            with pytest.raises(NotImplementedError, match=r"scatter_reduce of torch\.bool"):
                flags.scatter_reduce(1, index, flags[:, :2], reduce)
        else:
            flags.scatter_reduce(1, index, flags[:, :2], reduce)


@more_backbones
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_further_families_ask_for_nothing_that_cuda_lacks(make: Maker, dtype: torch.dtype) -> None:
    lm = make(dtype=dtype)
    with OnCuda():
        for sampler, cache in (("edit", "block"), ("sub_blocks", "sub_blocks"), ("threshold", "none")):
            dllm.generate(lm, [[5], [6, 7, 8]], sampler, cache, gen_length=5, block_length=3, seed=0)


@more_backbones
def test_defaults_that_the_user_set_for_tensors_change_no_tokens_of_further_families(make: Maker) -> None:
    lm = make()

    def decode() -> list[Any]:
        out = dllm.generate(lm, [[5], [6, 7, 8]], "edit", "block", gen_length=5, block_length=3)
        tokens: list[Any] = out.sequences.tolist()
        return tokens

    _same_whatever_the_defaults(decode)
