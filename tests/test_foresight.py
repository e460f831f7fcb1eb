"""Steps that are launched before the last one is read: as if each had waited for it."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch

import dllm
from contract_rig import BACKBONES, BY_NAME, MORE_BACKBONES, PROMPTS, common_token
from dllm.cache import FreeCache
from dllm.decoding import graphs
from dllm.decoding.canvas import Canvas
from dllm.decoding.compatibility import unmet
from dllm.decoding.foresight import Foresight, Taken
from dllm.decoding.step import Step
from dllm.decoding.window import Change, Edit, Window
from dllm.resolve import names, resolve
from dllm.samplers import Vanilla
from dllm.samplers.base import commit
from dllm.samplers.selection import top
from models import random_llada
from toys import Device, Leftmost

CACHES: dict[str, Any] = {name: resolve("cache", name, object) for name in names("cache")}
CACHES |= {"freecache-narrow": FreeCache(window=0), "freecache-token": FreeCache(granularity="token")}
FORESEEABLE = ("none", "prefix", "dual", "block", "freecache", "freecache-narrow")
SINGLE = {name: sampler for name, sampler in BY_NAME.items() if sampler.single_forward} | {"leftmost": Leftmost(2)}


class Counted:
    """What became of foreseen steps."""

    def __init__(self) -> None:
        self.made, self.held = 0, 0


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    """Foresight on the CPU."""
    found, make, goes_on = Counted(), Foresight.__call__, Canvas.goes_on

    def making(self: Foresight, taken: Taken) -> Taken | None:
        following = make(self, taken)
        found.made += following is not None
        return following

    def going(self: Canvas, change: Change) -> bool:
        held = goes_on(self, change)
        found.held += held
        return held

    monkeypatch.setattr("dllm.decoding.foresight.DEVICES", {"cpu"})
    monkeypatch.setattr(Foresight, "__call__", making)
    monkeypatch.setattr(Canvas, "goes_on", going)
    return found


def steps(lm: dllm.LanguageModel, sampler: Any, cache: Any, **options: Any) -> Iterator[Step]:
    """Of requests that come and go at random."""
    generator = random.Random(0)
    engine = dllm.Engine(lm, sampler, cache, batch_size=3, max_length=48)
    added = 0
    while added < 9 or engine.busy:
        while added < 9 and generator.random() < 0.5:
            own = {"gen_length": generator.randrange(6, 30), "block_length": generator.choice((4, 8, 16))} | options
            engine.add(PROMPTS[added % len(PROMPTS)], seed=added, **own)
            added += 1
        if added and generator.random() < 0.1:
            engine.abort(generator.randrange(added))
        step = engine.step()
        if isinstance(step, Step):
            yield step


def the_same(found: Iterator[Step], expected: Iterator[Step]) -> None:
    for one, other in zip(found, expected, strict=True):
        for name in ("ids", "tokens", "nfe", "forwards", "computed", "refreshes", "ends"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)
        for name in ("committed", "finished", "failed", "settled"):
            np.testing.assert_array_equal(getattr(one.change, name), getattr(other.change, name), err_msg=name)
        assert {name: (answer.completion, answer.error) for name, answer in one.answers.items()} == {
            name: (answer.completion, answer.error) for name, answer in other.answers.items()
        }


def compare(lm: dllm.LanguageModel, sampler: Any, cache: Any, counted: Counted, **options: Any) -> None:
    """Compare a run with foresight with one without."""
    counted.made = counted.held = 0
    found = list(steps(lm, sampler, cache, **options))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dllm.decoding.foresight.DEVICES", set())
        the_same(iter(found), steps(lm, sampler, cache, **options))


def settings() -> Iterator[tuple[str, str, str]]:
    """Every policy; a few with every cache, and on the other family."""
    few = ("vanilla", "threshold", "leftmost")
    yield from (
        ("llada", name, ("none", "dual")[place % 2]) for place, name in enumerate(sorted(SINGLE.keys() - {*few}))
    )
    yield from product(("llada", "dream"), few, FORESEEABLE)
    yield from product(("llada",), few[1:2], CACHES.keys() - {*FORESEEABLE})


@pytest.mark.parametrize(("family", "sampler", "cache"), sorted(settings()))
def test_steps_are_those_that_wait(
    family: str, sampler: str, cache: str, counted: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dllm.decoding.canvas._PACE", -9)  # foresees also where rows are about to leave their blocks
    if unmet(SINGLE[sampler], CACHES[cache]):
        pytest.skip("incompatible")
    make = BACKBONES[family]
    own = {} if sampler == "leftmost" else {"eos_token_id": common_token(make)}
    compare(make(), SINGLE[sampler], CACHES[cache], counted, **own)
    if sampler != "oracle":  # which rehearses without a cache
        assert bool(counted.made) == (cache in FORESEEABLE)
    if cache in FORESEEABLE and sampler in ("vanilla", "leftmost"):
        assert 0 < counted.held < counted.made


@pytest.mark.parametrize("family", BACKBONES)
@pytest.mark.parametrize("freeze", ["clean", "last_forward"])
def test_a_frozen_prompt(family: str, freeze: Any, counted: Counted) -> None:
    for seed in range(4):
        compare(BACKBONES[family](seed=seed), Leftmost(), FreeCache(freeze=freeze, granularity="prompt"), counted)
        assert bool(counted.held) == (family == "llada")


@dataclass(frozen=True)
class Hiding(Leftmost):
    """Hides the end of the canvas in the step after the first of a block."""

    def step(self, window: Window, denoise: Any, state: None) -> Edit:
        edit = super().step(window, denoise, state)
        until = (window.columns[:, 0] + window.block_length - 2).where(window.step == 0, window.tokens.shape[1])
        return replace(edit, until=until) if bool((window.step == 0).any()) else edit


@dataclass(frozen=True)
class ByIndex(Leftmost):
    """Commits by what it knows of the positions that are asked about."""

    def step(self, window: Window, denoise: Any, state: None) -> Edit:
        prediction = denoise()
        index = prediction.index
        score = torch.full((window.columns.numel(),), -torch.inf)
        score = score.scatter(0, index, torch.arange(len(index)).flip(0).float()).view(window.columns.shape)
        return commit(window, prediction, top(score, 1, score > -torch.inf))


@dataclass(frozen=True)
class Adjusting(Leftmost):
    """Commits where a prediction that was changed has a confidence."""

    def step(self, window: Window, denoise: Any, state: None) -> Edit:
        prediction = denoise()
        rows = len(prediction.logits)
        changed = prediction.adjusted(torch.zeros((rows, 1), dtype=torch.long), torch.zeros(rows, 1))
        return commit(window, changed, top(changed.confidence, 1, changed.confidence >= 0))


@pytest.mark.parametrize("sampler", [Hiding(), ByIndex(), Adjusting()], ids=repr)
@pytest.mark.parametrize("cache", ["none", "prefix"])
def test_policies_of_ones_own(sampler: Any, cache: str, counted: Counted) -> None:
    compare(random_llada(), sampler, CACHES[cache], counted, block_length=8)


def test_what_draws_takes_one_forward_in_vain(counted: Counted, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, inner = [0], graphs.Forward.__call__

    def noted(self: Any, *inputs: Any) -> Any:
        calls[0] += 1
        return inner(self, *inputs)

    monkeypatch.setattr(graphs.Forward, "__call__", noted)
    found = dllm.generate(random_llada(), [[5, 9]], Vanilla(order="random"), gen_length=12, stop_at_eos=False)
    assert calls[0] == int(found.nfe[0]) + 1


def test_steps_of_equal_pace_are_foreseen_rightly(counted: Counted) -> None:
    compare(random_llada(), Vanilla(), CACHES["dual"], counted, stop_at_eos=False)
    assert counted.held == counted.made > 0


@pytest.mark.parametrize("cache", ["none", "prefix", "freecache", "block"])
@pytest.mark.parametrize("make", [pytest.param(make, id=name) for name, make in MORE_BACKBONES.items()])
def test_other_families(make: Callable[..., Any], cache: str, counted: Counted) -> None:
    lm = make()
    own = {} if lm.backbone.pattern is None else {"block_length": lm.backbone.pattern.length}
    compare(lm, Vanilla(), CACHES[cache], counted, **own)
    assert bool(counted.held) == (lm.backbone.pattern is None or not lm.backbone.logits_shift)


@pytest.mark.parametrize("cache", ["none", "prefix", "dual", "freecache-narrow"])
def test_replayed_forwards(cache: str, counted: Counted, monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device()
    monkeypatch.setattr(
        "dllm.decoding.memory.Forward", lambda backbone, _: graphs.Forward(backbone, True, device.capture)
    )
    compare(random_llada(), Vanilla(), CACHES[cache], counted)
    assert counted.held
    assert device.made


@pytest.mark.parametrize(
    ("sampler", "cache", "options"),
    [
        (Vanilla(), CACHES["dual"], {"temperature": 0.7}),
        (Vanilla(order="random"), CACHES["dual"], {}),
        (Vanilla(), replace(CACHES["dual"], measure_every=2), {}),
        (BY_NAME["remdm"], CACHES["none"], {}),
        (BY_NAME["klass"], CACHES["none"], {}),
    ],
)
def test_what_depends_on_more_waits(sampler: Any, cache: Any, options: dict[str, Any], counted: Counted) -> None:
    compare(random_llada(), sampler, cache, counted, **options)
    assert counted.made == counted.held == 0


def test_a_step_that_fails_is_reported_when_it_is_taken(counted: Counted) -> None:
    @dataclass(frozen=True)
    class Failing(Leftmost):
        def step(self, window: Window, denoise: Any, state: None) -> Edit:
            if int(window.step[0]) == 2:
                raise ZeroDivisionError
            return super().step(window, denoise, state)

    engine = dllm.Engine(random_llada(), Failing(), "dual")
    engine.add([5, 9], gen_length=8, block_length=8, stop_at_eos=False)
    assert [len(engine.step()) for _ in range(2)] == [1, 1]
    with pytest.raises(ZeroDivisionError):
        engine.step()
