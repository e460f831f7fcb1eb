"""What was written earlier and is damaged since: one line that names the file, or it is made again; never a crash."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import save_file

import dllm
from commands import Outcome, command
from dllm.cache import NoCache
from dllm.evaluation.journal import Journal
from dllm.evaluation.records import Query
from dllm.evaluation.run_folder import RunFolder
from dllm.evaluation.runner import Runner, Setting
from dllm.evaluation.trace import Trace
from dllm.filters import Filter, FilterCard, NeighbourFilter, load_filter
from dllm.reports.reading import load
from dllm.scripts import train_filter as application
from dllm.tasks.base import Graded
from models import random_llada, save_folder
from report_rig import results, trace, write_error, write_run

LM = random_llada(tokenizer=True, max_length=96, dtype=torch.float32)
CARD = FilterCard("neighbours", 8, "m", "0123", {"a": 1}, {"b": None}, "data", 5, 6, {"x": 1}, {"y": 0.5}, [{"z": 1.0}])
STRANGE: list[Any] = [None, True, -7, 10**400, float("nan"), "x", "\ud800", [], [[]], {}, {"a": [1]}]


def put(content: bytes) -> Callable[[Path], None]:
    return lambda file: file.write_bytes(content) and None


def cut(share: float) -> Callable[[Path], None]:
    def damage(file: Path) -> None:
        content = file.read_bytes()
        file.write_bytes(content[: int(len(content) * share)])

    return damage


def instead(make: Callable[[Path], Any]) -> Callable[[Path], None]:
    def damage(file: Path) -> None:
        file.unlink()
        make(file)

    return damage


# What may befall any file.
PLACES = {
    "a folder": instead(lambda file: file.mkdir()),
    "a pipe": instead(os.mkfifo),
    "a link to itself": instead(lambda file: file.symlink_to(file)),
    "a link to nothing": instead(lambda file: file.symlink_to(file.with_name("nothing"))),
}
CONTENTS = {
    "empty": put(b""), "{}": put(b"{}\n"), "[]": put(b"[]\n"), "null": put(b"null\n"), "a number": put(b"5\n"),
    "text": put(b'"x"\n'), "deep lists": put(b"[" * 100_000 + b"\n"), "deep objects": put(b'{"a":' * 100_000 + b"\n"),
    "nested": put(b"[" * 700 + b"]" * 700 + b"\n"), "binary": put(bytes(range(256)) * 20 + b"\n"),
    "zeros": put(b"\0" * 500),
    **{f"cut at {share}": cut(share) for share in (0.02, 0.3, 0.6, 0.97)},
}  # fmt: skip
DAMAGES = PLACES | CONTENTS


def each(damages: dict[str, Callable[[Path], None]]) -> Any:
    return pytest.mark.parametrize("damage", damages.values(), ids=damages.keys())


def refused(file: Path, act: Callable[[], object]) -> str:
    """One line that names the file."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # looked at below
        act()
    said = str(caught.value)
    assert file.name in said
    assert "\n" not in said
    return said


def says(error: Exception, *parts: str) -> None:
    """One line with one of these."""
    assert any(part in str(error) for part in parts), error
    assert "\n" not in str(error)


def refused_or_made(file: Path, act: Callable[[], object]) -> None:
    try:
        act()
    except (ValueError, OSError) as error:
        says(error, file.name)


def variants(content: Any, depth: int = 4) -> Iterator[Any]:
    """A JSON value with each of its parts missing, or of another kind."""
    if depth and isinstance(content, dict):
        for key, value in content.items():
            yield {name: other for name, other in content.items() if name != key}
            yield from (content | {key: other} for other in (*STRANGE, *variants(value, depth - 1)))
    elif depth and isinstance(content, list) and content:
        yield content[1:]
        yield from ([other, *content[1:]] for other in (*STRANGE, *variants(content[0], depth - 1)))


def answered(outcome: Outcome, file: Path) -> None:
    """A command did its work, or said in one line what is in its way."""
    if outcome.code != 0:
        assert (outcome.code, outcome.err.count("\n")) == (2, 1), outcome.err
        assert file.name in outcome.err


# Journals -------------------------------------------------------------------------------------------------------------

REQUESTS = [Query(str(number), [5 + number, 6, 7], seed=number) for number in range(3)]


