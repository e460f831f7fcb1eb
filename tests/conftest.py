"""Fixtures shared by all tests."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from covering import Covering

settings.register_profile("any machine", deadline=None)  # a busy machine is slow, not wrong
settings.load_profile("any machine")

TESTS = Path(__file__).parent
LONGEST = (
    "test_everything_keeps_the_shapes", "test_ready_sweeps_run", "test_bundled.py", "on_trained_models",
    "saves_most_forwards", "test_two_hundred_ragged", "with_a_digit_changed", "whole_context", "TestSweeps", "clone",
    "test_parallel.py", "test_serve",
)  # fmt: skip


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """The models here are too small for more, and xdist brings its own parallelism."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def golden() -> Path:
    """Small random checkpoints with the logits of the published implementations."""
    return TESTS / "golden"


@pytest.fixture(scope="session")
def shared() -> Path:
    """More checkpoints and recorded decodes, in a folder beside the repository; tests skip without it."""
    folder = TESTS.parent.parent / "shared"
    if not folder.is_dir():
        pytest.skip(f"needs {folder}")
    return folder


def pytest_collection_finish() -> None:
    """Take what is imported and collected out of garbage collections, which `dllm bench` asks for again and again."""
    gc.collect()
    gc.freeze()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option of `make test`."""
    parser.addoption("--covering", action="store_true", help="of tests over several parameters run a covering set")


def pytest_configure(config: pytest.Config) -> None:
    """Choose the cases of `make test`."""
    if config.getoption("--covering"):
        config.pluginmanager.register(Covering(), "covering")


@pytest.hookimpl(tryfirst=True)  # xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep together what shares a fixture of its module, which every worker would make anew.

    Then start with what takes longest, so that no worker is left alone with it at the end.
    """
    for item in items:
        if item.get_closest_marker("xdist_group") is None and _shares(item):
            item.add_marker(pytest.mark.xdist_group(item.nodeid.partition("::")[0]))
    items.sort(
        key=lambda item: next((place for place, name in enumerate(LONGEST) if name in item.nodeid), len(LONGEST))
    )


def _shares(item: pytest.Item) -> bool:
    """Whether a test takes a fixture that its module makes once."""
    found = item._fixtureinfo.name2fixturedefs.values() if isinstance(item, pytest.Function) else ()
    module = item.nodeid.partition("::")[0]
    return any(each[-1].baseid == module and each[-1].scope in ("module", "session") for each in found)
