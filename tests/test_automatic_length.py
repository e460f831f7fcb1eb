"""`gen_length=auto` where answers are compared: evaluations, calibrations, results, and the baselines of a runner."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import dllm
from commands import command
from dllm.cache import NoCache
from dllm.calibration import Calibration
from dllm.evaluation.journal import Journal
from dllm.evaluation.records import Query
from dllm.evaluation.runner import Runner, Setting
from dllm.samplers import Calibrated, Daedal
from dllm.tasks import word_problems
from models import random_llada

AUTO = "sampler=tiny/daedal", "gen_length=auto", "task.limit=2", "threads=1"
MODELS = pytest.mark.parametrize("model", ["tiny-llada", "tiny-dream"])


@MODELS
def test_an_evaluation_finds_the_lengths_and_its_baselines_have_that_of_the_task(model: str, tmp_path: Path) -> None:
    outcome = command("evaluate", *AUTO, f"model={model}", f"out={tmp_path}")
    assert outcome.code == 0, outcome.err
    (file,) = tmp_path.glob("*/results.json")
    results = json.loads(file.read_text())
    asked = [problem.question for problem in word_problems.problems(2, 1_000_001)]
    expected = dllm.generate(dllm.load(model), asked, "tiny/daedal", gen_length="auto", batch_size=20)
    assert results["metrics"]["nfe"] == expected.nfe.float().mean().item()
    assert results["metrics"]["speedup"]["naive"]["nfe"] == 64
    assert results["metrics"]["computed_share"] == expected.stats.computed_share == 1


@MODELS
def test_results_hold_it_and_why_other_samplers_do_not(model: str, tmp_path: Path) -> None:
    only = "samplers=[vanilla,tiny/daedal]", "caches=[none]", "calibrate=false"
    outcome = command("results", *AUTO[1:], *only, f"model={model}", f"out={tmp_path / 'all'}")
    assert outcome.code == 0, outcome.err
    page = (tmp_path / "all.md").read_text()
    assert "| `tiny/daedal`<br>high=0.999, tuned |" in page
    assert "`vanilla` with `none`: gen_length=auto needs a sampler that finds the length (daedal)" in page


def test_a_card_is_of_it_and_compares_with_the_length_of_the_task(tmp_path: Path) -> None:
    outcome = command("calibrate", *AUTO, "values=[0.999]", "loss=0.9", f"out={tmp_path}")
    assert outcome.code == 0, outcome.err
    card = Calibration.read(tmp_path / "calibration.json")
    assert card.options["gen_length"] == "auto"
    asked = [problem.question for problem in word_problems.problems(2, 2_000_001)]
    lm = dllm.load("tiny-llada")
    assert card.baseline["nfe"] == dllm.generate(lm, asked, "vanilla", gen_length=64).nfe.float().mean().item()
    dllm.generate(lm, asked, Calibrated(tmp_path / "calibration.json"), gen_length="auto")  # without a notice


@pytest.mark.parametrize("name", ["evaluate", "calibrate"])
def test_a_sampler_that_finds_no_length_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    outcome = command(name, *AUTO[1:], "sampler=threshold", f"out={tmp_path}")
    assert outcome.code == 2
    assert outcome.err.endswith(
        f"dllm {name}: error: gen_length=auto needs a sampler that finds the length (daedal); "
        "use it, or give a number\n"
    )


def test_a_baseline_has_the_length_of_its_requests_as_far_as_the_context_goes() -> None:
    lm = random_llada(max_length=40)
    setting = Setting(lm, Daedal(), NoCache(), {"gen_length": "auto", "batch_size": 2})
    for prompt, length, expected in ((5, 12, 12), (30, 12, 10)):
        runner = Runner(setting, Journal(None), baselines=1)
        runner.answer([Query("a", [5] * prompt, length=length), Query("b", [6], length=3)])
        (found,) = runner.baseline("naive")
        assert found["nfe"] == 2 * expected
