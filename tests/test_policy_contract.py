"""The checks that the library offers for policies written elsewhere."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from dllm.contract import violations
from dllm.decoding.setup import Setup
from dllm.decoding.window import Edit, Window
from dllm.resolve import names
from dllm.samplers import Threshold, Vanilla, Wino
from dllm.samplers.base import Denoise, Policy, commit
from dllm.samplers.selection import top
from models import random_dream, random_llada
from toys import Leftmost, Remembering, Stalling, Vandal

LM = random_llada(layers=1)


class Neighbourly(Policy):
    """Commits as many tokens as the batch has rows."""

    def step(self, window: Window, denoise: Denoise, state: Any) -> Edit:
        prediction = denoise()
        return commit(window, prediction, top(prediction.confidence, len(window.rows), window.masked))


class Forgetful(Policy):
    """Counts steps by row, and does not begin again when the row's number is reused."""

    def start(self, setup: Setup) -> torch.Tensor:
        return torch.zeros(setup.slots, dtype=torch.long)

    def step(self, window: Window, denoise: Denoise, state: torch.Tensor) -> Edit:
        prediction = denoise()
        state[window.rows] += 1
        return commit(window, prediction, top(prediction.confidence, state[window.rows], window.masked))


class Scribbling(Policy):
    """Writes to the window."""

    def step(self, window: Window, denoise: Denoise, state: Any) -> Edit:
        prediction = denoise()
        edit = commit(window, prediction, top(prediction.confidence, 1, window.masked))
        window.step.add_(1)
        return edit


class Drawing(Policy):
    """Draws from torch's own generator."""

    def step(self, window: Window, denoise: Denoise, state: Any) -> Edit:
        return commit(window, denoise(), top(torch.rand(window.masked.shape), 1, window.masked))


@dataclass(frozen=True)
class Pretending(Policy):
    """Says that its step is one forward, and remembers earlier ones."""

    single_forward = True

    def start(self, setup: Setup) -> dict[str, int]:
        return {"steps": 0}

    def step(self, window: Window, denoise: Denoise, state: dict[str, int]) -> Edit:
        state["steps"] += 1
        score = torch.arange(window.masked.shape[1]).expand(window.masked.shape).double()
        chosen = top(score if state["steps"] % 3 else -score, 1, window.masked)
        return commit(window, denoise(), chosen)


@pytest.mark.parametrize(
    "sampler", [Vanilla(), Threshold(0.3), Leftmost(2), Remembering(), Wino(0.2, 0.6, 2)], ids=repr
)
@pytest.mark.parametrize("make", [random_llada, random_dream])
def test_good_policies_keep_every_rule(make: Any, sampler: Any) -> None:
    assert violations(make(layers=1), sampler) == []


@pytest.mark.parametrize("cache", names("cache"))
def test_a_good_policy_keeps_them_with_every_cache(cache: str) -> None:
    assert violations(LM, Threshold(0.3), cache) == []


def test_a_refused_combination_says_so() -> None:
    with pytest.raises(ValueError, match="not compatible"):
        violations(LM, Threshold(0.3), "dual", cfg_scale=1.0)


@pytest.mark.parametrize(
    ("sampler", "rule"),
    [
        (Neighbourly(), "a row does not depend on its batch"),
        (Forgetful(), "nor on earlier requests"),
        (Scribbling(), r"the inputs of step are unchanged \(step\)"),
        (Drawing(), "the same seed gives the same result"),
        (Pretending(), "single_forward"),
    ],
)
def test_a_broken_rule_is_named(sampler: Any, rule: str) -> None:
    with torch.random.fork_rng():
        broken = violations(LM, sampler)
    assert re.search(rule, "; ".join(broken))


@pytest.mark.parametrize(("sampler", "told"), [(Stalling(), "makes no progress"), (Vandal(), "outside the generated")])
def test_what_the_engine_stops_breaks_a_rule(sampler: Any, told: str) -> None:
    (broken,) = violations(LM, sampler)
    assert told in broken
    assert "_Watched" not in broken
