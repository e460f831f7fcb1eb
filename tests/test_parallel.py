"""Tensor parallelism: two processes of torchrun decode what one does."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet
import pytest
import torch

import dllm
from commands import command
from dllm.scripts import evaluate
from models import random_fast_dllm, random_llada, random_llada2, random_llada_moe, random_sdar, save_folder
from warm import Process

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the script of `divided.py` found."""
    folder = tmp_path_factory.mktemp("divided")
    toys = {"sdar": random_sdar(), "llada2": random_llada2(), "moe": random_llada_moe(), "tied": random_fast_dllm()}
    toys["odd"] = random_llada(hidden=36, heads=3)
    toys["nan"] = random_llada()
    with torch.no_grad():
        toys["nan"].backbone.blocks[0].q_proj.weight[-1] = torch.nan  # a row of the second process
    for name, lm in toys.items():
        save_folder(lm, folder / name)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    paths = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    script = [*launcher, str(HERE / "divided.py"), str(folder)]
    result = subprocess.run(script, check=False, capture_output=True, text=True, env=environment, timeout=300)
    assert result.returncode == 0, result.stderr
    return dict(json.loads((folder / "found.json").read_text())) | {"out": result.stdout}


@pytest.mark.parametrize("name", ["tiny-llada", "tiny-dream", "sdar", "llada2", "moe", "tied"])
def test_two_processes_decode_what_one_does(found: dict[str, Any], name: str) -> None:
    for process in found["every"]:
        assert process[name]["same"] and all(process[name]["same"]), process[name]
        assert process[name]["sampled"]


@pytest.mark.parametrize("name", ["tiny-llada", "tiny-dream", "sdar", "llada2", "moe", "tied"])
def test_a_process_holds_its_part_alone_and_knows_the_whole_model(found: dict[str, Any], name: str) -> None:
    for process in found["every"]:
        divided, alone = process[name]["heads"]
        assert divided == (alone if name == "llada2" else alone // 2)  # whose attention is not divided
        divided, alone = process[name]["weights"]
        assert divided < (0.8 if name in ("llada2", "tied") else 0.6) * alone
        divided, alone = process[name]["fingerprint"]
        assert divided == alone


def test_what_cannot_be_divided_is_refused_in_every_process(found: dict[str, Any]) -> None:
    for number, process in enumerate(found["every"]):
        errors = process["errors"]
        assert errors["save"] == "a model that is divided by tp=true cannot be saved; load it with tp=false"
        assert errors["graphs"].endswith("exchange parts of every layer (tp=true); use cuda_graphs=null")
        assert errors["uneven"].startswith("tp=true cannot divide 3 attention heads over 2 processes; use a number")
        assert errors["nan"].startswith("process 1: " * (number == 0)) and "q_proj.weight holds NaN" in errors["nan"]


def test_the_other_processes_repeat_what_the_first_does(found: dict[str, Any]) -> None:
    same, rehearsed, divided, alone, error, texts = found["led"]
    assert same
    assert rehearsed == [1, True]
    assert divided == pytest.approx(alone, abs=1e-9)
    assert error.startswith("tp=true cannot divide 3 attention heads")
    assert re.fullmatch(r"The answer is [0-9]+\.", texts[0])


def test_a_command_prints_once_what_one_process_does(found: dict[str, Any]) -> None:
    alone = command("generate", "model.dtype=float64", "show=none", "seed=5", "sampler=threshold")
    without_speed = [re.sub(r"\S+ tokens/s", "", out) for out in (found["out"], alone.out)]
    assert without_speed[0] == without_speed[1] != ""


def started(*arguments: str) -> list[tuple[int, str, str]]:
    """Exit code and output of two processes of a command, as torchrun starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    shared = os.environ | place | {"WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "test"}
    numbers = [{"RANK": each, "LOCAL_RANK": each} for each in "01"]
    both = [Process(*arguments, env=shared | number) for number in numbers]
    said = [each.communicate() for each in both]
    return [(each.wait(), *text) for each, text in zip(both, said, strict=True)]


def test_an_error_is_one_line_of_the_first_process(tmp_path: Path) -> None:
    lm = random_llada()
    with torch.no_grad():
        lm.backbone.blocks[0].q_proj.weight[-1] = torch.nan
    save_folder(lm, tmp_path)
    first, second = started("generate", f"model={tmp_path}", "model.tp=true", "prompt=x")
    assert first[:2] == (2, "")
    assert first[2].startswith("dllm generate: error: process 1: ")
    assert first[2].count("\n") == 1 and "q_proj.weight holds NaN" in first[2]
    assert second == (0, "", "")


def test_options_are_checked_by_the_first_process_alone() -> None:
    first, second = started("evaluate", "model.tp=true", "nothing=3")
    assert (first[0], first[1], first[2].count("\n")) == (2, "", 1)
    assert second == (0, "", "")


def test_the_first_process_writes_the_files(tmp_path: Path) -> None:
    out = [f"out={tmp_path}/{name}" for name in ("divided", "alone")]
    asked = ["evaluate", "model.dtype=float64", "task.limit=2", "sampler=threshold", "gen_length=32", "baselines=0"]
    first, second = started(*asked, out[0], "model.tp=true")
    assert first[0] == 0, first
    assert second == (0, "", "")
    assert command(*asked, out[1]).code == 0
    files = [next((tmp_path / name).glob("*/samples.parquet")) for name in ("divided", "alone")]
    texts = [parquet.read_table(each, columns=["id", "text", "nfe"]).to_pylist() for each in files]
    assert texts[0] == texts[1] and len(texts[0]) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "tp=true divides the model over processes that torchrun starts; use torchrun"),
        ({"device_map": "auto"}, "device_map='auto' has no effect with tp=true"),
        ({"device": "meta"}, "device='meta' is not "),
        ({"pack": True}, "pack=true does not support weights divided by tp=true"),
        ({"adapter": "folder"}, "adapter='folder' cannot be merged into weights divided by tp=true"),
        ({"tp": 2}, "tp=2"),
    ],
    ids=str,
)
def test_options_that_do_not_fit_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dllm.load("tiny-llada", **{"tp": True} | options)


def test_commands_say_it_in_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    evaluate._load.cache_clear()  # what other tests of this process loaded
    told = command("generate", "model.tp=true")
    assert (told.code, told.err.count("\n")) == (2, 1)
    assert "model.tp=true divides the model over processes that torchrun starts" in told.err
    told = command("bench", "model.tp=true")
    assert "model.tp=true is not supported by dllm bench" in told.err
    monkeypatch.setattr("dllm.scripts.torchrun.together", lambda _: nullcontext())
    monkeypatch.setattr("dllm.scripts.torchrun.processes", lambda: 2)
    told = command("evaluate", "task.limit=1")
    assert "torchrun started 2 processes, and model.tp=false uses one" in told.err
