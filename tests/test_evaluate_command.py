"""`dllm evaluate`: what a run leaves behind, that nothing is done twice, sweeps, and what is refused."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pyarrow import parquet

import dllm
from commands import Outcome, command, in_a_process, start
from dllm.cache import NoCache
from dllm.evaluation import claim, run_folder
from dllm.evaluation.journal import Journal
from dllm.evaluation.likelihood import Estimate
from dllm.evaluation.metrics import wilson
from dllm.evaluation.run_folder import RunFolder
from dllm.evaluation.runner import Runner, Setting
from dllm.evaluation.trace import Trace
from dllm.files import BUNDLED, write_json
from dllm.resolve import text
from dllm.samplers import Vanilla
from dllm.scripts import evaluate as application
from dllm.tasks import word_problems
from dllm.tasks.base import Graded
from models import random_llada, save_folder
from policies import over_masks

FAST = ("task.limit=8", "batch_size=4", "baselines=0", "frames=2", "sampler=tiny/localleap")
TIMES = {
    "members",
    "tokens_per_second",
    "seconds",
    "latency_p50",
    "latency_p95",
    "guide_seconds",
    "peak_memory",
    "time",
}


def run(out: Path, *arguments: str) -> Outcome:
    return command("evaluate", f"out={out}", *FAST, *arguments)


def folders(out: Path) -> list[Path]:
    return sorted(file.parent for file in out.glob("*/results.json"))


def results(out: Path) -> list[dict[str, Any]]:
    return [json.loads((folder / "results.json").read_text()) for folder in folders(out)]


def timeless(value: Any) -> Any:
    """Everything but times and memory."""
    if isinstance(value, list):
        return [timeless(each) for each in value]
    if isinstance(value, dict):
        return {key: timeless(each) for key, each in value.items() if key not in TIMES}
    return value


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one run."""
    out = tmp_path_factory.mktemp("finished")
    outcome = run(out, "cache=freecache", "baselines=1")
    assert outcome.code == 0, outcome.err
    (folder,) = folders(out)
    return folder


def test_runs_of_other_formats_have_folders_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()  # which makes ./a and a the same path
    schemas = [{}, {"const": None}, {"const": "./a"}, {"const": "a"}]
    schemas += [{"properties": dict.fromkeys(order, True)} for order in ("ab", "ba")]
    forms = [{"response_format": {"type": "json_schema", "schema": schema}} for schema in schemas]
    paths = [RunFolder(tmp_path, "x", application.normal(form)).path for form in forms]
    assert len(set(paths)) == len(schemas)
    assert paths == [RunFolder(tmp_path, "x", application.normal(json.loads(json.dumps(form)))).path for form in forms]