def runner(journal: Path) -> Runner:
    options = {"gen_length": 4, "block_length": 4, "batch_size": 2}
    return Runner(Setting(LM, dllm.samplers.Vanilla(), NoCache(), options), Journal(journal, patience=0), 1, 2)


@pytest.fixture(scope="module")
def unfinished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that answered everything and was not finished."""
    folder = tmp_path_factory.mktemp("run")
    one = runner(folder / "journal.jsonl")
    one.answer(REQUESTS)
    one.score("a", [5, 6], [7], greedy=True)
    one.close()
    return folder


@pytest.fixture
def run_folder(unfinished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(unfinished, tmp_path / "run")


def reversed_steps(file: Path) -> None:
    trace = Trace.load(file)
    replace(trace, commit_step=trace.commit_step[:, ::-1]).save(file)


class TestJournals:
    @each(DAMAGES)
    def test_are_refused_or_go_on(self, damage: Callable[[Path], None], run_folder: Path) -> None:
        file = run_folder / "journal.jsonl"
        damage(file)
        before = file.read_bytes() if file.is_file() else b""
        whole = before[: before.rfind(b"\n") + 1]

        def go_on() -> None:
            one = runner(file)
            try:
                assert len(one.answer(REQUESTS)) == 3
            finally:
                one.close()

        refused_or_made(file, go_on)
        if file.is_file():
            assert file.read_bytes().startswith(whole)  # nothing that was noted is lost

    def test_a_damaged_line_is_named_and_nothing_changed(self, run_folder: Path) -> None:
        file = run_folder / "journal.jsonl"
        lines = file.read_bytes().splitlines(keepends=True)
        for number in range(len(lines)):
            for line in (b"x\n", b"\n", lines[number][:-9] + b"\n", b"[]\n", lines[number - 1]):
                content = b"".join([*lines[:number], line, *lines[number + 1 :]])
                file.write_bytes(content)
                place = f"line {number + 1} " if number or line != lines[-1] else "line "
                assert place in refused(file, lambda: runner(file))
                assert file.read_bytes() == content

    @pytest.mark.parametrize("kind", ["record", "baseline", "film", "likelihood"])
    def test_entries_of_another_shape_are_refused(self, kind: str, run_folder: Path) -> None:
        file = run_folder / "journal.jsonl"
        rows = [json.loads(line) for line in file.read_bytes().splitlines()]
        for each in rows:
            del each["hash"]  # as of earlier versions
        (number, row), *_ = [(number, row) for number, row in enumerate(rows) if row["kind"] == kind]
        for value in (*STRANGE, *variants(row["value"], 2)):
            rows[number] = row | {"value": value}
            file.write_text("".join(json.dumps(each) + "\n" for each in rows))
            one = None
            try:
                one = runner(file)
                one.answer(REQUESTS)
                one.score("a", [5, 6], [7], greedy=True)
            except ValueError as error:
                says(error, f"{file} is not a journal of a run, or damaged, in line {number + 1} (")
                if one is not None:
                    one.close()
                continue
            folder = RunFolder(run_folder.parent, "x", {})  # what is a number like any other
            folder.path = run_folder
            folder.finish(one, Graded({"right": {"0": 1.0}}, "right", {"0": {}}))
            shutil.rmtree(run_folder)
            run_folder.mkdir()

    def test_after_the_line_is_removed_that_part_is_done_again(self, run_folder: Path) -> None:
        file = run_folder / "journal.jsonl"
        lines = file.read_bytes().splitlines(keepends=True)
        for number in range(len(lines)):
            file.write_bytes(b"".join(lines[:number] + lines[number + 1 :]))
            one = runner(file)
            found = one.answer(REQUESTS)
            assert [record.id for record in found] == ["0", "1", "2"]
            assert [frames.id for frames in one.frames(found)] == ["0", "1"]
            one.close()

    @each(CONTENTS | {"gone": lambda file: file.unlink(), "of another run": reversed_steps})
    def test_steps_that_were_kept_are_made_again(self, damage: Callable[[Path], None], run_folder: Path) -> None:
        file, journal = run_folder / "frames" / "0.safetensors", run_folder / "journal.jsonl"
        expected, noted = Trace.load(file), journal.read_bytes()
        damage(file)
        one = runner(journal)
        found, _ = one.frames(one.answer(REQUESTS))
        one.close()
        assert np.array_equal(found.canvas, expected.frames[0].canvas)
        assert np.array_equal(Trace.load(file).commit_step, expected.commit_step)
        assert journal.read_bytes() == noted


# Folders of runs ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of `dllm evaluate`, with the model that it is of."""
    folder = tmp_path_factory.mktemp("evaluate")
    save_folder(LM, folder / "model")
    assert evaluate(folder).code == 0
    return folder


