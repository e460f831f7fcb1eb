"""What every command shares: help, options of the right kind, and one clear line for bad input."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra.errors import HydraException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dllm.resolve import names, resolve
from dllm.scripts import usage
from dllm.scripts.kinds import check_kinds

# Options whose values are quoted for Hydra, so that commas, "?" and "=" in them mean themselves.
_PATHS = ("input", "output", "picture", "out", "init", "publish", "data", "model.path")
_FLAGS = """-h --help --hydra-help -v --version -c --cfg --resolve -p --package -r --run -m --multirun -sc
--shell-completion -cp --config-path -cn --config-name -cd --config-dir --experimental-rerun -i --info""".split()
# What bad input looks like when it surfaces; anything else is a bug and keeps its traceback.
_BAD_INPUT = (ValueError, OSError, HydraException, OmegaConfBaseException)


def run(task: Callable[[DictConfig], None], config_name: str, kinds: Mapping[str, Any] | None = None) -> None:
    """Run a Hydra application; bad input ends it with one line and exit code 2.

    Args:
        task: what to do with the composed configuration.
        config_name: its YAML in conf/.
        kinds: type hints of options, where their defaults do not say enough.
    """
    command = f"dllm {config_name.replace('_', '-')}"

    def guarded(cfg: DictConfig) -> None:
        # Caught here as well as below: what leaves the task as an error, Hydra reports in its own words.
        try:
            check_kinds(cfg, config_name, kinds or {})
            task(cfg)
        except BrokenPipeError:
            # Whoever read the output has seen enough; nothing is left to flush at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        except _BAD_INPUT as error:
            fail(command, _qualified(_one_line(error), cfg))

    # Without this Hydra prints its own report of a wrong option and exits with 1.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        arguments = rewrite(sys.argv[1:], config_name)
        if {"-h", "--help"} & set(arguments):
            print(usage.describe(config_name, arguments))
            return
        sys.argv = [command, *arguments]
        hydra.main(version_base="1.3", config_path="pkg://dllm.conf", config_name=config_name)(guarded)()
    except _BAD_INPUT as error:
        fail(command, _one_line(error))
    except KeyboardInterrupt:
        fail(command, "interrupted; what was written is kept", code=130)


def make(place: str, group: str, protocol: type, entry: Any) -> Any:
    """Make the sampler or cache that an option holds.

    Args:
        place: what errors call it.
        group: sampler or cache.
        protocol: what it must be.
        entry: {_target_: ..., its options}.

    Raises:
        ValueError: it is something else, or refuses its options.
    """
    fields = OmegaConf.to_container(entry, resolve=True) if OmegaConf.is_config(entry) else entry
    if not isinstance(fields, dict) or "_target_" not in fields:
        raise ValueError(f"{place}={fields!r} is no {group}; give {{_target_: dllm.{group}..., its options}}")
    try:
        made = instantiate(fields)
    except (*_BAD_INPUT, TypeError) as error:
        raise ValueError(f"{place}: {_one_line(error)}") from None
    return resolve(group, made, protocol, place)


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [f"| {' | '.join(cells)} |" for cells in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


def fail(command: str, message: str, code: int = 2) -> NoReturn:
    """Say what is wrong and leave."""
    print(f"{command}: error: {message}", file=sys.stderr)
    sys.exit(code)


def check_writable(option: str, value: str, file: str | None = None) -> None:
    """Refuse a path that cannot be written to, before any work is done.

    Args:
        option: where it comes from.
        value: what it is.
        file: the path that is going to be written, where it is not the value itself.

    Raises:
        ValueError: it is a folder, lies behind a file, or may not be written.
    """
    path = Path(file or value)
    nearest = path if path.exists() else next(parent for parent in path.absolute().parents if parent.exists())
    if path.is_dir() or (nearest != path and not nearest.is_dir()) or not os.access(nearest, os.W_OK):
        raise ValueError(f"{option}={value!r} cannot be written ({nearest} is in the way); give another path")


def rewrite(arguments: Sequence[str], config_name: str) -> list[str]:
    """Quote free text, and let the group `model` take a folder or hub id in place of a name.

    Raises:
        ValueError: a flag that Hydra does not have.
    """
    models = names("model") if "model" in usage.groups(config_name) else None
    multirun = not {"-m", "--multirun"}.isdisjoint(arguments)
    return [part for argument in arguments for part in _rewrite_one(argument, models, multirun)]


def _rewrite_one(argument: str, models: Sequence[str] | None, multirun: bool) -> list[str]:
    key, separator, value = argument.partition("=")
    if argument.startswith("-") and key not in _FLAGS:
        raise ValueError(f"{argument!r} is no flag; options are written name=value, and --help lists them")
    if not separator:
        return [argument]
    paths = value.split(",") if multirun else [value]
    if key == "model" and models is not None and not set(paths) <= set(models):
        return ["model=custom", f"model.path={','.join(map(_quote, paths))}"]
    if key == "prompt":
        return [f"prompt={_quote_literally(value)}"]
    return [f"{key}={_quote(value)}"] if key in _PATHS and value != "null" else [argument]


def _quote_literally(value: str) -> str:
    """Quote text in which even OmegaConf's ${...} and ??? mean themselves."""
    if value == "???":
        return "${oc.decode:\"'???'\"}"
    return _quote(re.sub(r"(\\*)\$\{", r"\1\1\\${", value))


