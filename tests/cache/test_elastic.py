"""Elastic-Cache: a window of masks, and everything from the layer on in which attention drifts."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

import dllm
from cache_rig import planned
from contract_rig import PROMPTS, Maker, backbones
from dllm.cache import Elastic
from dllm.cache.base import Flags, Metered, Plan, Question
from dllm.cache.elastic import _Comparing, similarity
from dllm.cache.store import PerRow, Reuse
from dllm.decoding.setup import Setup
from models import random_dream, random_fast_dllm, random_llada, random_sdar
from naive_rig import Naive, decoded
from toys import Leftmost

OPTIONS: dict[str, Any] = {"gen_length": 20, "block_length": 7, "stop_at_eos": False, "seed": 3}


class SpeltOut:
    """The method in plain tensors: inputs, queries, keys and values of every layer, and full attention maps."""

    def __init__(self, lm: dllm.LanguageModel, cache: Elastic) -> None:
        self.naive, self.cache = Naive(lm), cache
        self.kept: list[list[torch.Tensor]] = []
        self.tracked: list[int] = []
        self.masked: list[int] = []
        self.began: list[int] = []  # the layer in which each forward was recomputed

    def __call__(self, tokens: torch.Tensor, block: tuple[int, int], step: int) -> tuple[list[int], torch.Tensor]:
        naive, cache, every = self.naive, self.cache, [*range(len(tokens))]
        masked = (tokens == naive.mask_token_id).nonzero()[:, 0].tolist()
        read = {max(0, column - naive.shift) for column in masked if column < block[1]}
        window = sorted({max(0, column - naive.shift) for column in masked[: cache.window]})
        fresh = [column for column in self.masked if column not in masked]
        columns = sorted({*window, *read, *fresh, *self.tracked}) if self.kept else every
        testing, tracked, began = bool(self.kept and self.tracked), set[int](), len(naive.blocks)
        x = naive.embed(tokens[columns])
        for layer in range(len(naive.blocks)):
            if len(self.kept) <= layer:
                self.kept.append([torch.zeros(0)] * 4)
            before = self.map(layer, self.tracked) if testing else None
            maps, values = self.fresh(layer, columns, x, every)
            if before is not None:
                now = maps[:, [columns.index(column) for column in self.tracked]]
                cosine = (before * now).sum(0) / (before.norm(dim=0) * now.norm(dim=0))
                if cosine.mean() < cache.gamma:
                    columns, x, testing, began = every, self.kept[layer][0].clone(), False, layer
                    maps, values = self.fresh(layer, columns, x, every)
            attended = maps[:, [columns.index(column) for column in window]].sum((0, 1))
            given = [column for column in every if column not in masked]
            tracked |= {*sorted(given, key=lambda column: (-float(attended[column]), column))[: cache.track]}
            x = naive.finished(layer, x, maps @ values)
        self.tracked, self.masked = sorted(tracked), masked
        self.began.append(began)
        return columns, x

    def fresh(
        self, layer: int, columns: list[int], x: torch.Tensor, every: list[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Overwrite what is kept of some columns; their attention maps, and the values of all."""
        q, k, v = self.naive.projected(layer, x, torch.tensor(columns))
        found = [x, *(each.transpose(0, 1) for each in (q, k, v))]
        for number, each in enumerate(found):
            if len(columns) < len(every):
                each = self.kept[layer][number].index_copy(0, torch.tensor(columns), each)
            self.kept[layer][number] = each
        return self.map(layer, columns), self.kept[layer][3].transpose(0, 1)

    def map(self, layer: int, columns: list[int]) -> torch.Tensor:
        _, queries, keys, _ = self.kept[layer]
        return self.naive.weights(queries[columns].transpose(0, 1), keys.transpose(0, 1))


