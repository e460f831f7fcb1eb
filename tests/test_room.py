"""What is far beyond any machine is refused in one line, before there is room for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import dllm
from commands import command

HUGE = 10**9


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("bench", f"canvas={HUGE}"), ("bench", f"batch_size={HUGE}"),
        ("evaluate", f"task.limit={HUGE}"), ("train-filter", f"prompts={HUGE}"), ("train-tiny", f"batch_size={HUGE}"),
        ("train-tiny", f"eval_problems={HUGE}"), ("train-tiny", f"prompt_length={HUGE}"),
        ("train-tiny", "model.num_layers=1000000"),
    ],
)  # fmt: skip
def test_more_than_a_machine_holds_is_refused_at_once(
    name: str, option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = command(name, option)
    assert (result.code, result.err.count("\n")) == (2, 1), result
    assert option in result.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    ],
)
def test_memory_that_does_not_suffice_is_one_line(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr(dllm, "load", load)
    result = command("generate", "prompt=a")
    assert (result.code, result.err) == (
        2, "dllm generate: error: out of memory; use a smaller model, batch_size or length\n"
    )  # fmt: skip
