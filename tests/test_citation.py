"""CITATION.cff: valid, of this version, and with the paper of every policy, cache and model."""

from __future__ import annotations

import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
FILE = ROOT / "CITATION.cff"
ID = re.compile(r"arXiv[ :]+(\d{4}\.\d{4,5})")
SOURCES = [*(ROOT / "samplers").glob("*.py"), *(ROOT / "cache").glob("*.py")]
FAMILIES = [
    ROOT / "dllm" / "models" / f"{name}.py" for name in "llada llada_moe llada2 dream sdar sdar_moe fastdllm".split()
]

pytestmark = pytest.mark.skipif(not FILE.is_file(), reason="an installed copy without it")


@pytest.fixture(scope="module")
def citation() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    return found


def check_authors(authors: Any) -> None:
    assert authors
    for author in authors:
        assert set(author) in ({"name"}, {"family-names", "given-names"})
        assert all(isinstance(name, str) and name.strip() for name in author.values())


def test_has_what_the_format_requires(citation: dict[str, Any]) -> None:
    assert (citation["cff-version"], citation["type"], citation["license"]) == ("1.2.0", "software", "Apache-2.0")
    assert citation["version"] == version("dllm-samplers")
    assert citation["message"]
    assert citation["title"].startswith("dllm")
    check_authors(citation["authors"])
    allowed = "cff-version message type title abstract authors version license keywords references date-released url"
    assert set(citation) <= set(allowed.split())


def test_has_every_paper_once_and_whole(citation: dict[str, Any]) -> None:
    for reference in citation["references"]:
        assert set(reference) == {"type", "title", "authors", "year", "journal", "doi", "url", "notes"}
        assert reference["type"] == "article"
        check_authors(reference["authors"])
        assert {"name": "others"} not in reference["authors"]
        number = reference["url"].removeprefix("https://arxiv.org/abs/")
        assert reference["doi"] == f"10.48550/arXiv.{number}"
        assert reference["year"] == 2000 + int(number[:2])
    titles = [reference["title"] for reference in citation["references"]]
    assert len(titles) == len(set(titles))


@pytest.mark.parametrize("file", [*SOURCES, *FAMILIES], ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_every_policy_cache_and_model_is_cited(file: Path, citation: dict[str, Any]) -> None:
    cited = {reference["url"].rpartition("/")[2] for reference in citation["references"]}
    assert set(ID.findall(file.read_text(encoding="utf-8"))) <= cited
    if file in FAMILIES:
        assert ID.search(file.read_text(encoding="utf-8"))