class TestFiles:
    def test_a_run_leaves_results_samples_trace_and_manifest(self, finished: Path) -> None:
        members = {path.name for path in finished.iterdir()}
        assert members == {"results.json", "samples.parquet", "trace.safetensors", "manifest.json"}

    def test_samples_are_what_generate_answers(self, finished: Path) -> None:
        rows = parquet.read_table(finished / "samples.parquet").to_pylist()
        problems = word_problems.problems(8, 1_000_001)
        lm = dllm.load("tiny-llada")
        asked = [problem.question for problem in problems]
        found = dllm.generate(lm, asked, "tiny/localleap", "freecache", gen_length=64, seed=0)
        assert {row["question"]: row["text"] for row in rows} == dict(zip(asked, found.texts, strict=True))
        assert sum(row["nfe"] for row in rows) == int(found.nfe.sum())
        grades = {problem.question: word_problems.grade(str(text), problem) for problem, text in
                  zip(problems, found.texts, strict=True)}  # fmt: skip
        assert all(row["final answer"] == grades[row["question"]].final for row in rows)
        assert all(row["whole chain"] == grades[row["question"]].chain for row in rows)

    def test_results_follow_from_the_samples(self, finished: Path) -> None:
        (found,) = results(finished.parent)
        rows = parquet.read_table(finished / "samples.parquet").to_pylist()
        metrics = found["metrics"]
        right = sum(row["final answer"] for row in rows)
        assert metrics["n"] == 8
        assert metrics["accuracy"] == right / 8
        assert metrics["accuracy_interval"] == list(wilson(int(right), 8))
        assert metrics["tpf"] == sum(row["tokens"] for row in rows) / sum(row["nfe"] for row in rows)
        assert metrics["tokens_per_second"] == pytest.approx(metrics["tokens"] / sum(row["seconds"] for row in rows))
        assert metrics["refreshes"] > 0
        assert found["label"] == "tiny/localleap + freecache"
        assert found["sampler"] == {"name": "localleap", "threshold": 0.999, "relaxed_threshold": 0.99, "radius": 4}

    def test_speed_ups_name_both_baselines(self, finished: Path) -> None:
        (found,) = results(finished.parent)
        speedup = found["metrics"]["speedup"]
        assert speedup["samples"] == 4
        assert speedup["naive"]["nfe"] == 64
        assert 40 < speedup["eos_aware"]["nfe"] <= 64  # the last token before end-of-text may be decoded last
        assert speedup["naive"]["forwards"] >= speedup["eos_aware"]["forwards"] > 2

    def test_the_trace_holds_all_answers_and_the_steps_of_the_first(self, finished: Path) -> None:
        trace = Trace.load(finished / "trace.safetensors")
        rows = {row["id"]: row for row in parquet.read_table(finished / "samples.parquet").to_pylist()}
        assert [rows[name]["completion"] for name in trace.ids] == trace.tokens.tolist()
        assert {frames.id for frames in trace.frames} == {"word_problems/0", "word_problems/1"}
        tokenizer = dllm.load("tiny-llada").tokenizer
        assert all(trace.words[token] == tokenizer.decode([token]) for token in np.unique(trace.tokens))

    def test_the_manifest_says_what_ran_on_what(self, finished: Path) -> None:
        manifest = json.loads((finished / "manifest.json").read_text())
        assert manifest["config"]["cache"]["_target_"] == "dllm.cache.FreeCache"
        assert manifest["config"]["seed"] == 0
        (session,) = manifest["sessions"]
        assert {"torch", "transformers", "dllm-samplers"} <= set(session["packages"])
        assert session["dtype"] == "float32"
        assert session["device"].startswith("cpu")
        assert "git" in session


def test_the_same_command_gives_the_same_numbers_and_does_nothing_twice(finished: Path, tmp_path: Path) -> None:
    assert run(tmp_path, "cache=freecache", "baselines=1").code == 0
    (again,) = folders(tmp_path)
    assert again.name == finished.name
    assert timeless(results(tmp_path)) == timeless(results(finished.parent))
    before = {path: path.stat().st_mtime_ns for path in again.iterdir()}
    outcome = run(tmp_path, "cache=freecache", "baselines=1")
    assert outcome.code == 0
    assert "final answer" in outcome.out
    assert {path: path.stat().st_mtime_ns for path in again.iterdir()} == before


def test_a_kill_after_the_results_leaves_nothing_behind(tmp_path: Path) -> None:
    assert run(tmp_path, "task.limit=1").code == 0
    (folder,) = folders(tmp_path)
    members = {path.name for path in folder.iterdir()}
    (folder / "frames").mkdir()
    (folder / "journal.jsonl").write_text("")
    assert run(tmp_path, "task.limit=1").code == 0
    assert {path.name for path in folder.iterdir()} == members


def test_what_the_results_depend_on_has_a_folder_of_its_own(tmp_path: Path) -> None:
    for arguments in ([], ["seed=1"], ["sampler.radius=2"], ["task.limit=7"], ["objective=[nfe]"]):
        assert run(tmp_path, "task.limit=2", *arguments).code == 0
    assert len(folders(tmp_path)) == 4  # what a sweeper is told changes nothing
    shown = command("report", str(tmp_path))
    assert shown.code == 0, shown.err
    assert "word_problems (limit=2)" in shown.out
    assert "word_problems (limit=7)" in shown.out


def test_other_weights_are_another_run(tmp_path: Path) -> None:
    for seed in (1, 2):
        save_folder(random_llada(tokenizer=True, seed=seed, max_length=96), tmp_path / "model")
        application._load.cache_clear()  # as in a process of its own
        outcome = run(tmp_path / "out", f"model={tmp_path / 'model'}", "task.limit=1", "gen_length=8")
        assert outcome.code == 0, outcome.err
    assert len(folders(tmp_path / "out")) == 2


