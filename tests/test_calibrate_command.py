"""`dllm calibrate`: cards that certify, resume, and are of one model and one policy."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet
from safetensors.torch import load_file, save_file

import dllm
from commands import Outcome, command
from dllm import identity
from dllm.calibration import Calibration
from dllm.evaluation import claim
from dllm.evaluation.risk import at_most
from dllm.files import BUNDLED
from dllm.samplers import Anchored, Calibrated, LocalLeap, Threshold
from dllm.scripts import calibrate, evaluate
from dllm.tasks.arithmetic import WordProblems

SETTINGS = "task.limit=24", "batch_size=24", "threads=1", "model.device=cpu", "loss=0.2"


def run(out: Path, *options: str) -> Outcome:
    return command("calibrate", *SETTINGS, f"out={out}", "values=[0.9999,0.99,0.0]", *options)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    out = tmp_path_factory.mktemp("calibrate") / "out"
    return out, run(out)


@pytest.fixture
def card(made: tuple[Path, Outcome]) -> Path:
    return made[0] / "calibration.json"


def test_a_value_that_takes_more_forwards_is_not_called_cheaper(card: Path) -> None:
    found = Calibration.read(card)
    for nfe, told in ((32.0, "2.0x fewer forwards than"), (128.0, "2.0x as many forwards as")):
        tests: Any = [{**test, "nfe": nfe} for test in found.tests]
        there = replace(found, tests=tests, baseline=found.baseline | {"nfe": 64.0})
        assert f"NFE {nfe}, {told} one token per step" in calibrate._summary(there, card)


def test_the_fastest_certified_value_is_chosen(made: tuple[Path, Outcome], card: Path) -> None:
    outcome = made[1]
    assert outcome.code == 0, outcome.err
    found = Calibration.read(card)
    assert [test["value"] for test in found.tests] == [0.9999, 0.99, 0.0]
    assert [test["certified"] for test in found.tests] == [True, True, False]
    assert (found.knob, found.value, found.n, found.loss, found.delta) == ("threshold", 0.99, 24, 0.2, 0.05)
    assert found.bound is not None
    assert found.bound <= 0.2
    assert found.weights == dllm.load("tiny-llada", device="cpu").backbone.fingerprint()
    guarantee = "loses at most 0.2 of the problems with probability 1 - 0.05"
    assert f"threshold=0.99 is the fastest that {guarantee}: NFE " in outcome.out
    lost = next(test["mean_loss"] for test in found.tests if test["value"] == 0.99)
    assert f"lost {lost:.2%} of the problems, at most {at_most(found.bound)}" in outcome.out
    assert "share of problems lost against one token per step" in (made[0] / "calibration.svg").read_text()
    assert "not certified" in outcome.out
    assert (made[0] / "calibration.svg").read_text().startswith("<?xml")


def test_finished_runs_are_not_repeated(made: tuple[Path, Outcome], card: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in made[0].rglob("*.parquet")}
    again = run(made[0])
    assert (again.code, again.out) == (0, made[1].out)
    assert {path: path.stat().st_mtime_ns for path in made[0].rglob("*.parquet")} == before
    assert len(before) == 4


@pytest.mark.parametrize("values", ["[0.5]", "[0.9999]", "[0.99,0.9999,0.0]", "[0.9999,0.99]", "[0.9999,0.99,0.5,0.0]"])
def test_testing_ends_with_the_first_failure_for_good(
    values: str, made: tuple[Path, Outcome], card: Path, tmp_path: Path
) -> None:
    kept = card.read_bytes()
    again = run(made[0], f"values={values}")
    assert (again.code, again.err.count("\n")) == (2, 1)
    assert f"values={json.loads(values)} void the guarantee: {card} has [0.9999, 0.99, 0.0]" in again.err
    assert "(such as task.seed=N), and another out" in again.err
    assert card.read_bytes() == kept


@pytest.mark.parametrize(("other", "was"), [("seed=7", "seed=0"), ("batch_size=8", "batch_size=24")])
def test_nor_is_it_tried_again_with_another_seed_or_other_roundings(
    other: str, was: str, made: tuple[Path, Outcome], card: Path
) -> None:
    kept = card.read_bytes()
    again = run(made[0], other)
    assert (again.code, again.err.count("\n")) == (2, 1)
    assert f"{other} voids the guarantee: {card} has tests with {was}, of which the last was not certified" in again.err
    assert card.read_bytes() == kept


def test_a_failure_that_was_told_is_on_the_card_whatever_happens_next(
    made: tuple[Path, Outcome], card: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(_: Calibration) -> None:
        raise KeyboardInterrupt

    out = shutil.copytree(made[0], tmp_path / "out")
    (out / card.name).unlink()
    monkeypatch.setattr(calibrate, "_plot", stop)
    stopped = run(out)
    assert (stopped.code, "not certified" in stopped.out) == (130, True)
    assert (out / card.name).read_bytes() == card.read_bytes()
    again = run(out, "values=[0.5]")
    assert again.code == 2 and "testing ends there for these problems" in again.err


def test_a_certificate_is_not_lost_to_other_values(tmp_path: Path) -> None:
    card = tmp_path / "calibration.json"
    assert run(tmp_path, "values=[0.9999]").code == 0
    kept = card.read_bytes()
    other = run(tmp_path, "values=[0.0]")
    assert (other.code, other.err.count("\n")) == (2, 1)
    assert f"values=[0.0] do not begin with those that {card} certifies, [0.9999]; begin with these" in other.err
    assert card.read_bytes() == kept
    assert run(tmp_path, "values=[0.9999,0.99]").code == 0
    assert len(Calibration.read(card).tests) == 2


def test_a_card_of_an_earlier_version_goes_on(made: tuple[Path, Outcome], card: Path, tmp_path: Path) -> None:
    out = shutil.copytree(made[0], tmp_path / "out")
    content = json.loads(card.read_text())
    earlier = {name: value for name, value in content.items() if name not in ("dtype", "defaults", "score")}
    written = json.dumps(earlier)
    (out / card.name).write_text(written)
    assert run(out).code == 0
    assert (out / card.name).read_text() == written  # runs know it by its content


def test_values_after_the_one_that_ended_testing_change_nothing(made: tuple[Path, Outcome]) -> None:
    assert run(made[0], "values=[0.9999,0.99,0.0,0.5]").out == made[1].out


def test_runs_of_two_models_are_not_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, evaluated = shutil.copytree(BUNDLED / "tiny-llada", tmp_path / "model"), evaluate.run

    def changing(*arguments: Any) -> Any:
        found = evaluated(*arguments)
        file = folder / "tokenizer_config.json"
        file.write_text(file.read_text() + " ")
        return found

    monkeypatch.setattr(evaluate, "run", changing)
    result = command(
        "calibrate",
        f"model={folder}",
        "values=[0.9]",
        "task.limit=2",
        "gen_length=8",
        "threads=1",
        f"out={tmp_path}/out",
    )
    assert result.code == 2
    assert "is not that of the runs before, as another program changed it meanwhile" in result.err
    assert not (tmp_path / "out" / "calibration.json").exists()


@pytest.mark.parametrize("content", ["precious", "card"])
def test_what_comes_to_the_place_of_a_card_is_kept(
    content: str, card: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluated, place = evaluate.run, tmp_path / "out" / "calibration.json"

    def coming(*arguments: Any) -> Any:
        place.write_text(card.read_text() if content == "card" else content)
        return evaluated(*arguments)

    monkeypatch.setattr(evaluate, "run", coming)
    result = command("calibrate", "values=[0.9]", "task.limit=2", "gen_length=8", "threads=1", f"out={tmp_path}/out")
    assert result.code == 2
    assert place.read_text() == (card.read_text() if content == "card" else content)


def test_samples_that_were_changed_certify_nothing(made: tuple[Path, Outcome], card: Path) -> None:
    for file in made[0].rglob("samples.parquet"):
        content, before = file.read_bytes(), card.read_bytes()
        table = parquet.read_table(file)
        right = pa.array([1.0] * len(table))
        answers = table.column_names.index("final answer")
        for changed in (table.slice(1), table.set_column(answers, "final answer", right)):
            parquet.write_table(changed, file)
            again = run(made[0])
            assert (again.code, again.err.count("\n")) == (2, 1)
            assert f"{file} was changed since results.json was written; remove {file.parent}" in again.err
        file.write_bytes(content)
        assert card.read_bytes() == before


def test_a_card_of_another_score_is_not_replaced(made: tuple[Path, Outcome], card: Path) -> None:
    content = card.read_bytes()
    assert Calibration.read(card).score == "final answer"
    other = json.dumps(json.loads(content) | {"score": "strict"})
    card.write_text(other)
    again = run(made[0])
    assert (again.code, again.err.count("\n")) == (2, 1)
    assert "holds a card of another task.metric (strict); this run has final answer" in again.err
    assert card.read_text() == other
    card.write_bytes(content)


def test_losses_are_those_of_the_samples(made: tuple[Path, Outcome], card: Path) -> None:
    pandas = pytest.importorskip("pandas")
    folders = {path.parent.name.rpartition("-")[0]: path for path in made[0].rglob("samples.parquet")}
    base = pandas.read_parquet(folders["vanilla"]).set_index("id")["final answer"]
    for test in Calibration.read(card).tests:
        name = next(name for name in folders if name.endswith(f"threshold={test['value']!r}"))
        other = pandas.read_parquet(folders[name]).set_index("id")["final answer"]
        assert test["mean_loss"] == pytest.approx((base - other).clip(lower=0).mean())


def test_a_card_sets_the_policy(card: Path) -> None:
    lm = dllm.load("tiny-llada", device="cpu")
    prompts = ["Tom has 3 apples and buys 4.", "Ann has 20 pens. She gives 6 away."]
    expected = dllm.generate(lm, prompts, Threshold(0.99), gen_length=64)
    for sampler in (Calibrated(card), Calibrated(card, Threshold(0.3))):
        found = dllm.generate(lm, prompts, sampler, gen_length=64)
        assert found.sequences.tolist() == expected.sequences.tolist()
        assert found.nfe.tolist() == expected.nfe.tolist()
    options = ["prompt=Tom has 3 apples and buys 4.", "gen_length=64", "show=none", "sampler=threshold"]
    told = command("generate", *options, f"sampler.calibration={card}")
    plain = command("generate", *options, "sampler.threshold=0.99")
    assert (told.code, told.err) == (0, "")
    assert told.out.splitlines()[:2] == plain.out.splitlines()[:2]


def test_the_knob_of_a_policy_over_another_is_that_of_its_base(tmp_path: Path) -> None:
    over = "sampler=anchored", "sampler.base=tiny/threshold", "values=[0.9999,0.0]"
    outcome = run(tmp_path, *over)
    assert outcome.code == 0, outcome.err
    assert "base.threshold=0.9999 is the fastest that loses at most 0.2" in outcome.out
    card = tmp_path / "calibration.json"
    assert Calibration.read(card).knob == "base.threshold"
    wanted = Anchored(Threshold(0.9999))
    assert Calibrated(card).policy == Calibrated(card, Anchored(Threshold(0.5))).policy == wanted
    with pytest.raises(ValueError, match=r"is of .*use this policy with these options"):
        Calibrated(card, Anchored(LocalLeap()))
    refused = run(tmp_path, *over, "knob=base.at_least", "values=[1,2]")
    assert refused.code == 2
    assert "holds a card of another knob (base.threshold)" in refused.err


def test_a_card_is_of_one_model_and_policy(card: Path) -> None:
    with pytest.raises(ValueError, match=r"calibration is of tiny-llada with weights .* calibrate this model with"):
        dllm.generate(dllm.load("tiny-dream", device="cpu"), ["Tom"], Calibrated(card))
    for other in (Threshold(0.9, at_least=2), LocalLeap()):
        with pytest.raises(ValueError, match=r"is of .*use this policy with these options"):
            Calibrated(card, other)
    refused = command(
        "generate", "prompt=Tom", "sampler=threshold", f"sampler.calibration={card}", "sampler.at_least=2"
    )
    assert refused.code == 2
    assert refused.err.count("\n") == 1
    assert f"sampler.calibration='{card}' is of" in refused.err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        ("{", "is not JSON"),
        ("{}", "is not a card of dllm calibrate"),
        ('{"format": "dllm-calibration", "version": 1}', "is damaged"),
    ],
)
def test_what_is_no_card_is_refused(content: str | None, message: str, tmp_path: Path) -> None:
    file = tmp_path / "card.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ValueError, match=message):
        Calibrated(file)
    refused = command("generate", "prompt=Tom", "sampler=threshold", f"sampler.calibration={file}")
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    assert message in refused.err


def test_a_card_without_a_certified_value_says_so(card: Path, tmp_path: Path) -> None:
    content: dict[str, Any] = json.loads(card.read_text())
    none = tmp_path / "none.json"
    none.write_text(json.dumps(content | {"value": None, "tests": [], "loss": 0.0123456789, "delta": 1e-7}))
    guarantee = r"loses at most 0\.0123456789 of the problems with probability 1 - 1e-07"
    with pytest.raises(ValueError, match=rf"certifies no threshold: none {guarantee}; calibrate with safer values"):
        Calibrated(none)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["loss=0"], "loss=0"),
        (["delta=1"], "delta=1"),
        (["values=[]"], "values=[] are none"),
        (["values=[0.9,0.9]"], "not distinct"),
        (["values=[0.9,-1]"], "values[1]=-1 is not valid for threshold"),
        (["knob=nothing"], "unknown knob='nothing'; expected one of threshold, at_least, steps, steps_per_block"),
        (["sampler=edit", "knob=base.no"], "expected one of editing_threshold, max_post_steps, base, base.threshold, "),
        (["knob=at_least", "values=null"], "knob=at_least needs values="),
        (["sampler=freedave", "values=null"], "sampler=freedave has no knob of its own"),
        (["sampler.calibration=x.json"], "sampler.calibration has no effect here"),
        (["knob=at_least", "values=[1.5]"], "values[0]=1.5 is not valid for at_least"),
    ],
)
def test_bad_options_are_told_in_one_line(options: list[str], message: str, tmp_path: Path) -> None:
    outcome = run(tmp_path / "out", *options)
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert message in outcome.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["tiny/localleap", "hierarchical", "prophet", "learn2pd", "eb"])
def test_the_usual_values_suit_the_other_options(name: str, tmp_path: Path) -> None:
    outcome = command("calibrate", f"sampler={name}", "task.limit=1", "gen_length=32", "threads=1", f"out={tmp_path}")
    assert (outcome.code, outcome.out.count("not certified")) == (0, 1)


def test_a_format_is_known_by_its_content(tmp_path: Path) -> None:
    form, out = tmp_path / "form.json", tmp_path / "out"
    for text in ("1", "2"):
        form.write_text(json.dumps({"type": "choice", "choice": [text]}))
        outcome = run(out, "task.limit=1", "values=[0.5]", f"response_format={form}")
        assert outcome.code == (0 if text == "1" else 2), outcome.err
    assert 'response_format ({"type": "choice", "choice": ["1"]}); this run has {"type": ' in outcome.err


def test_files_of_others_are_kept(tmp_path: Path) -> None:
    (tmp_path / "calibration.json").write_text("mine")
    outcome = run(tmp_path)
    assert outcome.code == 2
    assert "is not a card of dllm calibrate" in outcome.err
    assert (tmp_path / "calibration.json").read_text() == "mine"


def test_one_that_is_being_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claim.Claim.__init__, "__defaults__", (0.0,))
    with claim.claimed(tmp_path / "out" / "calibration.json", "", ""):
        told = run(tmp_path / "out")
    assert told.code == 2 and "is being written by process" in told.err and "another out" in told.err
    assert list((tmp_path / "out").iterdir()) == []


def test_a_card_of_another_setting_is_kept(made: tuple[Path, Outcome], card: Path) -> None:
    before = card.read_bytes()
    for other, told in (
        ("cache=dual", "cache ("),
        ("sampler=credit", "sampler ("),
        ("delta=0.2", "delta (0.05); this run has 0.2, which voids the guarantee: "),
        ("sampler.at_least=2", "sampler ("),
        ("gen_length=40", "gen_length (64); this run has 40: "),
        ("block_length=8", "block_length (auto); this run has 8: "),
        ("temperature=0.5", "temperature (null); this run has 0.5: "),
        ("response_format={type: choice, choice: [a]}", 'response_format (null); this run has {"type": "choice", '),
        ("task.limit=20", "task.limit (24); this run has 20, which voids the guarantee"),
    ):
        refused = run(made[0], other)
        assert (refused.code, refused.err.count("\n")) == (2, 1)
        assert f"holds a card of another {told}" in refused.err
        again = other.partition("=")[0] in ("delta", "task.limit", "sampler.at_least")
        assert ("use problems that were not tested yet" in refused.err) == again
        assert ("give another out, or remove" in refused.err) != again
    assert card.read_bytes() == before


def test_a_card_of_other_data_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = "values=[0.9999]", "task.limit=2", "gen_length=8"
    monkeypatch.setattr(WordProblems, "check", lambda self: {"test": "a"})
    assert run(tmp_path, *options).code == 0
    before = (tmp_path / "calibration.json").read_bytes()
    monkeypatch.setattr(WordProblems, "check", lambda self: {"test": "b"})
    refused = run(tmp_path, *options)
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    assert "holds a card of another task.test_sha256 (a); this run has b: give another out" in refused.err
    assert (tmp_path / "calibration.json").read_bytes() == before


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ("model=tiny-dream", "another model ("),
        ("model.dtype=bfloat16", "another model.dtype (float32); this run has bfloat16: give another out, or remove "),
    ],
)
def test_a_card_of_another_model_or_precision_is_kept(other: str, told: str, card: Path, tmp_path: Path) -> None:
    short = ("task.limit=2", "gen_length=8")
    content = json.loads(card.read_text())
    content |= {"data": content["data"] | {"limit": 2}, "options": content["options"] | {"gen_length": 8}}
    card = tmp_path / "calibration.json"
    card.write_text(json.dumps(content))
    before = card.read_bytes()
    refused = run(tmp_path, other, *short)
    assert refused.code == 2
    assert f"holds a card of {told}" in refused.err.splitlines()[-1]
    assert card.read_bytes() == before


def test_a_card_knows_the_files_of_its_policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for end in ("safetensors", "json"):
        shutil.copy(BUNDLED / "tiny-llada" / f"learn2pd.{end}", f"f.{end}")
    policy = ("sampler=learn2pd", "sampler.filter=f.safetensors")
    calibrate = ("calibrate", *SETTINGS, *policy, "task.limit=12", "values=[0.9999]", "loss=0.5", "out=cal")
    use = ("generate", *policy, "sampler.calibration=cal/calibration.json", "prompt=Tom", "gen_length=64", "show=none")
    assert command(*calibrate).code == 0
    card = Path("cal/calibration.json")
    files = Calibration.read(card).contents
    assert files.keys() == {"f.safetensors", "f.json"}
    told = command(*use)
    assert (told.code, told.err) == (0, "")
    assert command(*calibrate).code == 0
    made = files["f.safetensors"]
    save_file({name: value * 2 for name, value in load_file("f.safetensors").items()}, "f.safetensors")
    now = identity.digest(Path("f.safetensors"))[:16]
    told = command(*use)
    assert told.code == 0
    assert told.err == (
        "dllm generate: warning: calibration='cal/calibration.json' was measured with "
        f"f.safetensors={made}, and is used with f.safetensors={now}: its guarantee does not hold; calibrate with "
        "these\n"
    )
    before = card.read_bytes()
    refused = command(*calibrate)
    assert (refused.code, refused.err) == (
        2,
        f"dllm calibrate: error: out='cal' holds a card of another f.safetensors ({made}); this run has {now}: give "
        "another out, or remove cal/calibration.json\n",
    )
    assert card.read_bytes() == before
    earlier = json.loads(before)
    del earlier["contents"]
    card.write_text(json.dumps(earlier))
    told = command(*use)
    assert (told.code, told.err) == (0, "")


@pytest.mark.parametrize("change", [{"contents": 1}, {"knob": "nothing"}, {"value": -3}, {"sampler": {}}])
def test_damaged_cards_are_named(change: dict[str, Any], card: Path, tmp_path: Path) -> None:
    file = tmp_path / "card.json"
    file.write_text(json.dumps(json.loads(card.read_text()) | change))
    with pytest.raises(ValueError, match=r"card\.json' is damaged .*make it again with dllm calibrate"):
        Calibrated(file)
