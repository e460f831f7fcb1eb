"""lm-evaluation-harness: the model class answers as `dllm.generate` does, and both ways in give the same results."""

from __future__ import annotations

import copy
import json
import logging
import math
import os
import pickle
import re
import warnings
from dataclasses import replace
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
from pyarrow import parquet

import dllm
from commands import command, start
from dllm.checks import Notice
from dllm.evaluation.journal import Journal
from dllm.evaluation.likelihood import Estimate, is_greedy, loglikelihood
from dllm.evaluation.runner import Runner, Setting
from dllm.samplers import FreeDave, Threshold
from dllm.scripts import lm_eval as lm_eval_command
from dllm.tasks import word_problems
from dllm.tasks.harness import _totals
from models import random_llada

lm_eval = pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.tasks import (  # noqa: E402
    TaskManager,
    _index,
)

from dllm.evaluation import lm_eval_options as harness_options  # noqa: E402
from dllm.evaluation.lm_eval import DLLM  # noqa: E402

# One worker finds the harness's tasks once for all.
pytestmark = pytest.mark.xdist_group("harness")
TINY = dllm.load("tiny-llada")
PROBLEMS = word_problems.problems(6, 1_000_001)
TASKS = {
    "toy_generate": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: [" apples", "zzz"], max_gen_toks: 64}
filter_list:
  - name: last
    filter: [{function: regex, regex_pattern: "answer is (\\\\d+)"}, {function: take_first}]
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
    "toy_choice": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_target: 0
doc_to_choice: "{{choices}}"
target_delimiter: ""
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
    "toy_text": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{solution}}"
metric_list: [{metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}]
""",
}


@pytest.fixture(scope="session", autouse=True)
def _offline(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
            patch.setenv(name, "1")
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("hf")))
        yield


@pytest.fixture(scope="session", autouse=True)
def _own_definitions_read_once() -> Any:
    """The harness reads its own 13,000 files for each index; they do not change."""
    inner, own, known = _index.load_yaml, Path(lm_eval.__file__).parent, {}

    def load_yaml(path: Path, **options: Any) -> Any:
        if own not in path.parents:
            return inner(path, **options)
        key = path, *sorted(options.items())
        if key not in known:
            known[key] = inner(path, **options)
        return copy.deepcopy(known[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_index, "load_yaml", load_yaml)
        yield


@pytest.fixture(scope="session")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of task definitions over word problems."""
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "problems.jsonl"
    rows = [
        {
            "question": problem.question,
            "answer": str(problem.answer),
            "choices": [problem.solution, problem.solution.replace(str(problem.answer), str(problem.answer + 1))],
            "solution": problem.solution,
        }
        for problem in PROBLEMS
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in TASKS.items():
        where = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: '{data}'}}}}\ntest_split: test\n"
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{where}{text}")
    return folder


def model(**options: Any) -> DLLM:
    chosen = {name: options.pop(name) for name in ("estimate", "lm") if name in options}
    setting = Setting(
        lm=chosen.get("lm", TINY),
        sampler=dllm.samplers.LocalLeap(threshold=0.999, relaxed_threshold=0.99),
        cache=dllm.cache.FreeCache(),
        options={"batch_size": 4, **options},
        estimate=chosen.get("estimate", Estimate(samples=8)),
    )
    return DLLM(Runner(setting, Journal(None)))


def asking(context: str, place: int = 0, **kwargs: Any) -> Instance:
    return Instance("generate_until", {}, (context, kwargs), 0, metadata=("toy", place, 1))


