"""The shapes that annotations state, checked in a run of their own: in every run it would take a third of the time."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from jaxtyping import TypeCheckError

from dllm.samplers.base import constant_denoiser
from dllm.samplers.selection import top

ROOT = Path(__file__).parents[1]
CHECKED = pytest.mark.skipif("DLLM_SHAPES" not in os.environ, reason="run by the test below, with shapes checked")
# What calls every function with every kind of input once.
FILES = (
    "backbones", "samplers", "conftest.py", "test_shapes.py", "test_contract.py", "test_caches.py", "test_api.py",
    "test_prediction.py", "test_canvas.py", "test_pattern.py", "test_drift.py", "test_layout.py", "test_store.py",
    "test_branches.py",
)  # fmt: skip
# Of what differs by no kind of input one is enough.
NAMES = (
    "(backbones and not packs and not test_kernels and not (decodes_are_the_same and not dllm_cache-random_dream))",
    "wrong_shape", "within_another", "(finishes_without_masks and llada)",
    "(masks_anywhere and ([freecache-prompt or [d2cache] or [dkv]))", "(lower_precision and dtype0 and elastic)",
    "edited_position",
    "(drafts_are_lossless and (prefix-tree or (clean and batch) or (anchored and not threshold)))",
    "test_api", "test_prediction", "test_canvas",
    "(test_drift and not measuring_changes_nothing and not refreshing_above_nothing)", "test_layout",
    "(test_store and not grows and not has_the_size)",
    "(test_branches and not (ignores_its and not dkv-random_sdar))", "equals_the_rule",
    "(as_the_method and unstable-block)", "(published_loop and 0.3-1-0.0-0-random_sdar)",
    "(as_by_hand and random_dream and not (t2m and not t2t))",
)  # fmt: skip


@CHECKED
def test_a_wrong_shape_is_an_error() -> None:
    score, eligible = torch.zeros(2, 3), torch.ones(2, 4, dtype=torch.bool)
    with pytest.raises(TypeCheckError, match="eligible"):
        top(score, 1, eligible)


@CHECKED
def test_a_function_within_another_is_checked_whenever_it_is_made() -> None:
    for wrong in (5, "all"):
        with pytest.raises(TypeCheckError, match=f"Actual value: {wrong!r}"):
            constant_denoiser(None)(wrong)


@pytest.mark.skipif("DLLM_SHAPES" in os.environ, reason="this is that run")
def test_everything_keeps_the_shapes_it_states() -> None:
    command = [sys.executable, "-m", "pytest", "tests", "-q", "--jaxtyping-packages=dllm,typechecking.check"]
    command += ["--covering", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", " or ".join(NAMES)]
    # Not the paths themselves: their conftest would be imported, and with it dllm, before checking is set up.
    command += [f"--ignore={path}" for path in (ROOT / "tests").iterdir() if path.name not in FILES]
    environment = os.environ | {"DLLM_SHAPES": "1"}
    result = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False, env=environment
    )
    assert result.returncode == 0, result.stdout
