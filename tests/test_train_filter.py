"""`dllm train-filter`: from prompts to a filter that samples, resumable, with a card that says what it is."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from datasets import Dataset, DatasetDict
from safetensors.torch import load_file, save_file

import dllm
from commands import Outcome, command, in_a_process, start
from dllm.evaluation import claim
from dllm.filters import ConfidenceFilter, load_filter
from dllm.samplers import Learn2PD
from dllm.scripts import train_filter as application
from models import random_llada, save_folder

LM = random_llada(tokenizer=True, max_length=128, dtype=torch.float32)
SMALL = ["prompts=6", "batch_size=4", "gen_length=12", "block_length=8", "epochs=3"]
ASK = ["Tom has 5 pens.", "Ann has 3 cups.", "He loses 2.", "She buys 7."]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_folder(LM, tmp_path_factory.mktemp("model") / "small")


def train(model: Path, out: Path, *arguments: str) -> Outcome:
    return command("train-filter", f"model={model}", f"out={out}", *SMALL, *arguments)


@pytest.fixture(scope="module")
def trained(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Outcome, Path]:
    out = tmp_path_factory.mktemp("filter") / "new" / "mine.safetensors"
    return train(model, out), out


def test_equal_prompts_are_trained_on_or_held_out(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, seen = tmp_path / "data.jsonl", []
    asked = [ASK[0], ASK[1], ASK[0], ASK[2], ASK[0], ASK[1]]
    data.write_text("".join(json.dumps({"prompt": each}) + "\n" for each in asked))
    split = application.split
    monkeypatch.setattr(application, "split", lambda *given: seen.append(split(*given)) or seen[-1])
    assert train(model, tmp_path / "f.safetensors", f"data={data}").code == 0
    ((learn, held_out),) = seen
    assert {*learn.prompt.tolist()} | {*held_out.prompt.tolist()} == {0, 1, 3}
    assert not {*learn.prompt.tolist()} & {*held_out.prompt.tolist()}
    data.write_text(json.dumps({"prompt": ASK[0]}) + "\n" + json.dumps({"prompt": ASK[0]}) + "\n")
    refused = train(model, tmp_path / "g.safetensors", f"data={data}")
    assert refused.code == 2
    assert "has one prompt 2 times, so that none can be held out; give others" in refused.err


def test_one_that_is_being_written_is_refused(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claim.Claim.__init__, "__defaults__", (0.0,))
    out = tmp_path / "mine.safetensors"
    with claim.claimed(out, "", ""):
        told = train(model, out)
    assert told.code == 2 and "is being written by process" in told.err and "another out" in told.err
    assert list(tmp_path.iterdir()) == []


def tensors(out: Path) -> dict[str, Any]:
    return {name: tensor.tolist() for name, tensor in load_file(out).items()}


class TestResult:
    def test_it_says_what_came_out(self, trained: tuple[Outcome, Path]) -> None:
        result, out = trained
        assert result.code == 0
        assert [line.split("  ")[0] for line in result.err.splitlines()][:3] == [
            "collecting 4/6", "collecting 6/6", "training 1/3",
        ]  # fmt: skip
        assert re.search(r"^6 prompts gave \d+ training records and \d+ held-out records", result.out)
        assert f"filter in {out}, card in {out.with_suffix('.json')}, plot in {out.with_suffix('.svg')}" in result.out
        assert "threshold 0.96" in result.out
        assert "at a precision of 99.9%" in result.out

    def test_the_filter_samples_with_the_model_it_was_trained_for(
        self, model: Path, trained: tuple[Outcome, Path]
    ) -> None:
        sampler = Learn2PD(str(trained[1]), 0.5)
        options = {"gen_length": 12, "block_length": 8}
        assert dllm.generate(dllm.load(model), "Tom has 5 pens.", sampler, **options).nfe.item() <= 12
        with pytest.raises(ValueError, match="is for the weights of"):
            dllm.generate(random_llada(seed=1), [[3]], sampler, **options)

    def test_the_card_says_what_it_was_trained_for_and_how_well_it_does(
        self, model: Path, trained: tuple[Outcome, Path]
    ) -> None:
        card = load_filter(trained[1]).card
        assert card is not None
        assert (card.architecture, card.block_length, card.backbone) == ("neighbours", 8, str(model))
        assert card.fingerprint == dllm.load(model).backbone.fingerprint()
        assert card.cache["_target_"] == "dllm.cache.NoCache"
        assert card.sampler["_target_"] == "dllm.samplers.Vanilla"
        assert (card.data, card.prompts, card.seed) == ("dllm.tasks.word_problems, seed 3000001", 6, 3000001)
        assert card.records["learned"] > 0 < card.records["held_out"]
        assert [row["threshold"] for row in card.held_out["thresholds"]] == [0.5, 0.7, 0.9, 0.96, 0.99, 0.999]
        assert sum(row["count"] for row in card.calibration) > 0

    def test_the_reliability_plot_is_well_formed(self, trained: tuple[Outcome, Path]) -> None:
        assert ElementTree.parse(trained[1].with_suffix(".svg")).getroot().tag.endswith("svg")

    def test_the_same_again_gives_the_same_filter(
        self, model: Path, trained: tuple[Outcome, Path], tmp_path: Path
    ) -> None:
        assert train(model, tmp_path / "again.safetensors").code == 0
        assert tensors(tmp_path / "again.safetensors") == tensors(trained[1])

    def test_the_published_form(self, model: Path, tmp_path: Path) -> None:
        assert train(model, tmp_path / "f.safetensors", "architecture=published", "hidden=5").code == 0
        network = load_filter(tmp_path / "f.safetensors").network
        assert isinstance(network, ConfidenceFilter)
        assert network.fc1.weight.shape == (5, 8)

    def test_it_lies_under_the_models_name_where_no_file_is_given(
        self, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        assert command("train-filter", f"model={model}", *SMALL).code == 0
        assert (tmp_path / "outputs" / "filters" / "small-8.safetensors").is_file()


class TestPrompts:
    def test_from_a_jsonl_file(self, model: Path, tmp_path: Path) -> None:
        lines = [json.dumps({"prompt": text}) for text in ASK]
        (tmp_path / "q.jsonl").write_text("\n".join(lines))
        assert train(model, tmp_path / "f.safetensors", f"data={tmp_path}/q.jsonl").code == 0
        card = load_filter(tmp_path / "f.safetensors").card
        assert card is not None
        assert (card.data, card.prompts) == (f"{tmp_path}/q.jsonl", 4)  # as many as there are

    @pytest.mark.parametrize("split", [None, "test"])
    def test_from_a_data_set(self, model: Path, tmp_path: Path, split: str | None) -> None:
        rows = [{"question": text, "answer": "5"} for text in ASK]
        parts = {"train": Dataset.from_list(rows), "test": Dataset.from_list(rows[:3])}
        for name, part in DatasetDict(parts).items():
            (tmp_path / "set").mkdir(exist_ok=True)
            part.to_parquet(tmp_path / "set" / f"{name}.parquet")
        arguments = [f"data={tmp_path}/set", *([f"split={split}"] if split else [])]
        assert train(model, tmp_path / "f.safetensors", *arguments).code == 0
        card = load_filter(tmp_path / "f.safetensors").card
        assert card is not None
        assert card.prompts == (3 if split else 4)
        assert card.data == f"{tmp_path}/set, split {split or 'train'}, column question"

    def test_a_data_set_is_read_anew(self, model: Path, tmp_path: Path) -> None:
        file, asked = tmp_path / "set" / "train.jsonl", []
        file.parent.mkdir()
        for name, texts in {"one": ASK, "two": ASK[::-1]}.items():
            file.write_text("".join(json.dumps({"question": text}) + "\n" for text in texts))
            os.utime(file, (1e9, 1e9))  # as copies that keep times have it
            assert train(model, tmp_path / f"{name}.safetensors", f"data={tmp_path}/set").code == 0
            asked.append(json.loads((tmp_path / f"{name}.records" / "recipe.json").read_text())["prompts"])
        assert asked[0] != asked[1]

    def test_through_the_chat_template(self, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        seen: list[Any] = []
        real = application.encode
        monkeypatch.setattr(application, "encode", lambda *args: seen.append(args[0]) or real(*args))
        assert train(model, tmp_path / "f.safetensors", "chat=true").code == 0
        assert all(chat[0]["role"] == "user" for chat in seen[0])


class TestInterruption:
    def test_what_was_decoded_is_not_decoded_again(
        self, model: Path, trained: tuple[Outcome, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        out = tmp_path / "f.safetensors"
        real, sizes = application.collect, []

        def breaking(lm: Any, prompts: Any, *rest: Any, **options: Any) -> Any:
            if len(sizes) == 1:
                raise KeyboardInterrupt
            sizes.append(len(prompts))
            return real(lm, prompts, *rest, **options)

        monkeypatch.setattr(application, "collect", breaking)
        assert train(model, out).code == 130
        assert not out.exists()
        sizes.clear()
        monkeypatch.setattr(
            application, "collect", lambda *args, **options: sizes.append(len(args[1])) or real(*args, **options)
        )
        assert train(model, out).code == 0
        assert sizes == [2]
        assert tensors(out) == tensors(trained[1])
        out.unlink()
        assert train(model, out, "architecture=published").code == 0  # another filter over the same records
        assert sizes == [2]

    @in_a_process
    def test_a_killed_run_goes_on(self, model: Path, tmp_path: Path) -> None:
        out = tmp_path / "f.safetensors"
        many = [
            "prompts=40",
            "batch_size=1",
            "gen_length=12",
            "block_length=8",
            "epochs=2",
            f"model={model}",
            f"out={out}",
        ]
        process, parts = start("train-filter", *many), []
        while process.poll() is None and len(parts) < 2:
            parts = sorted((tmp_path / "f.records").glob("*.safetensors"))
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert not out.exists()
        times = {part: part.stat().st_mtime_ns for part in parts}
        assert command("train-filter", *many).code == 0
        assert times == {part: part.stat().st_mtime_ns for part in parts}
        assert len(list((tmp_path / "f.records").glob("*.safetensors"))) == 40

    def test_other_prompts_are_other_records(self, model: Path, tmp_path: Path) -> None:
        asked = tmp_path / "q.jsonl"
        out, data = tmp_path / "f.safetensors", f"data={asked}"
        asked.write_text("\n".join(json.dumps({"prompt": text}) for text in ASK))
        assert train(model, out, data).code == 0
        asked.write_text("\n".join(json.dumps({"prompt": text}) for text in ASK[::-1]))
        result = train(model, out, data)
        assert result.code == 2
        assert "has records of other settings (prompts)" in result.err

    @pytest.mark.parametrize("change", ["temperature=0.5", "rate=0.01", "gen_length=24"])
    def test_a_finished_filter_that_cannot_be_compared_is_kept(
        self, change: str, model: Path, trained: tuple[Outcome, Path], tmp_path: Path
    ) -> None:
        out = shutil.copytree(trained[1].parent, tmp_path / "copy") / "mine.safetensors"
        shutil.rmtree(out.with_suffix(".records"))
        before = out.read_bytes()
        result = train(model, out, change)
        assert (result.code, result.err.count("\n")) == (2, 1)
        assert f"out='{out}' is a finished filter whose records are gone" in result.err
        assert out.read_bytes() == before

    @pytest.mark.parametrize("change", ["rate=0.01", "architecture=published", "seed=5", "prompts=5"])
    @pytest.mark.parametrize("records", [True, False])
    def test_a_finished_filter_of_other_options_is_kept(
        self, change: str, records: bool, model: Path, trained: tuple[Outcome, Path], tmp_path: Path
    ) -> None:
        out = shutil.copytree(trained[1].parent, tmp_path / "copy") / "mine.safetensors"
        if not records:
            if change == "rate=0.01":
                pytest.skip("the card does not tell it")
            shutil.rmtree(out.with_suffix(".records"))
        before = out.read_bytes()
        result = train(model, out, change)
        assert (result.code, result.out, result.err.count("\n")) == (2, "", 1)
        assert f"out='{out}' is a finished filter of " in result.err
        assert change in result.err.partition(", this run has ")[2]
        assert "; give another out, or remove that filter\n" in result.err
        assert out.read_bytes() == before

    def test_records_of_other_settings_are_not_mixed_in(
        self, model: Path, trained: tuple[Outcome, Path], tmp_path: Path
    ) -> None:
        shutil.copytree(trained[1].parent, tmp_path / "copy")
        result = train(model, tmp_path / "copy" / "mine.safetensors", "temperature=0.5")
        assert (result.code, result.err.count("\n")) == (2, 1)
        assert "has records of other settings (temperature); give another out, or remove that folder" in result.err


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["architecture=deep"], "architecture='deep'"),
        (["prompts=0"], "prompts=0"),
        (["prompts=1"], "prompts=1 cannot be split; use 2 or more"),
        (["epochs=0"], "epochs=0"),
        (["hidden=0"], "hidden=0"),
        (["rate=0"], "rate=0"),
        (["rate=inf"], "rate=inf"),
        (["rate=nan"], "rate=nan"),
        (["held_out=nan"], "held_out=nan"),
        (["held_out=1"], "held_out=1"),
        (["block_length=null"], "block_length=null"),
        (["gen_length=0"], "gen_length=0"),
        (["temperature=-1"], "temperature=-1"),
        (["sampler=best"], "sampler"),
        (["out=x.pt"], "out='x.pt' is not a filter file; give a name that ends in .safetensors"),
        (["out=/dev/null/f.safetensors"], "out='/dev/null/f.safetensors' cannot be written"),
        (["data=/no/such.jsonl"], "data='/no/such.jsonl' cannot be read"),
        (["data=/no/such/set"], "data='/no/such/set' with split='train' cannot be read"),
        (["data={tmp}/set", "column=text"], "column='text' is not in"),
        (["column=text"], "column='text' has no effect without a data set"),
        (["data={tmp}/one.jsonl", "split=test"], "split='test' has no effect without a data set"),
        (["gen_length=500"], "prompts[0] has"),
        (["data={tmp}/one.jsonl"], "has 1 prompts, too few"),
        (["data={tmp}/bad.jsonl"], "bad.jsonl' line 1 is not JSON"),
        (["model=/no/such"], "'/no/such'"),
        (["+more=1"], "unknown option 'more'; expected one of "),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    model: Path, tmp_path: Path, arguments: list[str], named: str
) -> None:
    (tmp_path / "one.jsonl").write_text(json.dumps({"prompt": "Tom"}))
    (tmp_path / "bad.jsonl").write_text("{")
    (tmp_path / "set").mkdir()
    Dataset.from_list([{"question": text} for text in ASK]).to_parquet(tmp_path / "set" / "train.parquet")
    result = train(model, tmp_path / "out" / "f.safetensors", *(a.replace("{tmp}", str(tmp_path)) for a in arguments))
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("dllm train-filter: error: ")
    assert result.err.count("\n") == 1
    assert named in result.err
    assert not (tmp_path / "out").exists()


def test_a_bare_filter_in_the_published_form_is_told_of_in_one_line(model: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare.safetensors"
    save_file(ConfidenceFilter(8).state_dict(), bare)
    asked = (f"model={model}", "sampler=learn2pd", f"sampler.filter={bare}", "gen_length=8", "prompt=Tom has 5 pens.")
    result = command("generate", *asked, "block_length=8")
    assert result.code == 0
    told = [line for line in result.err.splitlines() if "no card" in line]
    assert told == [
        f"dllm generate: warning: filter={str(bare)!r} has no card: it fits block_length=8, its model is unknown"
    ]
    assert "UserWarning" not in result.err
    result = command("generate", *asked, "block_length=4")
    assert result.code == 2
    assert "fits block_length=8 only, not 4; set block_length=8" in result.err


def test_records_that_are_removed_during_a_run_are_told(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    collect = application.collect

    def disturbed(*arguments: Any, **options: Any) -> Any:
        shutil.rmtree(tmp_path / "f.records")
        return collect(*arguments, **options)

    monkeypatch.setattr(application, "collect", disturbed)
    result = train(model, tmp_path / "f.safetensors")
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert "recipe.json was removed by another program during this run; run the command again" in result.err
    assert not list(tmp_path.iterdir())