def _quote(value: str) -> str:
    """Write a string as Hydra's grammar quotes it: backslashes count only before a quote."""
    escaped = re.sub(r"(\\*)'", r"\1\1\\'", value)
    escaped = re.sub(r"(\\+)$", r"\1\1", escaped)
    return f"'{escaped}'"


def _qualified(text: str, cfg: DictConfig) -> str:
    """An error about a sampler or cache, whose options have a prefix on the command line."""
    groups = {group: dict(cfg.get(group) or {}) for group in ("sampler", "cache")}
    for group, options in groups.items():
        for name, value in options.items():
            # An option that both have is known by its value.
            shared = all(name in other for other in groups.values())
            said = re.escape(repr(value)) if shared else ""
            if name not in cfg:
                text = re.sub(rf"(?<![\w.(]){name}=(?={said})", f"{group}.{name}=", text)
    return text


def _one_line(error: BaseException) -> str:
    cause: BaseException = error
    # instantiate() wraps what a constructor raised; the constructor's own words name the fix.
    while isinstance(cause, HydraException) and isinstance(cause.__cause__, (ValueError, TypeError)):
        cause = cause.__cause__
    text = re.sub(r"\s+", " ", str(cause)).strip() or type(error).__name__
    if match := re.search(r"Could not override '((sampler|cache)\.[^']+)'", text):
        group = match[2]
        return (
            f"{match[1]} is no option here; choose with {group}=NAME, of which `{group}=NAME --help` lists the options"
        )
    if match := re.search(r"Could not override '([^']+)'", text):
        return f"{match[1]} is no option here; --help lists those there are"
    if "Config group override must be a string" in text:
        return "a group such as cache, sampler or model is chosen by its name; --help lists them"
    if match := re.search(r"Could not find '([^/]+)/([^']*)' Available options in '[^']+': (.*?) Config search", text):
        return f"{match[1]}={match[2]} is unknown; use one of {', '.join(match[3].split())}"
    if match := re.search(r"Error parsing override '([^']*)' missing EQUAL", text):
        return f"{match[1]!r} is no option; options are written name=value, and --help lists them"
    if match := re.search(r"Ambiguous value for argument '([^']+)'", text):
        return f"{match[1]} names several; give one, or add -m to run them one after another"
    if match := re.search(r"Missing mandatory value: (\S+)", text):
        return f"{match[1]} has no value; set it with {match[1]}=..."
    return re.sub(r"(, set env var HYDRA_FULL_ERROR=1[^.]*| full_key:| See https://hydra).*", "", text)
