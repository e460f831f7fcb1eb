"""Options as they are typed: every bad value of every command ends in one line that names the option."""

from __future__ import annotations

import importlib
import os
import random
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

import dllm
from commands import Outcome, command
from dllm.resolve import build, names, options_of
from dllm.scripts.app import rewrite
from models import random_llada, save_folder

WORK = {
    "generate": "generate", "evaluate": "evaluate", "report": "report", "show": "show", "bench": "bench",
    "compatibility": "compatibility", "train-filter": "train_filter", "train-tiny": "train", "distill": "distill",
    "adapt": "adapt", "chat": "chat", "bench-serve": "bench_serve",
    "results": "results",
}  # fmt: skip
BAD = [
    "abc", "nan", "inf", "-1", "1e400", "[]", "{}", "[[1]]", "true", "", "x" * 5000, "${oc.env:HOME}", "${nope}", "???",
    os.fsdecode(b"\xff"), "null", "~", "{a: 1}", "/dev/full", "/dev/zero", "/tmp", "a\0b",
]  # fmt: skip


def refused(result: Outcome, name: str) -> None:
    assert (result.code, result.err.count("\n")) == (2, 1), result
    assert name in result.err, result


class Reached(Exception):
    """Heavy work would begin now."""


@pytest.fixture
def idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is loaded, trained or written."""

    def reached(*_: Any, **__: Any) -> Any:
        raise Reached

    monkeypatch.setattr(dllm, "load", reached)
    monkeypatch.setattr("dllm.scripts.bench_serve._started", reached)
    for name in ("train_tiny", "adapt"):
        monkeypatch.setattr(importlib.import_module(f"dllm.scripts.{name}"), "trainer_of", reached)


def options(name: str) -> Iterator[str]:
    """Every option of a command, and those of its default model, sampler, cache and task."""
    with initialize_config_module("dllm.conf", version_base="1.3"):
        fields: Any = OmegaConf.to_container(compose(name.replace("-", "_")))
    for option, default in fields.items():
        nested = isinstance(default, dict) and option not in ("settings", "variants", "canvas_lengths")
        yield from (f"{option}.{each}" for each in default) if nested else [option]


EVERY = [(name, option) for name in WORK for option in options(name)]


@pytest.mark.usefixtures("idle")
@pytest.mark.parametrize(("name", "option"), random.Random(0).sample(EVERY, 30))
def test_a_bad_value_is_refused_by_name_or_harmless(
    name: str, option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for value in random.Random(option).sample(BAD, 2):
        tried(name, option, value)


def tried(name: str, option: str, value: str) -> None:
    must = {"report": ["folder=x"], "show": ["path=x"]}.get(name, [])
    try:
        result = command(name, *must, f"{option}={value}")
    except Reached:
        return  # accepted
    if result.code != 0 and not (must and must[0] in result.err.replace("'", "")):
        refused(result, option)


@pytest.mark.usefixtures("idle")
@pytest.mark.parametrize(
    "option", ["model", "model.path", "task", "sampler", "seed", "gen_length", "out", "estimate.order"]
)
def test_text_that_is_none_is_refused(option: str) -> None:
    refused(command("evaluate", f"{option}={os.fsdecode(bytes([255]))}"), option)


class TestNames:
    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (["generate", "model=nope"], "error: model='nope' is not a folder"),
            (["generate", "model=custom", "model.path=nope"], "error: model.path='nope' is not a folder"),
            (["evaluate", "model=nope", "out=x"], "error: model='nope' is not a folder"),
            (["bench", "model=nope"], "error: model='nope' is not a folder"),
            (["train-filter", "model.path=nope", "prompts=2"], "error: model.path='nope' is not a folder"),
            (["generate", "model.device=nope"], "error: model.device='nope' is not available"),
            (["generate", "model.dtype=int8"], "error: unknown model.dtype='int8'"),
            (["bench", "model=random:tiny", "model.dtype=int8"], "error: unknown model.dtype='int8'"),
            (["evaluate", "estimate.samples=0", "out=x"], "error: estimate.samples=0 is out of range"),
            (["generate", "seed=-1"], "seed=-1 is out of range; use a whole number from 0 to 2**62 - 1, or"),
            (["evaluate", "seed=-1"], "seed=-1 is out of range; use a whole number from 0 to 2**62 - 1"),
            (["evaluate", "task.seed=1"], "error: task.seed=1 is out of range"),
            (["generate", "gen_length=${oc.env:HOME}"], "gen_length='${oc.env:HOME}' contains ${oc.env:HOME}, which"),
            (["generate", "gen_length=${nope}"], "gen_length refers to the unknown option 'nope'"),
            (["generate", "++gen_length=abc"], "gen_length='abc' is of the wrong type"),
            (["generate", "picture="], "picture='' is empty"),
            (["generate", "sampler=freedave", "sampler.base={_target_: dllm.samplers.Threshold, threshold: -1}"],
             "error: sampler.base.threshold=-1 is out of range"),
            (["train-tiny", "matrix_lr=nan"], "error: matrix_lr=nan is out of range"),
            (["train-tiny", "step_weights=[0,0,0]"], "error: step_weights=[0, 0, 0] has no weight"),
            (["train-tiny", "noise.window=2"], "error: noise.window=2 is out of range"),
        ],
    )  # fmt: skip
    def test_errors_say_options_as_they_are_typed(
        self, arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        refused(command(*arguments), said)

    def test_what_a_file_says_keeps_its_name(self, tmp_path: Path) -> None:
        folder = save_folder(random_llada(), tmp_path / "model")
        config = folder / "config.json"
        config.write_text(config.read_text().replace("{", '{"attn_implementation": "a/b",', 1))
        refused(command("generate", f"model={folder}"), f"{config}: attn_implementation='a/b' is not supported")

    def test_an_option_may_refer_to_another(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        seen = []
        monkeypatch.setattr("dllm.scripts.generate.generate", seen.append)
        assert command("generate", "batch_size=${gen_length}", "gen_length=5").code == 0
        assert seen[0].batch_size == 5


class TestFiles:
    @pytest.fixture
    def places(self, tmp_path: Path) -> dict[str, str]:
        """Paths that are no ordinary files."""
        (tmp_path / "loop").symlink_to("loop")
        os.mkfifo(tmp_path / "pipe")
        return {"loop": f"{tmp_path}/loop", "pipe": f"{tmp_path}/pipe", "folder": f"{tmp_path}", "long": "x" * 5000}

    @pytest.mark.usefixtures("idle")
    @pytest.mark.parametrize("kind", ["loop", "pipe", "folder", "long"])
    def test_what_is_no_file_is_refused(self, kind: str, places: dict[str, str], tmp_path: Path) -> None:
        place = places[kind]
        refused(command("generate", f"input={place}", f"output={tmp_path}/new"), "input=")
        refused(command("train-filter", f"data={place}/.jsonl" if kind == "folder" else f"data={place}.jsonl"), "data=")
        refused(command("show", place), "path=")
        refused(command("compatibility", f"out={place}"), "out=")

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
    def test_a_full_disk_names_the_option(self) -> None:
        refused(command("compatibility", "out=/dev/full"), "out='/dev/full' cannot be used (No space left on device)")


class TestSweeps:
    @pytest.mark.parametrize(
        ("value", "paths"),
        [
            ("'/x,y'", ["/x,y"]),
            ('"/x,y"', ["/x,y"]),
            ("'/x,y',tiny", ["/x,y", "tiny"]),
            ("tiny,\"/x,y\",'/z, w'", ["tiny", "/x,y", "/z, w"]),
            ("it's,b", ["it's", "b"]),
        ],
    )
    @pytest.mark.parametrize("group", ["model", "task"])
    def test_a_path_with_a_comma_is_quoted(self, group: str, value: str, paths: list[str]) -> None:
        option = {"model": "model.path", "task": "task.name"}[group]
        flag, choice, written = rewrite(["-m", f"{group}={value}"], "evaluate")
        override = OverridesParser.create().parse_override(written)
        found = (
            [text.strip("'").replace("\\'", "'") for text in override.sweep_string_iterator()]
            if (override.is_sweep_override())
            else [override.value()]
        )
        assert (flag, choice.partition("=")[0], override.key_or_group) == ("-m", group, option)
        assert found == paths or [str(each) for each in found] == paths

    @pytest.mark.parametrize("flags", [[], ["-m"]])
    @pytest.mark.parametrize("option", ["task.metric", "model.path", "out", "model", "task", "estimate.method"])
    def test_quotes_around_a_whole_value_are_not_part_of_it(self, option: str, flags: list[str]) -> None:
        for value in ("'acc,all'", '"acc,all"'):
            written = rewrite([*flags, f"{option}={value}"], "evaluate")[-1]
            override = OverridesParser.create().parse_override(written)
            assert not override.is_sweep_override()
            assert override.value() == "acc,all"

    def test_the_home_folder_may_be_named_in_any_option(self) -> None:
        parse = OverridesParser.create().parse_override
        assert parse(rewrite(["sampler.filter=~/f,1.safetensors"], "generate")[0]).value() == "~/f,1.safetensors"
        sweep = parse(rewrite(["-m", "sampler.filter=~/f,~/g"], "evaluate")[1])
        assert [str(each) for each in sweep.sweep_string_iterator()] == ["'~/f'", "'~/g'"]

    def test_models_with_commas_run_one_after_another(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        folder = save_folder(random_llada(tokenizer=True), tmp_path / "a,b")
        seen = []
        monkeypatch.setattr("dllm.scripts.generate.generate", seen.append)
        assert command("generate", "-m", f"model='{folder}',tiny-llada", f"output='{folder}/x'").code == 0
        assert [cfg.model.path for cfg in seen] == [str(folder), "tiny-llada"]
        assert [cfg.output for cfg in seen] == [f"{folder}/x"] * 2


def test_numbers_of_numpy_are_numbers() -> None:
    lm = random_llada()
    plain = dllm.generate(lm, [[5, 6]], dllm.samplers.Threshold(0.5), gen_length=8, seed=3, temperature=0.5)
    other = dllm.generate(
        lm, [[5, 6]], dllm.samplers.Threshold(np.float32(0.5)), gen_length=np.int64(8), seed=np.int32(3),
        temperature=np.float64(0.5), block_length=np.uint8(32), batch_size=np.int16(8), stop_at_eos=np.bool_(True),
    )  # fmt: skip
    assert other.sequences.tolist() == plain.sequences.tolist()
    listed = dllm.generate(
        lm, [[5, 6]], dllm.samplers.Threshold(0.5), gen_length=8, seed=[np.int64(3)], temperature=0.5
    )
    assert listed.sequences.tolist() == plain.sequences.tolist()


@pytest.mark.parametrize("seed", [-1, 2**62, 1.5, "3", True])
def test_a_seed_says_its_range(seed: Any) -> None:
    with pytest.raises(ValueError, match=r"seed=.* use a whole number from 0 to 2\*\*62 - 1, or null"):
        dllm.Options(seed=seed)


@pytest.mark.parametrize("seed", [{1}, {1: 2}, object(), iter([1])], ids=lambda seed: type(seed).__name__)
def test_seeds_without_an_order_are_refused(seed: Any) -> None:
    with pytest.raises(ValueError, match=r"^seed=.* is of the wrong type; give a whole number, a list"):
        dllm.Options(seed=seed)


KINDS = [("sampler", name) for name in names("sampler")] + [("cache", name) for name in names("cache")]
OTHERS = [
    1.0, 0.0, 1, -1, True, False, None, "x", "true", "", [], {}, [1], {"a": 1}, float("nan"), float("inf"), 10**30,
    1e-300, np.float32(0.5), np.int64(1), np.True_, b"x", (1, 2), object(), torch.tensor(1.0), torch.tensor([1, 2]),
]  # fmt: skip


@pytest.mark.parametrize(("group", "name"), KINDS)
def test_every_option_of_any_type_is_refused_or_decodes(group: str, name: str) -> None:
    fields, lm, draw = options_of(group, name, group), random_llada(), random.Random(name)
    for option in fields.keys() - {"_target_"}:
        for value in draw.sample(OTHERS, 6):
            with suppress(ValueError):
                made: Any = build(group, fields | {option: value}, object)
                setting = (made, "none") if group == "sampler" else ("threshold", made)
                dllm.generate(lm, [[3, 4]], *setting, gen_length=4, block_length=4, seed=0)


@pytest.mark.parametrize("value", [1.0, 0.0, 1, np.float32(1), np.array(1.0), torch.tensor(1.0)], ids=repr)
def test_a_number_is_no_truth_value(value: Any) -> None:
    with pytest.raises(ValueError, match=r"unknown eager=.*; expected one of True, False"):
        dllm.samplers.FreeDave(eager=value)
    assert dllm.samplers.FreeDave(eager=np.True_)  # type: ignore[arg-type]
