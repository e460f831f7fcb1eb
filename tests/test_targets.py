"""`_target_` names classes of this package and registered ones; anything else is refused, and not even imported."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

import dllm
from commands import command
from dllm import resolve
from dllm.cache.base import Cache
from dllm.resolve import build
from dllm.samplers import FreeDave, Threshold, Vanilla
from dllm.samplers.base import Sampler
from dllm.scripts import hydra_targets, references

FOREIGN = [
    "os.system",
    "subprocess.run",
    "builtins.eval",
    "hydra.utils.instantiate",
    "canary.Class",
    "dllm.models.loading.torch.load",
    "dllm.models.loading.torch",
    "dllm.scripts.app.os.system",
    "dllm.models.loading.load",
    "dllm.samplers.Vanilla.__init__",
    "dllm.samplers.base.Sampler",
    "dllm.scripts.train_tiny.Trainer",
    "dllm.evaluation.run_folder.RunFolder",
    "dllm.samplers",
    "dllm..samplers.Vanilla",
    "dllm.nothing.Vanilla",
    "",
    3,
    None,
    ["dllm.samplers.Vanilla"],
]


@pytest.fixture(autouse=True)
def canary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module that must not be imported."""
    (tmp_path / "canary.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.parametrize("target", FOREIGN)
@pytest.mark.parametrize("protocol", [Sampler, Cache])
def test_what_is_no_class_of_the_package_is_refused_at_any_depth(target: Any, protocol: type) -> None:
    bad = {"_target_": target}
    inside = {"_target_": "dllm.samplers.FreeDave" if protocol is Sampler else "dllm.cache.Dual"}
    name = "base" if protocol is Sampler else "measure_every"
    for options in (bad, {**inside, name: bad}, {**inside, name: [bad]}, {**inside, name: {"deep": [bad]}}):
        with pytest.raises(ValueError, match=r"_target_=.* is not a (sampler|cache) of dllm"):
            build("place", options, protocol)
    assert "canary" not in sys.modules


@pytest.mark.parametrize("key", ["_args_", "_partial_", "_recursive_", "_convert_", "speed"])
def test_what_the_class_does_not_take_is_refused(key: str) -> None:
    with pytest.raises(ValueError, match=rf"unknown option 'sampler\.{key}'; expected one of threshold, "):
        build("sampler", {"_target_": "dllm.samplers.Threshold", key: ["os.system"]}, Sampler)


def test_nested_objects_are_made_and_their_errors_say_where_they_are() -> None:
    options = {"_target_": "dllm.samplers.FreeDave", "base": {"_target_": "dllm.samplers.Threshold", "threshold": 0.5}}
    assert build("sampler", options, Sampler) == FreeDave(base=Threshold(0.5))
    options["base"] = {"_target_": "dllm.samplers.Threshold", "threshold": -1}
    with pytest.raises(ValueError, match=r"^sampler\.base\.threshold=-1 is out of range"):
        build("sampler", options, Sampler)


def test_a_class_of_the_other_group_is_refused() -> None:
    with pytest.raises(ValueError, match="is not a sampler"):
        build("sampler", {"_target_": "dllm.cache.Dual"}, Sampler)
    with pytest.raises(ValueError, match="is not a cache"):
        build("cache", {"_target_": "dllm.samplers.Vanilla"}, Cache)


def test_a_class_of_ones_own_is_named_once_it_is_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolve, "_REGISTERED", {})

    @dataclass(frozen=True)
    class Mine(Vanilla):
        pass

    Mine.__qualname__ = "Mine"
    name = f"{Mine.__module__}.Mine"
    with pytest.raises(ValueError, match=r"register custom classes with dllm\.register"):
        build("sampler", {"_target_": name}, Sampler)
    assert dllm.register(Mine) is Mine
    assert build("sampler", {"_target_": name, "tokens_per_step": 3}, Sampler) == Mine(tokens_per_step=3)


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (["generate", "sampler._target_=os.system"], "sampler._target_='os.system'"),
        (["generate", "cache._target_=canary.Class"], "cache._target_='canary.Class'"),
        (["evaluate", "task._target_=os.system"], "task._target_='os.system'"),
        (["generate", "sampler=freedave", "sampler.base={_target_: os.system}"], "sampler.base._target_='os.system'"),
        (["generate", "+sampler._partial_=true"], "unknown option 'sampler._partial_'"),
        (["generate", "+model._target_=os.system"], "model._target_"),
        (["evaluate", "-m", "hydra.launcher._target_=os.system"], "hydra.launcher._target_='os.system'"),
        (["generate", "+hydra.callbacks={a: {_target_: os.system}}"], "hydra.callbacks.a._target_='os.system'"),
        (["generate", "+hydra={callbacks: {a: {_target_: os.system}}}"], "hydra.callbacks.a._target_='os.system'"),
        (
            ["evaluate", "-m", "hydra/sweeper=optuna", "hydra.sweeper.custom_search_space=canary.Class"],
            "hydra.sweeper.custom_search_space='canary.Class'",
        ),
        (["generate", "hydra.output_subdir=."], "hydra.output_subdir='.'"),
        (["train-filter", "sampler._target_=os.system"], "sampler._target_='os.system'"),
        (["compatibility", "+variants.a={_target_: os.system}"], "variants.a._target_='os.system'"),
        (["bench", "samplers=[{freedave:{base:{_target_: os.system}}}]"], "samplers[0].base._target_='os.system'"),
        (["bench", "samplers=[{vanilla:{_target_: os.system}}]"], "samplers[0]._target_='os.system'"),
    ],
)
def test_no_command_makes_anything_else(arguments: list[str], option: str, tmp_path: Path) -> None:
    if arguments[0] == "evaluate":
        arguments = [*arguments, f"out={tmp_path}/out"]
    result = command(*arguments)
    assert (result.code, result.err.count("\n")) == (2, 1), result
    assert option in result.err
    assert "canary" not in sys.modules