@in_a_process
class TestInterrupted:
    ARGUMENTS = (
        "-m", "cache=none,dual", "model.dtype=float64", "sampler=vanilla", "task.limit=8", "batch_size=2",
        "gen_length=32",
    )  # fmt: skip

    def journals(self, out: Path) -> dict[str, list[str]]:
        """Answers noted so far, by folder."""
        found = {}
        for file in out.glob("*/journal.jsonl"):
            lines = [json.loads(line) for line in file.read_bytes().split(b"\n")[:-1]]
            found[file.parent.name] = [line["id"] for line in lines if line["kind"] == "record"]
        return found

    def test_workers_of_a_killed_sweep_end_and_it_goes_on(self, tmp_path: Path) -> None:
        pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
        arguments = (*self.ARGUMENTS, "hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
        process = start("evaluate", f"out={tmp_path}", *FAST, *arguments)
        while process.poll() is None and not any(self.journals(tmp_path).values()):
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGKILL)
        outcome = run(tmp_path, *self.ARGUMENTS)
        assert outcome.code == 0, outcome.err
        assert len(folders(tmp_path)) == 2
        assert all(found["metrics"]["n"] == 8 for found in results(tmp_path))

    def test_a_killed_sweep_loses_and_repeats_nothing(self, tmp_path: Path) -> None:
        whole, killed = tmp_path / "whole", tmp_path / "killed"
        assert run(whole, *self.ARGUMENTS).code == 0
        rng, kept, kills = random.Random(0), {}, 0
        while kills < 2 and len(folders(killed)) < 2:
            process = start("evaluate", f"out={killed}", *FAST, *self.ARGUMENTS)
            # Once it has noted something new, it dies at some moment.
            while process.poll() is None and self.journals(killed) == kept and len(folders(killed)) < 2:
                time.sleep(0.02)
            time.sleep(rng.uniform(0, 0.6))
            os.kill(process.pid, signal.SIGKILL)
            process.communicate()
            noted = self.journals(killed)
            for name, ids in kept.items():
                if name in noted:
                    assert noted[name][: len(ids)] == ids, "what was noted stays, and nothing is answered twice"
            kept, kills = noted, kills + 1
        finished = {folder.name: (folder / "results.json").read_bytes() for folder in folders(killed)}
        outcome = run(killed, *self.ARGUMENTS)
        assert outcome.code == 0, outcome.err
        for name, content in finished.items():
            assert (killed / name / "results.json").read_bytes() == content
        assert timeless(results(killed)) == timeless(results(whole))
        for one, other in zip(folders(whole), folders(killed), strict=True):
            left, right = (parquet.read_table(each / "samples.parquet").to_pylist() for each in (one, other))
            assert [(r["id"], r["text"], r["nfe"]) for r in sorted(left, key=lambda r: r["id"])] == [
                (r["id"], r["text"], r["nfe"]) for r in sorted(right, key=lambda r: r["id"])
            ]
            assert {path.name for path in one.iterdir()} == {path.name for path in other.iterdir()}
        assert kills > 0


