"""`dllm` itself: help that shows every option and works as printed, version, unknown commands, runs from a clone."""

from __future__ import annotations

import re
import runpy
import shlex
import subprocess
import sys
import textwrap
from contextlib import suppress
from importlib import resources
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from commands import Outcome, command
from dllm.resolve import names, variants
from dllm.scripts.app import argument, rewrite
from dllm.scripts.cli import COMMANDS, OTHERS

SCRIPTS = Path(__file__).parent.parent / "scripts"
CONF = resources.files("dllm.conf")
EACH = pytest.mark.parametrize("name", COMMANDS)


def yaml(file: str) -> tuple[str, Any]:
    text = (CONF / file).read_text(encoding="utf-8")
    return text, OmegaConf.to_container(OmegaConf.create(text))


def config(name: str) -> str:
    return f"{name.replace('-', '_')}.yaml"


def helped(*arguments: str) -> str:
    result = command(*arguments, "--help")
    assert (result.code, result.err) == (0, "")
    return result.out


class TestDllm:
    @pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], ["help"]])
    def test_lists_every_command_with_its_purpose(self, arguments: list[str]) -> None:
        result = command(*arguments)
        assert (result.code, result.err) == (0, "")
        for name in COMMANDS:
            purpose = yaml(config(name))[0].splitlines()[0].removeprefix("# ")
            assert re.search(rf"^  {name} +{re.escape(purpose)}$", result.out, re.MULTILINE)
        for name, purpose in OTHERS.items():
            assert re.search(rf"^  {name} +{re.escape(purpose)}$", result.out, re.MULTILINE)

    def test_every_application_is_a_command(self) -> None:
        applications = {path.stem for path in SCRIPTS.glob("*.py") if "app.run(" in path.read_text()}
        assert {name.replace("-", "_") for name in COMMANDS} == applications

    def test_tells_its_version(self) -> None:
        assert command("--version") == Outcome(0, f"dllm {version('dllm-samplers')}\n", "")

    @pytest.mark.parametrize(
        ("name", "meant"),
        [
            ("generat", "generate"),
            ("train_filter", "train-filter"),
            ("app", ""),
            ("prompt=x", ""),
            ("--foo", ""),
            ("", ""),
        ],
    )
    def test_an_unknown_command_is_named_with_those_there_are(self, name: str, meant: str) -> None:
        result = command(name)
        assert (result.code, result.out) == (2, "")
        asked = f" (did you mean {meant}?)" if meant else ""
        every = ", ".join((*COMMANDS, *OTHERS))
        assert result.err == f"dllm: error: unknown command {name!r}{asked}; expected one of {every}\n"


