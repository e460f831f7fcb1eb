"""A command writes over what it made itself, and never over other people's files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from commands import command
from dllm.files import BUNDLED
from dllm.filters import Filter, FilterCard, NeighbourFilter
from dllm.scripts import own
from models import random_llada, save_folder
from report_rig import write_run

DOCS = Path(__file__).parents[1] / "docs"
CARD = FilterCard("neighbours", 8, "m", "0123", {"a": 1}, {"b": None}, "data", 5, 6, {"x": 1}, {"y": 0.5}, [{"z": 1.0}])
MINE = "Mine, and not to be lost.\n"
# By command: the option, what it is given in a folder, and the files that are written then.
WRITERS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "bench": ("out", "package", ("package.md", "package.json")),
    "bench-serve": ("out", "load", ("load.jsonl", "load.csv")),
    "compatibility": ("out", "README.md", ("README.md",)),
    "generate": ("picture", "drawing.svg", ("drawing.svg",)),
    "train-filter": ("out", "model.safetensors", ("model.safetensors", "model.json", "model.svg")),
    "train-tiny": ("out", "", ("model.safetensors", "config.json", "README.md", "state.pt")),
    "adapt": ("out", "", ("model.safetensors", "config.json", "README.md", "state.pt")),
    "distill": ("out", "", ("adapter_model.safetensors", "adapter_config.json", "README.md", "state.pt")),
    "results": ("out", "table", ("table.md",)),
    "report": ("out", "", ("report.md", "report.csv", "report.html", "quality-nfe.svg", "quality-speed.svg")),
}
CASES = [(name, file) for name, (_, _, files) in WRITERS.items() for file in files]


@pytest.mark.parametrize(("name", "file"), CASES, ids=lambda value: value)
def test_files_of_others_are_refused_before_any_work(
    name: str, file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    option, value, _ = WRITERS[name]
    folder = tmp_path / "theirs"
    folder.mkdir()
    (folder / file).write_text(MINE)
    path = str(folder / value) if value else str(folder)
    monkeypatch.setattr("dllm.load", lambda *args, **options: pytest.fail("a model was loaded"))
    more = [str(write_run(tmp_path / "runs" / "a", "a").parent)] if name == "report" else []
    outcome = command(name, *more, f"{option}={path}")
    assert (outcome.code, outcome.out, outcome.err.count("\n")) == (2, "", 1), outcome.err
    assert outcome.err.startswith(f"dllm {name}: error: {option}='{path}': {folder / file} exists and is ")
    assert [(each.name, each.read_text()) for each in folder.iterdir()] == [(file, MINE)]


def test_a_drawing_of_others_is_told_whatever_it_repeats(tmp_path: Path) -> None:
    path = tmp_path / "quality-nfe.svg"
    path.write_text("<?xml" + '<g id="figure_1">' * 10**6)
    assert not own.REPORT[".svg"].marks(path)
    path.write_text("<?xml" + ">NFE per sample<" + '<g id="figure_1">')  # in another order
    assert not own.REPORT[".svg"].marks(path)


def test_a_table_within_another_text_is_no_table_of_a_command(tmp_path: Path) -> None:
    for table in DOCS.glob("*.md"):
        copy = tmp_path / table.name
        for text in (f"# My notes\n\n{table.read_text()}", f"{table.read_text()}\nMy notes.\n"):
            copy.write_text(text)
            for kind in (own.BENCH, own.MATRIX, own.RESULTS, own.REPORT[".md"]):
                with pytest.raises(ValueError, match="exists and is no"):
                    own.check("out", "x", {copy: kind})


@pytest.mark.parametrize("file", ["report.md", "report.csv"])
def test_notes_in_a_report_are_not_written_over(file: str, tmp_path: Path) -> None:
    write_run(tmp_path / "a", "a")
    (tmp_path / "b").mkdir()
    failed = {"format": "dllm-error", "version": 1, "label": "b", "message": "no\nway"}
    (tmp_path / "b" / "error.json").write_text(json.dumps(failed))
    for _ in range(2):
        assert command("report", str(tmp_path)).code == 0
    with (tmp_path / file).open("a") as opened:
        opened.write("\nMy notes.\n")
    before = (tmp_path / file).read_bytes()
    outcome = command("report", str(tmp_path))
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert f"{tmp_path / file} exists and is not a table of dllm report" in outcome.err
    assert (tmp_path / file).read_bytes() == before


@pytest.mark.parametrize(
    ("pattern", "kind"),
    [
        ("bench-*.md", own.BENCH), ("bench-*.json", own.BENCH_RECORD),
        ("compatibility.md", own.MATRIX), ("canvas.svg", own.PICTURE),
        *((f"*/**/*{end}", kind) for end, kind in own.REPORT.items()),
        *(
            (f"../dllm/checkpoints/*/[al]*{end}", kind)  # anchored and learn2pd
            for end, kind in ((".safetensors", own.FILTER), (".json", own.CARD), (".svg", own.RELIABILITY))
        ),
    ],
)  # fmt: skip
def test_what_is_committed_can_be_made_again_and_nothing_else_passes_for_it(pattern: str, kind: own.Kind) -> None:
    files = [
        file for file in DOCS.glob(pattern) if file.parent.name != "models" and file.name != "README.md"
    ]  # by hand
    assert files or pattern == "*/**/*.html"
    own.check("out", "x", dict.fromkeys(files, kind))
    every = [*DOCS.rglob("*.*"), *BUNDLED.rglob("*.*"), *DOCS.parent.glob("*.md")]
    others = [file for file in every if file.is_file() and file.resolve() not in {each.resolve() for each in files}]
    for file in others:
        with pytest.raises(ValueError, match="exists and is no"):
            own.check("out", "x", {file: kind})


@pytest.mark.parametrize("name", ["compatibility", "report"])
def test_the_same_again_replaces_what_it_made(name: str, tmp_path: Path) -> None:
    runs = write_run(tmp_path / "runs" / "a", "a").parent
    arguments = [str(runs)] if name == "report" else [f"out={tmp_path}/matrix.md"]
    for _ in range(2):
        outcome = command(name, *arguments)
        assert (outcome.code, outcome.err) == (0, "")


def test_a_report_into_a_folder_of_other_things_leaves_them_alone(tmp_path: Path) -> None:
    write_run(tmp_path / "a", "a")
    for name in ("README.md", "index.html"):
        (tmp_path / name).write_text(MINE)
    assert command("report", str(tmp_path)).code == 0
    assert {(tmp_path / name).read_text() for name in ("README.md", "index.html")} == {MINE}


class TestFilters:
    def kinds(self, path: Path) -> dict[Path, own.Kind]:
        return {path: own.FILTER, path.with_suffix(".json"): own.CARD}

    def test_its_own_are_replaced(self, tmp_path: Path) -> None:
        path = tmp_path / "f.safetensors"
        Filter(NeighbourFilter(), CARD, "f").save(path)
        own.check("out", str(path), self.kinds(path))
        path.with_suffix(".json").unlink()
        own.check("out", str(path), self.kinds(path))

    def test_a_model_of_the_same_tensors_is_not(self, tmp_path: Path) -> None:
        path = tmp_path / "f.safetensors"
        save_file(NeighbourFilter().state_dict(), path)  # earlier versions set no mark, and left a card
        with pytest.raises(ValueError, match=r"f\.safetensors exists and is not a filter of dllm train-filter"):
            own.check("out", str(path), self.kinds(path))

    @pytest.mark.parametrize("name", ["model", "config"])
    def test_a_checkpoint_is_left_as_it_is(self, name: str, tmp_path: Path) -> None:
        folder = save_folder(random_llada(tokenizer=True, max_length=96), tmp_path / "ck")
        before = {file.name: file.read_bytes() for file in folder.iterdir()}
        outcome = command("train-filter", f"model={folder}", f"out={folder}/{name}.safetensors")
        assert (outcome.code, outcome.err.count("\n")) == (2, 1)
        assert {file.name: file.read_bytes() for file in folder.iterdir()} == before

    def test_a_folder_of_other_things_is_not_taken_for_records(self, tmp_path: Path) -> None:
        (tmp_path / "f.records").mkdir()
        (tmp_path / "f.records" / "0000000.safetensors").write_text(MINE)
        outcome = command("train-filter", f"out={tmp_path}/f.safetensors")
        assert (outcome.code, outcome.err.count("\n")) == (2, 1)
        assert f"{tmp_path}/f.records holds no records of dllm train-filter" in outcome.err


def test_what_came_while_a_command_worked_is_seen_before_it_writes(tmp_path: Path) -> None:
    kinds: dict[Path, Any] = {tmp_path / "a.md": (own.MATRIX, "new"), tmp_path / "b.json": (own.BENCH_RECORD, "new")}
    own.check("out", "x", {path: kind for path, (kind, _) in kinds.items()})
    (tmp_path / "b.json").write_text(MINE)
    with pytest.raises(ValueError, match=r"b\.json exists"):
        own.write("out", "x", kinds)
    assert not (tmp_path / "a.md").exists()
    assert (tmp_path / "b.json").read_text() == MINE


@pytest.mark.parametrize("suffix", [".md", ".json"])
def test_a_full_disk_leaves_the_old_file(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for end in (".md", ".json"):
        shutil.copy(DOCS / f"bench-100m-cpu{end}", tmp_path / f"x{end}")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dllm.files.os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        own.write("out", "x", {tmp_path / f"x{suffix}": (own.BENCH if suffix == ".md" else own.BENCH_RECORD, "new")})
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {
        f"x{end}": (DOCS / f"bench-100m-cpu{end}").read_bytes() for end in (".md", ".json")
    }


def test_through_a_link_the_file_itself_is_looked_at(tmp_path: Path) -> None:
    (tmp_path / "mine.md").write_text(MINE)
    (tmp_path / "link.md").symlink_to(tmp_path / "mine.md")
    outcome = command("compatibility", f"out={tmp_path}/link.md")
    assert (outcome.code, (tmp_path / "mine.md").read_text()) == (2, MINE)