class TestGenerateUntil:
    QUESTIONS = [problem.question for problem in PROBLEMS]  # noqa: RUF012

    def test_answers_are_those_of_generate(self) -> None:
        asked = [asking(text, place, until=[], max_gen_toks=64) for place, text in enumerate(self.QUESTIONS)]
        expected = dllm.generate(
            TINY, self.QUESTIONS, "tiny/localleap", "freecache", gen_length=64, batch_size=4, seed=0
        )
        assert model().generate_until(asked) == expected.texts

    def test_stop_strings_end_the_answer_before_it_is_counted(self) -> None:
        whole, cut = model(), model()
        (full,) = whole.generate_until([asking(self.QUESTIONS[0], until=[], max_gen_toks=64)])
        (part,) = cut.generate_until([asking(self.QUESTIONS[0], until=[" answer"], max_gen_toks=64)])
        assert part == full[: full.index(" answer")]
        assert cut.runner.records()[0].tokens < whole.runner.records()[0].tokens

    def test_one_stop_string_need_not_be_a_list(self) -> None:
        (part,) = model().generate_until([asking(self.QUESTIONS[0], until=" answer", max_gen_toks=64)])
        assert "answer" not in part

    def test_requests_of_unlike_options_keep_their_order(self) -> None:
        lengths = [8, 64, 8, 32]
        lm = model()
        asked = enumerate(zip(self.QUESTIONS, lengths, strict=False))
        lm.generate_until([asking(text, place, until=[], max_gen_toks=length) for place, (text, length) in asked])
        found = {record.id: len(record.completion) for record in lm.runner.records()}
        assert [found[f"toy/{place}#0"] for place in range(4)] == lengths

    def test_answers_are_as_long_as_asked_where_they_fit(self) -> None:
        small = random_llada(tokenizer=True, seed=1, max_length=160)
        asked, lm = "Tom has", model(lm=small)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            lm.generate_until([asking(asked, until=[], max_gen_toks=120)])
        with pytest.warns(
            UserWarning, match="some answers have 80 tokens, as prompt and answer exceed the context of 160"
        ):
            lm.generate_until([asking(asked, 1, until=[], max_gen_toks=1000)])
        assert [len(record.completion) for record in lm.runner.records()] == [120, 80]

    def test_options_that_cannot_be_read_are_named(self) -> None:
        with pytest.raises(ValueError, match="max_gen_toks=0 is out of range"):
            model().generate_until([asking("a", until=[], max_gen_toks=0)])
        with pytest.raises(ValueError, match="do_sample='maybe' is not true or false"):
            model().generate_until([asking("a", until=[], do_sample="maybe")])
        with pytest.raises(ValueError, match="greedy='maybe' is not true or false"):
            DLLM.create_from_arg_obj({"pretrained": "tiny-llada", "greedy": "maybe"})

    def test_what_the_user_sets_goes_before_the_task(self) -> None:
        lm = model(gen_length=16, temperature=0.0)
        lm.generate_until([asking(self.QUESTIONS[0], until=[], max_gen_toks=64, do_sample=True, temperature=5.0)])
        assert len(lm.runner.records()[0].completion) == 16
        (greedy,) = model(gen_length=16).generate_until([asking(self.QUESTIONS[0], until=[])])
        assert lm.runner.records()[0].text == greedy

    def test_a_task_that_samples_is_sampled(self) -> None:
        hot = {"do_sample": True, "temperature": 3.0, "max_gen_toks": 32, "until": []}
        texts = {model().generate_until([asking(self.QUESTIONS[0], **hot)])[0] for _ in range(2)}
        (greedy,) = model().generate_until([asking(self.QUESTIONS[0], until=[], max_gen_toks=32)])
        assert len(texts) == 1, "seeded"
        same = model()
        assert {same.generate_until([asking(self.QUESTIONS[0], **hot)])[0] for _ in range(2)} == texts
        assert texts != {greedy}

    def test_chats_are_read_through_the_template(self) -> None:
        lm = model()
        text = lm.apply_chat_template([{"role": "user", "content": self.QUESTIONS[0]}])
        assert text == TINY.tokenizer.apply_chat_template(
            [{"role": "user", "content": self.QUESTIONS[0]}], tokenize=False, add_generation_prompt=True
        )
        lm.generate_until([asking(text, until=[], max_gen_toks=32)])
        chat = [{"role": "user", "content": self.QUESTIONS[0]}]
        expected = dllm.generate(TINY, [chat], "tiny/localleap", "freecache", gen_length=32)
        assert lm.runner.records()[0].text == expected.texts[0]

    def test_special_tokens_are_left_out_of_chats_alone(self, monkeypatch: pytest.MonkeyPatch) -> None:
        lm, told = model(), list[bool]()
        monkeypatch.setattr("dllm.evaluation.lm_eval.tokens_of", lambda *_, special=False: [told.append(special), 5])
        for chat in ([{"role": "user", "content": "a"}], [{"role": "user", "content": "b"}]):
            text = lm.apply_chat_template(chat)
            lm.tok_encode(text)
            lm._encode_pair("plain", " text")
            assert not told[0] and all(told[1:]), told
            told.clear()
        scored = [Instance("loglikelihood", {}, (context, " 5"), 0) for context in (text, "plain")]
        monkeypatch.setattr(lm, "_score", lambda *_: (0.0, True))
        monkeypatch.setattr(lm, "_encode_pair", lambda context, more: (lm.tok_encode(context + more), []))
        lm.loglikelihood(scored)
        assert told == [False, True]

    def test_a_chat_template_is_chosen_by_its_name(self) -> None:
        own = model(lm=replace(TINY, tokenizer=copy.deepcopy(TINY.tokenizer)))
        own.tokenizer.chat_template = {"default": "D{{ messages[0].content }}", "other": "O{{ messages[0].content }}"}
        written, keys = [], []
        for name in (False, True, "other", False):
            own.chat_template(name)
            written.append(own.apply_chat_template([{"role": "user", "content": "a"}]))
            keys.append(own.tokenizer_name)
        assert written == ["Da", "Da", "Oa", "Da"]
        assert keys[2] not in (keys[0], keys[1])
        with pytest.raises(ValueError, match="'nonsense' is not available"):
            own.chat_template("nonsense")
        own.tokenizer.chat_template = None
        with pytest.raises(ValueError, match="has no chat template; leave it out"):
            own.chat_template(True)

    def test_chats_of_the_request_cache_are_chats(self, monkeypatch: pytest.MonkeyPatch) -> None:
        told = list[bool]()
        monkeypatch.setattr("dllm.evaluation.lm_eval.tokens_of", lambda *_, special=False: [told.append(special), 5])
        kept = pickle.dumps(asking(model().apply_chat_template([{"role": "user", "content": "a"}])))
        model().tok_encode(pickle.loads(kept).args[0])
        assert told == [False]

    def test_prompts_that_do_not_fit_lose_their_beginning(self) -> None:
        lm = model(lm=random_llada(tokenizer=True, seed=1, max_length=40))
        with pytest.warns(UserWarning, match="truncated on the left"):
            texts = lm.generate_until([asking(self.QUESTIONS[0] * 3, until=[], max_gen_toks=16)])
        assert len(texts) == lm.truncated == 1

    def test_documents_that_do_not_fit_are_counted_once(self) -> None:
        lm = model(lm=random_llada(tokenizer=True, seed=1, max_length=40), estimate=Estimate(samples=1))
        long, short = self.QUESTIONS[0] * 3, "Tom"
        choices = [
            Instance("loglikelihood", {}, (question, answer), idx, metadata=("toy", doc, 1))
            for doc, question in enumerate((short, long))
            for idx, answer in enumerate((" yes", " no", " maybe"))
        ]
        with pytest.warns(Notice, match="truncated on the left"):
            lm.loglikelihood(choices)
        assert lm.truncated == 1
        lm.generate_until([asking(long, until=[], max_gen_toks=4) for _ in range(3)])  # three answers to one prompt
        assert lm.truncated == 2


