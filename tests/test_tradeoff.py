"""`dllm tradeoff`: a table and a chart of what was measured."""

from __future__ import annotations

import builtins
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

import dllm
from commands import Outcome, command
from dllm.evaluation.word_problems import Score, evaluate, wilson
from dllm.scripts import own
from dllm.scripts import tradeoff as application
from dllm.tasks import word_problems
from models import random_llada, save_folder

LM = random_llada(tokenizer=True, max_length=128)
SETTINGS = {
    "vanilla, 4 per step": dllm.samplers.Vanilla(tokens_per_step=4),
    "threshold 0.7": dllm.samplers.Threshold(threshold=0.7),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_folder(LM, tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def measured(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Outcome, Path]:
    """One run of the command on four problems."""
    out = tmp_path_factory.mktemp("out") / "new" / "chart.v1"
    options = ["problems=4", "seed=1000009", "gen_length=10", "block_length=5", "batch_size=3"]
    return command("tradeoff", f"model={model}", f"out={out}", *options), out


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def score(final: float, nfe: float, n: int = 100) -> Score:
    return Score(n, final, final / 2, wilson(round(final * n), n), nfe, 2.5, 321.4)


class TestCommand:
    def test_the_table_holds_the_scores(self, measured: tuple[Outcome, Path]) -> None:
        result, out = measured
        assert (result.code, result.err) == (0, "")
        lines = Path(f"{out}.md").read_text().splitlines()
        assert "4 problems of seed 1000009, gen_length=10, block_length=5, batch_size=3" in lines[0]
        head, table = cells(lines[2]), {cells(line)[0]: cells(line) for line in lines[4:]}
        assert head[1:6] == ["right answers", "95% interval", "whole chain right", "NFE", "TPF"]
        assert len(table) == 7
        problems = word_problems.problems(4, 1000009)
        for label, sampler in SETTINGS.items():
            s = evaluate(LM, problems, sampler, gen_length=10, block_length=5, batch_size=3)
            assert table[label][1:6] == [
                f"{s.final:.1%}", f"{s.interval[0]:.1%} to {s.interval[1]:.1%}", f"{s.chain:.1%}", f"{s.nfe:.1f}",
                f"{s.tpf:.2f}",
            ]  # fmt: skip

    def test_the_table_is_printed_too(self, measured: tuple[Outcome, Path]) -> None:
        written = f"written to {measured[1]}.md and {measured[1]}.svg"
        assert measured[0].out.strip() == f"{Path(f'{measured[1]}.md').read_text()}\n{written}"

    def test_the_chart_is_well_formed_and_names_every_setting(self, measured: tuple[Outcome, Path]) -> None:
        texts = [
            element.text for element in ElementTree.parse(f"{measured[1]}.svg").iter("{http://www.w3.org/2000/svg}text")
        ]
        assert {"vanilla", "threshold", "1 per step", "8 per step", "0.95", "0.7", "NFE per problem"} <= set(texts)

    @pytest.mark.parametrize(
        ("arguments", "named"),
        [
            (["problems=0"], "problems=0 is out of range"),
            (["problems=some"], "problems='some'"),
            (["gen_length=0"], "gen_length=0"),
            (["batch_size=0"], "batch_size=0"),
            (["gen_length=200"], "context of 128"),
            (["settings.threshold 0.9.threshold=-1"], "threshold=-1"),
            (["settings.threshold 0.9.threshold=-1", "problems=2"], "threshold=-1"),
            (["+settings.learned._target_=dllm.samplers.Learn2PD"], "filter=null finds no bundled filter"),
            (["+settings.cut._target_=dllm.samplers.Vanilla", "+settings.cut.run.gen_length=0"], "gen_length=0"),
            (["+settings.cut._target_=dllm.samplers.Vanilla", "+settings.cut.run.speed=9"], "speed"),
            (["+extra=1"], "unknown option 'extra'; expected one of "),
            (["out=/dev/null/x"], "out='/dev/null/x' cannot be written"),
            (["model=/no/such/folder"], "'/no/such/folder'"),
        ],
    )
    def test_bad_input_is_one_line_and_writes_nothing(
        self, model: Path, tmp_path: Path, arguments: list[str], named: str
    ) -> None:
        result = command("tradeoff", f"model={model}", f"out={tmp_path}/a/chart", "problems=1", *arguments)
        assert (result.code, result.out) == (2, "")
        assert result.err.startswith("dllm tradeoff: error: ")
        assert result.err.count("\n") == 1
        assert named in result.err
        assert list(tmp_path.iterdir()) == []

    def test_missing_matplotlib_is_told_before_anything_is_measured(
        self, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
            monkeypatch.delitem(sys.modules, name)
        real = builtins.__import__

        def without(name: str, *rest: Any) -> Any:
            if name.split(".")[0] == "matplotlib":
                raise ImportError(name)
            return real(name, *rest)

        monkeypatch.setattr(builtins, "__import__", without)
        monkeypatch.setattr(dllm, "load", None)
        result = command("tradeoff", f"model={model}", f"out={tmp_path}/chart")
        expected = "dllm tradeoff: error: the chart needs matplotlib: pip install 'dllm-samplers[plot]'\n"
        assert result == Outcome(2, "", expected)


def test_a_setting_may_have_options_of_the_run(model: Path, tmp_path: Path) -> None:
    own = ["+settings.whole._target_=dllm.samplers.Vanilla", "+settings.whole.run.gen_length=20"]
    result = command(
        "tradeoff", f"model={model}", f"out={tmp_path}/chart", "problems=1", "gen_length=10", "block_length=5", *own
    )
    assert (result.code, result.err) == (0, "")
    table = {cells(line)[0]: cells(line) for line in Path(f"{tmp_path}/chart.md").read_text().splitlines()[4:]}
    assert float(table["whole"][4]) > 10 >= float(table["vanilla, 1 per step"][4])


@pytest.mark.parametrize("name", ["tradeoff", "policies"])
def test_without_a_name_it_is_that_of_command_and_model(
    name: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(application, "_measure", lambda *_: {"a": score(0.5, 3.0)})
    assert command(name, f"model={model}").code == 0
    folder = tmp_path / "outputs"
    assert {path.name for path in folder.iterdir()} == {f"{name}-{model.name}.md", f"{name}-{model.name}.svg"}


class TestPolicies:
    """`dllm policies`: the same with all policies."""

    def test_every_policy_is_in_the_table_with_what_it_costs(self, tmp_path: Path) -> None:
        result = command("policies", f"out={tmp_path}/all", "problems=1")
        assert (result.code, result.err) == (0, "")
        lines = Path(f"{tmp_path}/all.md").read_text().splitlines()
        families = {re.split("[ ,]", cells(line)[0])[0] for line in lines[4:]}
        assert families == {"vanilla", "threshold", "localleap", "learn2pd", "freedave", "ar_guided", "oracle"}
        table = {cells(line)[0]: dict(zip(cells(lines[2]), cells(line), strict=True)) for line in lines[4:]}
        assert float(table["ar_guided argmax"]["guide NFE"]) > 0
        assert float(table["freedave 4 over vanilla"]["extra positions"].replace(",", "")) > 0
        assert (
            float(table["vanilla, EOS-aware"]["NFE"]) <= float(table["vanilla, to the end of the canvas"]["NFE"]) == 64
        )
        assert ElementTree.parse(f"{tmp_path}/all.svg").getroot().tag.endswith("svg")


class TestCaches:
    """`dllm caches`: policies times caches, and how far the caches are off."""

    @pytest.fixture(scope="class")
    def table(self, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
        out = tmp_path_factory.mktemp("caches") / "all"
        result = command("caches", f"out={out}", "problems=2", "repeats=1")
        assert (result.code, result.err) == (0, "")
        assert "positions computed per problem" in Path(f"{out}.svg").read_text()
        lines = Path(f"{out}.md").read_text().splitlines()
        return {cells(line)[0]: dict(zip(cells(lines[2]), cells(line), strict=True)) for line in lines[4:]}

    def test_every_cache_is_there_with_every_policy(self, table: dict[str, dict[str, str]]) -> None:
        families = {re.split("[ ,]", label)[0] for label in table}
        assert families == {"none", "prefix", "dual", "freecache", "dkv", "dllm_cache", "d2cache"}
        assert len(table) == 3 * 8

    def test_positions_and_drift_are_those_of_the_cache(self, table: dict[str, dict[str, str]]) -> None:
        exact, dual = table["none, threshold 0.999"], table["dual, threshold 0.999"]
        assert exact["KV error"] == "0.0%" != dual["KV error"]
        assert float(dual["positions"].replace(",", "")) < float(exact["positions"].replace(",", ""))
        assert float(exact["refreshes"]) == 0 < float(dual["refreshes"])

    def test_bad_options_are_told_before_the_model_loads(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(dllm, "load", None)
        for argument, named in (
            ("caches.dual.measure_every=0", "measure_every=0"),
            ("repeats=0", "repeats=0"),
            ("+samplers.bad={_target_: dllm.samplers.FreeDave, eager: true}", "eager=true"),
        ):
            result = command("caches", argument)
            assert (result.code, result.out) == (2, "")
            assert result.err.startswith("dllm caches: error: ")
            assert result.err.count("\n") == 1
            assert named in result.err


def test_speeds_are_medians_of_runs_that_take_turns(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = []

    def fake(lm: Any, problems: Any, sampler: Any, *rest: Any, **options: Any) -> Score:
        order.append(repr(sampler))
        return replace(score(0.5, 3.0), tokens_per_second=float(len(order)), guide_nfe=1.0)

    monkeypatch.setattr(application, "evaluate", fake)
    arguments = [f"model={model}", f"out={tmp_path}/c", "problems=1", "repeats=3", "gen_length=8"]
    assert command("tradeoff", *arguments).code == 0
    rows = [cells(line) for line in Path(f"{tmp_path}/c.md").read_text().splitlines()[4:]]
    # Seven settings: the first was measured as the 1st, 8th and 15th.
    assert [row[-1] for row in rows] == [str(place) for place in range(8, 15)]
    assert order == order[:7] * 3


class TestChart:
    SCORES = {  # noqa: RUF012
        "vanilla, 1 per step": score(0.98, 40.2), "vanilla, 2 per step": score(0.93, 20.5),
        "vanilla, 4 per step": score(0.6, 10.8), "vanilla, 8 per step": score(0.2, 5.9),
        "threshold 0.95": score(0.975, 17.0), "threshold 0.9": score(0.97, 15.5), "threshold 0.7": score(0.95, 11.8),
    }  # fmt: skip

    @pytest.fixture
    def axes(self) -> Any:
        figure = application._new_figure()
        application.draw(figure, self.SCORES, "tiny-llada")
        figure.draw_without_rendering()
        return figure.axes[0]

    def test_every_point_stands_at_its_score_with_its_interval(self, axes: Any) -> None:
        points, bars = set(), set()
        for container in axes.containers:
            line, _, (bar,) = container.lines
            points.add((float(line.get_xdata()[0]), float(line.get_ydata()[0])))
            ((x, low), (_, high)) = bar.get_segments()[0]
            bars.add((round(float(x), 6), round(float(low), 6), round(float(high), 6)))
        assert points == {(s.nfe, s.final) for s in self.SCORES.values()}
        assert bars == {(s.nfe, round(s.interval[0], 6), round(s.interval[1], 6)) for s in self.SCORES.values()}

    def test_labels_cover_neither_each_other_nor_a_point_and_stay_inside(self, axes: Any) -> None:
        boxes = [text.get_window_extent() for text in axes.texts]
        assert len(boxes) == len(self.SCORES)
        for number, box in enumerate(boxes):
            assert not any(box.overlaps(other) for other in boxes[:number])
            assert axes.bbox.y0 <= box.y0
            assert box.y1 <= axes.bbox.y1
            assert not any(box.contains(*axes.transData.transform((s.nfe, s.final))) for s in self.SCORES.values())

    def test_one_colour_a_sampler(self, axes: Any) -> None:
        colours: dict[str, set[str]] = {}
        for text in axes.texts:
            colours.setdefault("vanilla" if "per step" in text.get_text() else "threshold", set()).add(text.get_color())
        assert [len(found) for found in colours.values()] == [1, 1]
        assert colours["vanilla"] != colours["threshold"]
        assert [text.get_text() for text in axes.get_legend().get_texts()] == ["vanilla", "threshold"]

    @pytest.mark.parametrize("final", [0.0, 1.0])
    @pytest.mark.parametrize("n", [1, 3, 500])
    def test_none_and_all_right_can_be_drawn(self, final: float, n: int) -> None:
        figure = application._new_figure()
        application.draw(figure, {"vanilla": score(final, 1.0, n)}, "")
        assert len(figure.axes[0].containers) == 1

    def test_names_are_neither_formulas_nor_control_characters(self) -> None:
        figure = application._new_figure()
        application.draw(figure, {"a$\\frac$ \x1b--><b>": score(0.5, 1.0, 4)}, "$\\frac$ \x1b --><b>")
        ElementTree.fromstring(own.svg(figure))

    def test_the_same_scores_give_the_same_file(self, tmp_path: Path) -> None:
        for name in ("a.svg", "b.svg"):
            figure = application._new_figure()
            application.draw(figure, self.SCORES, "tiny-llada")
            figure.savefig(tmp_path / name, metadata={"Date": None})
        assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
        assert not re.search(r"\d{4}-\d\d-\d\dT", (tmp_path / "a.svg").read_text())


def test_the_table_is_markdown() -> None:
    lines = application.table({"a": score(0.5, 3.25), "b": score(1.0, 10)}, "caption").splitlines()
    assert lines[0] == "caption"
    assert lines[4] == "| a | 50.0% | 40.4% to 59.6% | 25.0% | 3.2 | 2.50 |"
    assert {line.count("|") for line in lines[2:]} == {7}


def test_costs_that_nfe_does_not_count_are_shown_where_there_are_any() -> None:
    drafted = replace(score(0.5, 3.25), positions=1234.4, extra_positions=1000.0, guide_nfe=2.0)
    lines = application.table({"a": drafted, "b": score(1.0, 10)}, "caption").splitlines()
    assert lines[2].endswith("| TPF | positions | extra positions | guide NFE | tokens/s |")
    assert lines[4].endswith("| 2.50 | 1,234 | 1,000 | 2.0 | 321 |")
    assert {line.count("|") for line in lines[2:]} == {11}