@pytest.mark.parametrize(
    ("content", "option"),
    [
        ("hydra: {callbacks: {x: {_target_: dllm.files.write_whole, path: P, content: x}}}", "callbacks.x._target_="),
        ("mine: {_target_: canary.Class}\nhydra: {callbacks: {x: '${mine}'}}", "callbacks.x._target_="),
        ("hydra: {job_logging: {version: 1, handlers: {x: {class: canary.Class}}}}", "handlers.x.class="),
        ("hydra: {job_logging: {version: 1, formatters: {x: {(): canary.Class}}}}", "formatters.x.()="),
        (
            "hydra: {hydra_logging: {version: 1, handlers: {x: {class: logging.FileHandler, filename: P, mode: w}},"
            " root: {handlers: [x]}}}",
            "handlers.x.filename=",
        ),
        (
            "hydra: {job_logging: {version: 1, handlers: {x: {class: logging.StreamHandler,"
            " stream: 'ext://canary.Class'}}}}",
            "handlers.x.stream=",
        ),
        ("hydra: {launcher: {_target_: canary.Class}}", "hydra.launcher._target_="),
        ("hydra: {job: {env_set: {CUDA_X: 1, LD_XYZ: x}}}", "hydra.job.env_set.LD_XYZ="),
        (  # what Hydra resolves later, or otherwise
            "hydra: {job: {env_set: {CUDA_V: canary.Class}}, job_logging: {version: 1,"
            " formatters: {x: {(): '${hydra:job.env_set.CUDA_V}'}}}}",
            "formatters.x.()=",
        ),
        (
            "hydra: {job: {env_set: {CUDA_V: P}}, job_logging: {version: 1, root: {handlers: [x]},"
            " handlers: {x: {class: logging.FileHandler, mode: w, filename: '${hydra:job.env_set.CUDA_V}'}}}}",
            "handlers.x.filename=",
        ),
        (
            "hydra: {job: {env_set: {CUDA_V: //canary.Class}}, job_logging: {version: 1,"
            " handlers: {x: {class: logging.StreamHandler, stream: 'ext:${hydra:job.env_set.CUDA_V}'}}}}",
            "handlers.x.stream=",
        ),
        ("hydra: {callbacks: '${hydra:job.env_set}'}", "hydra.callbacks="),
        (
            "hydra: {job_logging: {version: 1, names: {a: canary.Class}, handlers: {x: {class:"
            " '\\${oc.select:hydra.job_logging.names.b,logging.StreamHandler}'}}}}",
            "handlers.x.class=",
        ),
        ("hydra: {job: {name: ../kept}}", "hydra.job.name='../kept' is no name of a file"),
        (
            "hydra: {job_logging: {version: 1, root: {handlers: [x]},"
            " handlers: {x: {class: logging.FileHandler, filename: a.log, delay: true,"
            " .: {baseFilename: P, mode: w}}}}}",
            "handlers.x..",
        ),
    ],
)
def test_no_file_of_a_configuration_does(content: str, option: str, tmp_path: Path) -> None:
    (tmp_path / "sampler").mkdir()
    kept = tmp_path / "kept"
    kept.write_text("kept")
    text = f"# @package _global_\nsampler: {{_target_: dllm.samplers.Threshold}}\n{content.replace('P', str(kept))}\n"
    (tmp_path / "sampler" / "mine.yaml").write_text(text)
    arguments = ["gen_length=8", "prompt=a", f"--config-dir={tmp_path}", "sampler=mine"]
    for multirun in ([], ["-m", f"hydra.sweep.dir={tmp_path}/sweep"]):
        result = command("generate", *multirun, *arguments)
        assert (result.code, result.err.count("\n")) == (2, 1), result
        assert option in result.err
    assert "canary" not in sys.modules
    assert kept.read_text() == "kept"