class TestLikelihood:
    def test_it_is_that_of_the_estimate(self) -> None:
        lm = model(estimate=Estimate(samples=4, seed=3))
        question, solution = PROBLEMS[0].question, PROBLEMS[0].solution
        request = Instance("loglikelihood", {}, (question, " " + solution), 0, metadata=("toy", 0, 1))
        ((value, greedy),) = lm.loglikelihood([request])
        prefix, target = lm._encode_pair(question, " " + solution)
        assert value == loglikelihood(TINY, prefix, target, Estimate(samples=4, seed=3))
        assert greedy == is_greedy(TINY, prefix, target)

    def test_rolling_scores_every_token_once(self) -> None:
        short = random_llada(tokenizer=True, seed=1, max_length=12)
        lm = model(lm=short, estimate=Estimate(method="chain", order="left_to_right"))
        text = PROBLEMS[0].solution
        count = len(short.tokenizer(text, add_special_tokens=False).input_ids)
        scored: list[int] = []
        score = lm.runner.score

        def counting(name: str, prefix: list[int], target: list[int], greedy: bool) -> tuple[float, bool]:
            scored.append(len(target))
            assert len(prefix) + len(target) <= 12
            return score(name, prefix, target, greedy)

        lm.runner.score = counting  # type: ignore[method-assign]
        (value,) = lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0, metadata=("t", 0, 1))])
        assert sum(scored) == count > 12
        assert value < 0


