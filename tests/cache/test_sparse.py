"""Sparse-dLLM: the block attends to the part of the cache that its queries score highest."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

import dllm
from cache_rig import planned, selected
from contract_rig import BACKBONES, PROMPTS, Maker, backbones
from dllm.cache import Dual, Sparse
from dllm.cache.sparse import Evicting
from engine_rig import observed
from models import random_dream, random_llada
from naive_rig import Naive, decoded
from sampler_rig import facts
from toys import Leftmost

OPTIONS: dict[str, Any] = {"gen_length": 20, "block_length": 7, "stop_at_eos": False, "seed": 3}


class SpeltOut:
    """The method in plain tensors: what is left of each layer's cache is a list of columns with keys and values."""

    def __init__(self, lm: dllm.LanguageModel, cache: Sparse) -> None:
        self.naive, self.cache = Naive(lm), cache
        self.left: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.kept: list[list[list[int]]] = []

    def __call__(self, tokens: torch.Tensor, block: tuple[int, int], step: int) -> tuple[list[int], torch.Tensor]:
        naive, cache = self.naive, self.cache
        low, high = (max(0, column - naive.shift) for column in block)
        window = [*range(low, high)]
        columns = [*range(len(tokens))] if step <= cache.delay else window
        x, left, kept = naive.embed(tokens[columns]), [], []
        for layer in range(len(naive.blocks)):
            q, k, v = naive.projected(layer, x, torch.tensor(columns))
            if step == cache.delay:
                outside = [column for column in columns if column not in window]
                chosen = self.chosen(q[:, low:high], k, outside)
                left.append((k[:, chosen], v[:, chosen]))
                kept.append(chosen)
            elif step > cache.delay:
                k, v = (torch.cat((old, new), 1) for old, new in zip(self.left[layer], (k, v), strict=True))
            x = naive.finished(layer, x, naive.weights(q, k) @ v)
        if step == cache.delay:
            self.left = left
            self.kept.append(kept)
        return columns, x

    def chosen(self, queries: torch.Tensor, keys: torch.Tensor, outside: list[int]) -> list[int]:
        importance = [float((queries @ keys[:, [column]].transpose(1, 2)).mean()) for column in outside]
        reach = self.cache.kernel_size // 2
        pooled = [max(importance[max(0, i - reach) : i + reach + 1]) for i in range(len(outside))]
        order = sorted(range(len(outside)), key=lambda i: (-pooled[i], i))
        return sorted(outside[i] for i in order[: int(len(outside) * self.cache.retention)])


@backbones
@pytest.mark.parametrize(
    ("cache", "threshold"),
    [
        (Sparse(), 0.5), (Sparse(), 2.0), (Sparse(0.3, 1, 0), 0.5), (Sparse(0.6, 5, 2), 2.0), (Sparse(0.0), 0.5),
        (Sparse(0.9, 99), 0.5), (Sparse(1.0), 0.5),
    ],
    ids=repr,
)  # fmt: skip
def test_decodes_as_the_method_spelt_out(make: Maker, cache: Sparse, threshold: float) -> None:
    for seed, prompt in enumerate(([5, 9, 3], [1, 2, 3, 4, 5, 6, 7, 8, 9], [50])):
        lm = make(seed=seed, layers=3)
        row = [*prompt, *[lm.backbone.mask_token_id] * 20]
        result = dllm.generate(lm, [prompt], dllm.samplers.Threshold(threshold), cache, **OPTIONS)
        tokens, forwards = decoded(Naive(lm), row, 7, threshold, SpeltOut(lm, cache))
        assert result.sequences[0].tolist() == tokens
        assert result.nfe[0] == forwards


@backbones
def test_texts_are_filled_in_as_the_method_spelt_out(make: Maker) -> None:
    # Blocks that hold given tokens, begin with them, or have tokens after them.
    lm, cache = make(), Sparse(0.4)
    m = lm.backbone.mask_token_id
    rows = [
        [m, 5, m, m, 8, m, 9, m, m, m, m, 4, m, m, m],
        [1, 2, 3, 4, 5, 6, m, 7, 3, 3, 9, m, m, m, 4, m, m, 9, 9, 8],
        [8, 7, m, m, m, m, m, m, m, 1, 2, 3, m],
        [9, m],
    ]
    batch = dllm.infill(lm, rows, dllm.samplers.Threshold(0.6), cache, block_length=4, batch_size=3)
    for i, row in enumerate(rows):
        tokens, forwards = decoded(Naive(lm), row, 4, 0.6, SpeltOut(lm, cache))
        assert batch.sequences[i, -len(row) :].tolist() == tokens
        assert batch.nfe[i] == forwards


@backbones
@pytest.mark.parametrize("sampler", ["threshold", "wino", "adablock"])
def test_where_nothing_is_evicted_it_is_the_dual_cache(make: Maker, sampler: str) -> None:
    lm = make()
    dual, sparse = (
        dllm.generate(lm, PROMPTS, sampler, each, batch_size=3, **OPTIONS) for each in (Dual(), Sparse(1.0, delay=0))
    )
    assert torch.equal(dual.sequences, sparse.sequences)
    assert torch.equal(dual.nfe, sparse.nfe)
    assert torch.equal(dual.commit_step, sparse.commit_step)
    assert dual.stats.computed_columns == sparse.stats.computed_columns
    m = lm.backbone.mask_token_id
    rows = [[m, 5, m, m, 8, m, 9, m, m], [3, m, m, 4]]
    dual, sparse = (dllm.infill(lm, rows, sampler, each, block_length=4) for each in (Dual(), Sparse(1.0, delay=0)))
    assert torch.equal(dual.sequences, sparse.sequences)


