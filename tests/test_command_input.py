"""What a command reads besides plain values: flags, sweeps, YAML of the user's own, and what is far too long."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra._internal.sources_registry import SourcesRegistry

import dllm
from commands import Outcome, command
from dllm.scripts import evaluate, yaml_files

TARGET = "_target_: dllm.samplers.Vanilla\n"
NINES = "9" * 5000


class Reached(Exception):
    """Heavy work would begin now."""


@pytest.fixture(autouse=True)
def idle(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing is loaded."""

    def reached(*_: Any, **__: Any) -> Any:
        raise Reached

    monkeypatch.setattr(dllm, "load", reached)
    evaluate._load.cache_clear()  # what other tests of this process loaded
    monkeypatch.chdir(tmp_path)


def refused(result: Outcome, said: str) -> None:
    assert (result.code, result.err.count("\n")) == (2, 1), result
    assert said in result.err, result
    assert len(result.err) < 2500


@pytest.mark.parametrize("name", ["generate", "evaluate"])
def test_a_job_of_a_sweep_that_fails_is_one_line(name: str) -> None:
    result = command(name, "-m", "gen_length=0,-1", "seed=1")
    assert result.code == 2
    lines = result.err.splitlines()
    assert [line.split(" is out")[0] for line in lines] == [
        f"dllm {name}: error: gen_length={each} seed=1: gen_length={each}" for each in (0, -1)
    ]  # fmt: skip


class TestLength:
    @pytest.mark.parametrize(
        ("name", "option"),
        [
            ("generate", "seed"), ("generate", "gen_length"), ("generate", "temperature"), ("generate", "model.device"),
            ("evaluate", "estimate.samples"), ("evaluate", "task.limit"), ("bench", "canvas"), ("train-tiny", "steps"),
            ("generate", "+x"),
        ],
    )  # fmt: skip
    @pytest.mark.parametrize("value", [NINES, f"-{NINES}", f"[{NINES}]"])
    def test_numbers_of_thousands_of_digits_name_their_option(self, name: str, option: str, value: str) -> None:
        result = command(name, f"{option}={value}")
        refused(result, option.lstrip("+"))
        assert "Exceeds" not in result.err

    def test_the_interface_names_them_too(self) -> None:
        with pytest.raises(ValueError, match=r"^seed=9+\.\.\.9+ is out of range; use ") as caught:
            dllm.Options(seed=10**5000 - 1)
        assert len(str(caught.value)) < 300
        with pytest.raises(ValueError, match=r"^unknown stop_at_eos=1000"):
            dllm.Options(stop_at_eos=10**5000)  # type: ignore[arg-type]

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (["generate", "x" * 5000], "unknown option 'xxx"),
            (["generate", f"++{'x' * 5000}=1"], "unknown option 'xxx"),
            (["generate", f"cache={'x' * 5000}"], "cache='xxx"),
            (["generate", f"show={'x' * 5000}"], "show='xxx"),
            (["show", "path=x", f"sample={NINES}"], "path='x'"),
            (["generate", f"eos_token_id=[{','.join(['1'] * 20000)}]"], "eos_token_id=[1,1"),
            (["generate", f"stop={json.dumps([f'{i}' for i in range(20000)])}"], "stop=["),
            (["generate", f"stop={{{','.join(f'a{i}: 1' for i in range(10000))}}}"], "stop={"),
        ],
    )
    def test_what_is_very_long_is_told_in_short(self, arguments: list[str], said: str) -> None:
        refused(command(*arguments), said)

    @pytest.mark.parametrize("values", ["range(1000000000)", "range(200)", f"range({NINES})"])
    def test_a_sweep_of_too_many_jobs_is_refused(self, values: str) -> None:
        refused(command("evaluate", "-m", f"seed={values}", "gen_length=range(1,200)"), "more than 10000 jobs")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["evaluate", "+stop=x"], "unknown option 'stop'"),
        (["train-filter", "+cfg_scale=1"], "unknown option 'cfg_scale'"),
        (["evaluate", "+estimate.x=1"], "unknown option 'estimate.x'"),
        (["evaluate", "+estimate.seed=1"], "unknown option 'estimate.seed'"),
        (["evaluate", "objective=[]"], "objective=[] names no metric"),
        (["generate", "~model.path"], "model.path has no value"),
        (["evaluate", "~model.path"], "model.path has no value"),
    ],
)
def test_options_that_are_not_there_or_have_no_effect(arguments: list[str], said: str) -> None:
    refused(command(*arguments), said)


