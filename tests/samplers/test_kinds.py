"""What becomes of committed tokens, as the policies say of themselves."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import dllm
from commands import command
from contract_rig import PROMPTS
from dllm.calibration import Calibration
from dllm.resolve import names, resolve
from dllm.samplers import Calibrated
from dllm.samplers.base import KINDS, Policy, Sampler
from models import random_llada
from test_contract import SAMPLERS, revises, run


def test_are_of_every_policy() -> None:
    kinds: dict[str, set[str]] = {kind: set() for kind in KINDS}
    for name in names("sampler"):
        kinds[resolve("sampler", name, Sampler).kind].add(name)
    assert kinds["revising"] == {"edit", "remdm", "renoise", "saber", "t2m", "wino"}
    assert kinds["lossless"] == {"freedave", "oracle", "s2d2", "ssd"}
    assert kinds["guided"] == {"ar_guided"}
    assert {"vanilla", "threshold", "learn2pd", "sub_blocks"} <= kinds["committing"]


@pytest.mark.parametrize("name", [name for name, each in SAMPLERS.items() if isinstance(each, Policy)])
def test_one_that_commits_never_changes_a_token(name: str) -> None:
    sampler = SAMPLERS[name]
    if revises(sampler):  # toys among them, which leave their kind as it is
        return
    changed: list[bool] = []

    def watch(step: dllm.Step) -> None:
        changed.append(bool(step.change.edited.any() or step.change.revoked.any()))

    run(random_llada(), PROMPTS[:3], sampler, callback=watch)
    assert not any(changed) or sampler.kind == "revising"


@dataclass(frozen=True)
class Own(Policy):
    """A policy of another package."""


def test_are_committing_by_default_and_those_of_a_cards_policy(tmp_path: Path) -> None:
    assert Own().kind == "committing"
    fields: dict[str, Any] = {
        "model": "toy", "weights": "0", "sampler": {"_target_": "dllm.samplers.Saber"}, "knob": "at_least",
        "value": 2, "cache": {"_target_": "dllm.cache.NoCache"}, "options": {}, "task": "toy", "data": {}, "n": 9,
        "loss": 0.1, "delta": 0.1, "bound": 0.1, "baseline": {},
        "tests": [{
            "value": 2, "n": 9, "mean_loss": 0.0, "p_value": 0.1, "bound": 0.1, "accuracy": 1.0, "nfe": 5.0,
            "certified": True,
        }],
    }  # fmt: skip
    Calibration(**fields).write(tmp_path / "card.json")
    assert Calibrated(tmp_path / "card.json").kind == "revising"


def test_are_recorded_with_the_results(tmp_path: Path) -> None:
    done = command("evaluate", "sampler=tiny/wino", "task.limit=1", "gen_length=16", "baselines=0", f"out={tmp_path}")
    assert done.code == 0, done.err
    (file,) = tmp_path.glob("*/results.json")
    assert json.loads(file.read_text())["kind"] == "revising"
