"""`dllm generate` and `dllm evaluate` with response_format, in this process."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from commands import command

pytest.importorskip("outlines_core")


@pytest.mark.parametrize(
    "written",
    ["{type: choice, choice: [Sam, Tom]}", '{"type": "choice", "choice": ["Sam", "Tom"]}', "FILE"],
)
def test_a_format_is_a_mapping_or_json_or_a_file(written: str, tmp_path: Path) -> None:
    (tmp_path / "f.json").write_text('{"type": "choice", "choice": ["Sam", "Tom"]}')
    given = written.replace("FILE", str(tmp_path / "f.json"))
    told = command("generate", "prompt=Ann", "gen_length=8", "show=none", f"response_format={given}")
    assert told.code == 0, told.err
    assert told.out.splitlines()[1] in ("Sam", "Tom")


def test_a_file_of_answers_is_of_the_format_and_resumes_with_it_only(tmp_path: Path) -> None:
    questions, output = tmp_path / "q.jsonl", tmp_path / "a.jsonl"
    questions.write_text("".join(json.dumps({"id": number, "prompt": "Tom"}) + "\n" for number in range(3)))
    run = "generate", f"input={questions}", f"output={output}", "gen_length=8", "show=none"
    assert command(*run, "response_format={type: regex, regex: '[0-9]{2}'}").code == 0
    texts = [json.loads(line)["text"] for line in output.read_text().splitlines()]
    assert [bool(re.fullmatch("[0-9]{2}", text)) for text in texts] == [True] * 3
    told = command(*run, "response_format={type: regex, regex: '[0-9]{3}'}")
    assert told.code == 2
    assert "response_format" in told.err


@pytest.mark.parametrize(
    ("written", "named"),
    [
        ("/nope.json", "response_format='/nope.json' cannot be read"),
        ("{type: foo}", "unknown response_format.type='foo'"),
        ("{type: regex, regex: '('}", "response_format of type regex cannot be compiled"),
        ("{type: json_schema, schema: {patternProperties: {}}}", "'patternProperties'"),
        ("{type: json_object}", "cannot be written with the tokens of this model"),
    ],
)
def test_bad_formats_are_refused_in_one_line(written: str, named: str) -> None:
    told = command("generate", "prompt=Ann", "gen_length=8", f"response_format={written}")
    assert told.code == 2
    assert told.err.startswith("dllm generate: error: ")
    assert named in told.err
    assert len(told.err.splitlines()) == 1


def test_evaluation_is_held_to_it(tmp_path: Path) -> None:
    form = r"response_format={type: regex, regex: 'The answer is [0-9]{1,3}\.'}"
    told = command("evaluate", "task.limit=2", "baselines=0", "frames=0", "gen_length=16", f"out={tmp_path}/o", form)
    assert told.code == 0, told.err
    (samples,) = tmp_path.glob("o/*/samples.parquet")
    texts = pq.read_table(samples)["text"].to_pylist()
    assert len(texts) == 2
    assert all(re.fullmatch(r"The answer is [0-9]{1,3}\.", text) for text in texts), texts
