"""The code of docs/start.md runs, and shows what the page says."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from commands import command

PAGE = (Path(__file__).parents[2] / "docs" / "start.md").read_text()
DECODE, PROMPTS, COMPARE = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def printed(code: str, capsys: pytest.CaptureFixture[str]) -> str:
    exec(code, {})
    return capsys.readouterr().out


def test_a_prompt_is_decoded(capsys: pytest.CaptureFixture[str]) -> None:
    assert re.fullmatch(r"We compute 23 \+ 12 = 35\..* \d+ \d\.\d+\n", printed(DECODE, capsys))


def test_policies_are_compared_on_the_page_s_own_prompts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    printed(PROMPTS, capsys)
    found = printed(COMPARE, capsys).splitlines()
    assert [line.split()[0] for line in found] == ["vanilla", "tiny/threshold", "tiny/localleap"]
    forwards = [float(line.split()[2]) for line in found]
    assert forwards == sorted(forwards, reverse=True)
    assert found[0].endswith("as one token per step: 10 of 10")
    line = re.search(r"^        (dllm generate input=prompts.jsonl .*)$", PAGE, re.MULTILINE)
    assert line is not None
    told = command(*shlex.split(line[1].replace("${sampler#tiny/}", "vanilla").replace("$sampler", "vanilla"))[1:])
    assert re.search(r"^NFE [\d.]+ per answer, [\d.]+ tokens per forward \(TPF\)$", told.out, re.MULTILINE)
    rows = [json.loads(row) for row in (tmp_path / "answers-vanilla.jsonl").read_text().splitlines()]
    assert {"text", "tokens", "nfe"} <= set(rows[0])
    assert len(rows) == 10
