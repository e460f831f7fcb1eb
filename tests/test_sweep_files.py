"""The jobs of a sweep do not write over each other's files, and nothing measured is lost to a full disk."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path
from typing import Any

import pytest

import dllm
from commands import command
from dllm.scripts import own
from models import random_llada


@pytest.fixture(autouse=True)
def _measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    lm = random_llada(tokenizer=True, max_length=96)
    monkeypatch.setattr(dllm, "load", lambda *_, **__: lm)


SWEEPS = {
    "generate": ("picture=p.svg", ["seed=1,2", "prompt=Tom", "gen_length=4"], "p.svg"),
    "bench": ("out=b", ["canvas=20,24", "gen_length=4", "caches=[none]", "steps=1"], "b.md"),
}


@pytest.mark.parametrize("name", SWEEPS)
def test_a_job_that_would_write_over_another_ones_file_is_refused(name: str) -> None:
    option, swept, file = SWEEPS[name]
    for path in (Path(file), Path(file).with_suffix(".svg")):
        path.parent.mkdir(exist_ok=True)
    result = command(name, "-m", *([option] if option else []), *swept)
    assert result.code == 2
    (line,) = [line for line in result.err.splitlines() if ": error: " in line]
    assert f"{file} was written by another job of this sweep; include ${{NAME}} of a swept option in " in line
    key = swept[0].partition("=")[0]
    chosen = "picture=p${seed}.svg" if name == "generate" else f"out=x${{{key}}}"
    time.sleep(0.02)
    again = command(name, "-m", chosen, *swept)
    assert again.code == 0, again.err


def test_a_sweep_that_is_run_again_writes_its_files_again() -> None:
    swept = ["gen_length=4", "caches=[none]", "steps=1"]
    for _ in range(2):
        assert command("bench", "-m", "out=t${canvas}", "canvas=20,24", *swept).code == 0
        time.sleep(0.02)
    assert command("bench", "out=t20", "canvas=20", *swept).code == 0
    tomorrow = time.time() + 86400
    os.utime("t20.md", (tomorrow, tomorrow))  # by the clock of another machine
    assert command("bench", "-m", "out=t${canvas}", "canvas=20", *swept).code == 0


def test_a_full_disk_loses_nothing_that_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, content: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(own, "write_whole", full)
    result = command("bench", "out=t", "canvas=20", "gen_length=4", "caches=[none]", "steps=1")
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert "| threshold + none |" in result.out
    assert "out='t' cannot be used (No space left on device); free disk space" in result.err


@pytest.mark.parametrize("name", ["multirun.yaml", "optimization_results.yaml"])
def test_a_sweep_keeps_files_of_others_in_its_folder(name: str) -> None:
    Path("out").mkdir()
    Path("out", name).write_text("mine: true\n")
    options = "-m", "hydra.sweep.dir=out", "hydra.sweep.subdir=.", "gen_length=4", "prompt=Tom", "show=none", "seed=1,2"
    result = command("generate", *options)
    assert result.code == 2
    assert f"out/{name} exists and is not of such a sweep" in result.err
    assert Path("out", name).read_text() == "mine: true\n"
    Path("out", name).unlink()
    for _ in range(2):
        assert command("generate", *options).code == 0
