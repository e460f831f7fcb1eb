"""The plots: every run at its place, the fronts as steps, and labels that can be read."""

from __future__ import annotations

import builtins
import re
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.figure import Figure

from dllm.reports import plots
from dllm.reports.reading import load
from dllm.reports.runs import Sweep
from report_rig import SETTINGS, write_run, write_sweep


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    return load(write_sweep(tmp_path_factory.mktemp("sweep")))


def drawn(sweep: Sweep, cost: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The axes that the plot was drawn on."""
    kept: list[Any] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (kept.append(self), save(self, *a, **k)))
    plots.draw(sweep.groups[0], cost, plots.Look(sweep))
    monkeypatch.undo()
    return kept[0].axes[0]


def texts(svg: str) -> list[str]:
    found = ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")
    return [(element.text or "").strip() for element in found]


class TestPoints:
    def test_stand_at_quality_and_cost_with_both_errors(self, sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
        axes = drawn(sweep, "nfe", monkeypatch)
        points, bars = set(), set()
        for container in axes.containers:
            line, _, collections = container.lines
            points.add((float(line.get_xdata()[0]), float(line.get_ydata()[0])))
            bars |= {tuple(np.round(corner, 6)) for each in collections for corner in each.get_segments()[0]}
        assert points == {(nfe, accuracy) for accuracy, nfe in SETTINGS.values()}
        for run in sweep.groups[0].runs:
            nfe, (low, high) = run.number("nfe"), run.interval or (0, 0)
            assert nfe is not None
            # Rounding at 100% may put the interval's end beyond the share.
            assert {(nfe, round(low, 6)), (nfe, round(high, 6))} <= bars
            assert (round(1.05 * nfe, 6), run.quality) in bars

    def test_have_one_colour_a_sampler_and_one_marker_a_cache(self, sweep: Sweep) -> None:
        look = plots.Look(sweep)
        methods = [run for run in sweep.groups[0].runs if not run.reference]
        assert len({look.of(run)["color"] for run in methods}) == len({run.sampler for run in methods})
        assert len({look.of(run)["marker"] for run in methods}) == len({run.cache for run in methods})
        assert {look.of(run)["marker"] for run in sweep.groups[0].runs if run.reference} == {"*"}

    @pytest.mark.parametrize("accuracy", [0.0, 1.0])
    @pytest.mark.parametrize("n", [1, 500])
    def test_all_or_none_right_can_be_drawn(self, tmp_path: Path, accuracy: float, n: int) -> None:
        write_run(tmp_path, "a", accuracy, n=n)
        sweep = load(tmp_path)
        assert plots.draw(sweep.groups[0], "nfe", plots.Look(sweep))

    def test_runs_that_were_not_measured_are_not_drawn(self, tmp_path: Path) -> None:
        write_run(tmp_path / "a", "a", None, 3.0)
        write_run(tmp_path / "b", "b", 0.5, None)
        sweep = load(tmp_path)
        assert plots.draw(sweep.groups[0], "nfe", plots.Look(sweep)) is None
        assert plots.draw(sweep.groups[0], "tokens_per_second", plots.Look(sweep)) is None

    def test_only_the_oracle_can_be_drawn(self, tmp_path: Path) -> None:
        write_run(tmp_path, "oracle", 0.5, 3.0)
        sweep = load(tmp_path)
        svg = plots.draw(sweep.groups[0], "nfe", plots.Look(sweep))
        assert svg is not None
        assert "oracle (reference)" in texts(svg)
        assert "Pareto front" not in texts(svg)


class TestSteps:
    def test_show_the_best_quality_at_each_cost(self) -> None:
        points = [(4.0, 0.5), (8.0, 0.9)]
        assert plots.steps(points, "nfe", (1, 20)) == [(4, 0.5), (8, 0.5), (8, 0.9), (20, 0.9)]
        assert plots.steps([(100.0, 0.9), (300.0, 0.5)], "tokens_per_second", (10, 900)) == [
            (300, 0.5), (100, 0.5), (100, 0.9), (10, 0.9),
        ]  # fmt: skip
        assert plots.steps([], "nfe", (1, 20)) == []

    def test_of_front_and_bound_are_in_the_plot(self, sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
        axes = drawn(sweep, "nfe", monkeypatch)
        lines = {line.get_linestyle(): line.get_xydata() for line in axes.lines if len(line.get_xdata()) > 1}
        assert [tuple(corner) for corner in lines["-"][::2]][:-1] == [(3.3, 0.74), (7.7, 0.8), (10.4, 0.97)]
        assert tuple(lines[":"][0]) == (3.7, 0.98)


class TestLabels:
    @pytest.mark.parametrize("cost", ["nfe", "tokens_per_second"])
    def test_are_of_the_front_cover_nothing_and_stay_inside(
        self, sweep: Sweep, cost: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        axes = drawn(sweep, cost, monkeypatch)
        labels = [text for text in axes.texts if text.get_text()]
        assert {text.get_text() for text in labels} == {run.label for run in sweep.groups[0].nfe_front}
        places = axes.transData.transform([(run.number(cost), run.quality) for run in sweep.groups[0].runs])
        boxes = [text.get_window_extent().padded(-1) for text in labels]
        for number, box in enumerate(boxes):
            assert not any(box.overlaps(other) for other in boxes[:number])
            assert not any(box.contains(*place) for place in places)
            assert axes.bbox.x0 <= box.x0 and box.x1 <= axes.bbox.x1 and axes.bbox.y0 <= box.y0

    def test_of_a_long_front_are_not_all_drawn(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for number in range(30):
            write_run(tmp_path / f"{number}", f"threshold {number}", 0.5 + number / 100, 5.0 + number)
        axes = drawn(load(tmp_path), "nfe", monkeypatch)
        labels = [text.get_text() for text in axes.texts]
        assert len(labels) == 10
        assert {"threshold 0", "threshold 29"} <= set(labels)


@pytest.mark.parametrize(("count", "most", "kept"), [
    (3, 5, [0, 1, 2]), (5, 5, [0, 1, 2, 3, 4]), (9, 3, [0, 4, 8]), (9, 1, [0]), (9, 0, []), (0, 3, []),
])  # fmt: skip
def test_what_is_spread_holds_the_ends(count: int, most: int, kept: list[int]) -> None:
    assert plots.spread(range(count), most) == kept


class TestFile:
    def test_is_the_same_for_the_same_numbers_and_bears_no_date(self, sweep: Sweep) -> None:
        first, second = (plots.draw(sweep.groups[0], "nfe", plots.Look(sweep)) for _ in range(2))
        assert first == second is not None
        assert not re.search(r"\d{4}-\d\d-\d\d|<metadata", first)

    def test_names_the_task_the_axes_and_the_settings(self, sweep: Sweep) -> None:
        svg = plots.draw(sweep.groups[0], "tokens_per_second", plots.Look(sweep))
        assert svg is not None
        assert {
            "tiny-llada, word_problems", "tokens per second", "final answer", "localleap", "freecache", "Pareto front",
            "oracle (reference)", "threshold 0.999",
        } <= set(texts(svg))  # fmt: skip


def test_missing_matplotlib_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.delitem(sys.modules, "matplotlib")
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match=r"pip install 'dllm-samplers\[plot\]'"):
        plots.check()


class TestLegend:
    def test_has_a_section_for_each_kind_of_policy(self, sweep: Sweep) -> None:
        svg = plots.draw(sweep.groups[0], "nfe", plots.Look(sweep))
        assert svg is not None
        found = texts(svg)
        legend = found[found.index("committing") :]
        assert legend[: legend.index("Pareto front")] == [
            "committing", "localleap", "threshold", "vanilla", "lossless", "freedave", "guided", "ar_guided",
            "cache", "none", "dual", "freecache",
        ]  # fmt: skip

    def test_of_one_kind_lists_the_samplers(self, tmp_path: Path) -> None:
        for name in ("wino", "saber + dual"):
            write_run(tmp_path / name, name, 0.5, 3.0)
        sweep = load(tmp_path)
        svg = plots.draw(sweep.groups[0], "nfe", plots.Look(sweep))
        assert svg is not None
        found = texts(svg)
        assert found[found.index("sampler") :][:6] == ["sampler", "saber", "wino", "cache", "none", "dual"]

    def test_of_many_samplers_stays_within_the_picture(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for number in range(60):
            write_run(tmp_path / str(number), f"policy{number}", 0.5, 3.0)
        axes = drawn(load(tmp_path), "nfe", monkeypatch)
        (legend,) = axes.figure.legends
        box = legend.get_window_extent()
        assert axes.bbox.x1 < box.x0 < box.x1 <= axes.figure.bbox.x1
        assert 0 <= box.y0 < box.y1 <= axes.figure.bbox.y1
        assert axes.bbox.width > 400
