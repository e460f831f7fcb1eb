"""`dllm show`: keys on a terminal, lines elsewhere, one line for bad input."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console, RenderableType

from commands import command, in_a_process
from dllm import identity
from dllm.reports.player import line
from dllm.scripts.show import View, keys, play
from report_rig import trace
from warm import Process

TRACE = trace()
STEPS = len(TRACE.frames[0].canvas)
LEFT, RIGHT, UP, DOWN, HOME, END = (f"\x1b[{letter}" for letter in "DCABHF")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sampler=a,cache=b")
    TRACE.save(folder / "trace.safetensors")
    return folder


class TestWithoutATerminal:
    def test_every_step_is_a_line(self, run: Path) -> None:
        result = command("show", str(run))
        assert (result.code, result.err) == (0, "")
        assert result.out.splitlines() == [line(TRACE, 0, step) for step in range(STEPS)]

    def test_the_file_itself_may_be_given_by_its_name(self, run: Path) -> None:
        assert command("show", f"path={run}/trace.safetensors").out == command("show", str(run)).out

    def test_one_step_is_drawn(self, run: Path) -> None:
        result = command("show", str(run), "step=3", "sample=2")
        assert result.out.startswith("sample problem 1 (2 of 2)  step 3 of 12  NFE 3  computed ")
        assert "█" in result.out
        assert "\x1b" not in result.out

    @pytest.mark.parametrize("sample", ["2", "problem 1", "'problem 1'"])
    def test_a_sample_has_a_number_and_an_id(self, run: Path, sample: str) -> None:
        assert command("show", str(run), f"sample={sample}").out.splitlines()[0] == line(TRACE, 1, 0)

    @pytest.mark.parametrize(
        ("arguments", "named"),
        [
            (["{}/none"], "none' cannot be read (No such file"),
            ([], "path has no value"),
            (["{}/.."], "has no trace.safetensors"),
            (["{}", "sample=9"], "sample=9 was not recorded step by step; use 1 to 2, or an id: problem 0, problem 1"),
            (["{}", "sample=problem 4"], "sample='problem 4' was not recorded"),
            (["{}", "sample=0"], "sample=0 was not recorded"),
            (["{}", "step=0"], "step=0 is out of range; use 1 to 14"),
            (["{}", "step=15"], "step=15 is out of range; use 1 to 14"),
            (["{}", "step=x"], "step='x' is of the wrong type"),
            (["{}", "colour=red"], "unknown colour='red'; expected one of commit_step, confidence"),
            (["{}", "{}"], "is a second path"),
            (["{}", "path=x"], "is a second path"),
            (["{}", "color=red"], "unknown option 'color' (did you mean colour?); expected one of path, "),
            (["pyproject.toml"], "pyproject.toml is not a trace"),
        ],
    )
    def test_bad_input_is_one_line(
        self, run: Path, arguments: list[str], named: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(Path(__file__).parents[1])
        result = command("show", *(argument.format(run) for argument in arguments))
        assert (result.code, result.out) == (2, "")
        assert result.err.startswith("dllm show: error: ")
        assert result.err.count("\n") == 1
        assert named in result.err

    def test_a_trace_of_another_version_and_one_without_steps(self, tmp_path: Path) -> None:
        trace(samples=0).save(tmp_path / "empty")
        result = command("show", str(tmp_path / "empty"))
        assert (result.code, result.err.count("\n")) == (2, 1)
        assert "has no sample step by step" in result.err
        data = (tmp_path / "empty").read_bytes()
        (tmp_path / "later").write_bytes(data.replace(b'"version":"1"', b'"version":"2"'))
        result = command("show", str(tmp_path / "later"))
        assert (result.code, result.err.count("\n")) == (2, 1)
        assert "version 2, this dllm reads version 1" in result.err

    def test_a_trace_that_is_not_that_of_the_results_is_refused(self, run: Path, tmp_path: Path) -> None:
        folder = shutil.copytree(run, tmp_path / "run")
        file = folder / "trace.safetensors"
        results = {"format": "dllm-results", "members": {file.name: identity.digest(file)}}
        (folder / "results.json").write_text(json.dumps(results))
        assert command("show", str(folder)).code == 0
        trace(prompt=5).save(file)
        result = command("show", str(folder))
        assert (result.code, result.err.count("\n")) == (2, 1)
        assert f"{file} was changed since results.json was written; remove {folder}" in result.err
        for other in ("", "[]", json.dumps({"members": {file.name: 5}})):  # of another program
            (folder / "results.json").write_text(other)
            assert command("show", str(folder)).code == 0


class TestKeys:
    def follow(self, *pressed: str) -> tuple[list[str], View]:
        drawn: list[str] = []

        def see(drawing: RenderableType) -> None:
            console = Console(file=io.StringIO(), width=100)
            console.print(drawing)
            drawn.append(console.file.getvalue())  # type: ignore[attr-defined]  # a StringIO

        return drawn, play(TRACE, View(), iter(pressed), see)

    @pytest.mark.parametrize(
        ("pressed", "sample", "step"),
        [
            ([RIGHT, RIGHT, LEFT], 0, 1), (["l", " ", "h"], 0, 1), (["\x1bOC", "\x1bOC", "\x7f"], 0, 1),
            ([LEFT, "h"], 0, 0), ([END], 0, STEPS - 1), ([END, RIGHT, RIGHT], 0, STEPS - 1), ([END, HOME], 0, 0),
            ([RIGHT, DOWN], 1, 0), ([DOWN, DOWN], 0, 0), ([UP], 1, 0), (["n", "p"], 0, 0), (["x", "\x1b[5~"], 0, 0),
        ],
    )  # fmt: skip
    def test_lead_to_steps_and_samples(self, pressed: list[str], sample: int, step: int) -> None:
        assert self.follow(*pressed)[1] == View(sample, step)

    def test_every_move_is_drawn(self) -> None:
        drawn, _ = self.follow(RIGHT, "x", DOWN)
        assert [text.split("  NFE")[0] for text in drawn] == [
            "sample problem 0 (1 of 2)  step 1 of 14", "sample problem 0 (1 of 2)  step 2 of 14",
            "sample problem 1 (2 of 2)  step 1 of 12",
        ]  # fmt: skip
        assert all("q leave" in text for text in drawn)

    def test_toggle_the_colours(self) -> None:
        drawn, view = self.follow("c")
        assert view.colour == "confidence"
        assert ("first" in drawn[0], "unsure" in drawn[1]) == (True, True)
        assert self.follow("c", "c")[1].colour == "commit_step"

    @pytest.mark.parametrize("leave", ["q", "\x03", "\x04"])
    def test_leave(self, leave: str) -> None:
        assert self.follow(RIGHT, leave, RIGHT)[1] == View(0, 1)

    def test_are_told_apart_however_they_come(self) -> None:
        sent = iter([f"{RIGHT}{RIGHT}q", "\x1b[1~", "x\n", ""])
        assert list(keys(lambda: next(sent))) == [RIGHT, RIGHT, "q", "\x1b[1~", "x", "\n"]

    def test_end_with_an_interruption(self) -> None:
        def read() -> str:
            raise KeyboardInterrupt

        assert list(keys(read)) == []


@in_a_process
def test_on_a_terminal_keys_step_through_it(run: Path) -> None:
    with typing(str(run)) as (press, wait):
        wait("step 1 of 14")
        press(RIGHT + RIGHT)
        wait("step 3 of 14")
        press(END)
        wait("step 14 of 14")
        press("q")


@in_a_process
def test_in_any_encoding_the_terminal_is_given_back(run: Path) -> None:
    with typing(str(run), PYTHONIOENCODING="ascii") as (press, wait):
        wait("step 1 of 14")
        press("\udce9")  # a byte of a terminal in Latin-1
        press(RIGHT)
        wait("step 2 of 14")
        press("q")
        wait("\x1b[?1049l")


class typing:
    """`dllm show` on a terminal of its own: what presses keys there, and what waits for a text."""

    def __init__(self, *arguments: str, **environment: str) -> None:
        self.master, slave = pty.openpty()
        environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "100", "LINES": "30"} | environment
        self.process = Process("show", *arguments, stdin=slave, stdout=slave, stderr=slave, env=environment)
        os.close(slave)

    def __enter__(self) -> tuple[Callable[[str], object], Callable[[str], None]]:
        return lambda key: os.write(self.master, key.encode(errors="surrogateescape")), self.wait

    def wait(self, text: str) -> None:
        """Read until a text has been drawn, with its styles or without them."""
        seen = ""
        while text not in seen and text not in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", seen):
            assert select.select([self.master], [], [], 60)[0], f"{text!r} was not drawn: {seen!r}"
            seen += os.read(self.master, 65536).decode(errors="replace")

    def __exit__(self, *error: object) -> None:
        if error[0] is not None:
            self.process.kill()
        code = self.process.wait(60)
        os.close(self.master)
        assert error[0] is not None or code == 0