def test_a_sweep_over_all_names_of_a_pattern(tmp_path: Path) -> None:
    with pytest.raises(Reached):
        command("evaluate", "-m", "sampler=glob(v*)", f"out={tmp_path}/out")


class TestFlags:
    @pytest.mark.parametrize(
        ("flags", "said"),
        [
            (["--cfg", "nonsense"], "unknown --cfg='nonsense'; expected one of job, hydra, all"),
            (["-c", "nonsense"], "unknown -c='nonsense'"),
            (["--cfg=nonsense"], "unknown --cfg='nonsense'"),
            (["--cfg"], "--cfg has no value"),
            (["--cfg", "prompt=a"], "--cfg has no value before 'prompt=a'"),
            (["--info", "nonsense"], "unknown --info='nonsense'; expected one of all, config"),
            (["--package", "prompt=a"], "--package has no value before 'prompt=a'"),
            (["--package", "model"], "--package has no effect without --cfg"),
            (["--cfg", "job", "--package", "nope"], "--package=nope is not part of the options"),
            (["--config-dir"], "--config-dir has no value"),
            (["--config-dir", "/nope"], "--config-dir='/nope' is not a folder"),
            (["-cp", "nope"], "-cp='nope' is not a folder"),
            (["--config-name", "-m"], "--config-name has no value before '-m'"),
            (["--run=3"], "'--run=3' has a value, and --run takes none"),
            (["-v"], "unknown flag '-v'"),
            (["--"], "unknown flag '--'"),
            (["hydra.verbose=999"], "error: "),
            (["hydra.run=5"], "error: "),
        ],
    )
    def test_a_flag_with_a_wrong_value_is_one_line(self, flags: list[str], said: str) -> None:
        refused(command("generate", *flags), said)

    def test_flags_may_stand_anywhere(self) -> None:
        shown = command("generate", "prompt=a b", "-p", "model", "seed=3", "--cfg", "job")
        assert (shown.code, shown.err) == (0, "")
        assert shown.out.startswith("# @package model\npath: tiny-llada\n")


