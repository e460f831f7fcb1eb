"""The bundled models do what their cards say, so that policies have something to win and to lose."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest
from transformers import Qwen2ForCausalLM

import dllm
from dllm.evaluation.word_problems import evaluate, evaluate_causal
from dllm.files import BUNDLED
from dllm.models.tokenizers import load_tokenizer
from dllm.resolve import names
from dllm.samplers import Vanilla
from dllm.tasks import word_problems

# Held out: training uses seeds below 1,000,000.
PROBLEMS = word_problems.problems(100, seed=3_000_001)
OPTIONS = {"gen_length": 64, "block_length": 32, "batch_size": 10}


@pytest.mark.parametrize(("name", "least"), [("tiny-llada", 0.95), ("tiny-dream", 0.90)])
def test_one_token_per_step_is_nearly_always_right_and_four_visibly_worse(name: str, least: float) -> None:
    lm = dllm.load(name, device="cpu")
    slow = evaluate(lm, PROBLEMS, Vanilla(), **OPTIONS)
    fast = evaluate(lm, PROBLEMS, Vanilla(tokens_per_step=4), **OPTIONS)
    # 100 problems: three standard errors of room below what 500 must show.
    assert slow.final >= least - 3 * (least * (1 - least) / 100) ** 0.5
    assert fast.final <= slow.final - 0.10
    assert fast.nfe < slow.nfe / 3


def test_the_guide_is_nearly_always_right() -> None:
    folder = BUNDLED / "tiny-guide"
    score = evaluate_causal(Qwen2ForCausalLM.from_pretrained(folder).eval(), load_tokenizer(folder), PROBLEMS)
    assert score.final >= 0.90


def test_together_they_are_small() -> None:
    assert sum(path.stat().st_size for path in BUNDLED.rglob("*")) < 25e6


def test_the_readme_shows_the_measured_table() -> None:
    root = Path(__file__).parents[1]
    table = [line for line in (root / "docs" / "tradeoff.md").read_text().splitlines() if line.startswith("|")]
    assert "\n".join(table) in (root / "README.md").read_text()
    card = (BUNDLED / "tiny-llada" / "README.md").read_text()
    measured = re.search(r"vanilla, 1 token per step \| ([\d.]+%)", card)
    assert measured is not None and f"vanilla, 1 per step | {measured[1]}" in "\n".join(table)


def rows(text: str) -> dict[str, dict[str, str]]:
    """The first table of a Markdown text, by its first column."""
    lines = text[text.index("\n|") :].strip().partition("\n\n")[0].splitlines()
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0]: dict(zip(table[0], row, strict=True)) for row in table[2:]}


@pytest.mark.parametrize(
    ("heading", "file"),
    [
        ("## Policies compared", "policies-tiny-llada.md"),
        ("## Caches compared", "caches-tiny-llada.md"),
        ("## Speed", "bench-100m-cpu.md"),
    ],
)
def test_the_readme_compares_by_the_measured_tables(heading: str, file: str) -> None:
    root = Path(__file__).parents[1]
    measured = rows((root / "docs" / file).read_text())
    shown = rows((root / "README.md").read_text().partition(heading)[2])
    assert len(shown) >= 7
    for setting, cells in shown.items():
        [own] = [own for label, own in measured.items() if re.sub(r"\(.*\)", "", label) == setting]
        assert {name: cell for name, cell in cells.items() if name != "setting"}.items() <= own.items()


@pytest.mark.parametrize("name", ["tiny-llada", "tiny-dream"])
def test_every_cache_is_measured_with_three_policies_and_the_default_loses_little(name: str) -> None:
    measured = rows((Path(__file__).parents[1] / "docs" / f"caches-{name}.md").read_text())
    policies = ("threshold 0.999", "localleap 0.999/0.99/4", "ar_guided argmax")
    for policy in policies:
        own = {setting.split(",")[0].split()[0] for setting in measured if setting.endswith(policy)}
        assert own == {"none", "prefix", "dual", "freecache", "dkv", "dllm_cache", "d2cache"}
        exact = measured[f"none, {policy}"]
        for cache in ("dual", "freecache clean", "prefix"):
            cached = measured[f"{cache}, {policy}"]
            assert float(cached["right answers"].rstrip("%")) >= float(exact["right answers"].rstrip("%")) - 2
            assert float(cached["positions"].replace(",", "")) < float(exact["positions"].replace(",", ""))


def test_a_step_costs_little_more_than_the_forward_it_needs() -> None:
    docs = Path(__file__).parents[1] / "docs"
    measured = rows((docs / "bench-100m-cpu.md").read_text())
    for policy in ("threshold", "localleap", "learn2pd"):
        none, dual, freecache = (
            next(
                cells for label, cells in measured.items() if label.startswith(policy) and label.endswith(f" + {cache}")
            )
            for cache in ("none", "dual", "freecache")
        )
        assert float(none["step / bare forward"]) <= 1.05
        assert max(float(cells["step / bare forward"]) for cells in (dual, freecache)) <= 1.10
        # No star: the same tokens.
        assert float(none["of straightforward"]) >= 1.15
        assert float(dual["of dual"]) >= 1.3
        assert max(float(cells["peak / (weights + store)"]) for cells in (none, dual, freecache)) <= 1.10
    # dllm_cache computes the values of the whole response in every layer, which the columns it counts leave out.
    every = rows((docs / "bench-caches-100m-cpu.md").read_text())
    for cache in ("none", "prefix", "dual", "freecache", "dkv", "d2cache"):
        assert float(every[f"threshold + {cache}"]["step / bare forward"]) <= 1.10


@pytest.mark.parametrize("name", ["tiny-llada", "tiny-dream"])
def test_every_method_stays_within_a_point_of_one_token_per_step_at_most_at_60_percent_of_its_forwards(
    name: str,
) -> None:
    lines = (Path(__file__).parents[1] / "docs" / f"policies-{name}.md").read_text().splitlines()
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[4:]]
    measured = {row[0]: (float(row[1].rstrip("%")), float(row[4])) for row in table}
    share, nfe = measured["vanilla, EOS-aware"]
    for method in ("localleap", "learn2pd", "freedave", "ar_guided"):
        own = [values for setting, values in measured.items() if setting.startswith(method)]
        assert any(right >= share - 1 and forwards <= 0.6 * nfe for right, forwards in own), method
    assert {values[0] for setting, values in measured.items() if setting.endswith("over vanilla")} == {share}


def test_the_frontier_shown_is_of_every_policy_with_three_caches() -> None:
    file = Path(__file__).parents[1] / "docs" / "frontier" / "report.csv"
    with file.open(encoding="utf-8") as table:
        runs = list(csv.DictReader(table))
    pairs = {(run["sampler.name"], run["cache.name"]) for run in runs}
    assert pairs == {(name, cache) for name in names("sampler") for cache in ("none", "dual", "freecache")}
    assert {run["n"] for run in runs} == {"100"}
    # Over the same cache these give the very answers of one token per step, in fewer forwards.
    found = {(run["sampler.name"], run["cache.name"]): run for run in runs}
    for cache in ("none", "dual", "freecache"):
        for name in ("freedave", "oracle"):
            assert found[name, cache]["accuracy"] == found["vanilla", cache]["accuracy"]
            assert float(found[name, cache]["nfe"]) < float(found["vanilla", cache]["nfe"])
