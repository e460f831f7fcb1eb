"""Tasks of the harness whose definition, code or data are at fault: one line that names the file and the reason."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from commands import Outcome, command

tasks = pytest.importorskip("lm_eval.tasks")

BASE = (
    "task: mine\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\ntest_split: test\n"
    "output_type: generate_until\ndoc_to_text: '{{{{question}}}}'\ndoc_to_target: '{{{{answer}}}}'\n"
)
QUICK = ("gen_length=4", "baselines=0", "frames=0", "task.limit=2")
ROW = json.dumps({"question": "1 + 1?", "answer": "<<1+1=2>>\n#### 2"}) + "\n"
Evaluate = Callable[[Mapping[str, str]], Outcome]


@pytest.fixture(autouse=True)
def only_gsm8k(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the harness's own tasks, which take it seconds to find, those of one folder."""

    class Manager(tasks.TaskManager):  # type: ignore[misc]  # of a library without types
        def __init__(self, include_path: Any = None, include_defaults: bool = True) -> None:
            own = f"{tasks.__path__[0]}/gsm8k"
            paths = [own] * include_defaults + [path for path in [include_path] if path]
            super().__init__(include_path=paths, include_defaults=False)

    monkeypatch.setattr(tasks, "TaskManager", Manager)


@pytest.fixture
def evaluate(tmp_path: Path) -> Evaluate:
    """Evaluate the task "mine" of a folder with some files."""
    (tmp_path / "rows.jsonl").write_text(ROW * 3)
    folder = tmp_path / "tasks"
    folder.mkdir()

    def run(files: Mapping[str, str]) -> Outcome:
        for name, text in files.items():
            (folder / name).write_text(text.replace("BASE", BASE.format(data=tmp_path / "rows.jsonl")))
        return command("evaluate", f"out={tmp_path / 'out'}", "task=mine", f"task.include_path={folder}", *QUICK)

    return run


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"mine.yaml": "- a\n- b\n"}, "tasks/mine.yaml is a list, not a mapping"),
        ({"mine.yaml": "include: no.yaml\nBASE"}, "tasks/no.yaml cannot be read ([Errno 2] No such file"),
        ({"mine.yaml": "include: b.yaml\nBASE", "b.yaml": "include: mine.yaml\n"}, "tasks/b.yaml includes itself"),
        ({"mine.yaml": "include: mine.yaml\nBASE"}, "tasks/mine.yaml includes itself"),
        ({"mine.yaml": "include: b.yaml\nBASE", "b.yaml": "- a\n"}, "tasks/b.yaml is a list"),
        ({"mine.yaml": "include: {a: b}\nBASE"}, "tasks/mine.yaml: include={'a': 'b'} is not text"),
        ({"mine.yaml": "BASE{a: [\n"}, "tasks/mine.yaml cannot be read (while"),
        ({"mine.yaml": ""}, "tasks/mine.yaml is a NoneType"),
        ({"mine.yaml": "BASE", "b.yaml": "task: 5\n"}, "tasks/b.yaml: the name of a task or group=5 is not text"),
        ({"g.yaml": "group: mine\ntask: [absent]\n"}, "tasks/g.yaml names the unknown task 'absent'"),
        ({"g.yaml": "group: mine\ntask: [a]\n", "a.yaml": "- a\n"}, "tasks/a.yaml is ignored: "),
        ({"g.yaml": "group: mine\ntask: [{include: no.yaml, task: x}]\n"}, "unexpected keyword argument 'include'"),
        ({"g.yaml": "group: mine\ntask: [mine]\n"}, "its members are cyclic"),
        ({"g.yaml": "group: mine\ntask: []\n"}, "task=mine has no requests"),
        ({"mine.yaml": "BASEprocess_results: !function utils.f\n"}, "Cannot import module 'utils'"),
        (
            {"mine.yaml": "BASEprocess_results: !function broken.f\n", "broken.py": "raise RuntimeError('x')\n"},
            "task=mine cannot be used: x (RuntimeError in ",
        ),
        ({"mine.yaml": "BASEoutput_type: absent\n"}, "Got invalid output_type 'absent'"),
        ({"mine.yaml": "BASEtest_split: absent\n"}, "task=mine cannot be used: absent (KeyError"),
        ({"mine.yaml": "BASEdoc_to_text: '{{question'\n"}, "unexpected end of template"),
        ({"mine.yaml": "BASEnum_fewshot: 5\nfewshot_split: test\n"}, "fewer examples than task.num_fewshot asks for"),
        ({"mine.yaml": "BASEgeneration_kwargs: {until: 5}\n"}, "until=5 is of the wrong type"),
        ({"mine.yaml": "BASEdataset_kwargs: {data_files: {test: /no.jsonl}}\n"}, "Unable to find '/no.jsonl'"),
    ],
)
def test_a_broken_definition_is_named_in_one_line(files: dict[str, str], said: str, evaluate: Evaluate) -> None:
    outcome = evaluate(files)
    assert outcome.code == 2
    assert said in outcome.err
    assert len(outcome.err.strip().splitlines()) == 1, outcome.err


