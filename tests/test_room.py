"""What is far beyond any machine is refused in one line, before there is room for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import dllm
from commands import command
from dllm.checks import out_of_memory
from dllm.guide import load_guide
from models import random_llada, save_folder

HUGE = 10**9


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("bench", f"canvas={HUGE}"), ("bench", f"batch_size={HUGE}"),
        ("evaluate", f"task.limit={HUGE}"), ("train-filter", f"prompts={HUGE}"), ("train-tiny", f"batch_size={HUGE}"),
        ("train-tiny", f"eval_problems={HUGE}"), ("train-tiny", f"prompt_length={HUGE}"),
        ("train-tiny", "model.num_layers=1000000"), ("distill", f"train_batch_size={HUGE}"),
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
    "allocate",
    [
        lambda: bytes(2**62),
        lambda: torch.empty(2**50),
        lambda: torch.empty(2**63 - 1),
        lambda: torch.empty(2**40, 2**40),
        lambda: torch.randint(9, (2**63 - 1,)),
    ],
)
def test_what_no_memory_holds_is_known_by_its_error(allocate: Callable[[], object]) -> None:
    with pytest.raises((MemoryError, RuntimeError)) as caught:
        allocate()
    assert out_of_memory(caught.value)


@pytest.mark.parametrize("error", [ValueError("cannot allocate memory"), RuntimeError("shapes do not fit")])
def test_other_errors_are_not_about_memory(error: Exception) -> None:
    assert not out_of_memory(error)


@pytest.mark.parametrize("what", ["weights", "guide"])
def test_files_are_not_said_to_be_damaged_where_memory_does_not_suffice(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: Any, **__: Any) -> Any:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    folder = save_folder(random_llada(), tmp_path / "model")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", load)
    with pytest.raises(RuntimeError, match="allocate"):
        dllm.load(folder, device="cpu") if what == "weights" else load_guide("tiny-guide", torch.device("cpu", 0))


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("Storage size calculation overflowed with sizes=[9223372036854775807]"),
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
