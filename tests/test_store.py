"""The store: its size, and that nothing grows beside it."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import dllm
from cache_rig import selected
from dllm.cache.dllm_cache import Features
from dllm.cache.store import KeyValues
from dllm.decoding.recent import Recent
from dllm.resolve import names
from engine_rig import observed
from models import random_dream, random_llada
from sampler_rig import facts

CACHES = [name for name in names("cache") if name != "none"]


@pytest.mark.parametrize("name", CACHES)
@pytest.mark.parametrize("make", [random_llada, random_dream])
def test_a_store_has_the_size_its_docstring_says(make: Callable[..., dllm.LanguageModel], name: str) -> None:
    lm = make(dtype=torch.float32)
    stores: list[Any] = []

    def watch(engine: dllm.Engine, step: dllm.Step) -> None:
        cache_run: Any = engine.denoiser.cache
        stores.append(cache_run.store)

    observed(watch, lm, [[5, 6], [7, 8, 9]], "threshold", name, gen_length=12)
    layers, heads, size = lm.backbone.kv_shape
    columns = heads * size + (lm.backbone.config.hidden_size if name == "dllm_cache" else 0)
    own = {"sparse": 1, "elastic": lm.backbone.config.num_attention_heads * size + lm.backbone.config.hidden_size}
    numbers = 2 * columns + own.get(name, 0)  # of a column in a layer
    assert {store.nbytes for store in stores} == {layers * 2 * (15 + stores[0].spare) * numbers * 4}
    assert len({id(store) for store in stores}) == 1
    tensors = [value for value in vars(stores[0]).values() if isinstance(value, torch.Tensor)]
    tensors += [*getattr(stores[0], "added", {}).values()]
    assert sum(tensor.nbytes for tensor in tensors) == stores[0].nbytes


def alive() -> int:
    """Bytes of all tensors there are, each storage once."""
    gc.collect()
    tensors = (thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, torch.nn.Parameter))
    return sum({each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}.values())


@pytest.mark.parametrize("name", ["none", *CACHES])
def test_a_decode_keeps_nothing_that_grows_with_its_steps(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Recent, "__call__", lambda self, inputs, make: make())  # which keeps a few
    lm = random_llada(dtype=torch.float32)
    gc.freeze()  # what was there before is not looked at again
    steps = dllm.stream(lm, [[5, 6], [7, 8, 9]], "vanilla", name, gen_length=60, block_length=20, stop_at_eos=False)
    # The second and the last but one of each block; in between fewer positions are asked about.
    held = [alive() for number, _ in enumerate(steps) if number % 20 in (1, 18)]
    assert len(held) == 6
    assert held[0] == held[2] == held[4]
    assert held[1] == held[3] == held[5]
    assert held[1] <= held[0]


def test_the_last_few_plans_are_kept() -> None:
    recent: Recent[object] = Recent()
    inputs = [(np.array([number]),) for number in range(6)]
    made = [recent(each, object) for each in inputs]
    assert [recent(each, object) is one for each, one in zip(inputs[2:], made[2:], strict=True)] == [True] * 4
    assert recent(inputs[0], object) is not made[0]
    assert recent(inputs[2], object) is not made[2]  # the least recently used one


def bound(store: KeyValues, rows: list[int], columns: list[list[int]], first: list[bool] | None = None) -> Any:
    flags = np.array(first if first is not None else [True] * len(rows))
    return store.bind(selected(columns, rows, first=flags))


@pytest.mark.parametrize(
    ("rows", "columns"),
    [
        ([0, 1, 2], [[*range(20)]] * 3),  # all of all
        ([0, 1, 2], [[4, 5, 6]] * 3),  # neighbours
        ([0, 1, 2], [[4, 5, 6], [1, 9, 9], [0, 3, 19]]),  # scattered, one short
        ([0, 2], [[4, 5, 6], [5, 6, 7]]),  # not all rows
    ],
)
def test_fresh_columns_replace_stored_ones_and_no_others(rows: list[int], columns: list[list[int]]) -> None:
    store = KeyValues(_run(3))
    store.keys.copy_(torch.rand_like(store.keys))
    before = store.keys.clone()
    fresh = torch.rand(len(rows), 1, len(columns[0]), 4, dtype=torch.float64)
    for entry, own in enumerate(columns):  # what fills up a short sequence repeats its last column
        for slot, column in enumerate(own):
            fresh[entry, 0, slot] = fresh[entry, 0, own.index(column)]
    seen, _ = bound(store, rows, columns).update(1, fresh, fresh)
    expected = before.clone()
    for entry, row in enumerate(rows):
        expected[1, row, 0, columns[entry]] = fresh[entry, 0]
    assert torch.equal(store.keys, expected)
    assert torch.equal(seen, expected[1, rows, :, :20])


def test_of_several_drafts_the_first_is_kept_and_each_sees_its_own() -> None:
    store = KeyValues(_run(2))
    fresh = torch.rand(3, 1, 2, 4, dtype=torch.float64)
    binding = bound(store, [0, 0, 1], [[4, 5]] * 3, [True, False, True])
    seen, _ = binding.update(0, fresh, fresh)
    assert torch.equal(seen[:, :, 4:6], fresh)
    assert torch.equal(store.keys[0, :, :, 4:6], fresh[[0, 2]])


def test_drafts_alone_are_not_kept() -> None:
    store = Features(0.5, _run(2))
    binding = bound(store, [0, 1], [[4, 5]] * 2, [False, True])
    binding.stale(0, torch.rand(2, 1, 2, 4, dtype=torch.float64))
    assert not store.keys[0, 0].any()


def _run(rows: int) -> Any:
    return replace(facts(), slots=rows)