TWO = ", ".join(f"{{metric: {name}, aggregation: mean, higher_is_better: true}}" for name in ("acc", "acc_norm"))
ARGUMENTS = {
    "pretrained": "tiny-llada", "sampler": "localleap", "sampler.threshold": 0.999, "sampler.relaxed_threshold": 0.99,
    "cache": "freecache", "estimate.samples": 4, "batch_size": 4,
}  # fmt: skip


@pytest.fixture(scope="module")
def theirs(tasks: Path) -> Any:
    """What the harness itself finds for all tasks."""
    return lm_eval.simple_evaluate(
        model="dllm", model_args=",".join(f"{k}={v}" for k, v in ARGUMENTS.items()), tasks=[*TASKS], batch_size=None,
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False), bootstrap_iters=0,
    )  # fmt: skip


@pytest.mark.parametrize("task", TASKS)
def test_both_ways_in_agree(task: str, theirs: Any, tasks: Path, tmp_path: Path) -> None:
    outcome = command(
        "evaluate", f"out={tmp_path}", f"task={task}", f"task.include_path={tasks}", "sampler=tiny/localleap",
        "cache=freecache", "estimate.samples=4", "batch_size=4", "baselines=0",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    (file,) = tmp_path.glob("*/results.json")
    found = json.loads(file.read_text())
    mine = found["details"]["results"][task]
    assert {k: v for k, v in mine.items() if "stderr" not in k} == {
        k: v for k, v in theirs["results"][task].items() if "stderr" not in k
    }
    if task == "toy_text":
        assert found["metrics"]["accuracy"] is None
        perplexity = theirs["results"][task]["word_perplexity,none"]
        assert found["metrics"]["scores"]["word_perplexity"]["value"] == perplexity > 1
        assert "nothing was generated" in outcome.out
    else:
        (accuracy,) = [v for k, v in theirs["results"][task].items() if k.startswith(("exact_match,", "acc,"))]
        assert found["metrics"]["accuracy"] == accuracy
        assert found["metrics"]["n"] == 6
        assert accuracy > 0.5


def test_the_harness_own_command_line(tasks: Path, tmp_path: Path) -> None:
    process = start(
        "lm-eval", "--model", "dllm", "--model_args", "pretrained=tiny-llada,sampler=tiny/localleap,cache=freecache",
        "--tasks", "toy_generate", "--include_path", str(tasks), "--batch_size", "auto", "--output_path", str(tmp_path),
        "--trust_remote_code", "--device", "cpu", "--gen_kwargs", "temperature=None,top_k=-1",
    )  # fmt: skip
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    assert "toy_generate" in out
    told = [line for line in err.splitlines() if line.startswith("dllm lm-eval: ")]
    assert [line.split()[2].partition("=")[0] for line in told] == ["trust_remote_code", "batch_size"]
    (file,) = tmp_path.rglob("results_*.json")
    assert json.loads(file.read_text())["results"]["toy_generate"]["exact_match,last"] >= 0.5


def test_the_harness_finds_the_class_by_itself() -> None:
    (found,) = entry_points(group="lm_eval.models", name="dllm")
    assert found.load() is DLLM


def test_likelihoods_are_those_of_the_options() -> None:
    lm = DLLM.create_from_arg_string("pretrained=tiny-llada,seed=7,cfg_scale=1.5", {"batch_size": "4", "device": "cpu"})
    assert lm.runner.setting.estimate == Estimate(seed=7, cfg_scale=1.5)


def test_other_names_of_the_length_are_known_and_the_rest_is_told() -> None:
    lm = model()
    with pytest.warns(UserWarning, match="num_beams have no effect"):
        lm.generate_until([asking("Tom has 3 pens.", until=[], max_new_tokens=4, num_beams=3)])
    assert len(lm.runner.records()[0].completion) == 4


class TestWordsOfOthers:
    """Options of published commands, which were written for transformers or vLLM."""

    @pytest.mark.filterwarnings("ignore")
    @pytest.mark.parametrize(
        ("asked", "expected"),
        [
            ({"temperature": None}, {}),
            ({"temperature": None, "do_sample": None, "top_p": None, "top_k": None, "until": None}, {}),
            ({"temperature": 0.8, "do_sample": False, "top_p": 0.9, "top_k": 50}, {}),
            ({"temperature": 0, "do_sample": True, "top_k": -1}, {}),
            ({"temperature": "0.8", "top_k": -1, "top_p": 1.0}, {"temperature": 0.8}),
            ({"temperature": 0.8, "top_k": 0, "top_p": 1}, {"temperature": 0.8}),
            ({"temperature": 0.8, "top_k": 50, "top_p": 0.9}, {"temperature": 0.8, "top_k": 50, "top_p": 0.9}),
            ({"do_sample": True, "temperature": None}, {"temperature": 1.0}),
            ({"do_sample": "false", "temperature": 0.7}, {}),
            ({"num_beams": 1, "use_cache": True}, {}),
        ],
    )
    def test_what_means_off_is_off(self, asked: dict[str, Any], expected: dict[str, Any]) -> None:
        options, stops = harness_options.generation({"max_gen_toks": 8} | asked, 5, lambda message: None)
        off = {"temperature": 0.0, "top_p": None, "top_k": None}
        assert options == off | expected | {"gen_length": 8}
        assert stops == ()
        (text,) = model().generate_until([asking("Tom has 3 pens.", max_gen_toks=8, **asked)])
        assert isinstance(text, str)

    @pytest.mark.parametrize(
        ("asked", "length"),
        [
            ({"max_gen_toks": None, "max_new_tokens": 7}, 7),
            ({"max_tokens": "9"}, 9),
            ({"max_length": 30}, 25),
            ({"max_length": None, "max_tokens": 30}, 30),
            ({}, 256),
        ],
    )
    def test_lengths_by_any_name(self, asked: dict[str, Any], length: int) -> None:
        assert harness_options.generation(asked, 5, pytest.fail)[0]["gen_length"] == length

    def test_the_last_of_several_lengths_is_used_and_told(self) -> None:
        told: list[str] = []
        task = {"max_gen_toks": 48, "until": []}
        options, _ = harness_options.generation(task | {"max_new_tokens": 8}, 5, told.append)
        assert options["gen_length"] == 8
        assert told == ["max_new_tokens=8 is used, not max_gen_toks=48, which is given as well"]
        assert harness_options.generation(task | {"max_tokens": 48}, 5, pytest.fail)[0]["gen_length"] == 48
        assert harness_options.generation(task | {"max_length": 20}, 5, told.append)[0]["gen_length"] == 15
        assert told[1:] == ["max_length=20 is used, not max_gen_toks=48, which is given as well"]

    def test_what_goes_before_the_task_is_told(self) -> None:
        asked = asking("Tom has 3 pens.", max_gen_toks=48, do_sample=True, temperature=0.5)
        with pytest.warns(UserWarning, match="of the model arguments") as told:
            model(gen_length=8, temperature=0.0).generate_until([asked, asked])
        assert [str(each.message) for each in told] == [
            "gen_length=8 of the model arguments is used, not 48 of the task",
            "temperature=0.0 of the model arguments is used, not 0.5 of the task",
        ]

    def test_sampling_without_a_seed_is_told(self) -> None:
        asked = asking("Tom has 3 pens.", max_gen_toks=4, do_sample=True, temperature=0.5)
        with pytest.warns(UserWarning, match="whatever --seed says; use --model_args seed=N"):
            model().generate_until([asked])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            DLLM(model().runner, seed=0).generate_until([asked])

    def test_stop_strings_by_any_name(self) -> None:
        for until in ("x", ["x"], ["x", "", None], ("x",)):
            assert harness_options.generation({"until": until}, 1, pytest.fail)[1] == ("x",)
        assert harness_options.generation({"until": "x", "stop": ["y"]}, 1, pytest.fail)[1] == ("x", "y")

    def test_what_has_no_effect_is_told_once(self) -> None:
        lm = model()
        asked = {"do_sample": False, "temperature": 0.7, "max_gen_toks": 4, "num_beams": 3}
        with pytest.warns(UserWarning, match="no effect") as told:
            lm.generate_until([asking("Tom has 3 pens.", place, **asked) for place in range(3)])
        words = [str(each.message) for each in told]
        assert len(words) == len(set(words)) == 2
        assert any(word.startswith("temperature=0.7 has no effect") for word in words)

    @pytest.mark.parametrize(
        "asked",
        [
            {"temperature": "warm"},
            {"temperature": 10**400},
            {"top_k": [1]},
            {"until": [3]},
            {"max_tokens": "all"},
            {"max_gen_toks": "inf"},
            {"max_gen_toks": 7.5},
            {"max_length": math.inf},
            {"top_k": "1e400", "temperature": 1},
            {"top_k": math.nan, "temperature": 1},
        ],
    )
    def test_a_value_of_another_kind_is_named(self, asked: dict[str, Any]) -> None:
        name = next(iter(asked))
        with pytest.raises(ValueError, match=f"^{name}="):
            harness_options.generation(asked, 1, pytest.fail)

    @pytest.mark.parametrize("argument", ["top_k=inf", "top_k=2.5", "batch_size=auto,max_batch_size=all"])
    def test_an_argument_that_counts_is_a_whole_number(self, argument: str) -> None:
        with pytest.raises(ValueError, match=f"^{argument.rpartition(',')[2].partition('=')[0]}="):
            DLLM.create_from_arg_string(f"pretrained=tiny-llada,{argument}", {"device": "cpu"})

    @pytest.mark.parametrize(
        ("arguments", "beside", "told"),
        [
            ("trust_remote_code=True", {}, "code of a checkpoint is never run"),
            ("", {"batch_size": "auto"}, "batch_size='auto' is not searched for; 8 rows"),
            ("", {"batch_size": "auto:4", "max_batch_size": 2}, "batch_size='auto:4' is not searched for; 2 rows"),
            ("batch_size=auto", {"batch_size": 1}, "8 rows"),
            ("parallelize=True", {}, "parallelize has no effect"),
            ("add_bos_token=True", {}, "add_bos_token has no effect"),
            ("gpu_memory_utilization=0.8", {"max_batch_size": 64}, "gpu_memory_utilization has no effect"),
        ],
    )
    def test_arguments_without_effect_are_told(self, arguments: str, beside: dict[str, Any], told: str) -> None:
        with pytest.warns(UserWarning, match=told) as words:
            lm = DLLM.create_from_arg_string(f"pretrained=tiny-llada,{arguments}", {"device": "cpu"} | beside)
        assert len(words) == 1
        assert lm.runner.setting.options["batch_size"] in (2, 8)

    def test_arguments_that_are_off_say_nothing(self, recwarn: pytest.WarningsRecorder) -> None:
        arguments = "trust_remote_code=False,peft=None,load_in_8bit=False,temperature=None,top_k=-1,dtype=torch.float32"
        lm = DLLM.create_from_arg_string(f"pretrained=tiny-llada,{arguments}", {"batch_size": "3", "device": None})
        options = lm.runner.setting.options
        assert (options["temperature"], options["top_k"], options["batch_size"]) == (0.0, None, 3)
        assert not [each for each in recwarn if "effect" in str(each.message)]

    @pytest.mark.parametrize("given", ["peft=adapter", "load_in_8bit=True", "batch_size=many"])
    def test_what_would_change_results_is_refused(self, given: str) -> None:
        with pytest.raises(ValueError, match=given.partition("=")[0]):
            DLLM.create_from_arg_string(f"pretrained=tiny-llada,{given}")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("pretrained=tiny-llada,sampler=guess", "unknown sampler='guess'"),
        ("pretrained=tiny-llada,sampler=localleap,sampler.reach=3", "unknown option 'sampler.reach'; expected"),
        ("pretrained=tiny-llada,gen_lenght=3", "unknown option 'gen_lenght'"),
        ("sampler=freedave,sampler.base.reach=3", "unknown option 'sampler.base.reach'; expected"),
        ("sampler=freedave,sampler.base.tokens_per_step=0", "^sampler.base.tokens_per_step=0 is"),
        ("sampler=threshold,sampler.threshold.x=3", "^sampler.threshold=0.9 has no option x"),
        ("estimate.samples=0", "^estimate.samples=0 is"),
        ("estimate.sample=4", "unknown option 'estimate.sample'"),
        ("batch_size=²", "unknown batch_size='²'"),
        ("pretrained=tiny-llada,sampler=freedave,cache=dkv", "depend on the order a block is decoded in"),
        ("pretrained=/no/such/model", "/no/such/model"),
    ],
)
def test_bad_model_arguments_name_themselves(arguments: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        DLLM.create_from_arg_string(arguments, {"batch_size": 1})


@pytest.mark.parametrize("order", [1, -1])
def test_options_of_a_policy_over_another_are_those_of_its_base(order: int) -> None:
    base = ["sampler.base=threshold", "sampler.base.threshold=0.3"][::order]
    lm = DLLM.create_from_arg_string(",".join(["pretrained=tiny-llada,sampler=freedave", *base]))
    assert lm.runner.setting.sampler == FreeDave(base=Threshold(0.3))


def test_null_is_none() -> None:
    lm = DLLM.create_from_arg_string("pretrained=tiny-llada,block_length=null,top_p=null,dtype=null")
    assert lm.runner.setting.options["block_length"] is None


def test_a_missing_split_is_named(tmp_path: Path) -> None:
    data = tmp_path / "test.jsonl"
    data.write_text(json.dumps({"question": "1 + 1?", "answer": "#### 2"}) + "\n")
    outcome = command("evaluate", f"out={tmp_path}", "task=gsm8k", f"task.data={{test: {data}}}", "gen_length=8")
    assert outcome.code == 2
    assert "add train: FILE" in outcome.err
    assert "Traceback" not in outcome.err


def test_data_that_changed_and_kept_its_time_is_read_again(tmp_path: Path) -> None:
    data, tasks = tmp_path / "test.jsonl", tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "mine.yaml").write_text(
        f"{{task: mine, dataset_path: json, dataset_kwargs: {{data_files: {{test: {data}}}}}, test_split: test, "
        "output_type: generate_until, doc_to_text: '{{question}}', doc_to_target: '{{answer}}'}"
    )
    asked = ("task=mine", f"task.include_path={tasks}", "gen_length=4", "baselines=0", "frames=0")
    for count, answer in enumerate(("2", "3"), start=1):
        data.write_text(json.dumps({"question": "1 + 1?", "answer": answer}) + "\n")
        os.utime(data, (1e9, 1e9))
        for more in ((), (f"task.data={{test: {data}}}",)):
            out = tmp_path / f"out{len(more)}"
            outcome = command("evaluate", f"out={out}", *asked, *more)
            assert outcome.code == 0, outcome.err
            tables = [parquet.read_table(file).to_pylist() for file in out.glob("*/samples.parquet")]
            assert len(tables) == count
            assert answer in [row["reference"] for rows in tables for row in rows]


