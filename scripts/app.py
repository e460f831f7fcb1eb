"""What every command shares: help, options of the right kind, and one clear line for bad input."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from dllm.resolve import names
from dllm.scripts import usage
from dllm.scripts.ending import fail, leave_quietly
from dllm.scripts.kinds import check_kinds

# Options whose values are quoted for Hydra, so that commas, "?" and "=" in them mean themselves.
_PATHS = (
    "input",
    "output",
    "picture",
    "out",
    "init",
    "publish",
    "data",
    "model.path",
    "path",
    "folder",
    "quality",
    "task.metric",
)
# Groups that take more than their choices: which choice the others are, and which of its options takes them.
_OTHERS = {"model": ("custom", "path"), "task": ("lm_eval", "name")}
# The option that an argument without a name is.
_POSITIONAL = {"report": "folder", "show": "path"}
_VALUED = {"-c", "--cfg", "-p", "--package", "-cp", "--config-path", "-cn", "--config-name", "-cd", "--config-dir"}
_MULTIRUN = ("-m", "--multirun")
_FLAGS = """-h --help --hydra-help -v --version -c --cfg --resolve -p --package -r --run -m --multirun -sc
--shell-completion -cp --config-path -cn --config-name -cd --config-dir -i --info""".split()
# What bad input looks like when it surfaces; anything else is a bug and keeps its traceback.
BAD_INPUT = (ValueError, OSError, HydraException, OmegaConfBaseException)


def run(task: Callable[[DictConfig], Any], config_name: str, kinds: Mapping[str, Any] | None = None) -> None:
    """Run a Hydra application; bad input ends it with one line and exit code 2.

    Args:
        task: what to do with the composed configuration.
        config_name: its YAML in conf/.
        kinds: type hints of options, where their defaults do not say enough.
    """
    command = f"dllm {config_name.replace('_', '-')}"

    def guarded(cfg: DictConfig) -> Any:
        # Caught here as well as below: what leaves the task as an error, Hydra reports in its own words.
        try:
            check_kinds(cfg, config_name, kinds or {})
            result = task(cfg)
            if sys.stdout is not None:
                sys.stdout.flush()  # whether it can be written is known now
            return result
        except BrokenPipeError:
            leave_quietly()
        except BAD_INPUT as error:
            message = _qualified(one_line(error), cfg)
            if HydraConfig.get().mode == RunMode.MULTIRUN:
                # The other jobs of a sweep go on; what the sweeper makes of this one is told at its end.
                print(f"{command}: error: {message}", file=sys.stderr)
                raise ValueError(message) from None
            fail(command, message)

    # Without this Hydra prints its own report of a wrong option and exits with 1.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        arguments = rewrite(sys.argv[1:], config_name)
        if {"-h", "--help"} & set(arguments):
            print(usage.describe(config_name, arguments))
            return
        sys.argv = [command, *arguments]
        hydra.main(version_base="1.3", config_path="pkg://dllm.conf", config_name=config_name)(guarded)()
    except BrokenPipeError:
        leave_quietly()
    except BAD_INPUT as error:
        fail(command, one_line(error))


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [f"| {' | '.join(cells)} |" for cells in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


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
    """Quote free text, and let the groups `model` and `task` take other names than their choices.

    Raises:
        ValueError: a flag that Hydra does not have.
    """
    if config_name in _POSITIONAL:
        arguments = _named(arguments, _POSITIONAL[config_name])
    groups = usage.groups(config_name)
    open_groups = {group: names(group) for group in _OTHERS if group in groups}
    # Hydra's parser takes no options before a flag.
    flags = [argument for argument in arguments if argument in _MULTIRUN]
    multirun, arguments = bool(flags), [*flags, *(each for each in arguments if each not in _MULTIRUN)]
    return [part for argument in arguments for part in _rewrite_one(argument, open_groups, multirun)]


def _named(arguments: Sequence[str], option: str) -> list[str]:
    """Put an option's name before the one argument that has none; a path may hold "=" itself."""
    named, given = list(arguments), False
    for place, argument in enumerate(arguments):
        key, separator, _ = argument.partition("=")
        bare = not separator or ("/" in key and not key.startswith("hydra/")) or Path(argument).exists()
        if argument.startswith("-") or (place > 0 and arguments[place - 1] in _VALUED):
            continue
        if given and (bare or key == option):
            raise ValueError(f"{argument!r} is one {option} too many; give one, and options as name=value")
        if bare:
            named[place] = f"{option}={argument}"
        given = given or bare or key == option
    return named


def _rewrite_one(argument: str, open_groups: Mapping[str, Sequence[str]], multirun: bool) -> list[str]:
    key, separator, value = argument.partition("=")
    if argument.startswith("-") and key not in _FLAGS:
        raise ValueError(f"{argument!r} is no flag; options are written name=value, and --help lists them")
    if not separator:
        return [argument]
    if key.lstrip("+").startswith("hydra.") and "_target_" in argument:
        raise ValueError(f"{argument!r} names code to run; choose with hydra/launcher=NAME or hydra/sweeper=NAME")
    paths = value.split(",") if multirun else [value]
    if key in open_groups and not set(paths) <= set(open_groups[key]):
        choice, option = _OTHERS[key]
        if key == "task" and (both := sorted(set(paths) & set(open_groups[key]))):
            raise ValueError(f"{argument!r} mixes {both[0]} with others; give {key}={both[0]} a sweep of its own")
        return [f"{key}={choice}", f"{key}.{option}={','.join(map(_quote, paths))}"]
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


def one_line(error: BaseException) -> str:
    """What is wrong, in the words of whoever found out and without what only a programmer reads."""
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