class TestHelp:
    @EACH
    @pytest.mark.parametrize("flag", ["--help", "-h"])
    def test_shows_every_option_with_its_comment(self, name: str, flag: str) -> None:
        shown = command(name, flag).out
        with initialize_config_module("dllm.conf", version_base="1.3"):
            options: Any = OmegaConf.to_container(compose(name.replace("-", "_")))
        written = re.search(r"\nOptions and their defaults.*?\n\n(.*?)\n(?=\S)", shown, re.DOTALL)
        assert written is not None
        values: Any = OmegaConf.to_container(OmegaConf.create(textwrap.dedent(written[1])))
        assert values == {option: value for option, value in options.items() if option in values}
        grouped = {group for group in ("model", "sampler", "cache", "task", "engine") if f"\n{group}=NAME, " in shown}
        assert set(options) - grouped == set(values)
        for option in values:
            assert re.search(rf"^  {option}:.* # \S", shown, re.MULTILINE), option

    @EACH
    def test_shows_every_choice_of_every_group(self, name: str) -> None:
        shown, (_, options) = helped(name), yaml(config(name))
        for entry in options["defaults"]:
            for group, default in entry.items() if isinstance(entry, dict) else ():
                if group.startswith("override "):
                    continue
                assert f"\n{group}=NAME, by default {default or 'null'}:\n" in shown
                for choice in names(group) + variants(group):
                    lines = yaml(f"{group}/{choice}.yaml")[0].removeprefix("# @package _global_\n").splitlines()
                    purpose = lines[0].removeprefix("# ")
                    assert re.search(rf"^  {re.escape(choice)} +{re.escape(purpose)}$", shown, re.MULTILINE)

    @EACH
    def test_shows_nothing_that_only_hydra_reads(self, name: str) -> None:
        shown = helped(name)
        assert not re.search(r"^ *(defaults|hydra|output_subdir):|override hydra|_target_: *$", shown, re.MULTILINE)
        assert max(map(len, shown.splitlines())) <= 120

    @pytest.mark.parametrize("sampler", names("sampler"))
    def test_explains_the_options_of_the_chosen_sampler(self, sampler: str) -> None:
        shown = helped("generate", f"sampler={sampler}")
        assert f"\nOptions of sampler={sampler}, changed with sampler.NAME=VALUE:\n" in shown
        for line in yaml(f"sampler/{sampler}.yaml")[0].splitlines():
            if not line.startswith(("#", "_target_")):
                assert f"\n  {line}\n" in shown

    def test_explains_what_a_choice_shares_with_others(self) -> None:
        shown = helped("generate", "sampler=tiny/threshold", "cache=dual")
        assert re.findall(r"^  (\w+: \S+) +# minimum prob", shown, re.MULTILINE) == ["threshold: 0.999"]
        for option in ("at_least: 1", "measure_every: null", "refresh_above: null", "device: null"):
            assert re.search(rf"^  {option} +# \w", shown, re.MULTILINE)

    def test_a_folder_is_the_custom_model(self) -> None:
        assert "\nOptions of model=custom, " in helped("generate", "model=/some/folder")

    def test_an_unknown_choice_is_refused(self) -> None:
        result = command("generate", "sampler=nope", "--help")
        assert (result.code, result.out) == (2, "")
        assert result.err.startswith("dllm generate: error: unknown sampler=nope; expected one of ")

    @EACH
    def test_its_examples_are_valid(self, name: str) -> None:
        examples = [line.strip() for line in helped(name).splitlines() if line.startswith(f"  dllm {name}")]
        assert examples
        for example in examples:
            with initialize_config_module("dllm.conf", version_base="1.3"):
                application = name.replace("-", "_")
                arguments = [each for each in rewrite(shlex.split(example)[2:], application) if each != "-m"]
                sweeps = OverridesParser.create().parse_overrides(arguments)
                first = [next(each.sweep_string_iterator()) if each.is_sweep_override() else None for each in sweeps]
                chosen = [
                    argument if value is None else f"{sweep.key_or_group}={value}"
                    for argument, sweep, value in zip(arguments, sweeps, first, strict=True)
                ]
                compose(application, chosen)


def clone(name: str) -> str:
    return str(SCRIPTS / f"{name.replace('-', '_')}.py")


def test_an_application_runs_from_a_clone() -> None:
    ran = subprocess.check_output([sys.executable, clone("generate"), "-h"], text=True, timeout=120)
    assert ran == helped("generate")


@EACH
def test_every_file_is_an_application(name: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    # As Python runs a file, but without the start of a process.
    monkeypatch.syspath_prepend(SCRIPTS)
    monkeypatch.setattr(sys, "argv", [clone(name), "-h"])
    GlobalHydra.instance().clear()
    with suppress(SystemExit):
        runpy.run_path(clone(name), run_name="__main__")
    assert capsys.readouterr().out == helped(name)


def test_multirun_sweeps_over_settings_and_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    seen = []
    monkeypatch.setattr("dllm.scripts.generate.generate", seen.append)
    result = command(
        "generate", "-m", "prompt=a, b", "sampler=vanilla,threshold", "model=tiny-llada,/no/such", "seed=3"
    )
    assert result.code == 0
    assert [cfg.prompt for cfg in seen] == ["a, b"] * 4
    assert [cfg.sampler._target_.split(".")[-1] for cfg in seen] == ["Vanilla", "Vanilla", "Threshold", "Threshold"]
    assert [cfg.model.path for cfg in seen] == ["tiny-llada", "/no/such"] * 2


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (
            ["sampler.threshold=0.8"],
            "unknown option 'sampler.threshold'; choose with sampler=NAME, and `sampler=NAME --help` lists its options",
        ),
        (["sampler=threshold", "sampler.threshold=-1"], "error: sampler.threshold=-1 is out of range; use "),
        (
            ["sampler=learn2pd", "block_length=16"],
            "sampler.filter=null: there is no bundled filter for this model",
        ),
        (
            ["sampler=learn2pd", "block_length=16"],
            "sampler.filter=tiny-dream (of tiny-dream, tiny-llada) and sampler.al",
        ),
        (["sampler=freedave", "sampler.base=freedave"], "error: sampler.base='freedave' cannot be drafted: "),
        (["sampler=ar_guided", "sampler.guide=/no/such"], "error: sampler.guide='/no/such' is not a folder, "),
        (["sampler=learn2pd", "sampler.filter=x.pt"], "error: sampler.filter='x.pt' is not a bundled filter"),
    ],
)
def test_errors_name_options_of_a_sampler_as_the_command_line_does(arguments: list[str], named: str) -> None:
    result = command("generate", "gen_length=16", *arguments)
    assert (result.code, result.out, result.err.count("\n")) == (2, "", 1)
    assert named in result.err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["compatibility", "variants=null"], "variants=None is of the wrong type; give a group of options"),
        (["compatibility", "variants=abc"], "variants='abc' is of the wrong type"),
        (["generate", "picture=${cache}"], "picture={'_target_'"),
        (["generate", "input=${cache}", "output=x"], "input={'_target_'"),
        (
            ["generate", "model.device_map={a:{b:c}}"],
            "model.device_map={'a': {'b': 'c'}} has values that are not devices",
        ),
        (["generate", "sampler=threshold", f"sampler.threshold={10**400}"], "sampler.threshold=1000"),
    ],
)
def test_values_of_the_wrong_kind_are_one_line(arguments: list[str], told: str) -> None:
    result = command(*arguments)
    assert (result.code, result.err.count("\n")) == (2, 1), result
    assert told in result.err