def test_a_cache_of_answers_of_any_model_is_refused(tasks: Path, tmp_path: Path) -> None:
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    with pytest.raises(ValueError, match=r"^use_cache: .*answers_rank0\.db may contain answers of other models"):
        lm_eval.simple_evaluate(
            model="dllm", model_args="pretrained=tiny-llada", tasks=["toy_choice"], task_manager=manager,
            use_cache=str(tmp_path / "answers"),
        )  # fmt: skip


def test_a_metric_holds_for_the_command_that_names_it(tasks: Path, tmp_path: Path) -> None:
    (tmp_path / "tasks").mkdir()
    text = (tasks / "toy_choice.yaml").read_text()
    (tmp_path / "tasks" / "toy_choice.yaml").write_text(re.sub("metric_list:.*", f"metric_list: [{TWO}]", text))
    asked = ("task=toy_choice", f"task.include_path={tmp_path / 'tasks'}", "estimate.samples=1", "baselines=0")
    for first, second in (([], ["task.metric=acc_norm"]), (["task.metric=acc_norm"], [])):
        out = tmp_path / f"out{len(first)}"
        for more in (first, second, first):
            outcome = command("evaluate", f"out={out}", *asked, *more)
            assert outcome.code == 0, outcome.err
            assert f": {'acc_norm' if more else 'acc'} " in outcome.out
        (file,) = out.glob("*/results.json")
        assert json.loads(file.read_text())["metrics"]["task_accuracy"] == "acc"


