"""Progress in a notebook: one output of the cell, drawn again."""

from __future__ import annotations

import builtins
import io
import re
from typing import Any

import pytest
from rich.console import Console

import dllm
from dllm import progress
from dllm.progress import progress_bar, progress_reports
from models import random_llada

ipython = pytest.importorskip("IPython.display")


class Output:
    """What a cell shows of one display."""

    def __init__(self, shown: Any) -> None:
        self.drawings = [shown.data]

    def update(self, shown: Any) -> None:
        self.drawings.append(shown.data)


class ZMQInteractiveShell:
    """What rich takes for a notebook's kernel."""


@pytest.fixture
def outputs(monkeypatch: pytest.MonkeyPatch) -> list[Output]:
    """The outputs of a cell, in a notebook without ipywidgets."""
    found: list[Output] = []

    def display(shown: Any, display_id: bool) -> Output:
        assert display_id
        found.append(Output(shown))
        return found[-1]

    monkeypatch.setattr(builtins, "get_ipython", ZMQInteractiveShell, raising=False)
    monkeypatch.setattr(ipython, "display", display)
    monkeypatch.setattr(progress, "_SELDOM", 0.0)
    assert Console().is_jupyter
    return found


def plain(drawing: str) -> str:
    return re.sub("<.*?>", "", drawing)


def test_a_bar_is_one_output_that_is_drawn_again(outputs: list[Output], capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("decoding", 10, note="tokens") as update:
        for _ in range(10):
            update(advance=1)
    (output,) = outputs
    assert "decoding" in plain(output.drawings[0])
    assert ["1/10" in plain(output.drawings[0]), "10/10" in plain(output.drawings[-1])] == [True, True]
    assert capsys.readouterr() == ("", "")


def test_a_bar_is_drawn_a_few_times_a_second_and_at_the_end(
    outputs: list[Output], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "_SELDOM", 60.0)
    with progress_bar("decoding", 1000) as update:
        for _ in range(1000):
            update(advance=1)
    assert len(outputs[0].drawings) == 2
    assert "1000/1000" in plain(outputs[0].drawings[-1])


def test_the_bar_of_generate_is_a_notebooks(outputs: list[Output], capsys: pytest.CaptureFixture[str]) -> None:
    dllm.generate(random_llada(), [[4], [5]], progress=True, gen_length=8, block_length=4, stop_at_eos=False)
    (output,) = outputs
    assert "16/16" in plain(output.drawings[-1])
    assert capsys.readouterr() == ("", "")


def test_reports_of_commands_are_a_bar_and_no_lines(outputs: list[Output], capsys: pytest.CaptureFixture[str]) -> None:
    with progress_reports("collecting <b>") as report:
        for done in range(1, 21):
            report(done, 20, "prompts & more")
    (output,) = outputs
    assert "collecting &lt;b&gt;" in output.drawings[-1]
    assert "prompts &amp; more" in output.drawings[-1]
    assert capsys.readouterr() == ("", "")


def test_a_bar_that_is_not_shown_is_no_output(outputs: list[Output]) -> None:
    with progress_bar("decoding", 10, show=False) as update:
        update(advance=1)
    assert outputs == []


def test_outside_a_notebook_reports_are_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_reports("collecting") as report:
        for done in range(1, 21):
            report(done, 20)
    assert len(capsys.readouterr().err.splitlines()) == 10


def test_the_state_at_a_failure_stays(outputs: list[Output]) -> None:
    def interrupted() -> None:
        with progress_bar("decoding", 10) as update:
            update(advance=3)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert "3/10" in plain(outputs[0].drawings[-1])


def test_a_terminals_bar_is_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    with progress_bar("decoding", 2, console=console) as update:
        update(advance=2)
    assert "2/2" in console.file.getvalue()  # type: ignore[attr-defined]
