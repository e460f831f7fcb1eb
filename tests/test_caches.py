"""What holds for every cache with every sampler over every backbone, whatever the batch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import cycle
from typing import Any

import numpy as np
import pytest
import torch

import dllm
from contract_rig import BACKBONES, BY_NAME, LEARNED, PROMPTS, Maker, backbones, common_token
from dllm.cache import Block, D2Cache, DKVCache, DLLMCache, Dual, Elastic, FreeCache, Prefix, Sparse
from dllm.cache.base import Cache
from dllm.decoding.compatibility import unmet
from dllm.decoding.window import Edit, Window
from dllm.resolve import names, resolve
from dllm.samplers import T2M, AdaBlock, FreeDave, LocalLeap, Oracle, Threshold, Vanilla
from dllm.samplers import Editing as TokenEditing
from dllm.samplers.base import Denoise, Policy
from engine_rig import observed
from models import random_dream, random_llada
from toys import Drafting, Editing, Leftmost, Remembering, Revoking, Spying

SAMPLERS: dict[str, Any] = {
    **BY_NAME,
    "adablock-short": AdaBlock(0.5, range(0, 62, 3), 0.05, 0.6),
    "vanilla-3": Vanilla(tokens_per_step=3),
    "threshold-0.3": Threshold(0.3),
    "localleap-wide": LocalLeap(0.5, 0.2, 3),
    "learn2pd-cut": replace(LEARNED, eotp="published"),
    "freedave-tree": FreeDave(3, draft_mode="tree"),
    "drafting": Drafting(exact=False),
    "remembering": Remembering(),
    "revoking": Revoking(2),  # of blocks of four
    "editing": Editing(),
}
CACHES: dict[str, Any] = {
    **{name: resolve("cache", name, Cache) for name in names("cache") if name != "none"},
    "freecache-last": FreeCache(freeze="last_forward"),
    "freecache-token": FreeCache(granularity="token", window=2),
    "freecache-prompt": FreeCache(granularity="prompt", freeze="last_forward"),
    "dllm_cache-often": DLLMCache(3, 2, 0.4),
    "d2cache-few": D2Cache(current_k=3, sigma=2.0, rollout_p=0.3, inflate_w=2),
    "sparse-now": Sparse(0.3, 1, delay=0),
    "elastic-narrow": Elastic(0.8, 2, 3),
}
caches = pytest.mark.parametrize("cache", CACHES.values(), ids=CACHES)
# All but those that reuse what is exact alone: nothing, over models that attend to every position.
REUSING = {name: cache for name, cache in CACHES.items() if not isinstance(cache, Block)}
reusing = pytest.mark.parametrize("cache", REUSING.values(), ids=REUSING)
sizes = cycle([2, 3, 4])


OPTIONS: dict[str, Any] = {"gen_length": 10, "block_length": 4, "batch_size": 8, "stop_at_eos": False, "seed": 3}


def run(lm: dllm.LanguageModel, prompts: list[list[int]], sampler: Any, cache: Any, **options: Any) -> dllm.Generation:
    return dllm.generate(lm, prompts, sampler, cache, **OPTIONS | options)


def combinations() -> list[Any]:
    """Every cache with every sampler, each with one of the batch sizes between one row and all five.

    Caches with other options meet the samplers that ask most of them, and those meet both families with every cache;
    the others meet them in turn, so that every sampler and every cache meets both. Samplers with other options meet
    every third cache, and the others in `make test-all`.
    """
    demanding = ("vanilla", "freedave", "learn2pd-cut", "revoking", "editing")
    return [
        pytest.param(
            make,
            sampler,
            cache,
            next(sizes),
            id=f"{first}-{second}-{family}",
            marks=[pytest.mark.spare] * (second not in (*BY_NAME, *demanding) and (row + column) % 3 != 0),
        )
        for row, (first, cache) in enumerate(CACHES.items())
        for column, (second, sampler) in enumerate(SAMPLERS.items())
        if (first in names("cache") or second in demanding) and not unmet(sampler, cache)
        for place, (family, make) in enumerate(BACKBONES.items())
        if second in demanding or place == (row + column) % 2
    ]


SHORT = {"gen_length": 8}  # two blocks
_exact: dict[Any, dllm.Generation] = {}  # of each sampler without a cache
combined = pytest.mark.parametrize(("make", "sampler", "cache", "size"), combinations())


@combined
def test_every_sampler_runs_in_batches_with_every_cache(make: Maker, sampler: Any, cache: Any, size: int) -> None:
    lm = make()
    prompts = PROMPTS[:5]
    # Two forwards a step, or some more for each of two blocks.
    most = {Drafting: 16, TokenEditing: 40, T2M: 64}.get(type(sampler), 8)
    few = run(lm, prompts, sampler, cache, batch_size=size, seed=50, **SHORT)
    assert few.stats.cache_refreshes >= len(prompts)
    assert not (few.completions == lm.backbone.mask_token_id).any()
    assert few.nfe.max() <= most
    for row, prompt in enumerate(prompts):
        assert few.sequences[row, -8 - len(prompt) : -8].tolist() == prompt
    single = run(lm, [prompts[size]], sampler, cache, seed=[50 + size], **SHORT)  # without padding as well
    assert few.completions[size].tolist() == single.completions[0].tolist()
    assert few.commit_step[size].tolist() == single.commit_step[0].tolist()
    assert few.nfe[size] == single.nfe[0]


@combined
@pytest.mark.covering(1)
def test_refreshed_at_every_forward_a_cache_is_none(make: Maker, sampler: Any, cache: Any, size: int) -> None:
    if (key := (make, id(sampler), size)) not in _exact:
        _exact[key] = run(make(), PROMPTS[:4], sampler, "none", batch_size=size, **SHORT)
    spy = Spying(cache, expiring=True)
    exact, refreshed = _exact[key], run(make(), PROMPTS[:4], sampler, spy, batch_size=size, **SHORT)
    assert torch.equal(exact.sequences, refreshed.sequences)
    assert torch.equal(exact.nfe, refreshed.nfe)
    assert torch.equal(exact.commit_step, refreshed.commit_step)


@backbones
@pytest.mark.parametrize("cache", [DKVCache(interval=1), DLLMCache(1, 1, 0.0)], ids=repr)
def test_an_interval_of_one_is_none(make: Maker, cache: Any) -> None:
    lm = make()
    exact, refreshed = (run(lm, PROMPTS, "threshold", each) for each in ("none", cache))
    assert torch.equal(exact.sequences, refreshed.sequences)
    assert refreshed.stats.cache_refreshes == int(refreshed.nfe.sum())


@backbones
@reusing
def test_stale_keys_and_values_are_what_is_used(make: Maker, cache: Any) -> None:
    # Otherwise the tests above would compare exact runs with exact runs.
    lm = make()
    exact, cached = (run(lm, PROMPTS, "vanilla", each, gen_length=20) for each in ("none", cache))
    assert not torch.equal(exact.sequences, cached.sequences)
    assert cached.stats.computed_share < 1
    assert cached.stats.cache_refreshes < int(cached.nfe.sum())


def current_in_one_layer(make: Maker, cache: Any) -> bool:
    """Whether every column is computed after its token changed, before anything of it is used."""
    if isinstance(cache, Sparse):  # what is evicted is missing
        return False
    keeps_mask_keys = getattr(cache, "freeze", "clean") == "last_forward" and cache.granularity != "prompt"
    # Of a shifted block the column behind the last one read is not computed until the next block.
    return not keeps_mask_keys and not (make is random_dream and isinstance(cache, Dual))


CURRENT = {
    f"{backbone}-{name}": (make, cache)
    for backbone, make in BACKBONES.items()
    for name, cache in CACHES.items()
    if current_in_one_layer(make, cache)
}


@backbones
@reusing
def test_in_one_layer_only_what_changed_since_can_be_stale(make: Maker, cache: Any) -> None:
    # Keys and values of a single layer depend on a column's own token alone: what computes a column after its
    # token changed is exact, in the right slot, at every window's edge.
    lm = make(layers=1)
    exact, cached = (run(lm, PROMPTS, "vanilla", each) for each in ("none", cache))
    if make is random_dream and isinstance(cache, Prefix):  # the last column of all is not computed again
        exact.sequences[:, -2:], cached.sequences[:, -2:] = 0, 0
    assert torch.equal(exact.sequences, cached.sequences) == current_in_one_layer(make, cache)
    assert cached.stats.computed_share < 1


REPEATABLE = {name: cache for name, cache in CACHES.items() if not unmet(FreeDave(), cache)}


@backbones
@pytest.mark.parametrize("cache", REPEATABLE.values(), ids=REPEATABLE)
@pytest.mark.parametrize("base", [Vanilla(), Threshold(0.3), LocalLeap(0.5, 0.2, 3)], ids=repr)
def test_draft_and_verify_is_lossless(make: Maker, cache: Any, base: Any) -> None:
    lm = make()
    plain = run(lm, PROMPTS, base, cache, gen_length=14)
    for draft_mode in ("batch", "tree"):
        drafted = run(lm, PROMPTS, FreeDave(4, base, draft_mode), cache, gen_length=14)
        assert torch.equal(plain.sequences, drafted.sequences)
        assert (drafted.nfe <= plain.nfe).all()


class Careless(FreeDave):
    """Drafts whatever the cache says."""

    @property
    def needs(self) -> frozenset[str]:
        return frozenset()


BOUNDED = {name: replace(cache, measure_every=2, refresh_above=0.05) for name, cache in REPEATABLE.items()}
REFUSED = {name: cache for name, cache in (CACHES | BOUNDED).items() if unmet(FreeDave(), cache)}


@backbones
def test_draft_and_verify_is_refused_where_it_would_not_be_lossless(make: Maker) -> None:
    lm, lossy = make(), set()
    assert {"dkv", "dllm_cache", "d2cache", "freecache-last", "prefix", "dual", "freecache"} <= set(REFUSED)
    for name, cache in REFUSED.items():
        with pytest.raises(ValueError, match="is not compatible with lossless drafting"):
            run(lm, PROMPTS, FreeDave(4), cache)
        plain, drafted = (run(lm, PROMPTS[:4], each, cache, gen_length=20) for each in (Vanilla(), Careless(4)))
        lossy |= {name} if not torch.equal(plain.sequences, drafted.sequences) else set()
    assert {"dkv", "dllm_cache", "d2cache", "freecache-last", "dual"} <= lossy


@pytest.mark.parametrize(("make", "cache"), CURRENT.values(), ids=CURRENT)
def test_what_a_draft_changes_is_what_is_judged(make: Maker, cache: Any) -> None:
    # In one layer a draft's prediction is exact if all its own tokens were fed to the model.
    lm = make(layers=1)
    exact, cached = (run(lm, PROMPTS, Careless(4), each, gen_length=9) for each in ("none", cache))
    if make is random_dream and isinstance(cache, Prefix):
        exact.sequences[:, -2:], cached.sequences[:, -2:] = 0, 0
    assert torch.equal(exact.sequences, cached.sequences)


@backbones
@caches
def test_an_edited_position_is_computed_again(make: Maker, cache: Any) -> None:
    lm, seen = make(), []
    edited: list[int] = []

    def watch(engine: dllm.Engine, step: dllm.Step) -> None:
        cache_run: Any = engine.denoiser.cache
        store = cache_run.store
        if edited:
            # The first layer's keys depend on a column's own token alone.
            tokens = torch.tensor(step.tokens)
            keys = KeyCapture()
            lm.backbone(tokens, None, None, keys)
            seen.append(torch.allclose(store.keys[0, 0, :, edited[0]], keys.first[0, :, edited[0]]))
        edited.extend(np.flatnonzero(step.change.edited[0]).tolist())

    observed(watch, lm, PROMPTS[:1], Editing(revoke=False), cache, **OPTIONS)
    assert edited == [len(PROMPTS[0]) + 1]
    assert all(seen)
    assert len(seen) >= 1


class KeyCapture:
    """A store that keeps the first layer's keys."""

    first: torch.Tensor

    def update(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if layer == 0:
            self.first = keys
        return keys, values


@backbones
@caches
def test_a_revoked_position_is_computed_again(make: Maker, cache: Any) -> None:
    lm, spy = make(), Spying(cache)
    revoked: list[int] = []

    def watch(step: dllm.Step) -> None:
        if step.change.revoked.any():
            revoked.append(len(spy.log))

    run(lm, PROMPTS[:1], Editing(), spy, callback=watch)
    assert len(revoked) == 1
    assert len(PROMPTS[0]) in spy.log[revoked[0]][0]


@backbones
@caches
def test_forwards_about_drafts_alone_leave_what_is_remembered_of_a_row(make: Maker, cache: Any) -> None:
    lm = make()
    plain, peeking = (run(lm, PROMPTS[:3], each, cache) for each in (Leftmost(2), Peeking()))
    assert torch.equal(plain.sequences, peeking.sequences)
    assert plain.stats.cache_refreshes == peeking.stats.cache_refreshes


@dataclass(frozen=True)
class Peeking(Policy):
    """Leftmost, two at a time, after a look at a draft without the canvas as it is."""

    def step(self, window: Window, denoise: Denoise, state: None) -> Edit:
        drafted = Edit(window.columns, torch.ones_like(window.columns), window.masked).on(window.tokens)
        both = torch.stack((window.tokens, drafted), dim=1)
        denoise(torch.stack((torch.zeros_like(window.masked), window.inside), dim=1), tokens=both)
        return Leftmost(2).step(window, denoise, None)


@backbones
@caches
def test_refreshing_above_a_bound_ignores_batchmates(make: Maker, cache: Any) -> None:
    lm, bounded = make(), replace(cache, measure_every=2, refresh_above=0.3)
    batch = run(lm, PROMPTS, "threshold", bounded)
    for row in (0, 2, 5):
        single = run(lm, [PROMPTS[row]], "threshold", bounded)
        assert batch.completions[row].tolist() == single.completions[0].tolist()
        assert batch.nfe[row] == single.nfe[0]


@caches
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_lower_precision_runs(cache: Any, dtype: torch.dtype) -> None:
    for make in (random_llada, random_dream):
        result = run(make(dtype=dtype), PROMPTS[:3], "threshold", replace(cache, measure_every=3))
        assert not (result.completions == 63).any()
        assert result.stats.drift is not None
        assert result.stats.drift.kv_error < 2


@backbones
def test_rows_cut_off_early_compute_no_more_than_they_look_at(make: Maker) -> None:
    lm = make()
    lm.backbone.get_output_embeddings().weight.data[62] *= 2  # more of end-of-text
    cut = replace(LEARNED, eotp="published")
    for cache in CACHES.values():
        spy, ends = Spying(cache), []

        def watch(step: dllm.Step, spy: Spying = spy, ends: list[tuple[int, int]] = ends) -> None:
            if step.change.filled[0].any():
                ends.append((len(spy.log), int(step.change.filled[0].argmax())))

        run(lm, [[3, 4]], cut, spy, gen_length=24, block_length=8, callback=watch)
        assert ends
        for after, end in ends:
            assert all(max(forward[0]) < end for forward in spy.log[after:] if forward)


@backbones
@caches
def test_an_oracle_reproduces_its_base_with_the_same_cache(make: Maker, cache: Any) -> None:
    lm = make()
    base, oracle = (run(lm, PROMPTS[:3], each, cache) for each in (Leftmost(), Oracle(Leftmost())))
    assert torch.equal(base.sequences, oracle.sequences)
    assert (oracle.nfe <= base.nfe).all()


@caches
def test_masks_anywhere_are_filled(cache: Any) -> None:
    for make in (random_llada, random_dream):
        lm = make()
        m = lm.backbone.mask_token_id
        rows = [
            [m, 5, m, m, 8, m, 9, m, m, m, m, 4, m, m, m],
            [3, m, m, 4],
            [1, 2, 3, 4, 5, 6, m, 7, *[m] * 12, 9],
            [8, m],
        ]
        batch = dllm.infill(lm, rows, "threshold", cache, block_length=4, seed=5)
        for i, row in enumerate(rows):
            alone = dllm.infill(lm, [row], "threshold", cache, block_length=4, seed=5 + i)
            assert batch.sequences[i, -len(row) :].tolist() == alone.sequences[0].tolist()
            assert batch.nfe[i] == alone.nfe[0]


@backbones
@caches
def test_rows_that_stop_and_draw_ignore_batchmates(make: Maker, cache: Any) -> None:
    lm = make()
    options = {"stop_at_eos": True, "eos_token_id": common_token(make), "temperature": 0.7, "top_p": 0.95}
    batch = run(lm, PROMPTS, "threshold", cache, seed=9, **options)
    for row in (0, 2, 5):
        single = run(lm, [PROMPTS[row]], "threshold", cache, seed=9 + row, **options)
        assert batch.completions[row].tolist() == single.completions[0].tolist()
        assert batch.nfe[row] == single.nfe[0]


@backbones
@caches
def test_an_empty_prompt_generates(make: Maker, cache: Any) -> None:
    lm = make()
    result = run(lm, [[], [3, 4]], "threshold", cache)
    assert not (result.completions == lm.backbone.mask_token_id).any()
    # Without a prompt all masks are alike, and rounding alone decides among them.
    assert result.completions[1].tolist() == run(lm, [[3, 4]], "threshold", cache).completions[0].tolist()


@caches
def test_attention_may_be_spelled_out(cache: Any) -> None:
    fused, eager = random_dream(), random_dream()
    eager.backbone.config._attn_implementation = "eager"
    results = [run(lm, PROMPTS, "threshold", cache) for lm in (fused, eager)]
    assert torch.equal(results[0].sequences, results[1].sequences)