def test_a_score_that_is_no_share_is_none_of_a_finished_run_either(tasks: Path, tmp_path: Path) -> None:
    asked = ("evaluate", f"out={tmp_path}", "task=toy_text", f"task.include_path={tasks}", "estimate.samples=1")
    asked = (*asked, "baselines=0", "task.limit=1")
    refused = "task.metric='word_perplexity' is not a share of right answers of this task; use one of null: it has no"
    assert command(*asked).code == 0
    (file,) = tmp_path.glob("*/results.json")
    before = file.read_bytes()
    outcome = command(*asked, "task.metric=word_perplexity")
    assert outcome.code == 2
    assert refused in outcome.err
    assert file.read_bytes() == before


def test_totals_have_the_number_of_their_own_samples() -> None:
    found = {
        "samples": {"a": [{"doc_id": 0}], "b": [{"doc_id": 0}, {"doc_id": 0}, {"doc_id": 1}], "c": [{"doc_id": 0}] * 9},
        "results": {
            "a": {"acc,none": 1.0, "acc_stderr,none": 0.1}, "b": {"acc,none": 0.5, "brier,none": 0.2},
            "c": {"ppl,none": 3.0},
        },
        "groups": {"all": {"acc,none": 0.75, "alias": "all"}, "part": {"brier,none": 0.2}},
        "group_subtasks": {"all": ["part", "a", "c"], "part": ["b"]},
    }  # fmt: skip
    assert _totals(found) == {
        "a: acc": (1.0, 1), "b: acc": (0.5, 2), "b: brier": (0.2, 2), "c: ppl": (3.0, 1), "all: acc": (0.75, 3),
        "part: brier": (0.2, 2),
    }  # fmt: skip


