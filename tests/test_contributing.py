"""The worked examples of the contributors' guide run as they are printed."""

from __future__ import annotations

import importlib.util
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf

GUIDE = Path(__file__).parents[1] / "CONTRIBUTING.md"
FILES = dict(re.findall(r"^`([\w./]+)`:\n\n```\w+\n(.*?)^```", GUIDE.read_text(), flags=re.MULTILINE | re.DOTALL))
MODULES = {"samplers/leftmost.py": "dllm.samplers.leftmost", "cache/periodic.py": "dllm.cache.periodic"}


def run_file(path: Path, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, ModuleType]]:
    """Every Python file of the guide, imported under the name it would have."""
    folder = tmp_path_factory.mktemp("guide")
    names = MODULES | {path: Path(path).stem for path in FILES if path.startswith("tests/")}
    for path in names:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(FILES[path])
    yield {path: run_file(folder / path, name) for path, name in names.items()}
    for name in names.values():
        del sys.modules[name]


def test_each_example_is_one_module_one_yaml_and_one_test() -> None:
    assert list(FILES) == [
        "samplers/leftmost.py", "conf/sampler/leftmost.yaml", "tests/samplers/test_leftmost.py",
        "cache/periodic.py", "conf/cache/periodic.yaml", "tests/cache/test_periodic.py",
    ]  # fmt: skip


@pytest.mark.parametrize("yaml", [path for path in FILES if path.endswith(".yaml")])
def test_the_yaml_makes_the_object_with_its_defaults(examples: dict[str, ModuleType], yaml: str) -> None:
    written = OmegaConf.create(FILES[yaml])
    written.pop("defaults", None)
    made = instantiate(written)
    assert made == type(made)()
    assert inspect.getmodule(type(made)) in examples.values()


@pytest.mark.parametrize("path", [path for path in FILES if path.startswith("tests/")])
def test_the_test_passes(examples: dict[str, ModuleType], path: str) -> None:
    ran = 0
    for name, test in vars(examples[path]).items():
        if name.startswith("test_"):
            marks: list[Any] = getattr(test, "pytestmark", [])
            for value in marks[0].args[1] if marks else [None]:
                test(*([value] if marks else []))
                ran += 1
    assert ran >= 2
