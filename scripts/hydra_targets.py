"""What the `hydra` part of a configuration may name: plugins of Hydra, Python's log files, harmless variables.

Hydra creates callbacks, launchers, sweepers and log handlers from any import path, and sets environment variables, in
YAML files and overrides alike. The composed configuration is checked, since defaults, packages and interpolations can
put a mapping anywhere.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from hydra._internal import hydra as application
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigLoadError
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf, StringNode, read_write
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from dllm.evaluation.claim import claimed
from dllm.scripts import references
from dllm.stored import there

_NAMING = ("_target_", "()", "class", "factory", "custom_search_space")
_ALLOWED = re.compile(
    r"hydra\.experimental\.callbacks\.(LogJobReturnCallback|PickleJobInfoCallback)|optuna\.samplers\.\w+"
    r"|logging\.(NullHandler|StreamHandler|FileHandler)|logging\.handlers\.\w*FileHandler|colorlog\.ColoredFormatter"
)
# What runs commands on a cluster, or connects to machines and data bases: from the command line only.
_TYPED = (
    *(f"launcher.{name}" for name in ("setup", "additional_parameters", "srun_args", "python")),  # of Slurm
    *(f"launcher.ray.{name}" for name in ("init.address", "init.runtime_env", "remote.runtime_env", "cluster")),
    *(f"launcher.{name}" for name in ("env_setup", "sync_up", "sync_down")),  # of Ray
    "sweeper.storage",
)
_DEEPEST = 20
# Other variables can make programs load code, or fetch from elsewhere.
_VARIABLES = re.compile(r"(CUDA|NCCL|OMP|MKL|OPENBLAS|TOKENIZERS|CUBLAS)_\w+|HF_HUB_OFFLINE|COLUMNS|NO_COLOR")
_LOGS = ("hydra.job_logging.", "hydra.hydra_logging.")
_STREAMS = ("ext://sys.stdout", "ext://sys.stderr")
_LOG = re.compile(r"(\$\{hydra\.runtime\.output_dir\}/)?([\w-]|\$\{hydra\.job\.name\})+\.log")

_NAME = re.compile(r"([\w.-]|\$\{hydra[.:]job\.num\})+|\?\?\?")
_HYDRAS = "${hydra:"
_OWN = "dllm.conf"  # is in the configurations of sweeps, as they are read from there
_WHOLE = re.compile(r"\$\{[^}]*:.*\}", re.DOTALL)  # of a resolver, which may give anything


_STUDIES, _LOCKS = set[Path](), ExitStack()  # of searches, by their results


class _Loader(ConfigLoaderImpl):
    """Hydra's loader, which rejects foreign code before any of it is imported."""

    def load_configuration(self, *args: Any, **kwargs: Any) -> DictConfig:
        cfg = super().load_configuration(*args, **kwargs)
        references.check(cfg)
        check(cfg.hydra, kwargs["overrides"] if "overrides" in kwargs else args[1])
        # Hydra swallows errors where it only asks for the mode.
        if cfg.hydra.mode == RunMode.MULTIRUN and kwargs.get("validate_sweep_overrides", True):
            _check_sweep(cfg.hydra)
        return cfg


def register() -> None:
    """Let Hydra's applications use this loader."""
    setattr(application, "ConfigLoaderImpl", _Loader)  # noqa: B010  # mypy knows no such assignment


def check(node: DictConfig, overrides: Sequence[str]) -> None:
    """Reject code, log files and variables of others; what was checked is what is used, whatever it referred to.

    Args:
        node: the part `hydra` of a composed configuration. Names of code, log settings and mappings in it that refer
            to others are replaced by what they are.
        overrides: of the command line.

    Raises:
        ValueError: the option, its value and the fix.
    """
    plugins = Plugins.instance().class_name_to_class
    for path, name, raw, value in _entries(node, "hydra"):
        known = name == "_target_" and value in plugins
        if name in _NAMING and value is not None and not known and not _ALLOWED.fullmatch(str(value)):
            raise ValueError(
                f"{path}={value!r} names code to run; leave it out (plugins are chosen by hydra/launcher=NAME and "
                "hydra/sweeper=NAME)"
            )
        if path.startswith("hydra.job.env_set.") and not _VARIABLES.fullmatch(name):
            raise ValueError(f"{path}={value!r} could make programs run other code; set it in the shell")
        if isinstance(value, str) and value.startswith("ext://") and value not in _STREAMS:
            raise ValueError(f"{path}={value!r} names code to import; use one of {', '.join(_STREAMS)}")
        if name == "filename" and not _LOG.fullmatch(str(raw)):
            raise ValueError(f"{path}={value!r} could be a file of others; use NAME.log, without a folder")
        if path == "hydra.output_subdir" and value not in (None, ".hydra"):
            raise ValueError(f"{path}={value!r} could be a folder with files of others; use .hydra, or null")
        if path == "hydra.job.name" and not _NAME.fullmatch(str(value)):
            raise ValueError(f"{path}={value!r} is no name of a file; use letters, digits, _ and -")
        if path.startswith("hydra.launcher.") and isinstance(value, str) and not value.isprintable():
            raise ValueError(f"{path}={value!r} would be several lines of a script; write it in one")
    typed = [each.partition("=")[0].lstrip("+~") for each in overrides]
    for option in _TYPED:
        path, value = f"hydra.{option}", _plain(OmegaConf.select(node, option))
        if value in (None, [], {}) or value == _plugins_own(node, option):
            continue
        if not any(f"{each}.".startswith(f"{path}.") or path.startswith(f"{each}.") for each in typed):
            raise ValueError(f"{path}={value!r} runs commands or connects to others; give it on the command line")


