"""Fixtures shared by all tests."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import settings

settings.register_profile("any machine", deadline=None)  # a busy machine is slow, not wrong
settings.load_profile("any machine")

TESTS = Path(__file__).parent


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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start with what takes longest, so that no worker is left alone with it at the end."""
    items.sort(key=lambda item: "test_shapes" not in item.nodeid)
