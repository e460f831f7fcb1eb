"""What an interruption, another process or a person's own files may do to a run, and what is told of it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest

import dllm
from commands import Outcome, command
from dllm.cache import NoCache
from dllm.evaluation import claim
from dllm.evaluation.journal import Journal
from dllm.evaluation.jsonl import AnswerFile
from dllm.evaluation.metrics import speedup
from dllm.evaluation.records import Query
from dllm.evaluation.run_folder import RunFolder, sessions
from dllm.evaluation.runner import BASELINES, Runner, Setting
from dllm.evaluation.trace import Trace
from dllm.files import write_whole
from dllm.scripts import generate as generate_application
from dllm.tasks.base import Graded
from models import random_llada, save_folder

LM = random_llada(tokenizer=True, seed=3, max_length=96)
REQUESTS = [Query(str(number), [5 + number, 6, 7], seed=number) for number in range(5)]
GRADED = Graded({"right": {"0": 1.0}}, "right", {"0": {}})


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claim.Claim.__init__, "__defaults__", (0.0,))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "m"
    save_folder(LM, folder)
    return folder


class Killed(Exception):  # what ends a process
    """An interruption."""


class TestBaselines:
    """Two batches of two are timed beside baselines; a kill may come after any entry."""

    def runner(self, folder: Path, die_after: int | None = None, slow: float = 1.0) -> Runner:
        """A session whose machine is slower by a factor, and which ends with its n-th entry."""
        options = {"gen_length": 8, "batch_size": 2}
        journal = Journal(folder / "journal.jsonl", patience=0)
        add, left = journal.add, [die_after]

        def timed(kind: str, name: str, value: Any) -> None:
            add(kind, name, value | {"seconds": slow * value["nfe"]} if kind in ("record", "baseline") else value)
            if left[0] is not None:
                left[0] -= 1
                if left[0] == 0:
                    journal.close()
                    raise Killed

        journal.add = timed  # type: ignore[method-assign]
        return Runner(Setting(LM, dllm.samplers.Vanilla(), NoCache(), options), journal, baselines=2)

    def finish(self, runner: Runner) -> dict[str, Any]:
        records = runner.answer(REQUESTS)
        found = speedup(records, {name: runner.baseline(name) for name in BASELINES})
        runner.close()
        assert found is not None
        return found

    def test_are_timed_by_the_session_that_answers(self, tmp_path: Path) -> None:
        whole = self.finish(self.runner(tmp_path / "whole"))
        assert whole["samples"] == 4
        for count in (3, 5, 6, 9, 13):  # the session itself, then four baselines and two answers, twice
            folder = tmp_path / str(count)
            for die_after in (count, 2):
                try:
                    self.runner(folder, die_after, slow=1000.0).answer(REQUESTS)
                except Killed:
                    continue
            resumed = self.finish(self.runner(folder))
            assert resumed["samples"] == 4
            for name in BASELINES:
                for figure in ("nfe", "time", "forwards"):
                    assert resumed[name][figure] == pytest.approx(whole[name][figure]), (count, name)

    def test_of_answers_that_are_there_are_not_timed_again(self, tmp_path: Path) -> None:
        with pytest.raises(Killed):
            self.runner(tmp_path, die_after=7).answer(REQUESTS)  # one batch is answered
        runner = self.runner(tmp_path)
        runner.answer(REQUESTS)
        assert len(runner.journal.of("session")) == 2
        assert len(runner.journal.of("baseline")) == 8

    def test_the_line_of_a_run_says_how_many_sessions_it_took(self, model: Path, tmp_path: Path) -> None:
        arguments = ("evaluate", f"model={model}", f"out={tmp_path}", "task.limit=1", "gen_length=4", "baselines=0")
        assert "tokens/s  ->" in command(*arguments).out
        (manifest,) = tmp_path.glob("*/manifest.json")
        content = json.loads(manifest.read_text())
        manifest.write_text(json.dumps(content | {"sessions": content["sessions"] * 2}))
        assert "tokens/s over 2 sessions  ->" in command(*arguments).out


class TestSpellings:
    def test_of_one_setting_share_a_folder(self, model: Path, tmp_path: Path) -> None:
        arguments = ("evaluate", f"out={tmp_path}", "task.limit=1", "gen_length=4", "baselines=0", "sampler=threshold")
        spellings: tuple[tuple[str, ...], ...] = (
            (f"model={model}",),
            (f"model={model}", "sampler.threshold=0.9"),
            (f"model={model}/", "cfg_scale=0", "seed=0"),
            (f"model={model.parent}/./{model.name}", "sampler=tiny/threshold", "sampler.threshold=9e-1"),
        )
        for spelling in spellings:
            outcome = command(*arguments, *spelling)
            assert outcome.code == 0, outcome.err
        assert len(list(tmp_path.iterdir())) == 1

    def test_of_a_setting_that_could_not_be_made_are_forgiven_together(self, tmp_path: Path) -> None:
        for label in ("a", "b"):
            RunFolder(tmp_path, label, {"x": 1}).fail("why")
        assert len(list(tmp_path.iterdir())) == 1
        RunFolder(tmp_path, "c", {"x": 1}).clear_error()
        assert not list(tmp_path.iterdir())


def one_line(outcome: Outcome, *named: str) -> None:
    assert (outcome.code, outcome.err.count("\n")) == (2, 1), outcome.err
    for part in named:
        assert part in outcome.err


class TestRemovedOrReplaced:
    CHANGES: ClassVar[dict[str, tuple[Callable[[Path], Any], str]]] = {
        "removed": (Path.unlink, "was removed by another program during this run"),
        "replaced": (lambda path: write_whole(path, "mine"), "was changed by another program during this run"),
    }

    @pytest.fixture
    def ask(self, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Outcome]:
        monkeypatch.chdir(tmp_path)
        Path("q.jsonl").write_text('{"prompt": "Tom"}\n{"prompt": "Ann"}\n')
        own = ("gen_length=4", "show=none", f"model={model}")
        return lambda: command("generate", "input=q.jsonl", "output=a.jsonl", *own)

    @pytest.mark.parametrize("change", CHANGES)
    def test_a_manifest_of_answers(
        self, change: str, ask: Callable[[], Outcome], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        manifest, (act, told) = Path("a.jsonl.manifest.json"), self.CHANGES[change]
        verify = AnswerFile.verify

        def disturb(answers: AnswerFile) -> None:
            act(manifest)
            verify(answers)

        with monkeypatch.context() as patch:
            patch.setattr(generate_application.AnswerFile, "verify", disturb)
            one_line(ask(), "a.jsonl.manifest.json", told)
        assert len(Path("a.jsonl").read_text().splitlines()) == 2
        if change == "removed":
            assert ask().code == 0
            assert json.loads(manifest.read_text())["prompts"]
        else:
            assert manifest.read_text() == "mine"

    @pytest.mark.parametrize("change", CHANGES)
    @pytest.mark.parametrize("name", ["manifest.json", "journal.jsonl"])
    def test_a_file_of_a_run(self, change: str, name: str, tmp_path: Path) -> None:
        act, told = self.CHANGES[change]
        folder = RunFolder(tmp_path, "x", {})
        runner = self.begun(folder)
        runner.answer(REQUESTS[:2])
        act(folder.path / name)
        with pytest.raises(OSError, match=told):
            folder.finish(runner, GRADED)
        assert not (folder.path / "results.json").exists()
        runner.close()
        if name == "manifest.json":
            again = self.begun(folder)
            assert set(again.journal.of("record")) == {"0", "1"}
            again.answer(REQUESTS[:2])
            assert folder.finish(again, GRADED)["metrics"]["n"] == 1

    @pytest.mark.parametrize("late", [False, True])
    def test_the_whole_folder_of_a_run(self, late: bool, tmp_path: Path) -> None:
        folder = RunFolder(tmp_path, "x", {})
        runner = self.begun(folder)
        runner.answer(REQUESTS[:2])
        shutil.rmtree(folder.path)
        with pytest.raises(OSError, match=r"journal\.jsonl was removed by another program during this run; run the"):
            folder.finish(runner, GRADED) if late else runner.answer(REQUESTS[2:])
        runner.close()

    def begun(self, folder: RunFolder) -> Runner:
        runner = Runner(Setting(LM, dllm.samplers.Vanilla(), NoCache(), {"gen_length": 4}), Journal(folder.journal, 0))
        folder.begin(LM, {}, runner.answers)
        return runner

    def test_sessions_that_answered_nothing_are_not_told(self, tmp_path: Path) -> None:
        folder = RunFolder(tmp_path, "x", {})
        for count in (0, 1, 0, 2, 2, 0):
            runner = self.begun(folder)
            if count:
                runner.answer(REQUESTS[:count])
            runner.close()
        last = self.begun(folder)
        last.answer(REQUESTS[:2])
        folder.finish(last, GRADED)
        assert [each["answers"] for each in sessions(folder.path)] == [0, 1]


class TestWhatStandsInTheWay:
    @pytest.mark.parametrize("name", ["frames", "."])
    def test_a_file_where_a_folder_of_a_run_belongs_is_named(self, name: str, tmp_path: Path) -> None:
        folder = RunFolder(tmp_path, "x", {})
        place = folder.path / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text("mine")
        setting = Setting(LM, dllm.samplers.Vanilla(), NoCache(), {})
        with pytest.raises(ValueError, match=rf"{place} is not a folder, where one belongs; remove it"):
            Runner(setting, Journal(folder.journal, 0))
        assert place.read_text() == "mine"

    def test_a_damaged_trace_says_what_makes_it_again(self, tmp_path: Path) -> None:
        file = tmp_path / "trace.safetensors"
        file.write_text("x")
        with pytest.raises(ValueError, match="; make it again"):
            Trace.load(file)
        (tmp_path / "results.json").write_text("{}")
        with pytest.raises(ValueError, match=rf"; remove {tmp_path}/results\.json to run that setting again"):
            Trace.load(file)


class TestNeighbours:
    """Files that are kept beside an output."""

    WRITERS: ClassVar[dict[str, Callable[[Path], Any]]] = {
        "a.jsonl": lambda path: AnswerFile(path).__enter__(),
        "j.jsonl": lambda path: Journal(path, patience=0),
    }

    @pytest.mark.parametrize("content", ["mine", "", '{"process": 1}', "x" * 100_000])
    def test_a_file_with_the_name_of_a_lock_is_left(self, content: str, tmp_path: Path) -> None:
        for file, write in self.WRITERS.items():
            mine = tmp_path / f".{file}.lock"
            mine.write_text(content)
            before = mine.stat()
            if content:
                with pytest.raises(ValueError, match=r"cannot be locked, because .*\.lock is not a lock of dllm"):
                    write(tmp_path / file)
            else:
                held = write(tmp_path / file)
                with pytest.raises(ValueError, match="is being written by another process"):
                    write(tmp_path / file)
                held.close() if isinstance(held, Journal) else held.__exit__()
            assert (mine.read_text(), mine.stat().st_ino) == (content, before.st_ino)

    def test_a_lock_that_somebody_replaced_is_left(self, tmp_path: Path) -> None:
        with AnswerFile(tmp_path / "a.jsonl"):
            write_whole(tmp_path / ".a.jsonl.lock", "mine")
        assert (tmp_path / ".a.jsonl.lock").read_text() == "mine"

    @pytest.mark.parametrize("name", [".o.jsonl.lock", "o.jsonl.manifest.json", "link"])
    def test_a_name_that_belongs_beside_answers_is_refused(self, name: str, tmp_path: Path) -> None:
        (tmp_path / "link").symlink_to(".o.jsonl.lock")
        with pytest.raises(ValueError, match="has the name of a lock or a manifest of answers; give another file"):
            AnswerFile(tmp_path / name)

    def test_a_name_is_too_long_only_where_something_beside_it_is(self, tmp_path: Path) -> None:
        longest = 255 - len(".manifest.json")
        with AnswerFile(tmp_path / ("a" * longest)) as answers:
            answers.add({"id": 1, "text": "x", "tokens": 1, "nfe": 1, "guide_nfe": 0})
        for length in (longest + 1, 250, 255):
            for folder in (tmp_path, tmp_path / "new" / "folder"):
                with pytest.raises(ValueError, match=r"^output=.* is too long a name: .*; give a shorter one"):
                    AnswerFile(folder / ("a" * length))
        with pytest.raises(ValueError, match="is too long a name"):
            AnswerFile(tmp_path / ("ä" * 125))

    def test_whole_files_may_have_the_longest_name(self, tmp_path: Path) -> None:
        mine = tmp_path / f".a.{os.getpid()}"
        mine.write_text("mine")
        for name in ("a", "a" * 255):
            write_whole(tmp_path / name, "x")
        assert mine.read_text() == "mine"
        assert len(list(tmp_path.iterdir())) == 3