def test_code_that_fails_while_grading_is_named(evaluate: Evaluate) -> None:
    code = "def f(doc, results):\n    return {}['score']\n"
    outcome = evaluate({"mine.yaml": "BASEprocess_results: !function late.f\n", "late.py": code})
    assert outcome.code == 2
    assert "task=mine cannot be used: score (KeyError in " in outcome.err.splitlines()[-1]
    assert "late.py, line 2)" in outcome.err


def test_a_fault_of_this_package_keeps_its_traceback(evaluate: Evaluate, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Any, *arguments: Any, **options: Any) -> None:
        return self.nothing

    monkeypatch.setattr("dllm.evaluation.runner.Runner.answer", fail)
    with pytest.raises(AttributeError, match="nothing"):
        evaluate({"mine.yaml": "BASE"})


def test_a_run_outside_of_a_repository_is_quiet(
    evaluate: Evaluate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    asked: list[Any] = []
    run = subprocess.check_output
    monkeypatch.setattr(subprocess, "check_output", lambda *a, **k: asked.append(a) or run(*a, **k))
    assert evaluate({"mine.yaml": "BASE"}).code == 0
    assert not any("git" in str(each) for each in asked)
    assert "fatal" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("train", "test", "said"),
    [
        (ROW * 4, ROW, "task.data.train='{}/train.jsonl' has 4 rows, and task.num_fewshot=5 needs 5"),
        ("", ROW, "task.data.train='{}/train.jsonl' has no lines"),
        (ROW * 5, "\n\n", "task.data.test='{}/test.jsonl' has no lines"),
        (ROW * 5, "[]", "task.data.test='{}/test.jsonl' has no rows"),
        (ROW * 5, "hello\n", "task.data.test='{}/test.jsonl' line 1 is not JSON"),
        (ROW * 5, ROW + '{"question', "task.data.test='{}/test.jsonl' line 2 is not JSON"),
        (ROW * 5, ROW + "[1]\n", "task.data.test='{}/test.jsonl' line 2 is not a JSON object"),
        (ROW * 5, ROW + '{"question": "?"}\n', "task.data.test='{}/test.jsonl' line 2 has no 'answer'"),
        (ROW * 5, '{"question": null, "answer": "2"}\n', "task.data.test='{}/test.jsonl' line 1 has no 'question'"),
        ('{"q": "?", "answer": "2"}\n' * 5, ROW, "task.data.train='{}/train.jsonl' line 1 has no 'question'"),
        (ROW * 5, "\x1f\x8b", "task.data.test='{}/test.jsonl' cannot be read"),
    ],
)
def test_data_that_a_task_cannot_read_is_named(train: str, test: str, said: str, tmp_path: Path) -> None:
    files = {"train": train, "test": test}
    for split, text in files.items():
        (tmp_path / f"{split}.jsonl").write_bytes(text.encode("latin-1"))
    data = ", ".join(f"{split}: {tmp_path / split}.jsonl" for split in files)
    outcome = command("evaluate", f"out={tmp_path / 'out'}", "task=gsm8k", f"task.data={{{data}}}", *QUICK)
    assert outcome.code == 2
    assert said.format(tmp_path) in outcome.err
    assert len(outcome.err.strip().splitlines()) == 1, outcome.err
    assert not (tmp_path / "out").exists()


def test_as_few_rows_as_there_are_examples_will_do(tmp_path: Path) -> None:
    (tmp_path / "train.json").write_text(json.dumps([json.loads(ROW)] * 2))
    (tmp_path / "test.jsonl").write_text("\ufeff" + ROW)
    data = f"{{train: {tmp_path / 'train.json'}, test: {tmp_path / 'test.jsonl'}}}"
    outcome = command(
        "evaluate", f"out={tmp_path / 'out'}", "task=gsm8k", f"task.data={data}", "task.num_fewshot=2", *QUICK
    )
    assert outcome.code == 0, outcome.err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "has no lines"),
        ("[]", "has no rows"),
        ("hello", "line 1 is not JSON"),
        ('{"task_id": "a"}', "has no text 'prompt'"),
    ],
)
def test_programs_that_cannot_be_read_are_named_before_a_model_is_loaded(
    text: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr("dllm.scripts.app.load_model", fail)
    (tmp_path / "rows.jsonl").write_text(text)
    data = f"task.data={tmp_path / 'rows.jsonl'}"
    outcome = command("evaluate", f"out={tmp_path / 'out'}", "task=humaneval", data, *QUICK)
    assert outcome.code == 2
    assert said in outcome.err
    assert len(outcome.err.strip().splitlines()) == 1, outcome.err
