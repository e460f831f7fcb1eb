"""Where a card is used: as the policy of a loaded model, and under settings that it was not made with."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import dllm
from commands import command
from dllm.calibration import Calibration, files_of
from dllm.checks import Notice
from dllm.evaluation.journal import Journal
from dllm.evaluation.likelihood import Estimate
from dllm.evaluation.records import Query
from dllm.evaluation.runner import Runner, Setting
from dllm.resolve import with_option
from dllm.samplers import PC, Calibrated, Threshold
from dllm.scripts import app
from models import random_llada, random_sdar, save_folder

CARD = {
    "sampler": {"_target_": "dllm.samplers.Threshold", "threshold": 0.5}, "knob": "threshold", "value": 0.2,
    "cache": {"_target_": "dllm.cache.Dual"}, "options": {"gen_length": 12, "block_length": 4}, "task": "toy",
    "data": {}, "n": 300, "loss": 0.1, "delta": 0.05, "bound": 0.05, "baseline": {"accuracy": 1.0, "nfe": 12.0},
}  # fmt: skip
TEST = {
    "value": 0.2,
    "n": 300,
    "mean_loss": 0.0,
    "p_value": 0.01,
    "bound": 0.05,
    "accuracy": 1.0,
    "nfe": 5.0,
    "certified": True,
}
ASK: dict[str, Any] = {"gen_length": 12, "block_length": 4}
PROMPTS = [[5, 6, 7], [8, 9], [10]]
ENDS = [*random_llada().backbone.eos_token_ids]


@pytest.fixture
def lm() -> dllm.LanguageModel:
    return random_llada()


@pytest.fixture
def made(tmp_path: Path, lm: dllm.LanguageModel) -> Callable[..., Path]:
    """Writes a card of this model."""

    def write(model: dllm.LanguageModel = lm, **changes: Any) -> Path:
        fields = CARD | {"model": "toy", "weights": model.backbone.fingerprint()} | changes
        certified = TEST | {"value": fields["value"], "bound": fields["bound"]}
        Calibration(**{"tests": [certified]} | fields).write(tmp_path / "card.json")
        return tmp_path / "card.json"

    return write


def notices(call: Callable[[], Any]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(each.message) for each in caught if issubclass(each.category, Notice)]


class TestLoading:
    @pytest.fixture
    def folder(self, tmp_path: Path, lm: dllm.LanguageModel) -> Path:
        save_folder(lm, tmp_path / "model")
        return tmp_path / "model"

    def test_the_policy_of_the_card_is_used_where_none_is_given(self, folder: Path, made: Callable[..., Path]) -> None:
        plain = dllm.load(folder, device="cpu")
        lm = dllm.load(folder, calibration=made(plain), device="cpu")
        m = lm.backbone.mask_token_id
        calls: list[Callable[..., Any]] = [
            lambda lm, *sampler: dllm.generate(lm, PROMPTS, *sampler, cache="dual", **ASK).nfe.tolist(),
            lambda lm, *sampler: [
                answer.nfe for answer in dllm.as_completed(lm, PROMPTS, *sampler, cache="dual", **ASK)
            ],
            lambda lm, *sampler: [
                frame.nfe.tolist() for frame in dllm.stream(lm, PROMPTS, *sampler, cache="dual", **ASK)
            ],
            lambda lm, *sampler: dllm.infill(lm, [[5, *[m] * 12]], *sampler, cache="dual", block_length=4).nfe.tolist(),
            engine_nfe,
        ]
        for call in calls:
            wanted = call(plain, Threshold(0.2))
            assert call(lm) == wanted
            assert call(plain) != wanted
            assert call(lm, "vanilla") == call(plain)

    def test_a_card_of_another_model_is_refused_in_one_line(self, folder: Path, made: Callable[..., Path]) -> None:
        with pytest.raises(
            ValueError, match=r"^calibration is of toy with weights .*calibrate this model with"
        ) as caught:
            dllm.load(folder, calibration=str(made(random_llada(seed=1))))
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"value": None, "tests": [TEST | {"certified": False}]}, "certifies no threshold"),
            ({"value": -1}, "is damaged"),
            ({"cache": {}}, "is damaged"),
            (
                {"tests": [TEST | {"certified": False}]},
                "none of its tests certifies threshold=0.2",
            ),
            (
                {"tests": [TEST | {"value": 0.3}]},
                "none of its tests certifies threshold=0.2",
            ),
            (
                {"tests": [TEST | {"bound": 0.06}]},
                "bound=0.05 differs from the bound of the test",
            ),
            ({"tests": [TEST | {"p_value": 0.9}]}, r"damaged \(threshold=0.2 is certified, with p_value=0.9"),
            ({"tests": [TEST | {"bound": 0.3}], "bound": 0.3}, r"is certified, with p_value=0.01 and bound=0.3"),
            ({"loss": 5.0}, r"damaged \(loss=5.0, delta=0.05 or n=300 is out of range\)"),
            ({"n": -1}, "or n=-1 is out of range"),
            ({"tests": [TEST, {"certified": False}]}, "is damaged"),
            ({"tests": [TEST | {"nfe": "12"}]}, "is damaged"),
        ],
    )
    def test_a_card_of_no_use_is_refused_before_loading(
        self, change: dict[str, Any], message: str, made: Callable[..., Path]
    ) -> None:
        with pytest.raises(ValueError, match=message):
            dllm.load("/no/such/model", calibration=made(**change))
        with pytest.raises(ValueError, match=r"calibration='/no/card.json' does not exist"):
            dllm.load("/no/such/model", calibration="/no/card.json")
        with pytest.raises(ValueError, match="calibration=5 is not a path"):
            dllm.load("/no/such/model", calibration=5)  # type: ignore[arg-type]

    def test_a_card_whose_tests_are_gone_is_damaged(self, made: Callable[..., Path]) -> None:
        file = made(value=None, tests=[TEST | {"certified": False}])
        content = json.loads(file.read_text())
        del content["tests"]
        file.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=r"is damaged \(the card has no tests\)"):
            Calibration.read(file)


def engine_nfe(lm: dllm.LanguageModel, *sampler: Any) -> list[int]:
    engine = dllm.Engine(lm, *sampler, cache="dual", batch_size=3)
    for prompt in PROMPTS:
        engine.add(prompt, **ASK)
    answers = [answer for step in engine.steps() for answer in step.answers.values()]
    return [answer.nfe for answer in answers]


class TestOtherSettings:
    @pytest.mark.parametrize(
        ("cache", "options", "told"),
        [
            ("dual", {}, None),
            (dllm.cache.Dual(measure_every=3), {}, None),
            ("none", {}, ("cache=dual", "cache=none")),
            (
                dllm.cache.Dual(measure_every=3, refresh_above=0.5), {},
                ("cache.refresh_above=null", "cache.refresh_above=0.5"),
            ),
            ("dual", {"gen_length": 16}, ("gen_length=12", "gen_length=16")),
            ("dual", {"block_length": None}, ("block_length=4", "block_length=null")),
            ("dual", {"block_length": "auto"}, ("block_length=4", "block_length=32")),
            ("dual", {"temperature": 0.7}, ("temperature=0.0", "temperature=0.7")),
            ("dual", {"temperature": 1, "top_k": 5}, ("temperature=0.0, top_k=null", "temperature=1, top_k=5")),
            ("dual", {"top_k": 5}, ("top_k=null", "top_k=5")),
            ("dual", {"top_p": 0.5}, ("top_p=null", "top_p=0.5")),
            ("dual", {"eos_token_id": 9}, (f"eos_token_id={ENDS}", "eos_token_id=[9]")),
            ("dual", {"eos_token_id": ENDS}, None),
            (
                "dual", {"temperature": 0.7, "tempered_confidence": True},
                ("temperature=0.0, tempered_confidence=false", "temperature=0.7, tempered_confidence=true"),
            ),
            ("none", {"cfg_scale": 1.5}, ("cache=dual, cfg_scale=0.0", "cache=none, cfg_scale=1.5")),
            ("dual", {"eos_suppression": "both"}, ("eos_suppression=null", "eos_suppression=both")),
            (
                "prefix", {"gen_length": 8, "block_length": 5},
                ("cache=dual, gen_length=12, block_length=4", "cache=prefix, gen_length=8, block_length=5"),
            ),
        ],
    )  # fmt: skip
    def test_are_told_once_with_both_values(
        self, cache: Any, options: dict[str, Any], told: tuple[str, str] | None, lm: Any, made: Callable[..., Path]
    ) -> None:
        sampler = Calibrated(made())
        found = notices(lambda: dllm.generate(lm, PROMPTS, sampler, cache, batch_size=2, **ASK | options))
        if told is None:
            assert found == []
            return
        (message,) = found
        assert (
            f"card.json' was measured with {told[0]}, and is used with {told[1]}: its guarantee does not hold"
            in message
        )

    def test_another_format_is_told(self, made: Callable[..., Path]) -> None:
        lm = random_llada(tokenizer=True)
        form, other = ({"type": "choice", "choice": words} for words in (["1", "2"], ["3", "4"]))
        sampler = Calibrated(made(lm, options=ASK | {"response_format": form}))
        for used, told in ((form, []), (other, ['"3", "4"']), (None, ["response_format=null"])):
            found = notices(lambda used=used: dllm.generate(lm, "Tom", sampler, "dual", **ASK, response_format=used))  # type: ignore[misc]
            assert [words in message for message, words in zip(found, told, strict=True)] == [True] * len(told)

    def test_a_block_longer_than_the_text_is_all_of_it(self, lm: Any, made: Callable[..., Path]) -> None:
        sampler = Calibrated(made(options={"gen_length": 12, "block_length": "auto"}))
        for block_length in ("auto", None, 12, 40):
            assert (
                notices(
                    lambda length=block_length: dllm.generate(
                        lm, PROMPTS, sampler, "dual", gen_length=12, block_length=length
                    )
                )
                == []
            )  # type: ignore[misc]

    def test_a_block_causal_model_has_its_own_block(self, made: Callable[..., Path]) -> None:
        lm = random_sdar()
        sampler = Calibrated(
            made(lm, cache={"_target_": "dllm.cache.Block"}, options={"gen_length": 12, "block_length": "auto"})
        )
        assert notices(lambda: dllm.generate(lm, PROMPTS, sampler, "block", gen_length=12)) == []

    def test_auto_on_the_card_is_the_models_own_block(self, made: Callable[..., Path]) -> None:
        lm, options = random_sdar(), {"gen_length": 12, "block_length": "auto"}
        other = random_sdar(block_length=2)
        assert other.backbone.fingerprint() == lm.backbone.fingerprint()
        for more in ({}, {"defaults": {"eos_token_id": [*lm.backbone.eos_token_ids], "block_length": 4}}):
            sampler = Calibrated(made(lm, cache={"_target_": "dllm.cache.Block"}, options=options, **more))
            run = partial(dllm.generate, prompts=PROMPTS, sampler=sampler, cache="block", gen_length=12)
            assert notices(partial(run, lm)) == []
            (message,) = notices(partial(run, lm, block_length=2))
            assert "was measured with block_length=4, and is used with block_length=2" in message
            if more:
                (message,) = notices(partial(run, other))
                assert "was measured with block_length=4, and is used with block_length=2" in message

    def test_null_on_the_card_is_the_end_of_text_of_that_model(self, lm: Any, made: Callable[..., Path]) -> None:
        sampler = Calibrated(made(defaults={"eos_token_id": [7], "block_length": None}))
        (message,) = notices(lambda: dllm.generate(lm, PROMPTS, sampler, "dual", **ASK))
        assert f"was measured with eos_token_id=[7], and is used with eos_token_id={ENDS}" in message

    def test_another_precision_is_told(self, made: Callable[..., Path]) -> None:
        for dtype, told in ((torch.float32, []), (torch.bfloat16, ["model.dtype=float32, and is used with model."])):
            lm = random_llada(dtype=dtype)
            sampler = Calibrated(made(lm, dtype="float32"))
            found = notices(lambda lm=lm, sampler=sampler: dllm.generate(lm, PROMPTS, sampler, "dual", **ASK))  # type: ignore[misc]
            assert [words in message for message, words in zip(found, told, strict=True)] == [True] * len(told)

    def test_what_is_filled_in_has_no_length_of_its_own(self, lm: Any, made: Callable[..., Path]) -> None:
        m, sampler = lm.backbone.mask_token_id, Calibrated(made())
        rows = [[5, *[m] * 20, 7]]
        assert notices(lambda: dllm.infill(lm, rows, sampler, "dual", block_length=4)) == []
        (message,) = notices(lambda: dllm.infill(lm, rows, sampler, "none", block_length=4))
        assert "gen_length" not in message

    def test_on_a_command_they_are_one_line(self, tmp_path: Path, made: Callable[..., Path]) -> None:
        lm = dllm.load("tiny-llada", device="cpu")
        card = made(lm, options={"gen_length": 64, "block_length": "auto"})
        asked = ["prompt=Tom", "show=none", "sampler=threshold", f"sampler.calibration={card}", "model.device=cpu"]
        said = command("generate", *asked, "gen_length=64", "cache=dual")
        assert (said.code, said.err) == (0, "")
        said = command("generate", *asked, "gen_length=64", "cache=dual", "sampler.threshold=0.2")
        assert (said.code, said.err) == (0, "")
        said = command("generate", *asked, "sampler.threshold=0.9")
        assert (said.code, said.err.count("\n")) == (2, 1)
        assert f"sampler.threshold=0.9 has no effect with sampler.calibration='{card}', which says 0.2" in said.err
        said = command("generate", *asked, "gen_length=32")
        assert (said.code, said.err.count("\n")) == (0, 1)
        assert said.err.startswith("dllm generate: warning: calibration=")
        assert "cache=dual, gen_length=64, and is used with cache=none, gen_length=32" in said.err
        evaluated = command(
            "evaluate",
            *asked[2:],
            "cache=dual",
            "task.limit=2",
            "baselines=1",
            f"out={tmp_path / 'out'}",
            "batch_size=1",
        )
        assert (evaluated.code, evaluated.err.count("warning")) == (0, 0)


@pytest.mark.parametrize("kind", ["evaluate", "generate"])
def test_a_card_that_is_replaced_before_it_is_hashed_is_noticed(
    kind: str, tmp_path: Path, made: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = dllm.load("tiny-llada", device="cpu")
    card = made(lm, options={"gen_length": 8, "block_length": "auto"})
    card.rename(tmp_path / "old.json")
    other = made(lm, options={"gen_length": 8, "block_length": "auto"}, value=0.3).rename(tmp_path / "new.json")
    (tmp_path / "old.json").rename(card)
    build = app.build_both

    def replaced(cfg: Any) -> Any:
        built = build(cfg)
        if other.exists():
            other.replace(card)
        return built

    monkeypatch.setattr(app, "build_both", replaced)
    (tmp_path / "in.jsonl").write_text('{"prompt": "Tom"}\n')
    asked = {
        "evaluate": ("task.limit=2", "baselines=0", "frames=0", f"out={tmp_path / 'out'}"),
        "generate": (f"input={tmp_path / 'in.jsonl'}", f"output={tmp_path / 'out.jsonl'}", "show=none"),
    }
    words = (kind, "sampler=threshold", f"sampler.calibration={card}", "cache=dual", "gen_length=8", *asked[kind])
    said = command(*words)
    assert said.code == 2
    assert f"{card} was changed by another program during this run" in said.err
    assert command(*words).code == 0


def test_a_moved_file_is_the_same_and_a_changed_one_is_not(made: Callable[..., Path], tmp_path: Path) -> None:
    table = tmp_path / "table.json"
    table.write_text("{}")
    policy, (bundled,) = PC(table), files_of(PC())
    (own,) = files_of(policy).values()
    assert bundled == "checkpoints/tiny-llada/frequencies.json"
    for files, now in (
        ({}, []), ({table.as_posix(): own}, [own]), ({"moved.json": own}, [own]), ({table.as_posix(): "0"}, [own]),
        ({"moved.json": "0"}, ["another file"]),
    ):  # fmt: skip
        found = Calibration.read(made(contents=files)).compared(policy)
        assert list(found.items()) == [
            (name, (then, here)) for (name, then), here in zip(files.items(), now, strict=True)
        ]


def test_several_answers_to_a_problem_are_one_problem(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from dllm.evaluation import run_folder

    real = run_folder.samples

    def twice(*arguments: Any) -> list[dict[str, Any]]:
        rows = real(*arguments)
        return [row | {"id": f"{row['id']}#{answer}"} for row in rows for answer in "01"]

    monkeypatch.setattr(run_folder, "samples", twice)
    said = command(
        "calibrate", "task.limit=12", "batch_size=12", "threads=1", "model.device=cpu", "loss=0.5", "gen_length=32",
        "values=[0.9999]", f"out={tmp_path}",
    )  # fmt: skip
    assert said.code == 0, said.err
    card = json.loads((tmp_path / "calibration.json").read_text())
    assert (card["n"], card["tests"][0]["n"]) == (12, 12)


def test_problems_with_the_same_id_are_refused(lm: dllm.LanguageModel) -> None:
    setting = Setting(lm, Threshold(0.5), dllm.cache.NoCache(), {"gen_length": 4}, Estimate())
    with pytest.raises(ValueError, match="id 'a' occurs twice among the problems; make ids unique"):
        Runner(setting, Journal(None)).answer([Query("a", [5]), Query("b", [6]), Query("a", [7])])


def test_a_damaged_card_whose_knob_is_of_no_base_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"threshold=0\.9 has no option x"):
        with_option("sampler", {"_target_": "dllm.samplers.Threshold", "threshold": 0.9}, "threshold.x", 1)