class TestSweeps:
    def test_a_failed_job_does_not_lose_the_others(self, tmp_path: Path) -> None:
        outcome = run(tmp_path, "-m", "sampler=freedave,tiny/localleap", "cache=dkv", "task.limit=2")
        assert outcome.code == 2
        assert "Traceback" not in outcome.err
        assert "freedave" in outcome.err.lower()
        (found,) = results(tmp_path)
        assert found["label"] == "tiny/localleap + dkv"
        (failed,) = tmp_path.glob("*/error.json")
        error = json.loads(failed.read_text())
        assert error["label"] == "freedave + dkv"
        assert "depend on the order a block is decoded in" in error["message"]
        # Once it can be made, nothing is left of that.
        data = tmp_path / "HumanEval.jsonl"
        late = ("sampler=tiny/localleap,vanilla", "task=humaneval", f"task.data={data}", "task.limit=1")
        pytest.importorskip("lm_eval")
        out = tmp_path / "late"
        assert run(out, "-m", *late, "gen_length=8").code == 2
        assert len(list(out.glob("*/error.json"))) == 2
        task = {"task_id": "T/0", "prompt": "def f():\n", "canonical_solution": "    return 1\n", "entry_point": "f"}
        data.write_text(json.dumps(task | {"test": "def check(f):\n    assert f() == 1\n"}) + "\n")
        assert run(out, "-m", *late, "gen_length=8").code == 0
        assert not list(out.glob("*/error.json"))
        assert len(folders(out)) == 2

    def test_a_total_of_ones_own_task_is_of_all_its_samples(self, tmp_path: Path) -> None:
        graded = Graded({"right": {"a": 1.0, "b": 0.0}}, "right", {"a": {}, "b": {}}, totals={"x": 2.5, "y": (3.5, 1)})
        lm = dllm.load("tiny-llada", device="cpu")
        runner = Runner(Setting(lm, Vanilla(), NoCache(), {}, Estimate()), Journal(None))
        found = RunFolder(tmp_path, "mine", {}).finish(runner, graded)
        shown = {name: (score["value"], score["n"]) for name, score in found["metrics"]["scores"].items()}
        assert shown == {"right": (0.5, 2), "x": (2.5, 2), "y": (3.5, 1)}

    def test_a_failure_is_forgotten_however_its_folder_is_written(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        asked = ("-m", "sampler=vanilla", "task.limit=1", "gen_length=8")
        assert run(Path("out"), *asked, "model=./mine").code == 2
        assert len(list(Path("out").glob("*/error.json"))) == 1
        shutil.copytree(BUNDLED / "tiny-llada", "mine")
        assert run(tmp_path / "out", *asked, f"model={tmp_path}/mine", "objective=[nfe]").code == 0
        assert not list(Path("out").glob("*/error.json"))

    @pytest.mark.parametrize(
        ("launcher", "radii"),
        [
            pytest.param("joblib", {1, 2}, id="joblib", marks=in_a_process),
            pytest.param("submitit_local", {1}, id="submitit_local", marks=in_a_process),  # a process for each job
            pytest.param("ray", {1, 2}, id="ray", marks=pytest.mark.xdist_group("ray")),  # one Ray at a time here
        ],
    )
    def test_launchers_run_the_jobs(self, launcher: str, radii: set[int], tmp_path: Path) -> None:
        pytest.importorskip({"joblib": "hydra_plugins.hydra_joblib_launcher", "ray": "ray"}.get(launcher, "submitit"))
        settings = {"include_dashboard": "false", "num_cpus": "1"} if launcher == "ray" else {}
        plain = [f"+hydra.launcher.ray.init.{name}={value}" for name, value in settings.items()]
        process = start(
            "evaluate", f"out={tmp_path}", *FAST, "-m", f"hydra/launcher={launcher}", "task.limit=2",
            f"sampler.radius={','.join(map(str, radii))}", *plain,
        )  # fmt: skip
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, out + err
        assert {found["sampler"]["radius"] for found in results(tmp_path)} == radii

    def test_optuna_runs_two_jobs_and_goes_on_where_it_stopped(self, tmp_path: Path) -> None:
        pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
        first = run(tmp_path, "sweep=tune", "hydra.sweeper.n_trials=1", "task.limit=2")
        assert first.code == 0, first.err
        (one,) = folders(tmp_path)
        written = (one / "results.json").stat().st_mtime_ns
        assert run(tmp_path, "sweep=tune", "hydra.sweeper.n_trials=2", "task.limit=2").code == 0
        assert len(folders(tmp_path)) == 2
        assert (one / "results.json").stat().st_mtime_ns == written
        best = (tmp_path / "optimization_results.yaml").read_text()
        assert "sampler.relaxed_threshold" in best

    def test_optuna_takes_one_objective_and_trials_that_fail(self, tmp_path: Path) -> None:
        pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
        outcome = run(
            tmp_path, "sweep=tune", "task.limit=1", "gen_length=16", "objective=[nfe]",
            "hydra.sweeper.direction=minimize", "hydra.sweeper.n_trials=4", "sampler.radius=choice(-1,2)",
        )  # fmt: skip
        assert outcome.code == 0, outcome.err
        assert 0 < len(folders(tmp_path)) < 4
        assert "best_value" in (tmp_path / "optimization_results.yaml").read_text()
        assert "radius=-1 is out of range" in json.loads(next(tmp_path.glob("*/error.json")).read_text())["message"]

    def test_a_search_of_which_every_trial_fails_has_failed(self, tmp_path: Path) -> None:
        pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
        outcome = run(tmp_path, "sweep=tune", "hydra.sweeper.n_trials=1", "task.seed=-5")
        assert outcome.code == 2
        assert "task.seed=-5 is out of range" in outcome.err

    def test_two_searches_in_one_folder_are_refused(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
        monkeypatch.setattr(claim.Claim.__init__, "__defaults__", (0.0,))
        with claim.claimed(tmp_path / "optimization_results.yaml", "", ""):
            outcome = run(tmp_path, "sweep=tune", "hydra.sweeper.n_trials=1")
        assert (outcome.code, outcome.out) == (2, "")
        assert "optimization_results.yaml is being written by process" in outcome.err
        assert not folders(tmp_path)

    @in_a_process
    def test_launchers_know_classes_of_ones_own(self, tmp_path: Path) -> None:
        pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
        (tmp_path / "conf" / "sampler").mkdir(parents=True)
        (tmp_path / "conf" / "sampler" / "mine.yaml").write_text("_target_: own_policy.Mine\n")
        (tmp_path / "own_policy.py").write_text(
            "from dataclasses import dataclass\nimport dllm\nfrom dllm.samplers import Threshold\n\n"
            "@dllm.register\n@dataclass(frozen=True)\nclass Mine(Threshold):\n    threshold: float = 0.5\n"
        )
        script = "import own_policy\nfrom dllm.scripts.cli import main\nif __name__ == '__main__':\n    main()\n"
        (tmp_path / "my_dllm.py").write_text(script)
        asked = ("--config-dir=conf", "-m", "hydra/launcher=joblib", *FAST, "sampler=mine", "task.limit=1", "out=out")
        ran = subprocess.run(
            [sys.executable, "my_dllm.py", "evaluate", *asked],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert ran.returncode == 0, ran.stderr
        assert {found["label"] for found in results(tmp_path / "out")} == {"mine"}

    @pytest.mark.parametrize(
        ("sweep", "samplers", "caches"),
        [("frontier cache=freecache", len(over_masks()) - 1, 1), ("thresholds", 1, 1), ("caches", 1, 9)],
    )
    def test_ready_sweeps_run_and_are_reported(self, sweep: str, samplers: int, caches: int, tmp_path: Path) -> None:
        fast = ("task.limit=1", "gen_length=16", "baselines=0")
        outcome = command("evaluate", "-m", *f"sweep={sweep}".split(), f"out={tmp_path}", *fast)
        assert outcome.code == 0, outcome.err
        found = results(tmp_path)
        assert len({each["sampler"]["name"] for each in found}) == samplers
        assert len({each["cache"]["name"] for each in found}) == caches
        assert len(found) == max(samplers * caches, 7)
        assert command("report", str(tmp_path)).code == 0
        files = {"report.md", "report.csv", "report.html", "quality-nfe.svg", "quality-speed.svg"}
        assert files <= {path.name for path in tmp_path.iterdir()}

    def test_the_frontier_is_of_three_caches(self) -> None:
        assert "cache: none,dual,freecache\n" in text("sweep/frontier")

    def test_slurm_has_a_configuration(self) -> None:
        pytest.importorskip("submitit")
        shown = command("evaluate", "hydra/launcher=slurm", "hydra.launcher.partition=gpu", "--cfg", "hydra")
        assert shown.code == 0, shown.err
        assert "partition: gpu" in shown.out


def test_labels_tell_what_was_swept(tmp_path: Path) -> None:
    options = "sampler.radius=4", "sampler.threshold=0.99999", "block_length=16,32"
    assert run(tmp_path, "task.limit=1", "-m", *options).code == 0
    assert {found["label"] for found in results(tmp_path)} == {
        f"tiny/localleap threshold=0.99999 radius=4, block_length={length}" for length in (16, 32)
    }


def test_foreign_results_are_left_alone(tmp_path: Path) -> None:
    assert run(tmp_path, "task.limit=1").code == 0
    (folder,) = folders(tmp_path)
    (folder / "results.json").write_text('{"a": 1}')
    outcome = run(tmp_path, "task.limit=1")
    assert outcome.code == 2
    assert "is not a results file of this version" in outcome.err
    assert (folder / "results.json").read_text() == '{"a": 1}'


def test_results_of_another_run_are_not_taken_for_this_ones(tmp_path: Path) -> None:
    folders = [RunFolder(tmp_path, "a", {"options": {"gen_length": length, "rate": 0.1}}) for length in (8, 16)]
    metrics = dict.fromkeys(("accuracy", "accuracy_interval", "accuracy_name", "nfe", "tpf", "speedup"))
    metrics |= {"tokens_per_second": None, "n": 1, "scores": {}}
    found = {"format": "dllm-results", "version": 1, "label": "a", "task": "t", "metrics": metrics, "details": {}}
    write_json(folders[0].path / "results.json", found | folders[0].identity)
    assert folders[0].results() is not None
    shutil.copytree(folders[0].path, folders[1].path)
    with pytest.raises(ValueError, match="holds the results of another run; remove it to run that setting again"):
        folders[1].results()


def test_a_score_brings_the_number_of_its_samples(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, "a", {})
    scores = {
        "of two": {"value": 0.5, "interval": [0.1, 0.9], "n": 2},
        "of seven": {"value": 0, "interval": [0.0, 0.35], "n": 7},
    }
    metrics = {"n": 2, "accuracy": 0.5, "accuracy_interval": [0.1, 0.9], "accuracy_name": "of two", "scores": scores}
    metrics |= dict.fromkeys(("nfe", "tpf", "tokens_per_second", "speedup"))
    found = {"format": "dllm-results", "version": 1, "label": "a", "task": "t", "metrics": metrics, "details": {}}
    write_json(folder.path / "results.json", found)
    for _ in range(2):
        for main, n in (("of seven", 7), (None, 2)):
            told = folder.results(main)
            assert told is not None and told["metrics"]["n"] == n
            assert json.loads((folder.path / "results.json").read_text())["metrics"]["n"] == n


def test_sweeping_may_be_asked_for_anywhere(tmp_path: Path) -> None:
    assert run(tmp_path, "task.limit=1", "-m", "sampler.radius=1,2").code == 0
    assert len(folders(tmp_path)) == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("task=no_such_task",), "unknown task='no_such_task'"),
        (("task=gsm8k", "task.data={test: missing.jsonl}"), "task.data.test='missing.jsonl' cannot be read"),
        (("task=humaneval", "task.data=missing.jsonl"), "missing.jsonl"),
        (("task=word_problems,arc_easy", "-m"), "give task=word_problems a sweep of its own"),
        (("task.limit=0",), "task.limit=0 is out of range"),
        (("task.seed=5",), "task.seed=5 is out of range"),
        (("baselines=-1",), "baselines=-1 is out of range"),
        (("frames=x",), "frames='x' is of the wrong type"),
        (("sampler=freedave", "cache=dkv"), "depend on the order a block is decoded in"),
        (("estimate.method=guess",), "unknown estimate.method='guess'"),
        (("objective=[speed]",), "unknown objective='speed'"),
        (("out=pyproject.toml",), "out='pyproject.toml' cannot be written"),
        (("sweep=nothing",), "unknown sweep=nothing"),
        (("model=/no/such/folder",), "/no/such/folder"),
    ],
)
def test_bad_input_is_one_line(arguments: tuple[str, ...], said: str, tmp_path: Path) -> None:
    if any("task" in argument and "limit" not in argument and "seed" not in argument for argument in arguments):
        pytest.importorskip("lm_eval")
    changed = {argument.partition("=")[0] for argument in arguments}
    kept = [argument for argument in FAST if argument.partition("=")[0] not in changed]
    if "task" in changed:
        kept = [argument for argument in kept if not argument.startswith("task.limit")]
    out = () if "out" in changed else (f"out={tmp_path}",)
    outcome = command("evaluate", *out, *kept, *arguments)
    assert outcome.code == 2
    assert said in outcome.err
    assert len(outcome.err.strip().splitlines()) == 1, outcome.err


def test_a_finished_run_is_read_where_nothing_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ("task.limit=1", "gen_length=8")
    first = run(tmp_path, *asked)
    assert first.code == 0
    monkeypatch.setattr(os, "access", lambda *_: False)
    again = run(tmp_path, *asked)
    assert (again.code, again.out) == (0, first.out)
    other = run(tmp_path, *asked, "seed=5")
    assert (other.code, other.out) == (2, "")
    assert f"out='{tmp_path}' cannot be written" in other.err


def test_a_full_disk_is_no_matter_of_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, content: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(run_folder, "write_json", full)
    outcome = run(tmp_path, "task.limit=1", "gen_length=8")
    assert (outcome.code, outcome.out) == (2, "")
    assert f"out='{tmp_path}' cannot be used (No space left on device); free disk space\n" in outcome.err