def test_pythons_own_log_files_are_written_where_a_command_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for handler in ("logging.FileHandler", "logging.handlers.RotatingFileHandler"):
        name = f"{handler.rpartition('.')[2]}.log"
        logs = f"{{version: 1, handlers: {{x: {{class: {handler}, filename: {name}}}}}, root: {{handlers: [x]}}}}"
        (tmp_path / "sampler").mkdir(exist_ok=True)
        text = f"# @package _global_\nsampler: {{_target_: dllm.samplers.Threshold}}\nhydra: {{job_logging: {logs}}}\n"
        (tmp_path / "sampler" / "mine.yaml").write_text(text)
        arguments = ["gen_length=8", "prompt=a", "show=none", f"--config-dir={tmp_path}", "sampler=mine"]
        assert command("generate", *arguments).code == 0
        assert (tmp_path / name).is_file()


def test_what_was_checked_is_what_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CUDA_V", raising=False)
    (tmp_path / "sampler").mkdir()
    (tmp_path / "sampler" / "mine.yaml").write_text(
        "# @package _global_\nsampler: {_target_: dllm.samplers.Threshold}\n"
        "hydra: {job: {env_set: {CUDA_V: canary.Class}},"
        " job_logging: {version: 1, root: {handlers: [x]},"
        " handlers: {x: {class: '${oc.env:CUDA_V,logging.StreamHandler}'}}}}\n"
    )
    arguments = ["gen_length=8", "prompt=a", "show=none", f"--config-dir={tmp_path}", "sampler=mine"]
    assert command("generate", *arguments).code == 0
    assert "canary" not in sys.modules


def test_options_of_a_sweep_refer_to_those_of_their_job(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"id": "a", "prompt": "a"}\n')
    arguments = ["gen_length=8", "show=none", f"input={tmp_path}/in.jsonl", f"output={tmp_path}/out-${{seed}}.jsonl"]
    result = command("generate", "-m", "seed=1,2", f"hydra.sweep.dir={tmp_path}/sweep", *arguments)
    assert result.code == 0, result
    assert sorted(path.name for path in tmp_path.glob("out-*.jsonl")) == ["out-1.jsonl", "out-2.jsonl"]
    text = "cost ${seed} pens"
    numbered = ["hydra.job.name=run-${hydra.job.num}", "hydra.sweep.subdir=a${hydra:job.num}"]
    result = command(
        "generate", "-m", "sampler=vanilla,threshold", f"hydra.sweep.dir={tmp_path}/${{now:%S-%f}}", f"prompt={text}",
        "gen_length=8", "show=lines", *numbered,
    )  # fmt: skip
    assert result.code == 0, result
    (folder,) = (path.parent for path in tmp_path.rglob("multirun.yaml") if path.parent.name != "sweep")
    assert {path.name for path in folder.iterdir()} == {"a0", "a1", "multirun.yaml"}
    assert "cost 0 pens" not in result.out
    shown = command("generate", "prompt=echo ${HOME} and ${seed}", "--cfg", "job", "-p", "prompt")
    assert (shown.code, shown.out) == (0, "echo ${HOME} and ${seed}\n")