@backbones
@pytest.mark.parametrize(
    ("cache", "threshold"),
    [
        (Elastic(), 0.5), (Elastic(0.8, 3), 2.0), (Elastic(0.9, 2, 2), 0.5), (Elastic(0.95, None, 3), 0.5),
        (Elastic(0.6, 5), 2.0),
    ],
    ids=repr,
)  # fmt: skip
def test_decodes_as_the_method_spelt_out(make: Maker, cache: Elastic, threshold: float) -> None:
    began = []
    for seed, prompt in enumerate(([5, 9, 3], [1, 2, 3, 4, 5, 6, 7, 8, 9], [50])):
        lm = make(seed=seed, layers=4)
        method = SpeltOut(lm, cache)
        row = [*prompt, *[lm.backbone.mask_token_id] * 20]
        result = dllm.generate(lm, [prompt], dllm.samplers.Threshold(threshold), cache, **OPTIONS)
        tokens, forwards = decoded(method.naive, row, 7, threshold, method)
        assert result.sequences[0].tolist() == tokens
        assert result.nfe[0] == forwards
        began += method.began
    assert len(set(began)) >= 2  # not in the same layer every time


@backbones
def test_texts_are_filled_in_as_the_method_spelt_out(make: Maker) -> None:
    lm, cache = make(layers=4), Elastic(0.85, 3, 2)
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
@pytest.mark.parametrize("gamma", [1, 0.9999999])
@pytest.mark.parametrize("sampler", ["threshold", "t2m"])
def test_where_attention_always_drifts_it_is_no_cache(make: Maker, gamma: float, sampler: str) -> None:
    lm = make()
    exact, elastic = (
        dllm.generate(lm, PROMPTS, sampler, each, batch_size=3, **OPTIONS) for each in ("none", Elastic(gamma, 3))
    )
    assert torch.equal(exact.sequences, elastic.sequences)
    assert torch.equal(exact.nfe, elastic.nfe)
    assert torch.equal(exact.commit_step, elastic.commit_step)
    if sampler != "t2m" or gamma == 1:  # it also looks again at a canvas as it was, whose attention cannot drift
        assert elastic.stats.computed_columns == exact.stats.computed_columns
        assert elastic.stats.cache_refreshes == int(elastic.nfe.sum())


@backbones
@pytest.mark.parametrize("sampler", ["lopa", "multiblock"])
def test_drafts_are_exact_as_well_where_every_forward_refreshes(make: Maker, sampler: str) -> None:
    lm = make()
    exact, elastic = (dllm.generate(lm, PROMPTS, sampler, each, **OPTIONS) for each in ("none", Elastic(1)))
    assert torch.equal(exact.sequences, elastic.sequences)
    assert torch.equal(exact.nfe, elastic.nfe)


@dataclass(frozen=True)
class Windowed(Metered):
    """The first masks of a row, and what was decoded in the last step."""

    window: int

    def start(self, setup: Setup) -> Reuse:
        return Reuse(setup, _Windowed(self.window, setup))


class _Windowed(PerRow):
    def __init__(self, window: int, setup: Setup) -> None:
        super().__init__(setup)
        self.window, self.masked = window, self.per_row(False, setup.length, dtype=bool)

    def plan(self, question: Question, due: Flags, stale: Flags) -> Plan:
        compute = np.zeros_like(question.read)
        for i, (row, masked) in enumerate(zip(question.rows, question.masked, strict=True)):
            start = question.canvas.padding[row]
            for column in np.flatnonzero(masked)[: self.window]:
                compute[i, max(start, column - self.setup.logits_shift)] = True
            compute[i] |= self.masked[row] & ~masked
            self.masked[row] = masked
        return Plan(compute)


@backbones
def test_where_attention_never_drifts_it_is_a_window(make: Maker) -> None:
    lm = make()
    for window in (1, 4):
        for sampler in ("vanilla", "threshold"):
            plain, elastic = (
                dllm.generate(lm, PROMPTS, sampler, each, batch_size=3, **OPTIONS)
                for each in (Windowed(window), Elastic(0, window))
            )
            assert torch.equal(plain.sequences, elastic.sequences)
            assert torch.equal(plain.nfe, elastic.nfe)
            assert plain.stats.computed_columns == elastic.stats.computed_columns
            assert elastic.stats.cache_refreshes == len(PROMPTS)


