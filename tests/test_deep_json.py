"""JSON and other input nested 100,000 deep: one line from whoever reads it, never a crash."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from commands import command
from dllm.decoding.prompts import encode
from dllm.evaluation.journal import Journal
from dllm.evaluation.jsonl import AnswerFile, read_questions
from dllm.evaluation.run_folder import RunFolder
from dllm.evaluation.trace import FORMAT, VERSION, Trace
from dllm.filters import load_filter
from dllm.reports import reading
from dllm.tasks.humaneval import check_rows
from dllm.tasks.tokenizer import build_tokenizer
from models import random_filter

DEEP = '{"a":' + "[" * 100_000
FOLDER = RunFolder(Path(), "x", {}).path.name


def _trace(file: Path) -> Any:
    metadata = {"format": FORMAT, "version": str(VERSION), "ids": DEEP}
    save_file({"tokens": np.zeros((1, 2), np.int64)}, file, metadata)
    return Trace.load(file)


def _filter(file: Path) -> Any:
    random_filter().save(file.with_suffix(".safetensors"))
    return load_filter(file.with_suffix(".safetensors"))


def _run(file: Path) -> RunFolder:
    return RunFolder(file.parents[1], "x", {})


READERS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "questions": ("q.jsonl", read_questions),
    "answers": ("a.jsonl", AnswerFile),
    "a journal": ("j.jsonl", Journal),
    "problems": ("p.jsonl", lambda file: check_rows(str(file))),
    "a trace": ("t.safetensors", _trace),
    "the card of a filter": ("f.json", _filter),
    "results that are reported": (f"{FOLDER}/results.json", lambda file: reading.load(file.parent)),
    "results of a run that goes on": (f"{FOLDER}/results.json", lambda file: _run(file).results()),
}


@pytest.mark.parametrize("what", READERS)
def test_whoever_reads_it_says_so_in_one_line(what: str, tmp_path: Path) -> None:
    name, read = READERS[what]
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(DEEP + "\n")
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # each says it in its own words
        read(tmp_path / name)
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{{ " + "(" * 100_000 + "1" + ")" * 100_000 + " }}", "nested too deep|too many nested"),
        ("{{ " + "[" * 3_000 + "]" * 3_000 + " }}", "nested too deep|too many nested"),
        ("{% for %}", "chat template: "),
        ("{{ raise_exception('no system\\nmessages') }}", "no system messages"),
        ("{{ messages[9].content.x }}", "chat template: "),
        ("{{ 1 / 0 }}", "zero"),
    ],
    ids=lambda text: text[:12],
)
def test_a_chat_template_that_fails_is_one_line(template: str, why: str) -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=why) as caught:
        encode([{"role": "user", "content": "Tom"}], tokenizer)
    assert "prompts[0]" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("value", ["{a:" * 5_000, "[" * 5_000 + "]" * 5_000, "{a:[" * 100 + "]}" * 100])
@pytest.mark.parametrize("option", ["model.device_map", "+model.device_map", "seed"])
def test_an_option_of_the_command_is_one_line(option: str, value: str) -> None:
    result = command("generate", f"{option}={value}", "prompt=" + "(" * 50)
    assert result.code == 2
    assert result.err.count("\n") == 1
    assert f"{option} is nested too deep" in result.err
    assert len(result.err) < 300


@pytest.mark.parametrize("value", ["{a:" * 5_000, "[" * 5_000 + "]" * 5_000])
def test_the_choice_of_a_group_is_one_line(value: str) -> None:
    result = command("generate", f"cache={value}", "prompt=x")
    assert result.code == 2
    assert result.err.count("\n") == 1
    assert "; expected one of block" in result.err
    assert len(result.err) < 500