@pytest.mark.parametrize("text", ["a: [", '!!python/object/apply:os.system ["true"]'])
def test_a_yaml_of_the_users_that_is_none_is_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "sampler").mkdir()
    (tmp_path / "sampler" / "mine.yaml").write_text(text)
    result = command("generate", "--config-dir", str(tmp_path), "sampler=mine")
    assert (result.code, result.err.count("\n")) == (2, 1), result
    assert "mine.yaml" in result.err


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("sampler.filter", "a,b'c\\"),
        ("model.path", "~a, it's $x"),
        ("server", "http://127.0.0.1:8000/?a=b"),
        ("api_key", "null and 5"),
        ("stop", ["\n", "a, 'b'"]),
        ("stop", "[x"),
        ("stop", None),
        ("gen_length", "auto"),
        ("temperature", 0.5),
        ("top_k", None),
        ("stop_at_eos", False),
        ("sampler.base", {"_target_": "dllm.samplers.Threshold", "threshold": 0.5, "list": [1, None, "x y"]}),
    ],
)
def test_a_value_is_written_as_it_is_read(name: str, value: Any) -> None:
    written = argument(name, value)
    config = OmegaConf.create()
    for override in OverridesParser.create().parse_overrides(rewrite([written], "chat")):
        OmegaConf.update(config, override.key_or_group, override.value(), force_add=True)
    found = OmegaConf.select(config, name)
    assert (OmegaConf.to_container(found) if OmegaConf.is_config(found) else found) == value


def test_the_package_is_the_command(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["dllm", "generate", "--help"])
    runpy.run_module("dllm", run_name="__main__")
    assert capsys.readouterr().out == helped("generate")
    monkeypatch.setattr(sys, "argv", ["dllm", "nope"])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_module("dllm", run_name="__main__")
    assert "dllm: error: unknown command 'nope'" in capsys.readouterr().err


class TestManual:
    @EACH
    def test_every_command_has_every_section(self, name: str) -> None:
        shown = helped(name)
        summary, usage, described = shown.split("\n\n")[:3]
        assert "\n" not in summary
        assert usage.startswith(f"usage: dllm {name} ")
        assert ("[GROUP=NAME ...]" in usage) == ("=NAME, by default" in shown)
        assert len(described) > 60
        heads = ["usage: ", "Examples:\n", "Options and their defaults", "Exit status:\n", "Files and environment:\n"]
        places = [shown.index(f"\n{head}") for head in [*heads, "See also: "]]
        assert places == sorted(places)
        examples = shown[places[1] : places[2]].splitlines()
        assert sum(line.startswith("  dllm ") for line in examples) >= 2

    @EACH
    def test_what_it_refers_to_exists(self, name: str) -> None:
        referred = helped(name).rpartition("See also: ")[2]
        for command_ in re.findall(r"dllm ([\w-]+)", referred):
            assert command_ in COMMANDS
        for page in re.findall(r"docs/[\w.-]+", referred):
            assert (SCRIPTS.parent / page).is_file()

    def test_decoding_options_stand_apart(self) -> None:
        shown = helped("evaluate")
        assert shown.index("  out: outputs/evaluate") < shown.index("  # Decoding\n") < shown.index("  batch_size: 8 ")

    def test_the_key_of_a_server_is_told_where_it_is_read(self) -> None:
        told = {name for name in COMMANDS if "DLLM_API_KEY  " in helped(name)}
        assert told == {"chat", "serve", "bench-serve"}

    def test_the_list_of_commands_is_as_narrow_as_the_rest(self) -> None:
        assert max(map(len, command("--help").out.splitlines())) <= 120