@pytest.mark.parametrize(("lm", "shift"), [(random_llada(), 0), (random_dream(), 1)], ids=["llada", "dream"])
def test_the_window_slides_over_the_masks(lm: dllm.LanguageModel, shift: int) -> None:
    log, _ = planned(lm, 3, Elastic(0, 2), Leftmost(), gen_length=6, block_length=1)
    assert log[0] == [*range(9)]
    # The token just decoded, and the positions at which the next two masks are read.
    for step, columns in enumerate(log[1:], start=4):
        assert columns == sorted({step - 1} | {column - shift for column in (step, step + 1) if column < 9})


@backbones
def test_the_surer_attention_has_to_be_the_more_is_computed(make: Maker) -> None:
    lm = make(layers=4)
    shares = [
        dllm.generate(lm, PROMPTS, "vanilla", Elastic(gamma, 3), **OPTIONS).stats.computed_share
        for gamma in (0, 0.3, 0.8, 0.9, 0.95, 1)
    ]
    assert all(less <= more for less, more in pairwise(shares))
    assert shares[0] < shares[2] < shares[4]


def test_rows_of_a_batch_drift_in_layers_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    lm, layers, plain = random_llada(layers=5), [], _Comparing.wider

    def noting(self: _Comparing, layer: int, *inputs: Any) -> Any:
        if self.drift.any() and not self.drift.all():
            layers.append(layer)
        return plain(self, layer, *inputs)

    monkeypatch.setattr(_Comparing, "wider", noting)
    cache = Elastic(0.88, 3)
    batch = dllm.generate(lm, PROMPTS, "threshold", cache, batch_size=4, **OPTIONS)
    assert len(set(layers)) > 2
    for row, prompt in enumerate(PROMPTS):
        alone = dllm.generate(lm, [prompt], "threshold", cache, **OPTIONS)
        assert batch.completions[row].tolist() == alone.completions[0].tolist()
        assert batch.nfe[row] == alone.nfe[0]
    assert batch.stats.computed_columns == sum(
        dllm.generate(lm, [prompt], "threshold", cache, **OPTIONS).stats.computed_columns for prompt in PROMPTS
    )


@pytest.mark.parametrize("make", [random_sdar, random_fast_dllm])
def test_blocks_that_attend_backwards_refresh_as_well(make: Maker) -> None:
    lm = make()
    for gamma in (0.7, 0.9999999, 1):
        options = OPTIONS | {"block_length": 4, "gen_length": 14}
        batch = dllm.generate(lm, PROMPTS, "threshold", Elastic(gamma, 2), batch_size=3, **options)
        for row, prompt in enumerate(PROMPTS):
            alone = dllm.generate(lm, [prompt], "threshold", Elastic(gamma, 2), **options)
            assert batch.completions[row].tolist() == alone.completions[0].tolist()
        if gamma == 1:
            exact = dllm.generate(lm, PROMPTS, "threshold", "none", **options)
            assert torch.equal(exact.sequences, batch.sequences)


def test_similarity_is_that_of_the_heads() -> None:
    before, now = torch.rand(2, 2, 3, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    among = torch.ones(2, 4, 5, dtype=torch.bool)
    among[0, 2:], among[0, :, 4], among[1] = False, False, False
    found = similarity(before, now, among)
    expected = [
        float(before[0, :, t, s] @ now[0, :, t, s] / before[0, :, t, s].norm() / now[0, :, t, s].norm())
        for t in range(2)
        for s in range(4)
    ]
    assert float(found[0]) == pytest.approx(np.mean(expected))
    assert found[1] == torch.inf


@pytest.mark.parametrize(
    "options", [{"gamma": 1.1}, {"gamma": -0.1}, {"window": 0}, {"window": 1.5}, {"track": 0}, {"track": -1}]
)
def test_bad_options_are_refused(options: dict[str, Any]) -> None:
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"{name}={value} is out of range; use "):
        Elastic(**options)
