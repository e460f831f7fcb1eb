"""Reading a sweep: its runs by model and task, and one clear line for what cannot be read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from dllm.reports.reading import load
from report_rig import results, write_error, write_run, write_sweep


def labels(folder: Path, **options: Any) -> list[list[str]]:
    return [[run.label for run in group.runs] for group in load(folder, **options).groups]


class TestRuns:
    def test_the_best_come_first_then_the_cheapest(self, tmp_path: Path) -> None:
        for name, accuracy, nfe in (("d", None, 1.0), ("b", 0.9, 10.0), ("a", 0.9, 20.0), ("c", 0.8, 1.0)):
            write_run(tmp_path / "deep" / name, name, accuracy, nfe)
        assert labels(tmp_path) == [["b", "a", "c", "d"]]

    def test_a_folder_may_be_one_run(self, tmp_path: Path) -> None:
        assert labels(write_run(tmp_path / "run", "only")) == [["only"]]

    def test_runs_and_failures_behind_links_are_read_once(self, tmp_path: Path) -> None:
        for name in ("near", "far"):
            write_run(tmp_path / name, name)
        write_error(tmp_path / "failed", "failed", "why")
        gathered = tmp_path / "gathered"
        (gathered / "deep").mkdir(parents=True)
        shutil.move(tmp_path / "near", gathered / "near")
        for link, place in {"a": gathered / "near", "deep/far": tmp_path / "far", "deep/up": gathered}.items():
            (gathered / link).symlink_to(place)
        (gathered / "failed").symlink_to(tmp_path / "failed")
        sweep = load(gathered)
        assert sorted(run.place for group in sweep.groups for run in group.runs) == ["deep/far", "near"]
        assert [each.label for each in sweep.failures] == ["failed"]

    def test_models_and_tasks_are_kept_apart(self, tmp_path: Path) -> None:
        for number, (model, task) in enumerate([("m2", "a"), ("m1", "b"), ("m1", "a"), ("m1", "a")]):
            write_run(tmp_path / str(number), str(number), model=model, task=task)
        assert [group.title for group in load(tmp_path).groups] == ["m1, a", "m1, b", "m2, a"]
        assert labels(tmp_path) == [["2", "3"], ["1"], ["0"]]

    def test_failures_are_told_unless_the_run_was_measured_after_all(self, tmp_path: Path) -> None:
        write_sweep(tmp_path)
        write_error(tmp_path / "00", "again", "was wrong once")
        failures = load(tmp_path).failures
        assert [(each.label, each.message.split()[0]) for each in failures] == [
            ("ar_guided + d2cache", "ar_guided"),
            ("vanilla | 3", "out"),
        ]

    def test_another_score_may_be_the_quality(self, tmp_path: Path) -> None:
        write_run(tmp_path / "a", "a", 0.9)
        write_run(tmp_path / "b", "b", None)
        first, second = load(tmp_path, quality="whole chain").groups[0].runs
        assert (first.quality_name, first.quality) == ("whole chain", 0.45)
        assert first.interval is not None and first.interval[0] < 0.45 < first.interval[1]
        assert (second.quality, second.interval) == (None, None)

    def test_numbers_that_are_none_were_not_measured(self, tmp_path: Path) -> None:
        run = write_run(tmp_path / "a", "a", 0.9, None)
        text = (run / "results.json").read_text()
        (run / "results.json").write_text(text.replace('"refreshes": 0.0', '"refreshes": NaN'))
        found = load(tmp_path).groups[0].runs[0]
        assert found.number("nfe") is None
        assert found.number("refreshes") is None
        assert found.number("drift", "kv_error") is None
        assert found.number("accuracy") == 0.9


class TestLabels:
    def test_of_one_name_are_told_apart_by_the_options_that_differ(self, tmp_path: Path) -> None:
        write_run(tmp_path / "a", "vanilla", options={"gen_length": 64, "seed": 1})
        write_run(tmp_path / "b", "vanilla", options={"gen_length": 96, "seed": 1})
        write_run(tmp_path / "c", "threshold", options={"gen_length": 128})
        assert sorted(labels(tmp_path)[0]) == ["threshold", "vanilla (gen_length=64)", "vanilla (gen_length=96)"]

    def test_settings_that_times_depend_on_are_named_where_they_differ(self, tmp_path: Path) -> None:
        for name, size in (("a", 1), ("b", 40)):
            write_run(tmp_path / name, name, options={"gen_length": 64, "batch_size": size, "threads": None})
        assert labels(tmp_path) == [["a (batch_size=1)", "b (batch_size=40)"]]
        for name, used in (("a", [2]), ("b", [8, 4])):
            content = {"format": "dllm-manifest", "sessions": [{"threads": each, "device": "cpu"} for each in used]}
            (tmp_path / name / "manifest.json").write_text(json.dumps(content))
        assert labels(tmp_path) == [["a (batch_size=1, threads=2)", "b (batch_size=40, threads=8 and 4)"]]
        assert labels(tmp_path / "a") == [["a"]]

    def test_samplers_options_count_too(self, tmp_path: Path) -> None:
        for place, threshold in (("a", 0.9), ("b", 0.8)):
            write_run(tmp_path / place, "x", sampler={"name": "threshold", "threshold": threshold, "deep": {"k": 1}})
        assert sorted(labels(tmp_path)[0]) == ["x (sampler.threshold=0.8)", "x (sampler.threshold=0.9)"]

    def test_runs_that_differ_in_nothing_are_told_apart_by_their_folders(self, tmp_path: Path) -> None:
        write_run(tmp_path / "a", "x")
        write_run(tmp_path / "b" / "c", "x")
        assert sorted(labels(tmp_path)[0]) == ["x (a)", "x (b/c)"]


class TestRefused:
    def refused(self, folder: Path, *named: str, **options: Any) -> None:
        with pytest.raises(ValueError) as error:  # noqa: PT011  # the words are looked at below
            load(folder, **options)
        text = str(error.value)
        assert all(word in text for word in named), text

    def test_no_folder_and_no_runs(self, tmp_path: Path) -> None:
        self.refused(tmp_path / "none", "none' is not a folder")
        self.refused(tmp_path, "holds no finished run")

    def test_only_failed_runs(self, tmp_path: Path) -> None:
        write_error(tmp_path / "a", "vanilla", "out of memory")
        self.refused(tmp_path, "1 failed", "vanilla", "out of memory")

    @pytest.mark.parametrize(
        ("content", "named"),
        [
            ("", "cannot be read"),
            ("\udcff", "cannot be read"),
            ("{}", "not a dllm-results file"),
            ("[1]", "not a dllm-results file"),
            ('{"format":"dllm-results","version":2}', "version 2"),
            ('{"format":"dllm-results","version":1}', "damaged"),
        ],
    )
    def test_other_files(self, tmp_path: Path, content: str, named: str) -> None:
        (tmp_path / "results.json").write_bytes(content.encode("utf-8", "surrogateescape"))
        self.refused(tmp_path, str(tmp_path / "results.json"), named)

    @pytest.mark.parametrize(
        "wrong",
        [
            {"nfe": "x"}, {"accuracy": "0.9"}, {"accuracy_interval": [1]}, {"sampler": {}}, {"cache": "none"},
            {"scores": [1]}, {"tokens_per_second": True}, {"accuracy_interval": 3}, {"n": []},
        ],
    )  # fmt: skip
    def test_fields_of_the_wrong_kind(self, tmp_path: Path, wrong: dict[str, Any]) -> None:
        content = results()
        for name, value in wrong.items():
            (content if name in content else content["metrics"])[name] = value
        (tmp_path / "results.json").write_text(json.dumps(content))
        self.refused(tmp_path, "damaged")

    def test_missing_fields(self, tmp_path: Path) -> None:
        for name in ("label", "model", "task", "sampler", "cache", "metrics"):
            content = {key: value for key, value in results().items() if key != name}
            (tmp_path / "results.json").write_text(json.dumps(content))
            self.refused(tmp_path, "damaged", name)

    def test_a_damaged_error_file(self, tmp_path: Path) -> None:
        write_run(tmp_path / "a", "a")
        write_error(tmp_path / "b", "b", "m")
        (tmp_path / "b" / "error.json").write_text("{")
        self.refused(tmp_path, "error.json")

    def test_a_score_that_no_run_has(self, tmp_path: Path) -> None:
        write_run(tmp_path, "a")
        self.refused(tmp_path, "quality='x'", "final answer, whole chain", quality="x")

    def test_a_score_that_is_better_the_lower_it_is(self, tmp_path: Path) -> None:
        scores = {name: {"value": 0.3, "interval": None} for name in ("acc", "mc: brier_score,none")}
        folder = write_run(tmp_path, "a", scores=scores)
        found = json.loads((folder / "results.json").read_text())
        better = {"mc": {"acc": True, "brier_score": False}, "other": {}}
        (folder / "results.json").write_text(json.dumps(found | {"details": {"higher_is_better": better}}))
        self.refused(tmp_path, "lower it is; use one of acc", quality="mc: brier_score,none")
        self.refused(tmp_path, "is not a score of these runs; use one of acc", quality="x")
        assert load(tmp_path, quality="acc").groups[0].runs[0].quality == 0.3
        for free in (["x"], {"mc": True}, {"mc": {"acc": True}, "b": {"brier_score": False}}, None, "text"):
            (folder / "results.json").write_text(json.dumps(found | {"details": {"higher_is_better": free}}))
            assert load(tmp_path, quality="mc: brier_score,none").groups[0].runs[0].quality == 0.3

    def test_a_score_that_is_no_share(self, tmp_path: Path) -> None:
        scores = {"perplexity": {"value": 12.5, "interval": None}, "right": {"value": 0.5, "interval": None}}
        write_run(tmp_path, "a", scores=scores)
        self.refused(tmp_path, "perplexity=12.5", "one of right", quality="perplexity")