def evaluate(folder: Path) -> Outcome:
    own = ("task.limit=2", "gen_length=4", "block_length=4", "frames=1", "baselines=1", "batch_size=2")
    return command("evaluate", f"model={folder}/model", f"out={folder}/out", *own)


class TestRunFolders:
    @each(
        {
            name: DAMAGES[name]
            for name in ("a folder", "a pipe", "a link to itself", "empty", "null", "nested", "cut at 0.6")
        }
    )
    def test_damaged_results_are_refused_and_left(
        self, damage: Callable[[Path], None], finished: Path, tmp_path: Path
    ) -> None:
        folder = shutil.copytree(finished, tmp_path / "copy")
        shutil.move(folder, finished.with_name("there"))
        try:
            (file,) = finished.with_name("there").glob("out/*/results.json")
            one = RunFolder(file.parent.parent, "x", {})
            one.path = file.parent
            damage(file)
            assert "remove it" in refused(file, one.results)
            (file.parent / "journal.jsonl").write_text("")
            if file.is_file():
                assert one.results() is None  # all that they are made of is there
                assert (file.parent / "journal.jsonl").exists()
        finally:
            shutil.rmtree(finished.with_name("there"))

    def test_an_accuracy_that_is_not_the_score_of_its_name_is_refused(self, finished: Path, tmp_path: Path) -> None:
        (file,) = finished.glob("out/*/results.json")
        content = json.loads(file.read_text())
        content["metrics"]["accuracy"] = 2.5
        (tmp_path / "results.json").write_text(json.dumps(content))
        one = RunFolder(tmp_path, "x", {})
        one.path = tmp_path
        with pytest.raises(
            ValueError, match=r"is damaged \(metrics.accuracy is 2.5, and the score of that name 0.*remove it"
        ):
            one.results()

    def test_results_of_another_shape_are_refused_or_read(self, finished: Path, tmp_path: Path) -> None:
        from dllm.scripts.evaluate import _objective, _summary

        (file,) = finished.glob("out/*/results.json")
        content = json.loads(file.read_text())
        one = RunFolder(tmp_path, "x", {})
        one.path = tmp_path
        for changed in variants(content):
            (tmp_path / "results.json").write_text(json.dumps(changed))
            try:
                found = one.results()
            except ValueError as error:
                says(error, str(tmp_path / "results.json"), " is gone since results.json was written")
                continue
            assert found is not None
            assert _summary(found, tmp_path)
            _objective(found, ["n"])

    @pytest.mark.parametrize("change", [{"n": -3}, {"nfe": -1.5}, {"accuracy": 1.5, "accuracy_name": None}])
    def test_results_that_no_run_has_are_refused(self, change: dict[str, Any], finished: Path, tmp_path: Path) -> None:
        (file,) = finished.glob("out/*/results.json")
        copy = shutil.copytree(file.parent, tmp_path / "copy")
        content = json.loads(file.read_text())
        content["metrics"] |= change
        (copy / "results.json").write_text(json.dumps(content))
        one = RunFolder(tmp_path, "x", {})
        one.path = copy
        for read in (one.results, lambda: load(tmp_path)):
            with pytest.raises(ValueError, match=f"results.json is damaged .*{next(iter(change))}="):
                read()

    @pytest.mark.parametrize("name", ["manifest.json", "samples.parquet", "trace.safetensors", "error.json"])
    @pytest.mark.parametrize("damage", ["empty", "null", "nested", "cut at 0.6", "a folder", "a pipe"])
    def test_other_members_are_made_again_or_named(self, name: str, damage: str, run_folder: Path) -> None:
        file = run_folder / name
        file.write_text('{"format": "dllm-manifest", "sessions": [{}]}')
        DAMAGES[damage](file)
        folder = RunFolder(run_folder.parent, "x", {})
        folder.path = run_folder

        def go_on() -> None:
            assert folder.results() is None
            folder.begin(LM, {"a": 1})
            one = runner(folder.journal)
            one.answer(REQUESTS)
            folder.finish(one, Graded({"right": {"0": 1.0}}, "right", {"0": {}}))
            folder.clear_error()

        refused_or_made(file, go_on)
        if file.is_file() and name == "manifest.json":
            assert json.loads(file.read_text())["format"] == "dllm-manifest"

    @pytest.mark.parametrize("name", ["samples.parquet", "trace.safetensors"])
    def test_members_are_those_of_the_results(self, name: str, finished: Path) -> None:
        (file,) = finished.glob(f"out/*/{name}")
        content = file.read_bytes()
        for change, what in ((cut(0.9), "was changed"), (Path.unlink, "is gone")):
            change(file)
            outcome = evaluate(finished)
            assert (outcome.code, outcome.err.count("\n")) == (2, 1)
            assert (
                f"{file} {what} since results.json was written; remove {file.parent} to run that again" in outcome.err
            )
        file.write_bytes(content)
        assert evaluate(finished).code == 0

    def test_results_of_an_earlier_version_know_no_members(self, finished: Path) -> None:
        (file,) = finished.glob("out/*/results.json")
        content = file.read_bytes()
        file.write_text(json.dumps({name: value for name, value in json.loads(content).items() if name != "members"}))
        outcome = evaluate(finished)
        file.write_bytes(content)
        assert outcome.code == 0, outcome.err

    def test_the_command_says_so_in_one_line(self, finished: Path) -> None:
        (file,) = finished.glob("out/*/results.json")
        content = file.read_bytes()
        cut(0.5)(file)
        outcome = evaluate(finished)
        file.write_bytes(content)
        assert (outcome.code, outcome.err.count("\n")) == (2, 1)
        assert f"{file} is not JSON" in outcome.err
        assert outcome.err.endswith("; remove it to run that setting again\n")


