"""Measuring how far a cache is off."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import dllm
from dllm.cache import DLLMCache, Dual, FreeCache, NoCache
from dllm.cache.base import Cache
from dllm.decoding.drift import Comparison
from dllm.resolve import names, resolve
from dllm.samplers import Wino
from engine_rig import observed
from models import random_dream, random_llada
from toys import Drafting, Leftmost

Maker = Callable[..., dllm.LanguageModel]
PROMPTS = [[5, 9, 3], [7], [1, 2, 3, 4, 5, 6, 7, 8, 9]]
CACHES = [name for name in names("cache") if name != "none"]
backbones = pytest.mark.parametrize("make", [random_llada, random_dream])


OPTIONS: dict[str, Any] = {"gen_length": 12, "block_length": 6, "stop_at_eos": False, "seed": 0}


def run(lm: dllm.LanguageModel, sampler: Any, cache: Any, **options: Any) -> dllm.Generation:
    return dllm.generate(lm, PROMPTS, sampler, cache, **OPTIONS | options)


def made(name: str, **options: Any) -> Any:
    return replace(resolve("cache", name, Cache), **options)


@backbones
def test_what_is_asked_of_decided_tokens_is_measured_as_alone(make: Maker) -> None:
    lm, cache = make(), FreeCache(measure_every=2, refresh_above=0.05)
    together = run(lm, Wino(0.2, 0.6, 2), cache)
    assert together.stats.drift is not None
    alone = [dllm.generate(lm, [each], Wino(0.2, 0.6, 2), cache, **OPTIONS) for each in PROMPTS]
    assert together.nfe.tolist() == [int(each.nfe) for each in alone]
    assert together.stats.drift.measured == sum(each.stats.drift.measured for each in alone if each.stats.drift)


APPROXIMATE = [name for name in CACHES if name != "block"]  # it is exact, or computes everything


@backbones
@pytest.mark.parametrize("name", APPROXIMATE)
def test_measuring_changes_nothing(make: Maker, name: str) -> None:
    lm = make()
    for sampler in ("threshold", "vanilla"):
        plain, measured = run(lm, sampler, name), run(lm, sampler, made(name, measure_every=2))
        assert plain.stats.drift is None
        assert torch.equal(plain.sequences, measured.sequences)
        assert torch.equal(plain.nfe, measured.nfe)
        assert plain.stats.computed_columns == measured.stats.computed_columns
        assert measured.stats.drift is not None
        assert measured.stats.drift.measured == int((measured.nfe // 2).sum())
        assert measured.stats.drift.kv_error > 0


@backbones
@pytest.mark.parametrize("name", APPROXIMATE)
def test_refreshing_above_nothing_is_none(make: Maker, name: str) -> None:
    lm = make()
    for sampler in ("vanilla", dllm.samplers.Vanilla(order="margin")):
        exact, held = run(lm, sampler, "none"), run(lm, sampler, made(name, measure_every=1, refresh_above=0.0))
        assert torch.equal(exact.sequences, held.sequences)
        # Exact forwards beside the cache's own have a say, so they count; one that computed everything needs none.
        assert (held.nfe > exact.nfe).all()
        assert (held.nfe < 2 * exact.nfe).all()


@backbones
def test_a_bound_that_is_never_passed_refreshes_nothing(make: Maker) -> None:
    lm = make()
    free, bounded = (run(lm, "vanilla", Dual(measure_every=2, refresh_above=bound)) for bound in (None, 1e6))
    assert torch.equal(free.sequences, bounded.sequences)
    assert free.stats.cache_refreshes == bounded.stats.cache_refreshes


def test_more_is_refreshed_above_a_lower_bound() -> None:
    lm = random_llada()
    found = [run(lm, "vanilla", FreeCache(measure_every=1, refresh_above=bound)) for bound in (0.6, 0.3, 0.1)]
    refreshes = [each.stats.cache_refreshes for each in found]
    assert refreshes == sorted(refreshes)
    assert refreshes[0] < refreshes[-1]


@backbones
def test_what_is_measured_is_what_it_says(make: Maker) -> None:
    lm, seen = make(), []

    def watch(engine: dllm.Engine, step: dllm.Step) -> None:
        cache_run: Any = engine.denoiser.cache
        store = cache_run.store
        prediction, columns = step.last or (None, None)
        assert prediction is not None
        (measurement,) = step.drift
        if not measurement.kv_error.any():  # everything was computed
            return
        # The canvas before the step, computed anew outside the engine.
        tokens = torch.tensor(np.where(step.change.committed, step.mask_token_id, step.tokens))
        real = torch.tensor(np.arange(tokens.shape[1]) >= step.padding[:, None])
        capture = Capture()
        logits = lm.backbone(tokens, real, None, capture).logits
        for entry, row in enumerate(measurement.ids):
            keep = real[entry]
            off = size = 0.0
            for layer, (keys, values) in enumerate(capture.layers):
                for exact, held in ((keys, store.keys[layer, row, :, :-1]), (values, store.values[layer, row, :, :-1])):
                    off += float((held[:, keep] - exact[entry][:, keep]).square().sum())
                    size += float(exact[entry][:, keep].square().sum())
            seen.append((measurement.kv_error[entry], (off / size) ** 0.5))
            asked = prediction.asked[entry]
            at = columns[entry][asked] - lm.backbone.logits_shift
            exact_log = logits[entry, at].log_softmax(-1)
            of = np.flatnonzero(prediction.asked.flatten().numpy())
            mine = torch.tensor(of // prediction.asked.shape[1] == entry)
            cached_log = prediction.logits[mine].log_softmax(-1)
            kl = (exact_log.exp() * (exact_log - cached_log)).sum()
            assert measurement.kl[entry] == pytest.approx(float(kl), abs=1e-9)
            assert measurement.asked[entry] == int(asked.sum())
            exact_log[:, step.mask_token_id] = cached_log[:, step.mask_token_id] = -torch.inf
            assert measurement.flips[entry] == int((exact_log.argmax(-1) != cached_log.argmax(-1)).sum())

    with torch.inference_mode():
        observed(watch, lm, PROMPTS, Leftmost(), Dual(measure_every=1), **OPTIONS)
    assert len(seen) == 30
    for found, expected in seen:
        assert found == pytest.approx(expected, abs=1e-9)
    assert max(expected for _, expected in seen) > 0.1


class Capture:
    """A store that keeps what it is shown."""

    def __init__(self) -> None:
        self.layers: list[tuple[torch.Tensor, torch.Tensor]] = []

    def update(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.layers.append((keys, values))
        return keys, values


def test_rows_are_measured_by_their_own_forwards() -> None:
    lm = random_llada()
    together: dict[int, list[float]] = {0: [], 1: [], 2: []}

    def watch(step: dllm.Step) -> None:
        for measurement in step.drift:
            for row, error in zip(measurement.ids, measurement.kv_error, strict=True):
                together[int(row)].append(float(error))

    run(lm, "threshold", DLLMCache(measure_every=3), callback=watch)
    for row, prompt in enumerate(PROMPTS):
        options = {"gen_length": 12, "block_length": 6, "stop_at_eos": False}
        frames = dllm.stream(lm, [prompt], "threshold", DLLMCache(measure_every=3), **options)
        alone = [error for frame in frames for each in frame.drift for error in each.kv_error.tolist()]
        assert together[row] == pytest.approx(alone, abs=1e-9)


def test_measuring_is_not_in_the_seconds_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    inner = Comparison.update

    def slow(*arguments: Any) -> Any:
        time.sleep(0.02)
        return inner(*arguments)

    monkeypatch.setattr(Comparison, "update", slow)
    lm, wall = random_llada(), []
    for bound in (None, 1e6):
        started = time.perf_counter()
        stats = run(lm, "vanilla", Dual(measure_every=1, refresh_above=bound)).stats
        wall.append(time.perf_counter() - started)
        assert stats.drift is not None
        assert stats.drift.seconds >= 10 * 2 * 0.02
        # Where it may act on the result, it is a part of it.
        counted = stats.seconds + (stats.drift.seconds if bound is None else 0)
        assert counted <= wall[-1]
        assert (stats.seconds >= stats.drift.seconds) == (bound is not None)


def test_without_a_cache_nothing_is_off() -> None:
    drift = run(random_llada(), Drafting(), NoCache(measure_every=3)).stats.drift
    assert drift is not None
    assert (drift.measured, drift.kv_error, drift.worst_kv_error, drift.kl, drift.flips) == (12, 0, 0, 0, 0)


def test_the_drift_is_in_the_stream() -> None:
    frames = list(
        dllm.stream(random_llada(), PROMPTS, "vanilla", Dual(measure_every=4), gen_length=12, stop_at_eos=False)
    )
    assert [len(frame.drift) for frame in frames] == [0, 0, 0, 1] * 3
    assert frames[3].drift[0].ids.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"measure_every": 0}, "measure_every=0"),
        ({"measure_every": 1.5}, "measure_every=1.5"),
        ({"measure_every": 2, "refresh_above": -1.0}, "refresh_above=-1.0"),
        ({"measure_every": 2, "refresh_above": float("inf")}, "refresh_above=inf"),
        ({"refresh_above": 0.1}, "refresh_above=0.1 has no effect without measuring"),
    ],
)
@pytest.mark.parametrize("name", CACHES)
def test_bad_options_are_refused(name: str, options: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        made(name, **options)


def test_no_cache_has_nothing_to_refresh() -> None:
    with pytest.raises(ValueError, match="no effect without a cache"):
        NoCache(measure_every=2, refresh_above=0.1)
