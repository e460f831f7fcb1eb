"""The YAML of a policy or cache is a mirror of its constructor, which is the truth."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_module
from hydra.utils import get_class, instantiate
from omegaconf import DictConfig, OmegaConf

import dllm
from dllm.resolve import names, options_of, variants
from dllm.samplers import Calibrated
from models import random_llada

ROOT = Path(__file__).parents[1]
FOLDERS = {"sampler": "samplers", "cache": "cache"}
CHOICES = [(group, path.stem) for group in FOLDERS for path in sorted((ROOT / "conf" / group).glob("*.yaml"))]


def composed(group: str, name: str) -> DictConfig:
    with initialize_config_module("dllm.conf", version_base="1.3"):
        return compose(overrides=[f"+{group}={name}"])[group]


def default(parameter: inspect.Parameter) -> Any:
    return "???" if parameter.default is inspect.Parameter.empty else parameter.default


@pytest.mark.parametrize(("group", "name"), CHOICES)
def test_yaml_mirrors_the_constructor(group: str, name: str) -> None:
    config = composed(group, name)
    made = get_class(config["_target_"])
    arguments = inspect.signature(made).parameters
    written = {key: value for key, value in OmegaConf.to_container(config).items() if key != "_target_"}
    assert written.pop("calibration", ...) is (None if getattr(made, "knob", None) else ...)
    assert list(written) == list(arguments)
    for key, parameter in arguments.items():
        nested = isinstance(written[key], dict) and "_target_" in written[key]
        assert (instantiate(config[key]) if nested else written[key]) == default(parameter), key


@pytest.mark.parametrize(("group", "name"), CHOICES)
def test_yaml_starts_with_a_comment_that_says_what_it_is(group: str, name: str) -> None:
    first = (ROOT / "conf" / group / f"{name}.yaml").read_text().splitlines()[0]
    assert first.startswith("# ")
    assert len(first) > 10


@pytest.mark.parametrize("group", FOLDERS)
def test_every_policy_and_cache_has_a_yaml(group: str) -> None:
    offered = {get_class(composed(group, name)["_target_"]) for kind, name in CHOICES if kind == group}
    method = {"sampler": "step", "cache": "start"}[group]
    missing = set()
    for path in (ROOT / FOLDERS[group]).glob("*.py"):
        module = importlib.import_module(f"dllm.{FOLDERS[group]}.{path.stem}")
        for cls in vars(module).values():
            own = inspect.isclass(cls) and cls.__module__ == module.__name__ and not cls.__name__.startswith("_")
            if own and hasattr(cls, method) and not getattr(cls, "_is_protocol", False):
                missing |= {cls} - offered
    assert missing <= {Calibrated}  # an option of the others


@pytest.mark.parametrize(
    ("group", "name"),
    [(group, name) for group in ("sampler", "cache", "model", "task") for name in names(group) + variants(group)],
)
def test_the_interface_and_the_commands_read_a_yaml_alike(group: str, name: str) -> None:
    options = options_of(group, name)
    assert list(options.items()) == list(OmegaConf.to_container(composed(group, name)).items())
    options.clear()
    assert options_of(group, name)


def test_what_several_yamls_share_is_no_choice() -> None:
    assert "metered" not in (*names("cache"), *variants("cache"))
    with pytest.raises(ValueError, match="unknown cache='shared/metered'"):
        dllm.generate(random_llada(), [[5]], cache="shared/metered")


def test_commands_share_the_options_of_decoding() -> None:
    shared = set(OmegaConf.load(ROOT / "conf" / "shared" / "decoding.yaml"))
    assert shared <= set(dllm.Options.__dataclass_fields__)
    for command in ("generate", "evaluate", "train_filter"):
        with initialize_config_module("dllm.conf", version_base="1.3"):
            assert shared < set(compose(command))