class TestReports:
    @each(DAMAGES)
    @pytest.mark.parametrize("name", ["results.json", "error.json", "trace.safetensors"])
    def test_over_damaged_members(self, name: str, damage: Callable[[Path], None], tmp_path: Path) -> None:
        write_run(tmp_path / "a", "a")
        write_run(tmp_path / "b", "b", record=trace(samples=1))
        write_error(tmp_path / "c", "c", "why")
        file = tmp_path / ("c" if name == "error.json" else "b") / name
        damage(file)
        outcome = command("report", str(tmp_path), f"out={tmp_path}/out")
        answered(outcome, file)
        assert outcome.code == 0 or name != "trace.safetensors"

    def test_over_results_of_another_shape(self, tmp_path: Path) -> None:
        from dllm.reports import table

        file = tmp_path / "results.json"
        for changed in variants(results()):
            file.write_text(json.dumps(changed))
            try:
                sweep = load(tmp_path)
            except ValueError as error:
                says(error, "results.json", "not a share of right answers")
                continue
            for group in sweep.groups:
                assert table.cells(group, table.columns(group))
            assert table.raw(sweep)


# Traces, filters and their cards, records -----------------------------------------------------------------------------


class TestTraces:
    @each(DAMAGES)
    def test_are_refused(self, damage: Callable[[Path], None], tmp_path: Path) -> None:
        file = tmp_path / "trace.safetensors"
        trace(samples=1).save(file)
        damage(file)
        refused(file, lambda: Trace.load(file))

    def test_with_fields_of_another_shape_are_refused_or_drawn(self, tmp_path: Path) -> None:
        from dllm.reports.player import line

        file = tmp_path / "trace.safetensors"
        trace(samples=1).save(file)
        with safe_open(file, framework="numpy") as opened:
            metadata = opened.metadata()
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        changes = [
            metadata | {name: json.dumps(other)}
            for name, text in metadata.items() if name not in ("format", "version")
            for other in (*STRANGE, 10**12, *variants(json.loads(text), 2))
        ]  # fmt: skip
        changes += [
            metadata | {"ids": "[" * 5000},
            {},
            {name: text for name, text in metadata.items() if name != "ids"},
        ]
        altered = [(tensors, each) for each in changes]
        for name, values in tensors.items():
            altered += [({**tensors, name: other}, metadata) for other in (
                values[:-1], values.astype(np.float64), values[None], np.zeros(0, values.dtype), np.repeat(values, 2)
            )] + [({other: each for other, each in tensors.items() if other != name}, metadata)]  # fmt: skip
        for held, texts in altered:
            save_file({name: np.ascontiguousarray(values) for name, values in held.items()}, file, texts)
            try:
                found = Trace.load(file)
            except ValueError as error:
                says(error, str(file))
                continue
            assert all(line(found, 0, step) for step in range(len(found.frames[0].canvas) if found.frames else 0))

    @each(DAMAGES)
    def test_shown_are_refused_in_one_line(self, damage: Callable[[Path], None], tmp_path: Path) -> None:
        file = tmp_path / "trace.safetensors"
        trace(samples=1).save(file)
        damage(file)
        outcome = command("show", str(file), "plain=true")
        assert (outcome.code, outcome.err.count("\n")) == (2, 1)
        assert file.name in outcome.err


