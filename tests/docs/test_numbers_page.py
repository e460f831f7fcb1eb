"""Numbers in docs/numbers.md and docs/faq.md."""

from __future__ import annotations

import re
from pathlib import Path

from dllm.evaluation.metrics import wilson
from dllm.reports.matrix import Matrix

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "numbers.md").read_text()


def test_the_intervals_are_those_that_reports_show() -> None:
    sizes = (10, 100, 200, 1000)
    for name, share in {"all": 1, "90%": 0.9, "half": 0.5}.items():
        bounds = [wilson(round(n * share), n) for n in sizes]
        cells = " | ".join(f"{100 * low:.1f}% to {100 * high:.1f}%" for low, high in bounds)
        assert f"| {name} | {cells} |" in PAGE
    header = re.search(r"^\| right \|(.*)\|$", PAGE, re.M)
    assert header is not None
    assert [int(cell.split()[-1].replace(",", "")) for cell in header[1].split("|")] == list(sizes)


def test_the_dual_cache_changes_accuracy_as_the_questions_say() -> None:
    text = (DOCS / "faq.md").read_text()
    [points] = re.findall(r"it changes the accuracy by up to (\d+) points", text)
    for model in ("tiny-llada", "tiny-dream"):
        matrix = Matrix.read(DOCS / "results" / model / "runs.jsonl")
        found = {(each.sampler, each.cache): each.quality for each in matrix.cells}
        changes = [abs(found[sampler, "dual"] - found[sampler, "none"]) for sampler, cache in found if cache == "dual"]
        assert 0 < max(changes) <= int(points) / 100 + 1e-9
