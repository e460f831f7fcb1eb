"""The notebooks are whole; building the site, or `make notebooks`, runs them."""

from __future__ import annotations

import ast
import re
from functools import reduce
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

jupytext = pytest.importorskip("jupytext")

FOLDER = Path(__file__).parents[2] / "docs" / "notebooks"
BOOKS = sorted(FOLDER.glob("*.py"))
books = pytest.mark.parametrize("book", BOOKS, ids=[book.stem for book in BOOKS])


def read(book: Path) -> Any:
    return jupytext.read(book)


def texts(book: Path) -> list[str]:
    return [cell.source for cell in read(book).cells if cell.cell_type == "markdown"]


def code(book: Path) -> list[str]:
    return [cell.source for cell in read(book).cells if cell.cell_type == "code"]


def test_there_are_six_in_order() -> None:
    assert [book.stem[:3] for book in BOOKS] == [f"{number:02}_" for number in range(1, 7)]


def test_none_is_stored_with_outputs() -> None:
    assert list(FOLDER.glob("*.ipynb")) == []


@books
def test_is_a_notebook_of_text_and_code(book: Path) -> None:
    notebook = read(book)
    assert notebook.metadata.kernelspec.name == "python3"
    assert "jupytext" in notebook.metadata
    assert texts(book)[0].startswith("# ")
    assert sum(len(text) > 60 for text in texts(book)) >= 4
    assert len(code(book)) >= 4
    for cell in notebook.cells:
        assert cell.cell_type in ("markdown", "code")
        assert not cell.get("outputs")
    for source in code(book):
        ast.parse(source)


@books
def test_no_name_hides_a_package(book: Path) -> None:
    assert not book.stem.isidentifier()  # a kernel runs in this folder, which comes first in its path


@books
def test_everything_it_imports_of_the_package_is_there(book: Path) -> None:
    found = 0
    for node in ast.walk(ast.parse("\n".join(code(book)))):
        if isinstance(node, ast.Import):
            modules = [(alias.name, ()) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [(str(node.module), tuple(alias.name for alias in node.names))]
        else:
            continue
        for name, members in modules:
            if name.partition(".")[0] == "dllm" and (name != "dllm.evaluation.lm_eval" or find_spec("lm_eval")):
                module, found = import_module(name), found + 1
                assert all(hasattr(module, member) for member in members)
    assert found


@books
def test_every_name_it_uses_of_the_package_is_there(book: Path) -> None:
    import dllm

    for node in ast.walk(ast.parse("\n".join(code(book)))):
        name = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
        if re.fullmatch(r"dllm(\.\w+)+", name):
            reduce(getattr, name.split(".")[1:], dllm)


@books
def test_links_lead_to_files(book: Path) -> None:
    for link in re.findall(r"\]\(([^)]+)\)", "\n".join(texts(book))):
        if not link.startswith("https://"):
            assert (FOLDER / link.partition("#")[0]).is_file(), link


@books
def test_nothing_is_downloaded(book: Path) -> None:
    loaded = re.findall(r"dllm\.load\(\"([^\"]+)\"", "\n".join(code(book)))
    assert set(loaded) <= {"tiny-llada", "tiny-dream", "tiny-block"}