def test_results_that_cannot_be_written_fail(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    tracker = logging.getLogger("lm_eval.loggers.evaluation_tracker")
    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", lambda: tracker.warning("Could not save results aggregated"))
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    with pytest.raises(SystemExit) as ended:
        lm_eval_command.main()
    assert ended.value.code == 2
    assert "error: Could not save results aggregated to --output_path; free disk space" in capsys.readouterr().err
    tracker.filters.clear()


class TestLocalFiles:
    """Real data, where it is: 20 rows of each task go through from end to end, whatever the score."""

    COMMON = ("task.limit=20", "sampler=tiny/localleap", "gen_length=4", "baselines=0", "batch_size=20")

    def test_gsm8k(self, shared: Path, tmp_path: Path) -> None:
        data = shared / "data"
        files = f"{{train: '{data}/gsm8k_train_2000.jsonl', test: '{data}/gsm8k_test.jsonl'}}"
        outcome = command("evaluate", f"out={tmp_path}", "task=gsm8k", f"task.data={files}", *self.COMMON)
        assert outcome.code == 0, outcome.err
        (file,) = tmp_path.glob("*/results.json")
        found = json.loads(file.read_text())
        assert found["metrics"]["n"] == 20
        assert set(found["metrics"]["scores"]) == {"exact_match,strict-match", "exact_match,flexible-extract"}
        assert found["details"]["n-shot"]["gsm8k"] == 5

    @pytest.mark.parametrize("execute", [True, False])
    def test_humaneval(self, execute: bool, shared: Path, tmp_path: Path) -> None:
        data = shared / "data" / "HumanEval.jsonl.gz"
        told = f"task.execute={str(execute).lower()}"
        more = ("task=humaneval", f"task.data={data}", told)
        outcome = command("evaluate", f"out={tmp_path}", *more, *self.COMMON)
        assert outcome.code == 0, outcome.err
        (file,) = tmp_path.glob("*/results.json")
        metrics = json.loads(file.read_text())["metrics"]
        assert metrics["n"] == 20
        assert (metrics["accuracy"] is not None) == execute
        assert ("not graded" in outcome.out) == (not execute)
