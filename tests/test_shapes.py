"""The shapes that the annotations state are checked while the tests run, the backbones' in a run of their own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from jaxtyping import TypeCheckError

from dllm.samplers.base import constant_denoiser
from dllm.samplers.selection import top

ROOT = Path(__file__).parents[1]


def test_a_wrong_shape_is_an_error_in_the_tests() -> None:
    score, eligible = torch.zeros(2, 3), torch.ones(2, 4, dtype=torch.bool)
    with pytest.raises(TypeCheckError, match="eligible"):
        top(score, 1, eligible)


def test_a_function_within_another_is_checked_whenever_it_is_made() -> None:
    for wrong in (5, "all"):
        with pytest.raises(TypeCheckError, match=f"Actual value: {wrong!r}"):
            constant_denoiser(None)(wrong)


def test_the_backbones_keep_the_shapes_they_state() -> None:
    command = [sys.executable, "-m", "pytest", "tests", "--jaxtyping-packages=dllm,typechecking.check"]
    command += ["-p", "no:cacheprovider", "-p", "no:xdist"]
    # Not `pytest tests/backbones`: its conftest would be imported, and with it dllm, before checking is set up.
    command += [
        f"--ignore={path}" for path in (ROOT / "tests").iterdir() if path.name not in ("backbones", "conftest.py")
    ]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert result.returncode == 0, result.stdout