class TestOptionsOfABase:
    def test_they_are_typed_as_those_of_any_sampler(self) -> None:
        plain = ["generate", "show=none", "gen_length=16", "prompt=Tom has 3 apples."]
        written = "sampler.base={_target_: dllm.samplers.Threshold, threshold: 0.6}"
        one = command(*plain, "sampler=edit", "sampler.base.threshold=0.6", "seed=1")
        same = command(*plain, "sampler=edit", written, "seed=1")
        answers = [re.sub(r"[\d.,]+ tokens/s", "", result.out) for result in (one, same)]
        assert (one.code, one.err, answers[0]) == (0, "", answers[1])

    def test_those_of_a_base_that_is_named_and_of_its_base(self) -> None:
        options = ["sampler=freedave", "sampler.base=tiny/threshold", "sampler.base.threshold=0.6"]
        shown = command("generate", *options, "--cfg", "job", "-p", "sampler")
        assert "threshold: 0.6" in shown.out
        nested = ["sampler=edit", "sampler.base=anchored", "sampler.base.base.threshold=0.6"]
        shown = command("generate", *nested, "--cfg", "job", "-p", "sampler")
        assert shown.out.count("base:") == 2
        assert "threshold: 0.6" in shown.out

    def test_a_sweep_over_one_names_its_runs_by_it(self, tmp_path: Path) -> None:
        sweep = ["sampler=edit", "sampler.base.threshold=0.9,0.99", "task.limit=1", f"out={tmp_path}", "baselines=0"]
        result = command("evaluate", "-m", *sweep)
        assert result.code == 0
        assert [line.partition(":")[0] for line in result.out.splitlines()] == [
            "edit base.threshold=0.9", "edit base.threshold=0.99",
        ]  # fmt: skip

    @pytest.mark.parametrize(
        ("options", "told"),
        [
            (["sampler=edit", "sampler.base=nothing", "sampler.base.threshold=1"], "unknown sampler.base='nothing'"),
            (
                ["sampler=edit", "sampler.base.thresold=1"],
                "unknown option 'sampler.base.thresold' (did you mean threshold?); expected one of thr",
            ),
            (["sampler=threshold", "sampler.base.threshold=1"], "unknown option 'sampler.base.threshold'"),
            (["sampler=edit", "sampler.base.threshold=x"], "sampler.base.threshold='x'"),
        ],
    )
    def test_what_there_is_not_is_refused(self, options: list[str], told: str) -> None:
        result = command("generate", *options)
        assert result.code == 2
        assert told in result.err
        assert result.err.count("\n") == 1


class TestYamlOfOnesOwn:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        (tmp_path / "sampler").mkdir()
        (tmp_path / "sampler" / "bare.yaml").write_text("_target_: dllm.samplers.Threshold\nthreshold: 0.5\n")
        return tmp_path

    def test_help_shows_one_without_a_comment(self, folder: Path) -> None:
        shown = command("generate", "--config-dir", str(folder), "sampler=bare", "--help")
        assert (shown.code, shown.err) == (0, "")
        assert "threshold: 0.5" in shown.out

    @pytest.mark.parametrize("content", ["{{: x", "", "[1]", "a: *b"])
    @pytest.mark.parametrize("options", [["--help"], ["sampler=edit", "sampler.base=bad"]])
    def test_a_damaged_one_is_named(self, folder: Path, content: str, options: list[str]) -> None:
        (folder / "sampler" / "bad.yaml").write_text(content)
        result = command("generate", "--config-dir", str(folder), *options)
        assert (result.code, result.err.count("\n")) == (2, 1)
        assert "bad.yaml cannot be read (" in result.err


def test_a_working_directory_that_is_gone_is_one_line(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    script = "import os, sys; os.rmdir(os.getcwd()); from dllm.scripts.cli import main; main()"
    command = [sys.executable, "-P", "-c", script, "generate", "prompt=a"]
    result = subprocess.run(command, cwd=gone, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (2, "")
    said = "the working directory does not exist any more; change to another one"
    assert result.stderr == f"dllm generate: error: {said}\n"
