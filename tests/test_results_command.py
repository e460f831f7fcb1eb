"""`dllm results`: cards, runs and page by one command, which resumes; the committed page is made from its data."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from commands import Outcome, command
from dllm.calibration import Calibration
from dllm.evaluation import claim
from dllm.evaluation.journal import Journal
from dllm.evaluation.run_folder import RunFolder
from dllm.files import BUNDLED
from dllm.reports import matrix_page
from dllm.reports.frontier import aup
from dllm.reports.matrix import Cell, Matrix
from dllm.scripts import own
from report_rig import write_error, write_run

DOCS = Path(__file__).parents[1] / "docs"
OPTIONS = "samplers=[vanilla,saber,pc,s2d2]", "caches=[none,dual]", "task.limit=2", "gen_length=32", "threads=1"


def run(out: Path, *options: str) -> Outcome:
    return command("results", *OPTIONS, "problems=10", "loss=0.3", "model.device=cpu", f"out={out}", *options)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    out = tmp_path_factory.mktemp("results") / "all"
    return out, run(out)


def rows(text: str) -> dict[str, list[str]]:
    """The lines of the table by policy."""
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| `")]
    return {cells[0].partition("`")[2].partition("`")[0]: cells for cells in reversed(lines)}


class TestCommand:
    def test_evaluates_every_policy_with_every_cache_at_its_certified_value(self, made: tuple[Path, Outcome]) -> None:
        out, outcome = made
        assert outcome.code == 0, outcome.err
        card = Calibration.read(out / "tiny-llada" / "calibration" / "saber" / "calibration.json")
        assert (card.n, card.loss, card.delta) == (10, 0.3, 0.05)
        assert card.value is not None
        results = [json.loads(file.read_text()) for file in (out / "tiny-llada" / "runs").glob("*/results.json")]
        assert len(results) == 6
        calibrated = [each["sampler"] for each in results if "at_least" in each["sampler"]]
        assert all(each["calibration"] for each in calibrated)
        text = out.with_name("all.md").read_text()
        shown = rows(text)
        assert set(shown) == {"vanilla", "saber", "pc"}
        assert shown["saber"][0].endswith(f"<br>at_least={card.value!r}, certified")
        assert re.fullmatch(r"\d+\.\d \[\d+\.\d, \d+\.\d\]<br>\d+\.\d · \d+\.\d\d", shown["pc"][1])
        assert "- (1) `s2d2` with every cache: not compatible with " in text
        assert "Not run" not in text
        assert "tokens/s" not in text
        assert f"[{card.value!r}](all/tiny-llada/calibration/saber/calibration.json)" in text

    def test_finished_work_is_read(self, made: tuple[Path, Outcome]) -> None:
        files = [file for file in made[0].rglob("*") if file.name in ("results.json", "samples.parquet")]
        before = {file: file.stat().st_mtime_ns for file in files}
        text = made[0].with_name("all.md").read_bytes()
        again = run(made[0])
        assert again.code == 0, again.err
        assert {file: file.stat().st_mtime_ns for file in files} == before
        assert made[0].with_name("all.md").read_bytes() == text
        assert "certified" not in again.out

    def test_finished_work_is_read_where_the_folder_was_moved_to(
        self, made: tuple[Path, Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        moved = shutil.copytree(made[0], tmp_path / "moved")
        monkeypatch.setattr(RunFolder, "finish", lambda *_: pytest.fail("a run was made again"))
        again = run(moved)
        assert again.code == 0, again.err
        first, second = (Matrix.read(out / "tiny-llada" / "runs.jsonl").cells for out in (made[0], moved))
        assert first == second

    @pytest.mark.parametrize(
        ("options", "told"),
        [
            (["loss=0.05"], "loss (0.3); this run has 0.05"),
            (["delta=0.001"], "delta (0.05); this run has 0.001"),
            (["problems=20"], "number of problems (10); this run has 20"),
            (["gen_length=24"], "gen_length (32); this run has 24"),
            (["gen_length=24", "calibrate=false"], "gen_length (32); this run has 24"),
            (["block_length=8"], "block_length (auto); this run has 8"),
            (["cfg_scale=1"], "cfg_scale (0.0); this run has 1.0"),
        ],
    )
    def test_a_card_of_another_setting_is_refused(
        self, options: list[str], told: str, made: tuple[Path, Outcome], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("dllm.load", lambda *args, **options: pytest.fail("a model was loaded"))
        page = made[0].with_name("all.md").read_bytes()
        refused = run(made[0], *options)
        assert (refused.code, refused.err.count("\n")) == (2, 1)
        card = made[0] / "tiny-llada" / "calibration" / "saber" / "calibration.json"
        assert f"out='{made[0]}' holds a card of another {told}: give another out, or remove {card}" in refused.err
        assert made[0].with_name("all.md").read_bytes() == page

    def test_a_card_of_another_file_is_refused(self, made: tuple[Path, Outcome], tmp_path: Path) -> None:
        content = json.loads((made[0] / "tiny-llada" / "calibration" / "saber" / "calibration.json").read_text())
        card = tmp_path / "cards" / "saber" / "calibration.json"
        card.parent.mkdir(parents=True)
        card.write_text(json.dumps(content | {"contents": {"f.safetensors": "12"}}))
        refused = run(tmp_path / "out", f"cards={tmp_path / 'cards'}")
        assert (refused.code, refused.err.count("\n")) == (2, 1)
        assert "holds a card of another f.safetensors (12); this run has another file: give another" in refused.err

    def test_any_card_that_exists_is_used_where_none_is_made(self, made: tuple[Path, Outcome]) -> None:
        assert run(made[0], "loss=0.05", "problems=null", "calibrate=false").code == 0

    def test_runs_that_their_card_does_not_certify_are_refused(
        self, made: tuple[Path, Outcome], tmp_path: Path
    ) -> None:
        card = made[0] / "tiny-llada" / "calibration" / "saber" / "calibration.json"
        content = json.loads(card.read_text())
        copy = tmp_path / "cards" / "saber" / "calibration.json"
        copy.parent.mkdir(parents=True)
        finished = ("run=false", f"runs={made[0] / 'tiny-llada' / 'runs'}", f"cards={tmp_path / 'cards'}")
        shutil.copy(card, copy)
        outcome = run(tmp_path / "out", *finished)
        assert outcome.code == 0, outcome.err
        copy.write_text(json.dumps(content | {"options": content["options"] | {"gen_length": 64}}))
        outcome = run(tmp_path / "out", *finished)
        assert outcome.code == 2
        told = (
            f"cards='{tmp_path / 'cards'}' holds a card of another gen_length (64); {made[0] / 'tiny-llada' / 'runs'}"
        )
        assert told in outcome.err

    @pytest.mark.parametrize("there", [True, False])
    def test_runs_of_another_card_are_not_certified_by_this_one(
        self, there: bool, made: tuple[Path, Outcome], tmp_path: Path
    ) -> None:
        card = made[0] / "tiny-llada" / "calibration" / "saber" / "calibration.json"
        copy = tmp_path / "cards" / "saber" / "calibration.json"
        copy.parent.mkdir(parents=True)
        if there:
            content = json.loads(card.read_text())
            tests = [test | ({"value": 77} if test["value"] == content["value"] else {}) for test in content["tests"]]
            copy.write_text(json.dumps(content | {"value": 77, "tests": tests}))
        runs = made[0] / "tiny-llada" / "runs"
        outcome = run(tmp_path / "out", f"cards={tmp_path / 'cards'}", "run=false", f"runs={runs}")
        assert (outcome.code, outcome.err.count("\n")) == (2, 1)
        told = f"{copy} is another card than that of {runs}" if there else f"has no {copy}, and {runs}"
        assert told in outcome.err
        assert "(calibration.json); put that card there, or give cards= or other runs=" in outcome.err

    @pytest.mark.parametrize(
        ("change", "told"),
        [
            ("task.limit=1", "task.limit (2)"),
            ("top_p=0.5", "top_p (None)"),
            ("model.dtype=bfloat16", "model.dtype (float32)"),
        ],
    )
    def test_data_of_another_setting_are_not_replaced(
        self, change: str, told: str, made: tuple[Path, Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        out = shutil.copytree(made[0], tmp_path / "all", ignore=shutil.ignore_patterns("runs", "calibration"))
        monkeypatch.setattr("dllm.scripts.evaluate.run", lambda *_: pytest.fail("a run was started"))
        outcome = run(out, change)
        data = out / "tiny-llada" / "runs.jsonl"
        assert (outcome.code, outcome.err.count("\n")) == (2, 1)
        assert f"{data} has the results of tiny-llada with another value of {told}; give another out" in outcome.err
        head, *rows = data.read_text().splitlines()
        earlier = json.loads(head)
        del earlier["decoding"]
        for setting in earlier["settings"].values():
            del setting["given"]
        data.write_text("\n".join([json.dumps(earlier), *rows, ""]))
        shutil.copytree(made[0] / "tiny-llada" / "calibration", data.with_name("calibration"))
        assert command("results", f"out={out}", "run=false").code == 0

    @pytest.mark.parametrize(
        ("field", "own", "other", "told"),
        [
            ("score", "final answer", "strict", "task.metric (strict)"),
            ("dtype", "float32", "bfloat16", "model.dtype (bfloat16)"),
        ],
    )
    def test_a_card_of_another_score_or_precision_is_refused(
        self, field: str, own: str, other: str, told: str, made: tuple[Path, Outcome], tmp_path: Path
    ) -> None:
        card = made[0] / "tiny-llada" / "calibration" / "saber" / "calibration.json"
        content = json.loads(card.read_text())
        assert content[field] == own
        copy = tmp_path / "cards" / "saber" / "calibration.json"
        copy.parent.mkdir(parents=True)
        copy.write_text(json.dumps(content | {field: other}))
        runs = f"runs={made[0] / 'tiny-llada' / 'runs'}"
        outcome = run(tmp_path / "out", f"cards={tmp_path / 'cards'}", "run=false", runs)
        assert (outcome.code, outcome.err.count("\n")) == (2, 1)
        assert f"holds a card of another {told}" in outcome.err

    def test_a_card_of_another_precision_is_refused_before_a_run(
        self, made: tuple[Path, Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("dllm.scripts.evaluate.run", lambda *_: pytest.fail("a run was started"))
        cards = made[0] / "tiny-llada" / "calibration"
        outcome = run(tmp_path / "out", f"cards={cards}", "model.dtype=bfloat16")
        assert (outcome.code, outcome.err.count("\n")) == (2, 1)
        assert "holds a card of another model.dtype (float32); this run has bfloat16: give another cards" in outcome.err

    def test_the_page_is_made_from_the_data_alone(self, made: tuple[Path, Outcome], tmp_path: Path) -> None:
        out = tmp_path / "all"
        shutil.copytree(made[0], out, ignore=shutil.ignore_patterns("runs", "*.svg", "*-*-????????"))
        assert command("results", "run=false", f"out={out}").code == 0
        text, expected = (file.with_name("all.md").read_text() for file in (out, made[0]))
        assert text == expected.replace(f"out={made[0]} run=false", f"out={out} run=false")
        assert command("results", "run=false", f"out={out}", "speed=true").code == 0
        assert "tokens/s" in out.with_name("all.md").read_text()

    def test_a_card_of_another_value_than_the_runs_is_refused_and_so_is_none(
        self, made: tuple[Path, Outcome], tmp_path: Path
    ) -> None:
        out = tmp_path / "all"
        shutil.copytree(made[0], out, ignore=shutil.ignore_patterns("runs", "*.svg", "*-*-????????"))
        file = out / "tiny-llada" / "calibration" / "saber" / "calibration.json"
        card = json.loads(file.read_text())
        tests = [test | ({"value": 77} if test["value"] == card["value"] else {}) for test in card["tests"]]
        file.write_text(json.dumps(card | {"value": 77, "tests": tests}))
        result = command("results", "run=false", f"out={out}")
        assert (result.code, result.err.count("\n")) == (2, 1)
        assert f"{file} certifies at_least=77, and the runs were certified at at_least={card['value']}" in result.err
        file.unlink()
        result = command("results", "run=false", f"out={out}")
        assert (result.code, result.err.count("\n")) == (2, 1)
        assert f"{file} is missing, and the runs were certified by it; put it back" in result.err

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["samplers=[nope]"], "samplers has the unknown sampler 'nope'; expected some of adablock, "),
            (["caches=[]"], "caches=[] are none, or not distinct"),
            (["caches=[none,none]"], "caches=['none', 'none'] are none, or not distinct"),
            (["loss=1"], "loss=1 is out of range"),
            (["problems=0"], "problems=0 is out of range"),
            (["run=false"], "holds no results (MODEL/runs.jsonl); give model=, with run=true"),
            (["model=/no/such"], "model='/no/such' is not a folder, hub id or known model"),
            (["run=false", "runs=/no/such"], "folder='/no/such' is not a folder"),
        ],
    )
    def test_bad_options_end_in_one_line(self, options: list[str], message: str, tmp_path: Path) -> None:
        result = command("results", *options, f"out={tmp_path / 'x'}")
        assert (result.code, result.err.count("\n")) == (2, 1)
        assert message in result.err

    def test_a_task_without_problems_to_calibrate_with_is_told(self, tmp_path: Path) -> None:
        task = 'task.data={test: "x.jsonl", train: "x.jsonl"}'
        result = command("results", "task=gsm8k", task, "samplers=[threshold]", f"out={tmp_path / 'x'}")
        assert result.code == 2
        assert "there is no task=calibration/gsm8k to calibrate with; use calibrate=false" in result.err


class TestFinishedRuns:
    def write(self, folder: Path) -> Path:
        runs = folder / "runs"
        write_run(runs / "0", "vanilla", 0.98, 56.0)
        write_run(runs / "1", "tiny/threshold + dual", 0.9, 12.0)
        write_run(runs / "2", "oracle", 1.0, 3.0)
        write_error(runs / "3", "s2d2 + dual", "it has <no> order")
        return runs

    def test_become_data_without_a_model(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("dllm.load", lambda *args, **options: pytest.fail("a model was loaded"))
        runs = self.write(tmp_path)
        policies = "samplers=[vanilla,tiny/threshold,s2d2,oracle]"
        result = command(
            "results", "run=false", policies, "caches=[none,dual]", f"runs={runs}", f"out={tmp_path / 'out'}"
        )
        assert result.code == 0, result.err
        text = (tmp_path / "out.md").read_text()
        shown = rows(text)
        assert shown["vanilla"][1:3] == ["98.0 [93.0, 99.4]<br>56.0 · 0.71", "*absent*"]
        assert shown["tiny/threshold"][0] == "`tiny/threshold`<br>threshold=0.999, tuned"
        assert shown["oracle"][0] == "`oracle` (reference)"
        assert "- (1) `s2d2` with `dual`: it has \\<no\\> order" in text
        assert "Not run: `vanilla`, `oracle` with `dual`; `tiny/threshold`, `s2d2` with `none`." in text
        assert "| `tiny/threshold` | threshold | not calibrated |" in text
        again = command("results", "run=false", f"out={tmp_path / 'out'}")
        assert (again.code, again.err) == (0, "")  # a page without cards is one of this command, too

    def test_links_lead_to_names_with_spaces(self, tmp_path: Path) -> None:
        runs = self.write(tmp_path)
        assert command("results", "run=false", f"++runs={runs}", f"++out={tmp_path / 'my out'}").code == 0
        text = (tmp_path / "my out.md").read_text()
        assert "](my%20out/tiny-llada/runs.jsonl)" in text
        assert f"Made by `dllm results 'out={tmp_path}/my out' run=false` from" in text
        assert re.search(r"Runs: `dllm results model=tiny-llada run=false '\+\+runs=\S+ 'out=.*/my out'`", text)

    def test_two_of_one_combination_are_refused(self, tmp_path: Path) -> None:
        runs = self.write(tmp_path)
        write_run(runs / "4", "vanilla", 0.97, 56.0)
        result = command("results", "run=false", f"runs={runs}", f"out={tmp_path / 'out'}")
        assert result.code == 2
        assert "are both of vanilla + none; keep one of them" in result.err

    def test_of_several_tasks_are_refused(self, tmp_path: Path) -> None:
        runs = self.write(tmp_path)
        write_run(runs / "4", "pc", 0.97, 56.0, task="gsm8k")
        result = command("results", "run=false", f"runs={runs}", f"out={tmp_path / 'out'}")
        assert result.code == 2
        assert "has another task (" in result.err

    @pytest.mark.parametrize(
        ("label", "field", "changed", "told"),
        [
            ("pc", "options", {"gen_length": 32}, "another gen_length (32) than others (64)"),
            ("pc", "options", {"temperature": 1.5}, "another temperature (1.5) than others (None)"),
            ("vanilla + dual", "sampler", {"steps": 20}, "another steps (20) than others (None)"),
            ("vanilla + dual", "cache", {"refresh_above": 0.5}, "another refresh_above (None) than others (0.5)"),
            ("pc", "options", {"batch_size": 1, "seed": 5, "threads": 2}, None),
            ("tiny/daedal", "options", {"gen_length": "auto"}, None),
        ],
    )
    def test_of_other_options_are_refused(
        self, label: str, field: str, changed: dict[str, Any], told: str | None, tmp_path: Path
    ) -> None:
        usual: dict[str, dict[str, Any]] = {
            "options": {"gen_length": 64, "temperature": None, "batch_size": 8, "seed": 0, "threads": 1},
            "sampler": {"name": "vanilla", "steps": None},
            "cache": {"name": "dual", "refresh_above": None},
        }
        for place, name in enumerate(("vanilla", "tiny/threshold + dual", label)):
            folder = write_run(tmp_path / "runs" / str(place), name, 0.9, 12.0)
            own = {each: values | (changed if (place, each) == (2, field) else {}) for each, values in usual.items()}
            content = json.loads((folder / "results.json").read_text())
            (folder / "results.json").write_text(json.dumps(content | own))
        result = command("results", "run=false", f"runs={tmp_path / 'runs'}", f"out={tmp_path / 'out'}")
        if told is None:
            assert result.code == 0, result.err
        else:
            assert (result.code, result.err.count("\n")) == (2, 1)
            assert f" has {told}; give another runs" in result.err

    def test_of_another_model_are_refused(self, tmp_path: Path) -> None:
        runs = self.write(tmp_path)
        result = command("results", "run=false", "model=tiny-dream", f"runs={runs}", f"out={tmp_path / 'out'}")
        assert result.code == 2
        assert f"runs={str(runs)!r} has runs of tiny-llada; use model=tiny-llada" in result.err

    @pytest.mark.parametrize(
        ("name", "options", "shown"),
        [
            ("tiny/threshold", {"threshold": 0.5}, "threshold=0.5, given"),
            ("tiny/threshold", {"threshold": 0.999}, "threshold=0.999, tuned"),
            (
                "anchored",
                {"base": {"_target_": "dllm.samplers.Threshold", "threshold": 0.5}},
                "base.threshold=0.5, given",
            ),
        ],
    )
    def test_the_value_is_that_of_the_runs(
        self, name: str, options: dict[str, Any], shown: str, tmp_path: Path
    ) -> None:
        folder = write_run(tmp_path / "runs" / "0", name, 0.9, 12.0)
        content = json.loads((folder / "results.json").read_text())
        content["sampler"] |= options
        (folder / "results.json").write_text(json.dumps(content))
        result = command(
            "results", "run=false", f"samplers=[{name}]", f"runs={folder.parent}", f"out={tmp_path / 'out'}"
        )
        assert result.code == 0, result.err
        assert rows((tmp_path / "out.md").read_text())[name][0] == f"`{name}`<br>{shown}"

    def test_of_another_precision_are_refused(self, tmp_path: Path) -> None:
        for name, dtype in (("vanilla", "float32"), ("pc", "bfloat16")):
            folder = write_run(tmp_path / "runs" / name, name, 0.9, 12.0)
            manifest = {"format": "dllm-manifest", "sessions": [{"dtype": dtype}]}
            (folder / "manifest.json").write_text(json.dumps(manifest))
        result = command("results", "run=false", f"runs={tmp_path / 'runs'}", f"out={tmp_path / 'out'}")
        assert (result.code, result.err.count("\n")) == (2, 1)
        assert " has another model.dtype (" in result.err

    def test_texts_may_hold_any_separator_of_lines(self, tmp_path: Path) -> None:
        runs, message = tmp_path / "runs", "one\u2028two\u2029three\x85four\x0cfive"
        write_run(runs / "0", "vanilla", 0.98, 56.0)
        write_error(runs / "1", "s2d2", message)
        where = f"out={tmp_path / 'out'}"
        for options in (("samplers=[vanilla,s2d2]", f"runs={runs}", where), (where,)):
            result = command("results", "run=false", *options)
            assert result.code == 0, result.err
        assert [each.refused for each in Matrix.read(tmp_path / "out" / "tiny-llada" / "runs.jsonl").refusals] == [
            message
        ]

    def test_damaged_data_are_told(self, tmp_path: Path) -> None:
        file = tmp_path / "out" / "m" / "runs.jsonl"
        file.parent.mkdir(parents=True)
        for text in ("", "{}", '{"format": "dllm-matrix", "version": 1}', "[", "\x00"):
            file.write_text(text)
            result = command("results", "run=false", f"out={tmp_path / 'out'}")
            assert (result.code, result.err.count("\n")) == (2, 1)
            assert f"{file} cannot be read (" in result.err


MUTATED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "packages of another type": ({"places": [{"packages": 5}]}, {}),
    "a name that is HTML": ({"samplers": ["</td><script>"]}, {}),
    "a name of two lines": ({"caches": ["x\n\n# heading"]}, {}),
    "a knob that is HTML": ({"settings": {"vanilla": {"knob": "<b>", "value": 1, "certified": False}}}, {}),
    "another sampler": ({}, {"sampler": "`x`"}),
    "a share above its interval": ({}, {"quality": 7.5, "interval": [9.0, -3.0]}),
    "no share": ({}, {"quality": float("nan"), "interval": None}),
    "an interval the wrong way round": ({}, {"interval": [0.9, 0.1]}),
    "an interval elsewhere": ({}, {"quality": 0.5, "interval": [0.6, 0.9]}),
    "no number of forwards": ({}, {"nfe": float("nan")}),
    "infinite speed": ({}, {"tokens_per_second": float("inf")}),
    "fewer than no problems": ({}, {"n": -5}),
    "no such place": ({}, {"place": 9}),
    "no date": ({}, {"started": "| x |"}),
}


@pytest.mark.parametrize("kind", MUTATED)
def test_data_that_no_run_gives_are_told(kind: str, made: tuple[Path, Outcome], tmp_path: Path) -> None:
    head, row, *_ = (made[0] / "tiny-llada" / "runs.jsonl").read_text().splitlines()
    file = tmp_path / "out" / "m" / "runs.jsonl"
    file.parent.mkdir(parents=True)
    more_head, more_row = MUTATED[kind]
    content = json.loads(head)
    if "places" in more_head:
        content["places"] = [content["places"][0] | more_head["places"][0]]
        more_head = {}
    file.write_text(f"{json.dumps(content | more_head)}\n{json.dumps(json.loads(row) | more_row)}\n")
    result = command("results", "run=false", f"out={tmp_path / 'out'}")
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert f"{file} cannot be read (" in result.err


@pytest.mark.parametrize("what", ["damaged", "locked", "a card that is locked"])
def test_what_is_locked_or_damaged_is_not_refused(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claim.Claim.__init__, "__defaults__", (0.0,))
    kept, knob = ("samplers=[vanilla]", "caches=[none]", "task.limit=1", "gen_length=8"), "samplers=[vanilla,saber]"
    out = tmp_path / "out"
    asked = ("results", *kept, f"out={out}", "model.device=cpu")
    assert command(*asked).code == 0
    data, page = out / "tiny-llada" / "runs.jsonl", tmp_path / "out.md"
    before = data.read_bytes(), page.read_bytes()
    (folder,) = (out / "tiny-llada" / "runs").iterdir()
    if what == "damaged":
        (folder / "results.json").write_text("{")
        found = command(*asked)
        assert "results.json is not JSON" in found.err
    elif what == "locked":
        (folder / "results.json").unlink()
        with closing(Journal(folder / "journal.jsonl", run="x")):
            found = command(*asked)
        assert "is being written by process" in found.err
    else:
        with claim.claimed(out / "tiny-llada" / "calibration" / "saber" / "calibration.json", "", ""):
            found = command(*asked, knob, "problems=2", "loss=0.5")
        assert "is being written by process" in found.err
    assert found.code == 2
    assert (data.read_bytes(), page.read_bytes()) == before


def test_a_choice_of_ones_own_may_have_any_name_that_a_page_can_show(tmp_path: Path) -> None:
    (tmp_path / "conf" / "sampler").mkdir(parents=True)
    for name in ("my policy 2", "a`b"):
        (tmp_path / "conf" / "sampler" / f"{name}.yaml").write_text("_target_: dllm.samplers.Saber\n")
    options = ("caches=[none]", "task.limit=1", "gen_length=8", "calibrate=false", f"out={tmp_path / 'out'}")
    result = command("results", f"--config-dir={tmp_path / 'conf'}", "samplers=['my policy 2']", *options)
    assert result.code == 0, result.err
    assert "| `my policy 2` |" in (tmp_path / "out.md").read_text()
    result = command("results", f"--config-dir={tmp_path / 'conf'}", "samplers=['a`b']", *options)
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert "samplers has 'a`b', which a page cannot show; rename its YAML" in result.err


@pytest.mark.parametrize(("more", "lost"), [("samplers=[vanilla,pc]", "saber"), ("caches=[none]", "dual")])
def test_results_that_are_left_out_are_not_lost(more: str, lost: str, made: tuple[Path, Outcome]) -> None:
    file = made[0] / "tiny-llada" / "runs.jsonl"
    before = file.read_bytes()
    result = run(made[0], "calibrate=false", more)
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert f" leaves out {lost}, of which {file} has results, which would be lost; add what is left out" in result.err
    assert file.read_bytes() == before


@pytest.mark.parametrize("text", ["dllm results 'x=a\n<b>\nc'", "dllm results 'model=`a` ``b`'"])
def test_a_command_is_one_line_of_code_whatever_is_in_it(text: str, tmp_path: Path) -> None:
    if not (DOCS / "results").is_dir():
        pytest.skip("an installed copy without docs")
    shutil.copytree(DOCS / "results" / "tiny-dream", tmp_path / "results" / "m")
    file = tmp_path / "results" / "m" / "runs.jsonl"
    head, _, rest = file.read_text().partition("\n")
    file.write_text(json.dumps(json.loads(head) | {"command": text}) + "\n" + rest)
    page = tmp_path / "results.md"
    page.write_text(matrix_page.page(tmp_path / "results", text, False, False))
    assert "\n<b>" not in page.read_text()
    own.check("out", "x", {page: own.RESULTS})


class TestOtherData:
    OPTIONS = ("samplers=[vanilla,threshold]", "caches=[none]", "task.limit=2", "gen_length=8", "model.device=cpu")

    def test_of_a_model_of_the_same_name_are_kept(self, tmp_path: Path) -> None:
        out = f"out={tmp_path / 'all'}"
        for name in ("tiny-llada", "tiny-dream"):
            shutil.copytree(BUNDLED / name, tmp_path / name / "final")
        first, other = (f"model={tmp_path / name / 'final'}" for name in ("tiny-llada", "tiny-dream"))
        assert command("results", first, out, "calibrate=false", *self.OPTIONS).code == 0
        data = tmp_path / "all" / "final" / "runs.jsonl"
        before = data.read_bytes()
        refused = command("results", other, out, "calibrate=false", *self.OPTIONS)
        assert (refused.code, refused.err.count("\n")) == (2, 1)
        assert f"{data} has the results of final with another value of weights" in refused.err
        assert data.read_bytes() == before

        # A card that is made after runs certifies nothing about them.
        card = tmp_path / "all" / "final" / "calibration" / "threshold"
        made = command(
            "calibrate", first, "values=[0.5]", "task.limit=12", "loss=0.9", "gen_length=8", f"out={card}"
        )  # fmt: skip
        assert made.code == 0, made.err
        again = command(
            "results", first, out, "run=false", f"runs={tmp_path / 'all' / 'final' / 'runs'}", *self.OPTIONS
        )
        assert again.code == 0, again.err
        text = (tmp_path / "all.md").read_text()
        assert "threshold=0.9, default" in text
        assert "certified |" not in text


def test_aup_is_over_the_caches_of_a_policy_and_over_the_policies_of_a_cache() -> None:
    def cell(sampler: str, cache: str, quality: float, tpf: float) -> Cell:
        return Cell(sampler, cache, "committing", 100, quality, None, 10.0, None, tpf, 1.0, "", 0)

    cells = (cell("a", "x", 0.9, 2.0), cell("a", "y", 0.88, 3.0), cell("b", "x", 0.95, 1.0), cell("oracle", "x", 1, 9))
    matrix = Matrix(None, cells, ())  # type: ignore[arg-type]  # the header does not matter
    assert matrix.aup(sampler="a") == aup([(2.0, 90.0), (3.0, 88.0)], 95.0)
    assert matrix.aup(cache="x") == aup([(2.0, 90.0), (1.0, 95.0)], 95.0)
    assert matrix.aup(sampler="oracle") is None
    assert matrix.aup() == aup([(1.0, 95.0), (2.0, 90.0), (3.0, 88.0)], 95.0)


@pytest.mark.parametrize("name", ["tiny-llada", "tiny-dream", "tiny-block"])
def test_the_documented_command_takes_the_committed_cards(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not (DOCS / "results").is_dir():
        pytest.skip("an installed copy without docs")
    shutil.copytree(DOCS / "results", tmp_path / "docs" / "results")
    monkeypatch.chdir(tmp_path)

    def load(*args: object, **options: object) -> None:
        raise ValueError("the model is loaded")

    monkeypatch.setattr("dllm.load", load)
    options = shlex.split(Matrix.read(DOCS / "results" / name / "runs.jsonl").header.command)
    assert "the model is loaded" in command(*options[1:]).err


def test_the_committed_page_is_made_from_the_committed_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not (DOCS / "results.md").is_file():
        pytest.skip("an installed copy without docs")
    shutil.copytree(DOCS / "results", tmp_path / "docs" / "results")
    (tmp_path / "docs" / "performance.md").touch()
    monkeypatch.chdir(tmp_path)
    result = command("results", "out=docs/results", "run=false")
    assert result.code == 0, result.err
    assert (tmp_path / "docs" / "results.md").read_bytes() == (DOCS / "results.md").read_bytes()
    assert command("results", "out=docs/results", "run=false").code == 0  # it knows its own page, without cards, too
    sizes = [file.stat().st_size for file in (DOCS / "results").rglob("*") if file.is_file()]
    assert sum(sizes) < 1_500_000