def _plugins_own(node: DictConfig, option: str) -> Any:
    """What the chosen plugin itself says for an option."""
    group, _, rest = option.partition(".")
    try:
        own = ConfigStore.instance().load(f"hydra/{group}/{node.runtime.choices.get(f'hydra/{group}')}.yaml").node
    except ConfigLoadError:  # none of the plugin
        return None
    return _plain(OmegaConf.select(own, rest))


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value) if isinstance(value, (DictConfig, ListConfig)) else value


def _check_sweep(node: DictConfig) -> None:
    """Reject files of others in the folder of a sweep, where Hydra and its plugins write some of these names."""
    try:
        folder = Path(node.sweep.dir)
    except OmegaConfBaseException:  # it depends on a job
        return
    if not node.sweeper["_target_"].endswith("BasicSweeper"):
        _lock(folder / "optimization_results.yaml")
    for name, marks in {"multirun.yaml": ("hydra:", _OWN), "optimization_results.yaml": ("name:", "")}.items():
        file, (begin, own) = folder / name, marks
        if there(file):
            text = file.read_text(encoding="utf-8", errors="replace")
            if not text.startswith(begin) or own not in text:
                raise ValueError(
                    f"{file} exists and is not of such a sweep, which would replace it; give another folder, or remove "
                    "that file"
                )


def _lock(results: Path) -> None:
    """Keep others from searching in the same folder: they would take each other's trials for failures."""
    if results not in _STUDIES:
        _STUDIES.add(results)
        _LOCKS.enter_context(claimed(results, str(results), "another out"))


@contextmanager
def one_study() -> Iterator[None]:
    """Release the locks of searches at the end."""
    try:
        yield
    finally:
        _STUDIES.clear()
        _LOCKS.close()


def _entries(node: Any, place: str) -> Iterator[tuple[str, str, Any, Any]]:
    """Path, name, value as written, and value of all entries, of mappings behind interpolations as well."""
    waiting = [(place, node)]
    while waiting:
        place, node = waiting.pop()
        if place.count(".") > _DEEPEST:
            raise ValueError(f"{place} is nested too deep; give plainer values")
        for name in list(node) if isinstance(node, DictConfig) else range(len(node)):
            path, raw = f"{place}.{name}", node._get_node(name)._value()
            log = path.startswith(_LOGS)
            if log and name == ".":
                raise ValueError(f"{path} sets attributes of log handlers; leave it out")
            try:
                # In a sweep, Hydra knows that of the job before.
                value, known = node[name], not (isinstance(raw, str) and _HYDRAS in raw)
            except MissingMandatoryValue:  # Hydra sets it later
                continue
            except OmegaConfBaseException:
                value, known = raw, False
            if not known:  # Hydra knows it later: text, where it is harmless
                anything = _WHOLE.fullmatch(raw) and not isinstance(node._get_node(name), StringNode)
                if name != "filename" and (log or name in _NAMING or anything):
                    raise ValueError(f"{path}={raw!r} cannot be resolved yet; write the value itself")
                value = raw
            held = log or name in _NAMING or isinstance(value, (DictConfig, ListConfig))
            if held and isinstance(raw, str) and raw is not value and name != "filename":
                if isinstance(value, str) and "${" in value:  # it was escaped
                    raise ValueError(f"{path}={value!r} refers to others; write the value itself")
                with read_write(node):
                    node[name] = value
                value = node[name]
            if isinstance(value, (DictConfig, ListConfig)):
                waiting.append((path, value))
            else:
                yield path, str(name), raw, value
