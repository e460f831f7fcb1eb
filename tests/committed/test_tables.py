"""Committed measurements: that the tables in docs/ hold what the text beside them says, not what the code does now."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest

from dllm.resolve import names, options_of, resolve
from dllm.samplers.base import KINDS, Sampler
from policies import over_masks

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


def rows(text: str) -> dict[str, dict[str, str]]:
    """The first table of a Markdown text, by its first column."""
    lines = text[text.index("\n|") :].strip().partition("\n\n")[0].splitlines()
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0]: dict(zip(table[0], row, strict=True)) for row in table[2:]}


def runs(folder: str) -> list[dict[str, str]]:
    """The runs of a report, all of their numbers."""
    with (DOCS / folder / "report.csv").open(encoding="utf-8") as table:
        return list(csv.DictReader(table))


@pytest.mark.parametrize(
    ("page", "heading", "file"),
    [
        ("docs/comparison.md", "## Policies", "policies/tiny-llada/report.md"),
        ("docs/comparison.md", "## Caches", "caches/tiny-llada/report.md"),
        ("README.md", "## Quality and speed", "policies/tiny-llada/report.md"),
        ("docs/performance.md", "## The floor", "bench-100m-cpu.md"),
    ],
)
def test_pages_show_the_measured_tables(page: str, heading: str, file: str) -> None:
    measured = rows((DOCS / file).read_text())
    shown = rows((ROOT / page).read_text().partition(heading)[2])
    assert len(shown) >= 5
    for setting, cells in shown.items():
        [own] = [own for label, own in measured.items() if re.sub(r"\(.*\)", "", label).strip() == setting]
        assert {name: cell for name, cell in cells.items() if name != "setting"}.items() <= own.items()


def test_every_cache_is_measured_and_computes_less() -> None:
    for model in ("tiny-llada", "tiny-dream"):
        measured = {run["cache.name"]: run for run in runs(f"caches/{model}")}
        assert set(measured) == set(names("cache")) - {"block", "sub_blocks"}  # for block-causal models
        exact = measured["none"]
        for name in ("dual", "freecache", "prefix"):
            assert float(measured[name]["accuracy"]) >= float(exact["accuracy"]) - 0.03
            assert float(measured[name]["positions"]) < float(exact["positions"])


def test_a_step_costs_little_more_than_the_forward_it_needs() -> None:
    measured = rows((DOCS / "bench-100m-cpu.md").read_text())
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
    every = rows((DOCS / "bench-caches-100m-cpu.md").read_text())
    for cache in ("none", "prefix", "dual", "freecache", "dkv", "d2cache"):
        assert float(every[f"threshold + {cache}"]["step / bare forward"]) <= 1.10


@pytest.mark.parametrize("model", ["tiny-llada", "tiny-dream"])
def test_every_method_stays_within_a_point_of_one_token_per_step_at_most_at_60_percent_of_its_forwards(
    model: str,
) -> None:
    measured = runs(f"policies/{model}")
    assert {run["sampler.name"] for run in measured} == set(over_masks())
    [vanilla] = [run for run in measured if run["sampler.name"] == "vanilla"]
    for method in ("localleap", "learn2pd", "freedave", "ar_guided"):
        own = [run for run in measured if run["sampler.name"] == method]
        assert any(
            float(run["accuracy"]) >= float(vanilla["accuracy"]) - 0.01
            and float(run["nfe"]) <= 0.6 * float(vanilla["nfe"])
            for run in own
        ), method
    for name in ("freedave", "ssd"):
        [lossless] = [run for run in measured if run["sampler.name"] == name]
        assert lossless["accuracy"] == vanilla["accuracy"]


def test_the_frontier_shown_is_of_every_policy_with_three_caches() -> None:
    pairs = {(run["sampler.name"], run["cache.name"]) for run in runs("frontier")}
    # A canvas that grows takes no cache.
    policies = set(over_masks()) - {"daedal"}
    assert pairs == {(name, cache) for name in policies for cache in ("none", "dual", "freecache")}
    assert {run["n"] for run in runs("frontier")} == {"100"}
    # Over the same cache these give the very answers of one token per step, in fewer forwards.
    found = {(run["sampler.name"], run["cache.name"]): run for run in runs("frontier")}
    for cache in ("none", "dual", "freecache"):
        for name in ("freedave", "ssd", "oracle"):
            assert found[name, cache]["accuracy"] == found["vanilla", cache]["accuracy"]
            assert float(found[name, cache]["nfe"]) < float(found["vanilla", cache]["nfe"])


@pytest.mark.parametrize("folder", ["frontier", "policies/tiny-llada", "policies/tiny-dream"])
def test_reports_group_policies_as_these_say_of_themselves(folder: str) -> None:
    kinds = {name: resolve("sampler", name, Sampler).kind for name in names("sampler")}
    measured, shown = runs(folder), rows((DOCS / folder / "report.md").read_text())
    assert {run["label"]: run["kind"] for run in measured} == {
        label.removesuffix(" (reference)"): cells["kind"] for label, cells in shown.items()
    }
    assert all(run["kind"] == kinds[run["sampler.name"]] for run in measured)
    legend = (DOCS / folder / "quality-nfe.svg").read_text()
    assert all(f">{kind}</text>" in legend for kind in set(kinds.values()))


def test_every_policy_has_a_section_that_names_its_options() -> None:
    page = (DOCS / "policies.md").read_text()
    sections = dict(re.findall(r"^### `(\w+)`.*?\n(.*?)(?=^##|\Z)", page, re.MULTILINE | re.DOTALL))
    assert list(sections) == sorted(sections, key=lambda name: (KINDS.index(kind_of(name)), list(sections).index(name)))
    assert set(sections) == set(names("sampler"))
    for name, text in sections.items():
        mentioned = set(re.findall(r"`(\w+)[`=]", text))
        assert mentioned & set(options_of("sampler", name)), name


def kind_of(name: str) -> str:
    return str(resolve("sampler", name, Sampler).kind)