class TestFilters:
    @each(DAMAGES)
    @pytest.mark.parametrize("end", [".safetensors", ".json"])
    def test_are_refused(self, end: str, damage: Callable[[Path], None], tmp_path: Path) -> None:
        file = tmp_path / "f.safetensors"
        Filter(NeighbourFilter(), CARD, "f").save(file)
        damage(file.with_suffix(end))
        refused(file.with_suffix(end), lambda: load_filter(file))

    def test_with_cards_of_another_shape_are_refused(self, tmp_path: Path) -> None:
        file = tmp_path / "f.safetensors"
        Filter(NeighbourFilter(), CARD, "f").save(file)
        content = json.loads(file.with_suffix(".json").read_text())
        for name, other in ((name, other) for name in content for other in (10**400, True, [[]], -1.5)):
            file.with_suffix(".json").write_text(json.dumps(content | {name: other}))
            refused(file.with_suffix(".json"), lambda: load_filter(file))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("filter")
    save_folder(LM, folder / "model")
    assert train(folder).code == 0
    return folder


def train(folder: Path) -> Outcome:
    small = ("prompts=4", "batch_size=2", "gen_length=8", "block_length=8", "epochs=1")
    return command("train-filter", f"model={folder}/model", f"out={folder}/f.safetensors", *small)


class TestRecords:
    @each(CONTENTS)
    def test_of_a_damaged_batch_are_made_again(self, damage: Callable[[Path], None], trained: Path) -> None:
        part = trained / "f.records" / "0000002.safetensors"
        before = part.read_bytes()
        damage(part)
        assert application._part(part, range(2, 4), 8) is None
        part.write_bytes(before)
        assert application._part(part, range(2, 4), 8) is not None
        assert application._part(part, range(2), 8) is None

    def test_the_command_makes_them_again(self, trained: Path) -> None:
        part = trained / "f.records" / "0000002.safetensors"
        before = part.read_bytes()
        cut(0.5)(part)
        outcome = train(trained)
        assert outcome.code == 0, outcome.err
        assert part.read_bytes() == before

    @each({name: DAMAGES[name] for name in ("a folder", "a pipe", "empty", "{}", "null", "nested", "cut at 0.6")})
    def test_without_a_recipe_are_refused(self, damage: Callable[[Path], None], trained: Path) -> None:
        recipe = trained / "f.records" / "recipe.json"
        before = recipe.read_bytes()
        damage(recipe)
        outcome = train(trained)
        shutil.rmtree(recipe) if recipe.is_dir() else recipe.unlink()
        recipe.write_bytes(before)
        assert (outcome.code, outcome.out, outcome.err.count("\n")) == (2, "", 1), outcome.err
        assert "f.records" in outcome.err
        assert "remove that folder" in outcome.err


@each({name: DAMAGES[name] for name in ("empty", "null", "binary", "cut at 0.6")})
def test_the_state_of_a_training_that_is_damaged_is_named(damage: Callable[[Path], None], tmp_path: Path) -> None:
    (tmp_path / "train_tiny.yaml").write_text("matrix_lr: 1\n")
    torch.save({"model": []}, tmp_path / "state.pt")
    damage(tmp_path / "state.pt")
    small = ("model.hidden_size=16", "model.intermediate_size=32", "model.num_layers=1", "compile=false", "steps=1")
    outcome = command("train-tiny", f"out={tmp_path}", *small, "autocast=null", "eval_problems=0", "device=cpu")
    assert (outcome.code, outcome.err.count("\n")) == (2, 1), outcome.err
    assert f"{tmp_path}/state.pt is damaged" in outcome.err
