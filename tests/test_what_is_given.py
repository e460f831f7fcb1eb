"""Names and objects that a user may give for a model, a guide or an id."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jaxtyping
import pytest

import dllm
from commands import command
from dllm.escape import terminal
from models import random_llada, save_folder


@pytest.mark.parametrize("name", ["x" * 5000, "~nobody-of-this-name/x", "a\0b"])
def test_what_is_no_possible_folder_is_no_model(name: str) -> None:
    with pytest.raises(ValueError, match=r"name=.* is not a folder"):
        dllm.load(name)


def test_a_home_that_does_not_exist_is_one_line() -> None:
    for option in ("model", "sampler.guide", "sampler.filter"):
        sampler = {"sampler.guide": ["sampler=ar_guided"], "sampler.filter": ["sampler=learn2pd"]}.get(option, [])
        result = command("generate", *sampler, f"{option}=~nobody-of-this-name/x")
        assert (result.code, result.err.count("\n")) == (2, 1), result
        assert "~nobody-of-this-name/x" in result.err


def test_a_path_is_a_folder_and_no_bundled_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_folder(random_llada(layers=1), tmp_path / "tiny-llada")
    monkeypatch.chdir(tmp_path)
    assert dllm.load(Path("tiny-llada")).backbone.config.num_hidden_layers == 1
    assert dllm.load("./tiny-llada").backbone.config.num_hidden_layers == 1
    assert dllm.load("tiny-llada").backbone.config.num_hidden_layers > 1


@pytest.mark.parametrize("decode", [dllm.generate, dllm.as_completed, dllm.stream, dllm.infill])
def test_the_name_of_a_model_is_no_model(decode: Any) -> None:
    jaxtyping.config.update("jaxtyping_disable", True)  # types are not checked where users run it
    try:
        with pytest.raises(
            ValueError, match=r"^lm='tiny-llada' is not a loaded model; give dllm.load\('tiny-llada'\)$"
        ):
            decode("tiny-llada", "a")
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.parametrize("ids", [63, [5, 63]])
def test_a_mask_ends_no_text(ids: Any) -> None:
    for decode in (dllm.generate, dllm.infill):
        with pytest.raises(ValueError, match=r"eos_token_id=63 is the id of \[MASK\]"):
            decode(random_llada(), [[5, 63]] if decode is dllm.infill else [[5]], eos_token_id=ids)


def test_what_xml_does_not_know_is_written_by_its_escape() -> None:
    assert terminal("a\ufffeb\uffff") == r"a\ufffeb\uffff"


def test_a_guide_may_be_a_path() -> None:
    folder = Path(dllm.__file__).parent / "checkpoints" / "tiny-guide"
    found = dllm.generate(dllm.load("tiny-llada"), "Tom has 3 pens.", dllm.samplers.ARGuided(folder), gen_length=8)
    named = dllm.generate(dllm.load("tiny-llada"), "Tom has 3 pens.", "ar_guided", gen_length=8)
    assert found.texts == named.texts


@pytest.mark.parametrize("command_name", ["generate", "evaluate", "train-filter"])
def test_a_group_that_is_no_more_than_a_name_is_one_line(command_name: str, tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\nsampler: threshold\n")
    result = command(command_name, f"--config-dir={tmp_path}", "+experiment=mine")
    assert (result.code, result.err.count("\n")) == (2, 1), result
    assert "sampler='threshold' is a name where options are expected" in result.err


def test_a_yaml_that_would_not_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "sampler").mkdir()
    (tmp_path / "sampler" / "threshold.yaml").write_text("_target_: dllm.samplers.Threshold\nthreshold: 0.1\n")
    result = command("generate", f"--config-dir={tmp_path}", "sampler=threshold")
    assert (result.code, result.err.count("\n")) == (2, 1), result
    assert "threshold.yaml has the name of a YAML of dllm" in result.err
