"""What the code says of itself: docstrings, options, sections of the guides, measured rows."""

from __future__ import annotations

import csv
import inspect
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from dllm.cache.base import Cache
from dllm.decoding.compatibility import NEEDS, unmet
from dllm.models import ARCHITECTURES, MaskedDiffusionModel
from dllm.reports.matrix import Cell, Matrix
from dllm.resolve import names, resolve, sources, variants
from dllm.samplers.base import Sampler
from site_pages.sources import ROOT

DOCS = ROOT / "docs"
# Where measured rows are from: folders of docs/ with a report.csv and a report.md, and the data of `dllm results`.
TABLES = {
    "sampler": ("policies/tiny-llada", "policies/tiny-dream"),
    "cache": ("caches/tiny-llada", "caches/tiny-dream"),
}
RESULTS = DOCS / "results"
PROTOCOLS = {"sampler": Sampler, "cache": Cache}
_RULE = re.compile(r"^Rule:\n\n((?: {4}.*\n|\n)+)", re.MULTILINE)
_PAPER = re.compile(r"arXiv (\d{4}\.\d{5})")
_OPTION = re.compile(r"^(\w+): *(.*?) *#+ *(.*)$", re.MULTILINE)
_SECTION = re.compile(r"^### `([\w-]+)`\n\n(.*?)\n*(?=^##|\Z)", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Method:
    """A module's docstring, in parts.

    Attributes:
        summary: its first line.
        rule: the formula: the block after the line `Rule:`; empty if there is none.
        explanation: its symbols and what follows from it, as Markdown.
        differences: from the paper or the published code, likewise; empty if there are none.
        papers: arXiv identifiers, in order.
        path: of the module in the repository.
    """

    summary: str
    rule: str
    explanation: str
    differences: str
    papers: tuple[str, ...]
    path: str


def method_of(cls: type) -> Method:
    """What the module of a policy, cache or family says."""
    module = import_module(cls.__module__)
    text = inspect.getdoc(module) or ""
    summary, _, rest = text.partition("\n\n")
    found = _RULE.search(rest + "\n")
    rule = textwrap.dedent(found[1]).strip("\n") if found else ""
    details = _RULE.sub("", rest + "\n").strip()
    # A list needs an empty line before it.
    details = re.sub(r"(:)\n(- )", r"\1\n\n\2", details)
    explanation, opening, differences = f"\n{details}".partition("\nDifference")
    return Method(
        summary=" ".join(summary.split()),
        rule=rule,
        explanation=explanation.strip("\n"),
        differences=(opening + differences).strip("\n"),
        papers=tuple(dict.fromkeys(_PAPER.findall(text))),
        path=Path(inspect.getsourcefile(module) or "").resolve().relative_to(ROOT).as_posix(),
    )


def built(group: str, name: str) -> Any:
    """A policy or cache with its defaults."""
    return resolve(group, name, PROTOCOLS[group])


@dataclass(frozen=True)
class Setting:
    """An option in a YAML: its default, what it means, and the value for the bundled models if that is another."""

    name: str
    default: str
    meaning: str
    tuned: str


def settings(group: str, name: str) -> list[Setting]:
    """The options of a choice, in the order of its YAML."""
    lines = _commented(f"{group}/{name}")
    tuned = _commented(f"{group}/tiny/{name}") if f"tiny/{name}" in variants(group) else lines
    return [
        Setting(option, value, meaning, "" if tuned[option][0] == value else tuned[option][0])
        for option, (value, meaning) in lines.items()
    ]


def _commented(file: str) -> dict[str, tuple[str, str]]:
    """The options of a YAML and of those that it includes: value and comment."""
    return {option: (value, meaning) for text in sources(file) for option, value, meaning in _OPTION.findall(text)}


@cache
def sections(guide: str) -> dict[str, str]:
    """The sections of a page of docs/ that are headed by a name, such as those of policies.md."""
    return dict(_SECTION.findall((DOCS / guide).read_text(encoding="utf-8")))


def refused(group: str, name: str) -> dict[str, list[str]]:
    """The caches that a policy is not compatible with, or the policies that a cache is not, by the reason."""
    own, other = built(group, name), "cache" if group == "sampler" else "sampler"
    reasons: dict[str, list[str]] = {}
    for each in names(other):
        pair = (own, built(other, each)) if group == "sampler" else (built(other, each), own)
        for need in unmet(*pair):
            reasons.setdefault(pair[1].refuses[need], []).append(each)
    return reasons


def families_of(name: str) -> list[str]:
    """The families that a policy runs on."""
    needs = built("sampler", name).needs
    # A canvas grows only where every position attends to every other, so that there are no blocks to keep.
    bidirectional = {each for each, cls in ARCHITECTURES.items() if cls.pattern is MaskedDiffusionModel.pattern}
    met = {each for each, cls in ARCHITECTURES.items() if not needs & cls.refuses.keys()}
    return [each for each in ARCHITECTURES if each in (met & bidirectional if "growth" in needs else met)]


def needs_of(cls: Any) -> list[str]:
    """What a policy asks of caches and models, in words."""
    return [NEEDS[need][0] for need in sorted(cls.needs)]


@cache
def _rows(table: str) -> tuple[dict[str, str], ...]:
    file = DOCS / table / "report.csv"
    if not file.is_file():
        return ()
    with file.open(encoding="utf-8", newline="") as rows:
        return tuple(csv.DictReader(rows))


def measured(group: str, name: str) -> Iterator[tuple[str, dict[str, str]]]:
    """The measured rows of a policy, or of a cache, with the table that they are of."""
    for table in TABLES[group]:
        for row in _rows(table):
            if row[f"{group}.name"] == name:
                yield table, row


@cache
def matrices() -> tuple[Matrix, ...]:
    """The results of every policy with every cache, of each model."""
    return tuple(Matrix.read(file) for file in sorted(RESULTS.glob("*/runs.jsonl"), reverse=True))


def runs(group: str, name: str, matrix: Matrix) -> dict[str, Cell]:
    """The runs of a policy by cache, or those of a cache by policy; a policy as its values for the model are named."""
    other = "cache" if group == "sampler" else "sampler"
    own = {name, f"tiny/{name}"}
    return {getattr(cell, other): cell for cell in matrix.cells if getattr(cell, group) in own}


def family_page(cls: type) -> str:
    """The page of docs/models/ about a family: the one that links to its module.

    Raises:
        ValueError: there is none.
    """
    module = method_of(cls).path
    for page in sorted((DOCS / "models").glob("*.md")):
        if f"{module})" in page.read_text(encoding="utf-8"):
            return page.stem
    raise ValueError(f"no page of docs/models links to {module}; add one for {cls.__name__}")
