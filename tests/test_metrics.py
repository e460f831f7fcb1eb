"""The figures of a run, checked against figures worked out by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from dllm.evaluation.metrics import cost, impossible, quality, speedup, wilson
from dllm.evaluation.records import Record

ONE = Record(
    id="a", text="x", completion=[1, 2], commit_step=[0, 1], confidence=[0.5, None], tokens=10, nfe=5, guide_nfe=2,
    seconds=0.5, latency=1.0, guide_seconds=0.1, positions=60, canvas=20, refreshes=1, peak_memory=100, drift=[],
)  # fmt: skip
TWO = replace(ONE, id="b", tokens=30, nfe=15, guide_nfe=0, seconds=1.5, latency=3.0, positions=300, peak_memory=70)


class TestQuality:
    def test_right_and_wrong_have_wilsons_interval(self) -> None:
        found = quality([1.0, 1.0, 0.0, 1.0])
        assert found == {"value": 0.75, "interval": list(wilson(3, 4)), "n": 4}

    @pytest.mark.parametrize("values", [[1.0] * 19 + [0.5], [0.5] * 20, [0.5, 1.0], [0.99, 1.0], [0.1], [0.1] * 3])
    def test_scores_from_0_to_1_have_an_interval_within_that_is_never_empty(self, values: list[float]) -> None:
        found = quality(values)
        low, high = found["interval"]
        assert 0 <= low < found["value"] < high <= 1
        assert (low, high) == wilson(sum(values), len(values))
        for end in (low, high):  # where the mean is 1.96 standard deviations away, of right and wrong answers
            assert abs(found["value"] - end) == pytest.approx(1.959964 * (end * (1 - end) / len(values)) ** 0.5)

    @pytest.mark.parametrize("interval", [[-math.inf, math.inf], [0.2, 1e308], [math.nan, 0.9]])
    def test_no_interval_is_infinite(self, interval: list[float]) -> None:
        scores = {"f1": {"value": 0.5, "interval": interval, "n": 4}}
        said = impossible({"scores": scores, "accuracy": 0.5, "accuracy_interval": [0.4, 0.6]})
        assert said == f"the interval {interval} of f1"

    def test_other_scores_have_an_interval_of_standard_errors(self) -> None:
        found = quality([0.0, 5.0, 10.0])
        assert found["value"] == 5
        assert found["interval"] == pytest.approx([5 - 1.959964 * 5 / 3**0.5, 5 + 1.959964 * 5 / 3**0.5])

    def test_a_single_such_score_has_none(self) -> None:
        assert quality([3.0])["interval"] is None


class TestCost:
    def test_means_sums_and_ratios(self) -> None:
        found = cost([ONE, TWO])
        assert found["nfe"] == 10
        assert found["nfe_error"] == pytest.approx(5.0)  # the standard deviation is 50 ** 0.5
        assert found["tpf"] == 40 / 20
        assert (found["tokens"], found["tokens_per_sample"]) == (40, 20)
        assert found["tokens_per_second"] == 40 / 2.0
        assert found["latency_p50"] == 2.0
        assert found["latency_p95"] == pytest.approx(2.9)
        assert (found["guide_nfe"], found["guide_seconds"]) == (1.0, pytest.approx(0.2))
        assert found["positions"] == 180
        assert found["computed_share"] == 360 / (20 * 20)
        assert (found["refreshes"], found["peak_memory"], found["drift"]) == (1.0, 100, None)

    def test_several_answers_to_a_sample_are_one_cost(self) -> None:
        answers = [replace(each, id=f"{each.id}#0{suffix}") for each in (ONE, TWO) for suffix in ("", ".1", ".2")]
        one, three = cost([ONE, TWO]), cost(answers)
        for name in ("nfe", "nfe_error", "tokens", "tokens_per_sample", "guide_nfe", "positions", "refreshes"):
            assert three[name] == pytest.approx(3 * one[name])
        for name in ("tpf", "tokens_per_second", "computed_share", "latency_p50"):
            assert three[name] == one[name]

    def test_one_sample_has_no_standard_error(self) -> None:
        assert cost([ONE])["nfe_error"] is None

    def test_nothing_generated_costs_nothing_that_could_be_told(self) -> None:
        assert set(cost([]).values()) == {None}
        assert set(cost([])) == set(cost([ONE]))

    def test_drift_is_over_what_was_compared(self) -> None:
        measured = [[[0.1, 0.2, 1, 4], [0.2, 0.3, 0, 6]], [[0.3, 0.1, 2, 20]]]
        records = [replace(ONE, drift=each) for each in measured] + [TWO]
        drift = cost(records)["drift"]
        assert drift["measured"] == 3
        assert drift["kv_error"] == pytest.approx(0.2)
        assert drift["worst_kv_error"] == 0.3
        assert drift["kl"] == pytest.approx(0.6 / 30)
        assert drift["flips"] == pytest.approx(0.1)


class TestSpeedup:
    BASELINE = {"ids": ["a"], "tokens": 10, "seconds": 2.0, "nfe": 20}  # noqa: RUF012

    def test_it_is_over_the_samples_that_both_answered(self) -> None:
        found = speedup([ONE, TWO], {"naive": [self.BASELINE], "eos_aware": [self.BASELINE | {"nfe": 10}]})
        assert found is not None
        assert found["samples"] == 1
        assert found["naive"] == {"tokens_per_second": 5.0, "nfe": 20.0, "time": 4.0, "forwards": 4.0}
        assert found["eos_aware"]["forwards"] == 2.0

    def test_baselines_of_some_answers_tell_of_whole_samples(self) -> None:
        answers = [replace(ONE, id=f"{name}#0{suffix}") for name in "ab" for suffix in ("", ".1")]
        baseline = {"ids": ["a#0", "a#0.1", "b#0"], "tokens": 30, "seconds": 6.0, "nfe": 60}
        found = speedup(answers, {"naive": [baseline], "eos_aware": [baseline]})
        assert found is not None
        assert found["samples"] == 2
        assert found["naive"] == {"tokens_per_second": 5.0, "nfe": 40.0, "time": 4.0, "forwards": 4.0}

    def test_a_shorter_answer_is_not_faster_for_being_short(self) -> None:
        short = replace(ONE, tokens=5, nfe=5, seconds=0.5)
        found = speedup([short], {"naive": [self.BASELINE], "eos_aware": [self.BASELINE]})
        assert found is not None
        assert found["naive"]["time"] == 2.0
        assert found["naive"]["forwards"] == 2.0

    def test_without_baselines_there_is_none(self) -> None:
        assert speedup([ONE], {"naive": [], "eos_aware": []}) is None
