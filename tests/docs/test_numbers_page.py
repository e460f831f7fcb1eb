"""The table of intervals in docs/numbers.md."""

from __future__ import annotations

import re
from pathlib import Path

from dllm.evaluation.metrics import wilson

PAGE = (Path(__file__).parents[2] / "docs" / "numbers.md").read_text()


def test_the_intervals_are_those_that_reports_show() -> None:
    sizes = (10, 100, 200, 1000)
    for name, share in {"all": 1, "90%": 0.9, "half": 0.5}.items():
        bounds = [wilson(round(n * share), n) for n in sizes]
        cells = " | ".join(f"{100 * low:.1f}% to {100 * high:.1f}%" for low, high in bounds)
        assert f"| {name} | {cells} |" in PAGE
    header = re.search(r"^\| right \|(.*)\|$", PAGE, re.M)
    assert header is not None
    assert [int(cell.split()[-1].replace(",", "")) for cell in header[1].split("|")] == list(sizes)
