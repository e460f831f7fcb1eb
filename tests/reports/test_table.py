"""The table: what is shown of runs, on which fronts they are, and the raw numbers."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest

from dllm.reports import table
from dllm.reports.frontier import aup
from dllm.reports.reading import load
from dllm.reports.runs import Group, MeasuredRun
from report_rig import SETTINGS, results, speedup, write_run, write_sweep


def shown(group: Group) -> dict[str, dict[str, str]]:
    """Texts by setting and column."""
    columns = table.columns(group)
    heads = [column.head for column in columns]
    return {row[0]: dict(zip(heads, row, strict=True)) for row in table.cells(group, columns)}


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Group:
    return load(write_sweep(tmp_path_factory.mktemp("sweep"))).groups[0]


def test_every_number_is_shown(group: Group) -> None:
    assert shown(group)["localleap 0.999/0.99/4 + freecache"] == {
        "setting": "localleap 0.999/0.99/4 + freecache", "final answer": "96.0%", "95% interval": "90.2% to 98.4%",
        "n": "100", "front": "", "kind": "committing", "NFE": "11.0 ± 0.6", "TPF": "3.64", "tokens/s": "818",
        "faster (EOS-aware)": "4.7x", "TPF gain (EOS-aware)": "3.5x",
        "faster (naive)": "7.0x", "TPF gain (naive)": "3.5x", "whole chain": "48.0%", "p50 s": "1.10", "p95 s": "1.40",
        "positions": "1,075", "computed": "50%", "refreshes": "2.0", "KV error": "6.0%", "KL": "0.010",
        "flips": "2.0%", "peak MiB": "775",
    }  # fmt: skip


def test_what_was_not_measured_is_empty(group: Group) -> None:
    row = shown(group)["threshold 0.9"]
    assert {row[head] for head in ("KV error", "flips", "faster (naive)")} == {""}


def test_columns_that_are_empty_for_all_are_left_out(tmp_path: Path) -> None:
    write_run(tmp_path / "a", "a", None, None, peak_memory=None, computed_share=None, positions=None)
    heads = {column.head for column in table.columns(load(tmp_path).groups[0])}
    assert heads == {"setting", "n", "p50 s", "p95 s"}
    write_run(tmp_path / "b", "b", guide_nfe=3.0, speedup=speedup(2.0))
    heads = {column.head for column in table.columns(load(tmp_path).groups[0])}
    assert {"guide NFE", "NFE", "peak MiB", "faster (naive)"} <= heads


def test_scores_that_are_no_shares_are_numbers(tmp_path: Path) -> None:
    write_run(tmp_path, "a", None, None, scores={"perplexity": {"value": 1234.5, "interval": None}})
    assert shown(load(tmp_path).groups[0])["a"]["perplexity"] == "1,234.500"


def test_runs_judged_by_different_scores_share_a_column(tmp_path: Path) -> None:
    write_run(tmp_path / "a", "a", 0.5)
    write_run(tmp_path / "b", "b", 0.25, accuracy_name="exact match")
    write_run(tmp_path / "c", "c", 0.2, accuracy_name="exact match")
    group = load(tmp_path).groups[0]
    rows = shown(group)
    assert [(row["judged by"], row["quality"]) for row in rows.values()] == [
        ("exact match", "25.0%"), ("exact match", "20.0%"), ("final answer", "50.0%")
    ]  # fmt: skip
    assert [bool(row["front"]) for row in rows.values()] == [True, False, True]
    assert table.areas(group) == []


class TestFronts:
    def test_hold_what_no_other_method_beats(self, group: Group) -> None:
        best = {label for label, row in shown(group).items() if row["front"] == "NFE, speed"}
        assert best == {"threshold 0.999", "localleap 0.999/0.99/4", "threshold 0.9", "ar_guided topk 5"}

    def test_are_two(self, tmp_path: Path) -> None:
        write_run(tmp_path / "a", "drafts", 0.9, 10.0, tokens_per_second=50.0)
        write_run(tmp_path / "b", "plain", 0.9, 20.0, tokens_per_second=100.0)
        rows = shown(load(tmp_path).groups[0])
        assert (rows["drafts"]["front"], rows["plain"]["front"]) == ("NFE", "speed")

    def test_leave_out_the_oracle_and_say_so(self, group: Group) -> None:
        assert shown(group)["oracle (reference)"]["front"] == "reference"
        assert not any(run.reference for run in (*group.nfe_front, *group.speed_front))


class TestAreas:
    def test_are_of_all_and_of_each_sampler_and_cache_with_two_runs_or_more(self, group: Group) -> None:
        found = {each.of: each.runs for each in table.areas(group)}
        assert found == {
            "all": 11, "cache none": 9, "sampler localleap": 3, "sampler threshold": 3, "sampler vanilla": 3,
        }  # fmt: skip

    def test_measure_accuracy_in_percent_over_tokens_per_forward(self, group: Group) -> None:
        points = [(40 / nfe, 100 * accuracy) for label, (accuracy, nfe) in SETTINGS.items() if "vanilla" in label]
        (vanilla,) = (each for each in table.areas(group) if each.of == "sampler vanilla")
        assert vanilla.aup == pytest.approx(aup(points, best=98.0))

    def test_are_none_where_nothing_was_right_or_wrong(self, tmp_path: Path) -> None:
        write_run(tmp_path, "a", None, None)
        assert table.areas(load(tmp_path).groups[0]) == []


class TestCsv:
    def test_has_a_line_a_run_with_raw_numbers(self, tmp_path: Path) -> None:
        write_sweep(tmp_path)
        write_run(tmp_path / "other", "a, b", 1 / 3, model="other", options={"block": [1, 2]}, speedup=speedup(2.0))
        rows = {row["label"]: row for row in csv.DictReader(io.StringIO(table.raw(load(tmp_path))))}
        assert len(rows) == len(SETTINGS) + 1
        assert rows["a, b"]["accuracy"] == repr(1 / 3)
        assert rows["a, b"]["options.block"] == "[1, 2]"
        assert rows["a, b"]["speedup.naive.time"] == "2.0"
        assert rows["a, b"]["folder"] == "other"
        cached = rows["localleap 0.999/0.99/4 + freecache"]
        assert (cached["sampler.name"], cached["cache.name"], cached["drift.kl"]) == ("localleap", "freecache", "0.01")
        assert 0.90 < float(cached["accuracy_interval.low"]) < 0.96 < float(cached["accuracy_interval.high"])
        assert (rows["vanilla"]["drift.kl"], rows["vanilla"]["front"]) == ("", "")
        assert "drift" not in rows["vanilla"]

    def test_what_has_a_value_in_some_runs_and_parts_in_others_has_columns_for_both(self, tmp_path: Path) -> None:
        bases = {"a": "klass", "b": "factor", "c": {"threshold": 0.8}, "d": None}
        for label, base in bases.items():
            write_run(tmp_path / label, label, sampler={"name": "edit", "base": base})
        rows = {row["label"]: row for row in csv.DictReader(io.StringIO(table.raw(load(tmp_path))))}
        assert [row["sampler.base"] for _, row in sorted(rows.items())] == ["klass", "factor", "", ""]
        assert [row["sampler.base.threshold"] for _, row in sorted(rows.items())] == ["", "", "0.8", ""]

    def test_settings_stand_before_metrics(self, tmp_path: Path) -> None:
        write_run(tmp_path / "a", "a")
        write_run(tmp_path / "b", "b", options={"late": 1})
        names = table.raw(load(tmp_path)).splitlines()[0].split(",")
        assert names.index("options.late") < names.index("n")


def test_columns_sort_by_their_numbers(group: Group) -> None:
    by_head = {column.head: column for column in table.columns(group)}
    run: MeasuredRun = group.runs[1]
    assert by_head["NFE"].value(run) == 12.6
    assert by_head["final answer"].value(run) == 0.98


class TestKinds:
    def test_are_those_of_the_policies(self, group: Group) -> None:
        assert {(run.sampler, run.kind) for run in group.runs} == {
            ("vanilla", "committing"), ("threshold", "committing"), ("localleap", "committing"),
            ("freedave", "lossless"), ("oracle", "lossless"), ("ar_guided", "guided"),
        }  # fmt: skip
        assert {row["kind"] for row in shown(group).values()} == {"committing", "lossless", "guided"}

    def test_are_as_recorded_where_they_are(self, tmp_path: Path) -> None:
        for name, more in (
            ("a", {"kind": "revising"}),
            ("vanilla", {}),
            ("one's own", {}),
            ("b", {"kind": "sketching"}),
        ):
            (write_run(tmp_path / name, name) / "results.json").write_text(json.dumps(results(name) | more))
        group = load(tmp_path).groups[0]
        kinds = {name: row["kind"] for name, row in shown(group).items()}
        assert kinds == {"a": "revising", "vanilla": "committing", "one's own": "committing", "b": "sketching"}
        assert group.kinds == ["committing", "revising", "sketching"]
        rows = csv.DictReader(io.StringIO(table.raw(load(tmp_path))))
        assert {row["label"]: row["kind"] for row in rows} == kinds

    def test_are_no_column_where_all_are_alike(self, tmp_path: Path) -> None:
        for name in ("wino", "saber"):
            write_run(tmp_path / name, name)
        group = load(tmp_path).groups[0]
        assert group.kinds == ["revising"]
        assert "kind" not in {column.head for column in table.columns(group)}

    def test_that_are_no_text_are_damage(self, tmp_path: Path) -> None:
        (write_run(tmp_path / "a", "a") / "results.json").write_text(json.dumps(results("a") | {"kind": 3}))
        with pytest.raises(ValueError, match=r"results.json is damaged \(TypeError: kind=3\)"):
            load(tmp_path)