class TestYaml:
    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("a: ${a}\n", "sampler.a refers to the unknown option 'a'"),
            ("steps: ${sampler.steps}\n", "sampler.steps: Recursive interpolation"),
            ("a: &a [*a]\n", "mine.yaml"),
            ("".join(f"a{i}: &a{i} [{f'*a{i - 1}, ' * 10 if i else 'x'}]\n" for i in range(9)), "mine.yaml"),
            ("".join(f"a{i}: &a{i} [{f'*a{i - 1}' if i else 'x'}]\n" for i in range(99)), "mine.yaml"),
            (f"a: {'[' * 3000}{']' * 3000}\n", "mine.yaml is nested too deep"),
            (f"a: {'[' * 50}{']' * 50}\n", "mine.yaml"),
            ("".join(f"{' ' * i}a:\n" for i in range(1000)), "mine.yaml"),
            ("steps: 1\nsteps: 2\n", "found duplicate key steps"),
            ("\tsteps: 1\n", "mine.yaml"),
            ("steps: 1\0\n", "mine.yaml"),
            (b"# \xe9\n", "mine.yaml"),
            ("steps: !!set {a}\n", "mine.yaml"),
            (f"steps: {NINES}\n", "sampler.steps=999"),
            ("- a\n", "mine.yaml"),
            ("# " + "x" * 2_000_000, "mine.yaml is not a file of at most"),
            ("defaults:\n- mine\n", "includes itself"),
        ],
    )
    @pytest.mark.parametrize("flag", ["--config-dir", "--config-path"])
    def test_a_yaml_that_cannot_be_followed_is_one_line(
        self, flag: str, text: str | bytes, said: str, tmp_path: Path
    ) -> None:
        (tmp_path / "sampler").mkdir()
        (tmp_path / "generate.yaml").write_text((resources.files("dllm.conf") / "generate.yaml").read_text())
        content = text if isinstance(text, bytes) else text.encode()
        head = b"" if content.startswith(b"-") else TARGET.encode()
        (tmp_path / "sampler" / "mine.yaml").write_bytes(head + content)
        others = ["hydra.searchpath=[pkg://dllm.conf]"] if flag == "--config-path" else []
        refused(command("generate", flag, str(tmp_path), *others, "sampler=mine"), said)

    def test_a_configuration_that_lacks_an_option_is_one_line(self, tmp_path: Path) -> None:
        (tmp_path / "own.yaml").write_text("prompt: a\n")
        refused(command("generate", "--config-dir", str(tmp_path), "--config-name", "own"), "infill has no value")

    @pytest.mark.parametrize("kind", ["/dev/zero", "/dev/full", "loop"])
    def test_a_yaml_without_an_end_is_one_line(self, kind: str, tmp_path: Path) -> None:
        (tmp_path / "sampler").mkdir()
        file = tmp_path / "sampler" / "mine.yaml"
        file.symlink_to(file if kind == "loop" else kind)
        refused(command("generate", "--config-dir", str(tmp_path), "sampler=mine"), "mine")

    def test_a_worker_of_a_sweep_may_register_hydras_own_reader_once_more(self) -> None:
        yaml_files.register(())
        registry = SourcesRegistry.instance()
        ours = registry.types["file"]
        registry.register(FileConfigSource)
        assert registry.types["file"] is ours
        assert ours is not FileConfigSource

    def test_a_plain_one_is_read(self, tmp_path: Path) -> None:
        (tmp_path / "sampler").mkdir()
        (tmp_path / "sampler" / "mine.yaml").write_text(f"{TARGET}steps: &a 3\ntokens_per_step: *a\n")
        shown = command("generate", "--config-dir", str(tmp_path), "sampler=mine", "--cfg", "job", "-p", "sampler")
        assert (shown.code, shown.err) == (0, "")
        assert "steps: 3\ntokens_per_step: 3\n" in shown.out

    def test_a_group_may_have_folders(self, tmp_path: Path) -> None:
        (tmp_path / "exp" / "sub").mkdir(parents=True)
        (tmp_path / "exp" / "sub" / "x.yaml").write_text("# @package _global_\ngen_length: 24\n")
        shown = command("generate", "--config-dir", str(tmp_path), "+exp=sub/x", "--cfg", "job", "-p", "gen_length")
        assert (shown.code, shown.out) == (0, "24\n")

    def test_other_folders_beside_them_may_have_the_names_of_options(self, tmp_path: Path) -> None:
        for folder in ("output", "stop"):
            (tmp_path / folder / ".hydra").mkdir(parents=True)
            (tmp_path / folder / "x.yaml").write_text("a: 1\n")
        shown = command("generate", "--config-dir", str(tmp_path), "stop=x", "--cfg", "job", "-p", "stop")
        assert (shown.code, shown.out, shown.err) == (0, "x\n", "")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["generate", "cache=[none,dual]"], "cache=[none,dual] has no name; expected one of block, "),
        (["generate", "cache={a: 1}"], "cache={a: 1} has no name; expected one of block, "),
        (["generate", "sampler=null"], "sampler=null has no name; expected one of adablock, anchored, "),
        (["generate", "-m", "cache=null,dual"], "cache=null,dual has no name; expected one of block, "),
        (["generate", "=3"], "unknown option '=3'; options are written name=value"),
        (["generate", "sampler=tiny/nope"], "unknown sampler=tiny/nope; expected one of adablock, anchored, "),
        (["generate", "+sampler=nope"], ", tiny/threshold"),
        (["generate", "hydra/launcher=nope"], "unknown hydra/launcher=nope; expected one of basic, "),
        (["generate", "gen_length=1,2"], "gen_length=1,2 names several; give one, or add -m"),
        (["generate", "gen_length=range(1,3)"], "gen_length=range(1,3) names several; give one, or add -m"),
        (["generate", "gen_length=["], "'gen_length=[' cannot be read; "),
        (["generate", "~nope"], "unknown option 'nope'; expected one of "),
        (["generate", "~prompt"], "option 'prompt' cannot be removed; give it a value, prompt=..."),
        (["generate", "task=gsm8k"], "unknown option 'task'; expected one of "),
        (["evaluate", "task.nope=1"], "unknown option 'task.nope'; choose with task=NAME, and "),
        (["generate", "++sampler.nope=3"], "unknown option 'sampler.nope'; expected one of steps, "),
        (["generate", "+model.name=x"], "unknown option 'model.name'; expected one of path, "),
        (["evaluate", "task=lm_eval"], "task.name has no value; set it with task.name=..."),
        (["evaluate", "+sweep.x=1"], "sweep has no options of its own; "),
        (["generate", "~model.path"], "model.path has no value; "),
        (["report", "out=${folder}"], "folder has no value; set it with folder=..."),
        (["generate", "seed=${gen_length}", "gen_length=${seed}"], "gen_length: Recursive interpolation"),
    ],
)
def test_what_hydra_would_refuse_is_one_line_that_names_the_option(arguments: list[str], said: str) -> None:
    refused(command(*arguments), said)
