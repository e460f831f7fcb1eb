"""The policy of docs/write-a-policy.md runs as it is printed, in a folder outside the package."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

import dllm
from commands import command
from dllm.resolve import search_also

PAGE = (Path(__file__).parents[2] / "docs" / "write-a-policy.md").read_text()
FILES = dict(re.findall(r"^`([\w./]+)`:\n\n```\w+\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the files of the page, whose modules can be imported."""
    path = tmp_path_factory.mktemp("page")
    for name, content in FILES.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(content)
    sys.path.insert(0, str(path))
    yield path
    sys.path.remove(str(path))
    for name in ("hesitant", "test_hesitant", "my_dllm"):
        sys.modules.pop(name, None)
    search_also()


@pytest.fixture
def tests(folder: Path) -> ModuleType:
    return import_module("test_hesitant")


def test_the_tests_of_the_page_pass(tests: ModuleType) -> None:
    (caches,) = tests.test_it_keeps_the_rules_of_every_policy.pytestmark
    for cache in caches.args[1]:
        tests.test_it_keeps_the_rules_of_every_policy(cache)
    tests.test_a_margin_above_one_is_one_token_per_step()
    tests.test_several_are_committed_where_the_model_is_sure()


def test_the_python_of_the_page_runs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    use = next(block for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if "from hesitant" in block)
    exec(use, {})
    assert "The answer is 35." in capsys.readouterr().out


def test_commands_find_it_in_the_folder_that_is_named(folder: Path) -> None:
    import_module("my_dllm")  # as the script of the page does
    config = ["--config-dir", str(folder / "conf")]
    result = command("generate", *config, "sampler=margin", "sampler.margin=0.99", "show=none", "gen_length=16")
    assert (result.code, result.err) == (0, "")
    drafted = command("generate", *config, "sampler=freedave", "sampler.base=margin", "show=none", "gen_length=16")
    assert (drafted.code, drafted.err) == (0, "")
    search_also()
    shown = command("generate", *config, "sampler=margin", "--help")
    assert "Options of sampler=margin" in shown.out
    assert "least difference of the two highest probabilities" in shown.out


def test_its_name_is_unknown_without_the_folder(folder: Path) -> None:
    result = command("generate", "sampler=freedave", "sampler.base=margin")
    assert result.code == 2
    assert "unknown sampler.base='margin'" in result.err


def test_python_finds_a_name_in_the_folders_that_are_searched(folder: Path) -> None:
    import_module("hesitant")
    search_also(folder / "conf")
    assert dllm.generate(dllm.load("tiny-llada"), ["We"], sampler="margin", gen_length=8).nfe[0] > 0