@pytest.mark.parametrize(("lm", "shift"), [(random_llada(), 0), (random_dream(), 1)], ids=["llada", "dream"])
@pytest.mark.parametrize("delay", [0, 1, 3])
def test_the_block_alone_is_computed_after_the_delay(lm: dllm.LanguageModel, shift: int, delay: int) -> None:
    log, result = planned(lm, 3, Sparse(delay=delay), Leftmost(), gen_length=10, block_length=5)
    whole, blocks = [*range(13)], ([*range(3, 8)], [*range(8, 13)])
    assert log == [
        whole if step <= delay else [column - shift for column in block] for block in blocks for step in range(5)
    ]
    assert result.stats.cache_refreshes == 2 * (delay + 1)


@backbones
def test_a_larger_share_keeps_the_same_and_more(make: Maker) -> None:
    lm, kept = make(layers=3), []
    for retention in (0.0, 0.2, 0.5, 0.8, 1.0):
        method = SpeltOut(lm, Sparse(retention))
        found = evicted(lm, Sparse(retention))
        decoded(method.naive, [5, 9, 3, *[63] * 20], 7, 2.0, method)
        outside = 23 - 7
        assert [len(each) for each in method.kept[0]] == [int(retention * outside)] * 3
        for layer, gone in enumerate(found):
            assert set(gone).isdisjoint(method.kept[0][layer])
            assert len(gone) == outside - int(retention * outside)
        kept.append(method.kept[0])
    for fewer, more in pairwise(kept):
        assert all(set(one) <= set(other) for one, other in zip(fewer, more, strict=True))


def evicted(lm: dllm.LanguageModel, cache: Sparse) -> list[list[int]]:
    """The columns evicted in each layer in the first block."""
    found: list[torch.Tensor] = []

    def watch(engine: dllm.Engine, step: dllm.Step) -> None:
        cache_run: Any = engine.denoiser.cache
        found.append(cache_run.store.evicted[:, 0].clone())

    observed(watch, lm, [[5, 9, 3]], "vanilla", cache, **OPTIONS)
    return [layer.nonzero()[:, 0].tolist() for layer in found[cache.delay]]


def test_prompt_and_suffix_are_pooled_as_one_list() -> None:
    store = Evicting(0.5, 3, facts())
    # The block is columns 8 to 11; only column 12, after it, is important.
    block, visible = torch.zeros(2, 1, 20, dtype=torch.bool).numpy()
    block[0, 8:12], visible[:] = True, True
    yes = torch.ones(1, dtype=torch.bool).numpy()
    store.prepare(torch.zeros(1, dtype=torch.long).numpy(), yes, yes, block, visible)
    binding: Any = store.bind(selected([[*range(20)]]))
    keys = torch.zeros(1, 1, 20, 4, dtype=torch.float64)
    keys[0, 0, 12, 0] = 1
    binding.update(0, keys, keys)
    binding.queried(0, torch.ones(1, 1, 20, 4, dtype=torch.float64))
    left = (store.evicted[0, 0, :20] == 0).nonzero()[:, 0].tolist()
    # Its neighbours are columns 7 and 13; all others tie, and the leftmost stay.
    assert left == [0, 1, 2, 3, 4, 7, 8, 9, 10, 11, 12, 13]


def test_rows_leave_nothing_evicted_to_those_that_take_their_place() -> None:
    lm = random_llada()
    prompts = [[5, 6, 7], [8], [9, 10, 11, 12], [5, 9], [6, 6, 6], [7, 1], [3], [12, 40, 2, 8]]
    batch = dllm.generate(lm, prompts, "threshold", Sparse(0.2), batch_size=3, **OPTIONS)
    for row, prompt in enumerate(prompts):
        alone = dllm.generate(lm, [prompt], "threshold", Sparse(0.2), **OPTIONS)
        assert batch.completions[row].tolist() == alone.completions[0].tolist()


@pytest.mark.parametrize("make", BACKBONES.values(), ids=BACKBONES)
def test_without_a_delay_drafting_is_lossless(make: Maker) -> None:
    lm, base = make(), dllm.samplers.Threshold(0.5)
    plain = dllm.generate(lm, PROMPTS, base, Sparse(0.4, delay=0), **OPTIONS)
    for mode in ("batch", "tree"):
        drafting = dllm.samplers.FreeDave(4, base, mode)  # type: ignore[arg-type]
        drafted = dllm.generate(lm, PROMPTS, drafting, Sparse(0.4, delay=0), **OPTIONS)
        assert torch.equal(plain.sequences, drafted.sequences)
        with pytest.raises(ValueError, match="cache=sparse is not compatible with lossless drafting"):
            dllm.generate(lm, PROMPTS, drafting, Sparse(0.4), **OPTIONS)


@pytest.mark.parametrize(
    "options",
    [{"retention": 1.1}, {"retention": -0.1}, {"kernel_size": 2}, {"kernel_size": 0}, {"delay": -1}, {"delay": 0.5}],
)
def test_bad_options_are_refused(options: dict[str, Any]) -> None:
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"{name}={value} is out of range; use "):
        Sparse(**options)
