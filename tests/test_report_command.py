"""`dllm report`: files that are the same each time, tables on a terminal and elsewhere, one line for bad input."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from commands import command
from dllm.reports import plots
from dllm.reports.page import chosen
from dllm.reports.reading import load
from report_rig import SETTINGS, trace, write_error, write_run, write_sweep

WRITTEN = ["quality-nfe.svg", "quality-speed.svg", "report.csv", "report.html", "report.md"]


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sweep(tmp_path_factory.mktemp("sweeps") / "batch_size=1,x")


def page(folder: Path) -> dict[str, Any]:
    """What the player of a page has to show."""
    text = (folder / "report.html").read_text()
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert data is not None
    return json.loads(data[1])  # type: ignore[no-any-return]  # an object, as written


class TestFiles:
    def test_are_written_into_the_sweep_itself(self, tmp_path: Path) -> None:
        write_run(tmp_path / "a", "a")
        result = command("report", str(tmp_path))
        assert (result.code, result.err) == (0, "")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["a", *WRITTEN]
        assert result.out.endswith(f"written to {tmp_path}: {', '.join(WRITTEN)}\n")

    def test_are_the_same_for_the_same_runs(self, sweep: Path, tmp_path: Path) -> None:
        outs = [tmp_path / "new" / "one", tmp_path / "two"]
        for out in outs:
            assert command("report", str(sweep), f"out={out}").code == 0
        assert sorted(path.name for path in outs[0].iterdir()) == WRITTEN
        for name in WRITTEN:
            assert (outs[0] / name).read_bytes() == (outs[1] / name).read_bytes()
        # Nothing says when or where it was made.
        assert not re.search(rf"\d{{4}}-\d\d-\d\dT|{re.escape(str(tmp_path))}", (outs[0] / "report.html").read_text())

    def test_the_table_is_printed_as_it_is_written(self, sweep: Path, tmp_path: Path) -> None:
        result = command("report", f"folder={sweep}", f"out={tmp_path}")
        text = (tmp_path / "report.md").read_text()
        assert result.out.startswith(text)
        lines = text.splitlines()
        assert lines[2] == "## tiny-llada, word_problems"
        table = lines[4 : 4 + 2 + len(SETTINGS)]
        assert {len(re.findall(r"(?<!\\)\|", line)) for line in table} == {24}
        assert [line.split(" | ")[0] for line in table[2:4]] == ["| oracle (reference)", "| threshold 0.999"]
        assert "- vanilla \\| 3: out of memory second line" in lines
        assert "- ar_guided + d2cache: ar_guided does not go with \\<d2cache\\>" in lines
        assert "![tiny-llada, word_problems: quality against NFE per sample](quality-nfe.svg)" in lines
        assert "| sampler vanilla | 3 | 67.9 |" in lines

    def test_of_several_models_and_tasks_are_kept_apart(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        several = [
            ("A", "b-c"), ("a", "b, c"), ("a", "b-c"), ("a, b", "c"), ("a-b", "c"), ("my model", "a/b"),
            ("my+model", "a/b"),
        ]  # fmt: skip
        for number, (model, task) in enumerate(several):
            write_run(tmp_path / str(number), "x", model=model, task=task)
        monkeypatch.setattr(plots, "draw", lambda group, cost, _: f"<svg>{group.model}|{group.task}|{cost}</svg>")
        assert command("report", str(tmp_path)).code == 0
        # Some disks do not tell a from A.
        assert len({path.name.lower() for path in tmp_path.glob("*.svg")}) == 2 * len(several)
        linked = re.findall(r"\]\((quality-\S+\.svg)\)", (tmp_path / "report.md").read_text())
        drawn = [f"<svg>{model}|{task}|{cost}</svg>" for model, task in several for cost in plots.COSTS]
        assert [(tmp_path / name).read_text() for name in linked] == drawn
        assert re.findall(r"<svg>.*?</svg>", (tmp_path / "report.html").read_text()) == drawn

    def test_of_tasks_with_long_names_have_names_that_a_disk_takes(self, tmp_path: Path) -> None:
        for number, task in enumerate(["a" * 300, "a" * 301, "ä" * 150]):
            write_run(tmp_path / str(number), "x", task=task)
        result = command("report", str(tmp_path))
        assert (result.code, result.err) == (0, "")
        assert len(list(tmp_path.glob("*.svg"))) == 6

    def test_without_anything_to_draw_there_are_no_plots(self, tmp_path: Path) -> None:
        write_run(tmp_path / "a", "a", None, None)
        assert command("report", str(tmp_path)).code == 0
        assert not list(tmp_path.glob("*.svg"))
        assert "<figure" not in (tmp_path / "report.html").read_text()

    def test_another_score_may_be_the_quality(self, sweep: Path, tmp_path: Path) -> None:
        command("report", str(sweep), f"out={tmp_path}", "quality=whole chain")
        assert "| setting | whole chain |" in (tmp_path / "report.md").read_text()

    def test_another_score_brings_the_number_of_its_samples(self, tmp_path: Path) -> None:
        scores = {
            "of two": {"value": 0.5, "interval": None, "n": 2},
            "of seven": {"value": 0.5, "interval": None, "n": 7},
        }
        write_run(tmp_path, n=2, scores=scores, accuracy_name="of two")
        for quality, n in (("of two", "2"), ("of seven", "7")):
            assert command("report", str(tmp_path), f"quality={quality}").code == 0
            (row,) = csv.DictReader((tmp_path / "report.csv").open(newline=""))
            assert (row["quality_name"], row["n"]) == (quality, n)
            assert f"| {n} |" in (tmp_path / "report.md").read_text()


class TestTraces:
    def test_of_the_front_come_first_then_one_a_sampler(self, tmp_path: Path) -> None:
        small = trace(samples=1)
        settings = {
            "a 1": (0.9, 30.0), "a 2": (0.8, 20.0), "a 3": (0.95, 60.0), "a 4": (0.5, 50.0), "a 5": (0.4, 70.0),
            "b": (0.1, 80.0), "oracle": (0.97, 10.0),
        }  # fmt: skip
        for label, (accuracy, nfe) in settings.items():
            write_run(tmp_path / label, label, accuracy, nfe, record=small)
        write_run(tmp_path / "none", "none", 0.99, 90.0)
        sweep = load(tmp_path)
        found = [[run.label for run in chosen(sweep, count)] for count in (0, 1, 2, 4, 5, 6, 9)]
        front = ["a 2", "a 1", "a 3"]
        assert found == [
            [], front[:1], ["a 2", "a 3"], [*front, "oracle"], [*front, "oracle", "b"], [*front, "oracle", "b", "a 4"],
            [*front, "oracle", "b", "a 4", "a 5"],
        ]  # fmt: skip

    def test_that_are_not_there_are_told(self, tmp_path: Path) -> None:
        write_run(tmp_path / "a", "a")
        write_run(tmp_path / "b", "b", record=trace(samples=1))
        command("report", str(tmp_path))
        runs = page(tmp_path)["runs"]
        assert [(run["note"], len(run["samples"])) for run in runs] == [("This run left no trace.", 0), ("", 1)]

    def test_that_are_left_out_can_be_found(self, tmp_path: Path) -> None:
        write_run(tmp_path / "a", "a", record=trace(samples=1))
        command("report", str(tmp_path), "traces=0")
        assert "dllm show a" in page(tmp_path)["runs"][0]["note"]

    def test_every_task_has_some(self, tmp_path: Path) -> None:
        for number in range(6):
            write_run(tmp_path / str(number), str(number), task=f"t{number % 2}", record=trace(samples=1))
        command("report", str(tmp_path), "traces=3")
        assert sorted(run["group"] for run in page(tmp_path)["runs"] if run["samples"]) == [
            "tiny-llada, t0", "tiny-llada, t0", "tiny-llada, t1",
        ]  # fmt: skip

    def test_without_steps_are_told(self, tmp_path: Path) -> None:
        write_run(tmp_path / "a", "a", record=trace(samples=0))
        command("report", str(tmp_path))
        assert page(tmp_path)["runs"][0]["note"] == "This run recorded no sample step by step."

    def test_that_would_make_the_page_heavy_come_with_fewer_samples(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("dllm.reports.page._MOST", 10)
        write_run(tmp_path / "a b", "a", record=trace(samples=3))
        command("report", str(tmp_path))
        run = page(tmp_path)["runs"][0]
        assert len(run["samples"]) == 1
        assert run["note"].startswith("2 more of its samples")
        assert "dllm show 'a b' " in run["note"]

    def test_that_are_damaged_are_told_and_the_report_goes_on(self, tmp_path: Path) -> None:
        run = write_run(tmp_path / "a", "a", record=trace(samples=1))
        write_run(tmp_path / "b", "b", record=trace(samples=1))
        (run / "trace.safetensors").write_bytes(b"x")
        result = command("report", str(tmp_path))
        assert (result.code, result.err.count("\n")) == (0, 1)
        assert result.err.startswith(f"dllm report: warning: {run}/trace.safetensors is not a trace or damaged")
        assert f"remove {run}/results.json to run that setting again" in result.err
        damaged, whole = page(tmp_path)["runs"]
        assert "a/trace.safetensors is damaged" in damaged["note"]
        assert (len(damaged["samples"]), len(whole["samples"])) == (0, 1)

    def test_that_are_not_those_of_the_results_are_told_likewise(self, tmp_path: Path) -> None:
        file = write_run(tmp_path / "a", "a", record=trace(samples=1)) / "results.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"members": {"trace.safetensors": "0"}}))
        result = command("report", str(tmp_path))
        assert (result.code, result.err.count("\n")) == (0, 1)
        assert f"trace.safetensors was changed since results.json was written; remove {file.parent}" in result.err
        assert page(tmp_path)["runs"][0]["samples"] == []


class TestPage:
    def test_needs_no_network_and_escapes_what_it_shows(self, tmp_path: Path) -> None:
        write_run(tmp_path / "a", "<b>x</b> & </script>", record=trace())
        write_error(tmp_path / "b", "<i>", "</ul><script>alert(1)</script>")
        command("report", str(tmp_path))
        text = (tmp_path / "report.html").read_text()
        assert not re.search(r"""(src|href|action|data)\s*=\s*["']?\s*(https?:)?//|@import|url\(['"]?http""", text)
        assert text.count("<script") == 2 == text.count("</script>")
        assert "<b>x" not in text and "alert(1)</script>" not in text
        assert page(tmp_path)["runs"][0]["label"] == "<b>x</b> & </script>"

    def test_has_the_plots_in_it_with_names_of_their_own(self, sweep: Path, tmp_path: Path) -> None:
        command("report", str(sweep), f"out={tmp_path}")
        text = (tmp_path / "report.html").read_text()
        assert text.count("<svg ") == 2
        names = re.findall(r'\bid="([^"]+)"', text)
        assert len(names) == len(set(names))
        assert {
            used for used in re.findall(r'xlink:href="#([^"]+)"|url\(#([^)]+)\)', text) for used in used if used
        } <= {*names}
        assert plots.INK not in text


class TestTerminal:
    def shown(self, sweep: Path, width: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
        drawn = io.StringIO()
        terminal = Console(file=drawn, force_terminal=True, width=width)
        monkeypatch.setattr("dllm.scripts.report.Console", lambda: terminal)
        assert command("report", str(sweep), f"out={tmp_path}").code == 0
        return re.sub(r"\x1b\[[0-9;]*m", "", drawn.getvalue())

    def test_leaves_out_what_it_has_no_room_for_and_says_so(
        self, sweep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        plain = self.shown(sweep, 100, tmp_path, monkeypatch)
        assert max(map(len, plain.splitlines())) <= 100
        assert "localleap 0.999/0.99/4 + freecache" in plain
        assert re.search(r"no room for .*peak MiB; see report\.md", " ".join(plain.split()))
        assert "not measured: ar_guided + d2cache: ar_guided does not go with <d2cache>" in plain

    def test_shows_everything_where_there_is_room(
        self, sweep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        plain = self.shown(sweep, 400, tmp_path, monkeypatch)
        assert "peak MiB" in plain
        assert "no room" not in plain


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "folder has no value; set it with folder=..."),
        (["{}/none"], "none' is not a folder"),
        (["{}/empty"], "empty' holds no finished run"),
        (["{}/sweep", "quality=x"], "quality='x' is not a score of these runs; use one of final answer, whole chain"),
        (["{}/sweep", "traces=-1"], "traces=-1 is out of range; use 0 or more"),
        (["{}/sweep", "out={}/file"], "file' cannot be written"),
        (["{}/sweep", "out={}/file/x"], "cannot be written"),
        (["{}/sweep", "{}/empty"], "is a second folder"),
        (["{}/other"], "other/results.json is of version 7, this dllm reads version 1"),
    ],
)
def test_bad_input_is_one_line(tmp_path: Path, arguments: list[str], named: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    write_run(tmp_path / "sweep", "a")
    write_run(tmp_path / "other", "a", version=7)
    result = command("report", *(argument.format(tmp_path) for argument in arguments))
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("dllm report: error: ")
    assert result.err.count("\n") == 1
    assert named in result.err
    assert (tmp_path / "file").read_text() == "x"


def test_the_plots_of_an_earlier_report_are_gone_and_those_of_others_stay(tmp_path: Path) -> None:
    for task in ("one", "two"):
        write_run(tmp_path / task, "a", task=task)
    assert command("report", str(tmp_path)).code == 0
    before = sorted(path.name for path in tmp_path.glob("*.svg"))
    assert len(before) == 4
    (tmp_path / "quality-nfe-mine.svg").write_bytes((tmp_path / before[0]).read_bytes())
    (tmp_path / "two" / "results.json").unlink()
    assert command("report", str(tmp_path)).code == 0
    after = {path.name for path in tmp_path.glob("*.svg")}
    assert after == {"quality-nfe.svg", "quality-speed.svg", "quality-nfe-mine.svg"}
