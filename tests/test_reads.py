"""How often a step waits for the device: once, whatever the number of rows and positions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import dllm
from engine_rig import waiting_engine
from models import random_frequencies, random_guide, random_llada

_WAITING = {
    torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.masked_select.default,
    torch.ops.aten._unique2.default, torch.ops.aten.equal.default, torch.ops.aten.is_nonzero.default,
}  # fmt: skip


class Waits(TorchDispatchMode):
    """Notes operations whose result the host must wait for, or whose size it must."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        by_flags = "index" in func.__name__ and any(
            isinstance(each, torch.Tensor) and each.dtype == torch.bool
            for arg in args
            if isinstance(arg, (list, tuple))
            for each in arg
        )
        if func in _WAITING or by_flags:
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@contextmanager
def waiting(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What waits, and what is copied to the host."""
    with Waits() as waits, monkeypatch.context() as patch:
        for name in ("cpu", "tolist"):
            inner = getattr(torch.Tensor, name)

            def noted(self: Any, *args: Any, _name: str = name, _inner: Any = inner, **rest: Any) -> Any:
                waits.seen.append(_name)
                return _inner(self, *args, **rest)

            patch.setattr(torch.Tensor, name, noted)
        yield waits.seen


def steps(sampler: Any, cache: str, rows: int, monkeypatch: pytest.MonkeyPatch, **options: Any) -> list[list[str]]:
    """What each step but the first waited for."""
    lm = random_llada()
    prompts = [[5] * (3 + row % 4) for row in range(rows)]
    engine = waiting_engine(lm, prompts, sampler, cache, gen_length=12, block_length=4, seed=0, **options)
    running, found = engine.steps(), []
    next(running)
    while True:
        with waiting(monkeypatch) as seen:
            if next(running, None) is None:
                return found
        found.append(seen)


@pytest.mark.parametrize("cache", ["none", "prefix", "dual", "freecache", "dkv", "dllm_cache", "sparse"])
@pytest.mark.parametrize(
    "name",
    [
        "vanilla", "threshold", "factor", "entropy_threshold", "localleap", "eb", "klass", "credit", "hierarchical",
        "prophet", "slowfast", "pc", "certainty", "saber", "learn2pd", "remdm", "t2m",
    ],
)  # fmt: skip
def test_a_step_reads_the_device_once(name: str, cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = name
    if name == "learn2pd":
        sampler = dllm.samplers.Learn2PD(filter="tiny-llada", allow_mismatch=True)  # type: ignore[assignment]
    if name == "pc":
        sampler = dllm.samplers.PC(random_frequencies())  # type: ignore[assignment]
    for rows in (1, 6) if name == "threshold" else (6,):
        assert {tuple(seen) for seen in steps(sampler, cache, rows, monkeypatch)} == {("cpu",)}


@pytest.mark.parametrize("cache", ["none", "prefix", "dual", "freecache", "dkv", "sparse"])
def test_shadows_of_the_block_are_known_to_the_host(cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for rows in (1, 6):
        assert {tuple(seen) for seen in steps(dllm.samplers.Wino(0.2), cache, rows, monkeypatch)} == {("cpu",)}


def test_where_a_block_ends_is_read_with_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    for cache in ("none", "dual"):
        sampler = dllm.samplers.AdaBlock(0.5, range(0, 62, 3), 0.05)
        assert {tuple(seen) for seen in steps(sampler, cache, 6, monkeypatch)} == {("cpu",)}


def test_sampling_reads_the_device_no_more_often(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = steps("threshold", "dual", 3, monkeypatch, temperature=0.7, top_k=9, top_p=0.9, eos_suppression="both")
    assert {tuple(seen) for seen in drawn} == {("cpu",)}


@pytest.mark.parametrize(("cache", "most"), [("none", 2), ("dual", 3)])
def test_drafts_are_read_before_they_are_judged(cache: str, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for mode in ("batch", "tree"):
        sampler = dllm.samplers.FreeDave(3, draft_mode=mode)  # type: ignore[arg-type]
        assert max(len(seen) for seen in steps(sampler, cache, 4, monkeypatch)) == most
    assert max(len(seen) for seen in steps(dllm.samplers.LoPA(0.5), cache, 4, monkeypatch)) == most


def test_blocks_ahead_are_read_before_they_are_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    for cache in ("none", "dual"):
        sampler = dllm.samplers.MultiBlock(dllm.samplers.Threshold(0.3), 2, 0.0, 0.0)
        assert max(len(seen) for seen in steps(sampler, cache, 4, monkeypatch)) == 2


@pytest.mark.parametrize(("eotp", "most"), [("accepted", 2), ("safe", 2), ("published", 3)])
def test_where_a_row_ends_is_read(eotp: Any, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = dllm.samplers.Learn2PD(filter="tiny-llada", allow_mismatch=True, eotp=eotp)
    assert max(len(seen) for seen in steps(sampler, "none", 4, monkeypatch)) == most


def test_a_guide_is_asked_for_as_many_columns_as_it_must_read(monkeypatch: pytest.MonkeyPatch) -> None:
    for rows in (1, 6):
        found = steps(dllm.samplers.ARGuided(random_guide()), "none", rows, monkeypatch)
        assert max(len(seen) for seen in found) <= 12