@pytest.mark.parametrize("flag", ["--experimental-rerun", "--experimental-rerun=x.pickle", "--experimental", "--exp"])
def test_no_pickle_is_run_again(flag: str, tmp_path: Path) -> None:
    result = command("generate", flag, str(tmp_path / "x.pickle"))
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert repr(flag) in result.err


@pytest.mark.parametrize(
    "arguments",
    [["hydra.searchpath=[pkg://canary.conf]"], ["--config-path=pkg://canary"], ["--config-path", "FOLDER"]],
)
def test_no_package_of_others_is_imported(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "canary.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "generate.yaml").write_text("defaults: [_self_]\nhydra: {searchpath: ['pkg://canary']}\nprompt: a\n")
    result = command("generate", *(each.replace("FOLDER", str(tmp_path)) for each in arguments), "prompt=a")
    assert (result.code, result.err.count("\n")) == (2, 1), result
    assert "pkg://canary" in result.err
    assert "canary" not in sys.modules


SLURM = {"setup": None, "additional_parameters": {}, "partition": None, "comment": None}


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("launcher.setup", ["touch x"]),
        ("launcher.additional_parameters", {"prolog": "/x"}),
        ("launcher.ray.init.address", "ray://elsewhere"),
        ("sweeper.storage", "sqlite:////x"),
    ],
)
def test_what_runs_commands_or_connects_is_typed(option: str, value: Any) -> None:
    node = OmegaConf.create({"launcher": dict(SLURM), "sweeper": {"storage": None}, "runtime": {"choices": {}}})
    OmegaConf.update(node, option, value, force_add=True)
    with pytest.raises(ValueError, match=rf"hydra\.{option}=.* on the command line"):
        hydra_targets.check(node, ["hydra.launcher.partition=gpu", "hydra.sweeper.n_trials=3", "hydra/launcher=slurm"])
    for typed in (f"hydra.{option}=x", f"+hydra.{option}.init=x", "hydra={launcher: {}, sweeper: {}}"):
        hydra_targets.check(node, [typed])


def test_what_a_plugin_says_itself_is_taken() -> None:
    for choice in ("ray", "ray_aws"):
        own = ConfigStore.instance().load(f"hydra/launcher/{choice}.yaml").node
        node = OmegaConf.create({"launcher": own, "runtime": {"choices": {"hydra/launcher": choice}}})
        hydra_targets.check(node, [])


def test_a_launchers_words_are_of_one_line() -> None:
    node = OmegaConf.create({"launcher": SLURM | {"partition": "gpu", "comment": "my job"}, "runtime": {"choices": {}}})
    hydra_targets.check(node, [])
    node.launcher.comment = "x\ntouch y"
    with pytest.raises(ValueError, match="several lines of a script"):
        hydra_targets.check(node, ["hydra.launcher.comment=x"])


def _chain(first: Any, more: Callable[[str], Any]) -> dict[str, Any]:
    return {"l0": first} | {f"l{place}": more(f"l{place - 1}") for place in range(1, 40)}


@pytest.mark.parametrize(
    "content",
    [
        _chain("aaaa", lambda last: f"${{{last}}}" * 2),
        _chain("aaaa", lambda last: f"${{oc.select:{last}}}" * 2),
        _chain("a" * 10**6, lambda last: f"${{{last}}}" * 2),
        _chain({"a": 1}, lambda last: {"a": f"${{{last}}}", "b": f"${{{last}}}"}),
        {"a": {"b": "${c}"}, "c": {"d": "${a}"}},
    ],
)
def test_references_that_multiply_are_refused(content: dict[str, Any]) -> None:
    node = OmegaConf.create({"hydra": {}} | content)
    with references.counted():
        with pytest.raises(ValueError, match="references to other options multiply; write the values themselves"):
            references.check(node)
        with pytest.raises(OmegaConfBaseException, match="multiply"):
            OmegaConf.to_container(node, resolve=True)


def test_many_references_are_none() -> None:
    node = OmegaConf.create({"a": "x" * 1000} | {f"b{place}": "${a}" for place in range(500)} | {"c": "${hydra:x}"})
    with references.counted():
        references.check(node)
    assert node.b499 == "x" * 1000
