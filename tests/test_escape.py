"""Text that is not the program's own: what terminals, spreadsheets, Markdown and pages make of it."""

from __future__ import annotations

import csv
import html
import io
import json
import re
from base64 import b64encode
from hashlib import sha256
from pathlib import Path
from xml.etree import ElementTree

import pytest
from rich.text import Text

from commands import command
from dllm.decoding.display import save_picture
from dllm.escape import cell, markdown, terminal
from report_rig import trace, write_error, write_run

HOSTILE = "\x1b]0;title\x07\x1b[2J\r\x9b31m\u202egnp.exe\u2066\x00\x7f"
UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


class TestTerminal:
    def test_control_characters_become_visible(self) -> None:
        assert terminal("a\x1b[31mb") == r"a\x1b[31mb"
        assert terminal("\x9b\u202e\x07") == r"\x9b\u202e\x07"
        assert not UNSEEN.search(terminal(HOSTILE))
        terminal("\ud800").encode()

    def test_text_stays_text(self) -> None:
        text = "Ωmega 日本語 \U0001f469\u200d\U0001f4bb é\t\u05d0\nnext"
        assert terminal(text) == text
        assert terminal("a\nb\tc", one_line=True) == r"a\nb\tc"


class TestMarkdown:
    @pytest.mark.parametrize(
        "text",
        [
            "a|b", "[x](http://evil)", "<b>x</b>", "![x](y)", "`code`", "*x*", "_x_", "~~x~~", "&lt;", "$x$",
            "https://evil.example", "www.evil.example", "me@evil.example", "# head", "- item", "1. item", "---",
            "a\n\n# b", "\\|",
        ],
    )  # fmt: skip
    def test_it_shows_as_itself(self, text: str) -> None:
        markdown_it = pytest.importorskip("markdown_it")
        plain = re.sub(r"\s+", " ", text)
        parsed = markdown_it.MarkdownIt("commonmark").enable(["table", "strikethrough"])
        for where, tag in ((f"| head |\n|---|\n| {markdown(text)} |", "td"), (f"- {markdown(text)}", "li")):
            (shown,) = re.findall(rf"<{tag}>(.*?)</{tag}>", parsed.render(where), re.DOTALL)
            assert html.unescape(shown.strip()) == plain
        assert not re.search(r"(https?:|(?<!\\)@|www\.)", markdown(text))

    def test_plain_names_and_numbers_stay(self) -> None:
        for text in ("localleap threshold=0.9", "gen_length=64", "-1.5", "+3", "12", "p50 s", "a.b (c)", "日本"):
            assert markdown(text) == text


class TestCells:
    @pytest.mark.parametrize("text", ["=1+1", "+cmd|x", "-2+3", "@SUM(A1)", "\t=1", "\r=1", " =1", "=HYPERLINK(1)"])
    def test_formulas_are_quoted(self, text: str) -> None:
        assert cell(text) == f"'{terminal(text)}"

    def test_numbers_stay_numbers(self) -> None:
        values = [-1.5, 3, None, True, "-1.5", "+2", "-1e-3", "localleap", "a=b", ""]
        assert [cell(value) for value in values] == values


class TestCommands:
    def test_an_error_shows_what_was_typed(self) -> None:
        result = command("generate", f"sampler={HOSTILE[1:]}")
        assert result.code == 2
        assert not UNSEEN.search(result.err)
        assert result.err.count("\n") == 1

    def test_an_answer_and_a_prompt_on_a_terminal(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import dllm
        from dllm.scripts import generate

        kept = dllm.generate

        def answer(*args: object, **options: object) -> object:
            result = kept(*args, **options)  # type: ignore[arg-type]
            object.__setattr__(result, "texts", [f"{HOSTILE} :smile: [red]x"])
            return result

        monkeypatch.setattr(generate.dllm, "generate", answer)
        result = command("generate", "prompt=Tom \x1b[31mhas :smile: [b]3", "gen_length=4", "show=lines")
        assert result.code == 0, result.err
        assert not UNSEEN.search(result.out)
        assert r"Tom \x1b[31mhas :smile: [b]3" in result.out
        assert ":smile: [red]x" in result.out

    def test_ids_in_progress_lines(self, tmp_path: Path) -> None:
        (tmp_path / "in.jsonl").write_text(json.dumps({"id": HOSTILE, "prompt": "1 + 1"}) + "\n")
        arguments = (f"input={tmp_path}/in.jsonl", f"output={tmp_path}/out.jsonl", "gen_length=4", "show=lines")
        result = command("generate", *arguments)
        assert result.code == 0, result.err
        assert r"\x1b]0;title" in result.err
        assert not UNSEEN.search(result.out + result.err)


class TestReports:
    LABEL = f"=cmd|{HOSTILE} <b>$x_1$ [y](http://z)"

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        write_run(tmp_path / "a", self.LABEL, record=trace(), model=f"m[red]{HOSTILE}")
        write_error(tmp_path / "b", self.LABEL, f"+wrong {HOSTILE} <script>")
        result = command("report", str(tmp_path))
        assert result.code == 0, result.err
        assert not UNSEEN.search(result.out + result.err)
        return tmp_path

    def test_nothing_in_them_is_obeyed(self, folder: Path) -> None:
        for file in folder.glob("*.*"):
            text = file.read_text()
            assert not UNSEEN.search(text)
            assert file.suffix == ".csv" or not re.search(r"<(b|script)>\$x|wrong[^\n]* <script>", text)
            if file.suffix == ".svg":
                assert "$x_1$" in "".join(ElementTree.fromstring(text).itertext())
        (row,) = csv.DictReader(io.StringIO((folder / "report.csv").read_bytes().decode(), newline=""))
        assert row["label"] == f"'{terminal(self.LABEL)}"
        float(row["quality"])
        assert r"\[y\](http\://z)" in (folder / "report.md").read_text()

    def test_the_page_loads_nothing_and_runs_its_own_script_alone(self, folder: Path) -> None:
        text = (folder / "report.html").read_text()
        (policy,) = re.findall(r'<meta http-equiv="Content-Security-Policy" content="([^"]+)">', text)
        (script,) = re.findall(r'<script type="module">(.*?)</script>', text, re.DOTALL)
        hashed = b64encode(sha256(script.encode()).digest()).decode()
        assert policy.split("; ")[:2] == ["default-src 'none'", f"script-src 'sha256-{hashed}'"]
        assert text.index("Content-Security-Policy") < text.index("<style")
        assert not re.search(r" on[a-z]+=", text.partition("<script")[0])
        label = json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1])["runs"][0]["label"]  # type: ignore[index]
        assert label == terminal(self.LABEL, one_line=True)


def test_a_picture_loads_nothing_and_shows_its_title(tmp_path: Path) -> None:
    save_picture([Text("a"), Text("ab")], f"<model> {HOSTILE}", tmp_path / "canvas.svg")
    text = (tmp_path / "canvas.svg").read_text()
    assert not UNSEEN.search(text)
    assert not re.search(r"@font-face|url\((?!#)|@import", text)
    assert r"<model>" in "".join(ElementTree.fromstring(text).itertext()).replace("\xa0", " ")
