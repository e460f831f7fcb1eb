"""Records of answered requests: what they say is what `dllm.generate` says, and time is shared out whole."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest

import dllm
from dllm.api import prepare
from dllm.cache import NoCache
from dllm.decoding.options import parse_options
from dllm.evaluation.journal import Journal
from dllm.evaluation.metrics import cost
from dllm.evaluation.records import Query, cut, follow
from dllm.evaluation.run_folder import samples
from dllm.evaluation.runner import Runner, Setting
from dllm.tasks import word_problems
from dllm.tasks.base import Graded
from models import random_llada
from toys import Spying

TINY = dllm.load("tiny-llada")
QUESTIONS = [problem.question for problem in word_problems.problems(5, seed=1_000_001)]
REQUESTS = [Query(str(n), TINY.tokenizer(text).input_ids, seed=n) for n, text in enumerate(QUESTIONS)]
OPTIONS: dict[str, Any] = {"gen_length": 64, "batch_size": 2}


def records(sampler: Any, cache: Any, traced: frozenset[str] = frozenset(), **more: Any) -> list[Any]:
    found, size = [], (OPTIONS | more)["batch_size"]
    for start in range(0, len(REQUESTS), size):
        batch = REQUESTS[start : start + size]
        options = parse_options(OPTIONS | more | {"seed": [request.seed for request in batch]})
        made = prepare(TINY, [request.prompt for request in batch], sampler, cache, options)
        found += follow(*made, batch, traced)
    return sorted(found, key=lambda pair: int(pair[0].id))


@pytest.mark.parametrize(
    ("sampler", "cache"),
    [("tiny/localleap", "freecache"), ("ar_guided", "none"), ("freedave", "dual"), ("vanilla", "d2cache")],
)
def test_they_say_what_generate_says(sampler: str, cache: str) -> None:
    cached = dllm.cache.D2Cache(measure_every=2) if cache == "d2cache" else cache
    found = [record for record, _ in records(sampler, cached)]
    result = dllm.generate(TINY, QUESTIONS, sampler, cached, seed=0, **OPTIONS)
    assert [record.text for record in found] == result.texts
    assert [record.completion for record in found] == result.completions.tolist()
    assert [record.commit_step for record in found] == result.commit_step.tolist()
    assert [record.nfe for record in found] == result.nfe.tolist()
    assert [record.guide_nfe for record in found] == result.guide_nfe.tolist()
    stats = result.stats
    assert sum(record.tokens for record in found) == stats.tokens
    assert sum(record.positions for record in found) == stats.computed_columns
    assert sum(record.refreshes for record in found) == stats.cache_refreshes
    drift = cost(found)["drift"]
    if stats.drift is None:
        assert drift is None
    else:
        assert drift == pytest.approx({name: value for name, value in asdict(stats.drift).items() if name != "seconds"})


def test_every_token_has_the_confidence_it_was_committed_with() -> None:
    for record, _ in records("tiny/threshold", "none"):
        known = np.array([step >= 0 for step in record.commit_step])
        confidence = np.array(record.confidence, dtype=float)
        assert (~np.isnan(confidence) == known).all()
        # All but the surest token of a step are above the threshold.
        for step in set(record.commit_step) - {-1}:
            of_step = np.sort(confidence[np.array(record.commit_step) == step])
            assert (of_step[:-1] >= 0.999).all()


def test_time_is_shared_out_whole() -> None:
    found = [record for record, _ in records("vanilla", "none", batch_size=5)]
    # The rows of one batch: its end is the latency of the last, and what the steps took is the sum of the shares.
    assert sum(record.seconds for record in found) == pytest.approx(max(record.latency for record in found))
    assert sorted(found, key=lambda r: r.latency) == sorted(found, key=lambda r: r.nfe)


class TestFrames:
    def test_they_are_the_steps_that_stream_shows(self) -> None:
        (record, frames), *others = records("tiny/localleap", "none", frozenset({"0"}))
        assert all(kept is None for _, kept in others)
        shown = list(dllm.stream(TINY, QUESTIONS[0], "tiny/localleap", gen_length=64, seed=0))
        assert np.array_equal(frames.canvas, np.stack([frame.tokens[0, -64:].numpy() for frame in shown]))
        assert frames.canvas[-1].tolist() == record.completion
        assert frames.nfe.tolist() == [int(frame.nfe[0]) for frame in shown]
        assert frames.prompt.tolist() == list(REQUESTS[0].prompt)
        assert frames.computed.all()

    def test_committed_tokens_were_predicted_surely(self) -> None:
        (_, frames), *_ = records("tiny/threshold", "none", frozenset({"0"}))
        mask, before = TINY.backbone.mask_token_id, None
        for canvas, predicted, confidence in zip(frames.canvas, frames.predicted, frames.confidence, strict=True):
            new = (canvas != mask) if before is None else (canvas != mask) & (before == mask)
            asked = new & ~np.isnan(confidence)
            assert (canvas[asked] == predicted[asked]).all()
            before = canvas

    def test_computed_columns_are_those_the_cache_planned(self) -> None:
        log: list[dict[int, list[int]]] = []
        cache = Spying(dllm.cache.Dual(), log=log)
        found = records("vanilla", cache, frozenset({"0"}), batch_size=1, block_length=16)
        frames = found[0][1]
        planned = log[: len(frames.canvas)]
        assert [np.flatnonzero(step).tolist() for step in frames.computed] == [each[0] for each in planned]
        assert not frames.computed.all()

    @pytest.mark.parametrize("sampler", ["freedave", "ar_guided"])
    def test_drafts_are_accepted_where_they_are_written(self, sampler: str) -> None:
        (_, frames), *_ = records(sampler, "none", frozenset({"0"}))
        drafted = frames.drafted != TINY.backbone.mask_token_id
        accepted = drafted & (frames.drafted == frames.canvas)
        assert accepted.any()
        assert (drafted & ~accepted).any()

    def test_policies_without_drafts_have_none(self) -> None:
        (_, frames), *_ = records("vanilla", "none", frozenset({"0"}))
        assert (frames.drafted == TINY.backbone.mask_token_id).all()


class TestCut:
    TOKENS = np.array(TINY.tokenizer("Start with 12. Add 7: 12 + 7 = 19. The answer is 19.").input_ids)

    def test_text_ends_before_the_first_stop_string(self) -> None:
        text, count = cut(TINY.tokenizer, self.TOKENS, ("answer", " Add"))
        assert text == "Start with 12."
        assert "Add" in TINY.tokenizer.decode(self.TOKENS[:count])
        assert "Add" not in TINY.tokenizer.decode(self.TOKENS[: count - 1])

    def test_what_comes_after_it_is_not_counted(self) -> None:
        _, whole = cut(TINY.tokenizer, self.TOKENS, ())
        _, part = cut(TINY.tokenizer, self.TOKENS, ("Add",))
        assert part < whole == len(self.TOKENS)

    def test_strings_that_do_not_occur_change_nothing(self) -> None:
        assert cut(TINY.tokenizer, self.TOKENS, ("Question:", "")) == cut(TINY.tokenizer, self.TOKENS, ())

    def test_special_tokens_stop_as_well(self) -> None:
        eos = TINY.tokenizer.eos_token
        tokens = np.array([*self.TOKENS[:3], TINY.tokenizer.eos_token_id, *self.TOKENS[3:]])
        text, count = cut(TINY.tokenizer, tokens, (eos,))
        assert (text, count) == (TINY.tokenizer.decode(self.TOKENS[:3]), 4)

    def test_without_a_tokenizer_nothing_is_cut(self) -> None:
        assert cut(None, self.TOKENS, ("Add",)) == (None, len(self.TOKENS))


class TestRunner:
    def runner(self, journal: Journal, **options: Any) -> Runner:
        lm = random_llada(tokenizer=True, seed=3, max_length=96)
        setting = Setting(lm, dllm.samplers.Vanilla(), NoCache(), {"gen_length": 8, "batch_size": 2, **options})
        return Runner(setting, journal, baselines=1, traced=2)

    def test_what_is_noted_is_not_decoded_again(self, tmp_path: Any) -> None:
        first = self.runner(Journal(tmp_path / "journal.jsonl"))
        some = first.answer(REQUESTS[:3])
        first.close()
        second = self.runner(Journal(tmp_path / "journal.jsonl"))
        added: list[str] = []
        second.journal.add = _spying(second.journal.add, added)  # type: ignore[method-assign]
        every = second.answer(REQUESTS)
        assert every[:3] == some
        assert [each for each in added if each.startswith("record")] == ["record 3", "record 4"]
        assert not [each for each in added if each.startswith("baseline")]
        alone = self.runner(Journal(None)).answer(REQUESTS)
        assert [record.completion for record in every] == [record.completion for record in alone]

    @pytest.mark.parametrize("done", range(1, 6))
    def test_where_it_was_cut_off_changes_nothing_but_times(self, done: int) -> None:
        def runner() -> Runner:
            lm = random_llada(tokenizer=True, seed=3, max_length=96)
            options = {"gen_length": 24, "block_length": 6, "batch_size": 3}
            return Runner(Setting(lm, dllm.samplers.Threshold(0.3), dllm.cache.Dual(), options), Journal(None))

        whole, resumed = runner(), runner()
        expected = whole.answer(REQUESTS)
        for name, value in list(whole.journal.of("record").items())[:done]:
            resumed.journal.add("record", name, value)
        found = resumed.answer(REQUESTS)
        timeless = {"seconds": 0.0, "latency": 0.0, "guide_seconds": 0.0, "peak_memory": 0}
        assert [replace(each, **timeless) for each in found] == [replace(each, **timeless) for each in expected]

    def test_scores_do_not_count_as_answers(self) -> None:
        runner = self.runner(Journal(None))
        runner.score("a", [5, 6], [7], greedy=False)
        runner.answer(REQUESTS[:2])
        assert runner.baseline("naive")

    def test_frames_are_those_of_the_first_answers_however_often_it_stopped(self, tmp_path: Any) -> None:
        for count in (1, 2, 5):
            runner = self.runner(Journal(tmp_path / "journal.jsonl"))
            found = runner.answer(REQUESTS[:count])
            kept = [frames.id for frames in runner.frames(found)]
            assert kept == ["0", "1"][:count]
            runner.close()
        runner = self.runner(Journal(tmp_path / "journal.jsonl"))
        runner.close(remove=True)
        assert not list(tmp_path.iterdir())

    def test_baselines_decode_the_first_batch_one_token_per_step(self) -> None:
        runner = self.runner(Journal(None))
        runner.answer(REQUESTS)
        (naive,) = runner.baseline("naive")
        (aware,) = runner.baseline("eos_aware")
        assert sorted(naive["ids"]) == sorted(aware["ids"]) == ["0", "1"]
        assert naive["nfe"] == 16 >= aware["nfe"]

    def test_options_of_a_call_go_before_the_settings(self) -> None:
        found = self.runner(Journal(None)).answer(REQUESTS[:1], gen_length=5)
        assert len(found[0].completion) == 5


def _spying(add: Any, log: list[str]) -> Any:
    def noting(kind: str, name: str, value: Any) -> None:
        log.append(f"{kind} {name}")
        add(kind, name, value)

    return noting


def test_answers_belong_to_their_sample_whatever_the_task_is_called() -> None:
    ids = ["c#/0", "a#1/12", "plain"]
    setting = Setting(random_llada(), dllm.samplers.Threshold(0.5), NoCache(), {"gen_length": 4})
    runner = Runner(setting, Journal(None))
    runner.answer([Query(f"{name}{number}", [5, 6]) for name in ids[:2] for number in ("#0", "#0.1")])
    runner.answer([Query("plain", [7])])
    graded = Graded({"right": dict.fromkeys(ids, 1.0)}, "right", {name: {"question": name} for name in ids}, {})
    rows = samples(runner.records(), graded)
    assert [row["question"] for row in rows] == ["c#/0", "c#/0", "a#1/12", "a#1/12", "plain"]
    assert all(row["right"] == 1.0 for row in rows)
