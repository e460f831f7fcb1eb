"""Shared code of all commands: help, validation of options, and one-line errors for bad input."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import stat
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from itertools import accumulate, islice
from pathlib import Path
from typing import Any, NamedTuple

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, QuotedString
from hydra.core.utils import JobReturn
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

import dllm
from dllm import identity
from dllm.cache.base import Cache
from dllm.calibration import Calibration
from dllm.checks import NOT_WITHIN, Notice, close, first_line, is_text, naming, out_of_memory, renamed
from dllm.checks import known as known_options
from dllm.escape import brief
from dllm.files import parse_json
from dllm.resolve import CALIBRATION, TARGET, Carried, build, names, options_of, variants, written_out
from dllm.samplers.base import Sampler
from dllm.scripts import flags, hydra_targets, references, torchrun, usage, yaml_files
from dllm.scripts.ending import fail, leave_quietly, line
from dllm.scripts.kinds import check_kinds

# Options that are text, whatever it looks like.
_TEXTS = ("server", "api_key")
_DEEPEST = 20  # Hydra's parser is recursive
_MOST_ENTRIES = 1000  # and quadratic in the length of a list
_MOST_JOBS = 10_000
_LONGEST_NAME = 255  # Hydra looks for a file of this name
# More digits than an argument can have: the error of Python's lower limit does not name the option.
_DIGITS = 1 << 18
_RETURNED = Counter[str]()  # jobs of a sweep, by how they ended; some are counted twice
_SHARED = ("BasicLauncher", "JoblibLauncher")  # launchers whose jobs write to this process's own stderr
_PIECE = re.compile(r"""(?:\s*'([^']*)'\s*|\s*"([^"]*)"\s*|([^,]*)),""")
_QUOTED = re.compile(r"""\s*('[^']*'|"[^"]*")\s*(,\s*('[^']*'|"[^"]*")\s*)*""")
# Environment variable shared by the processes of a sweep: start time of the command.
STARTED = "DLLM_STARTED"
_LISTED = "--help lists them"
# Commands that support tensor parallelism.
_DIVIDING = ("generate", "serve", "evaluate", "calibrate")
# Exceptions caused by bad input; any other is a bug and keeps its traceback.
BAD_INPUT = (ValueError, OSError, HydraException, OmegaConfBaseException, YAMLError)


def run(task: Callable[[DictConfig], Any], config_name: str, kinds: Mapping[str, Any] | None = None) -> None:
    """Run a Hydra application; bad input ends it with one line and exit code 2.

    Args:
        task: function of the composed configuration.
        config_name: its YAML in conf/.
        kinds: type hints of options, beyond the types of their defaults.
    """
    command = f"dllm {config_name.replace('_', '-')}"

    composed, own = False, Carried.here()

    def guarded(cfg: DictConfig) -> Any:
        # Caught here as well as below: Hydra would report errors of the task in its own format.
        nonlocal composed
        composed, fields = True, dict[str, Any]()
        own.restore()  # launchers may run this in another process
        try:
            fields |= _fields(cfg)
            check_kinds(fields, config_name, kinds or {})
            _refuse_empty(fields)
            _refuse_idle_knob(fields)
            result = task(cfg)
            if sys.stdout is not None:
                sys.stdout.flush()  # raises write errors here
            return result
        except BrokenPipeError:
            leave_quietly()
        except Exception as error:
            if not (isinstance(error, BAD_INPUT) or out_of_memory(error)):
                raise
            message = _qualified(error, fields)
            hydra_cfg = HydraConfig.get()
            if hydra_cfg.mode != RunMode.MULTIRUN:
                fail(command, message)
            # The other jobs of a sweep continue.
            print(line(command, f"{brief(' '.join(hydra_cfg.overrides.task))}: {message}"), file=sys.stderr)
            shared = hydra_cfg.launcher["_target_"].endswith(_SHARED)
            raise (_ToldError if shared else ValueError)(message) from None

    _prepare_hydra(config_name)
    try:
        arguments = rewrite(sys.argv[1:], config_name)
        sys.argv, own = [command, *arguments], Carried.here()
        with _notices(command), _package(arguments), references.counted(), hydra_targets.one_study():
            hydra.main(version_base="1.3", config_path="pkg://dllm.conf", config_name=config_name)(guarded)()
        if _RETURNED["failed"] and not _RETURNED["done"]:  # a search goes on after trials that fail
            sys.exit(2)
    except BrokenPipeError:
        leave_quietly()
    except _ToldError:
        sys.exit(2)
    except BAD_INPUT as error:
        fail(command, one_line(error, config_name))
    except Exception as error:
        if composed:
            raise
        if isinstance(error, RecursionError):
            fail(command, "the configuration includes itself; take one of its files out of the others' defaults")
        fail(command, f"Hydra cannot use these options ({first_line(error)}); leave out those of hydra")


def _prepare_hydra(config_name: str) -> None:
    # Without the second, Hydra prints its own report of a wrong option and exits with 1.
    os.environ |= {STARTED: str(time.time()), "HYDRA_FULL_ERROR": "1"}
    setattr(JobReturn, "return_value", property(_returned, _return))  # noqa: B010  # mypy knows no such assignment
    yaml_files.register(usage.entries(config_name).keys() - usage.groups(config_name).keys())
    hydra_targets.register()
    sys.set_int_max_str_digits(_DIGITS)
    _RETURNED.clear()


class _ToldError(ValueError):
    """An error that a job of a sweep has already reported."""


def _returned(job: JobReturn) -> Any:
    """The return value of a job, without Hydra's own report of a failed job."""
    failed = isinstance(job._return_value, Exception)
    _RETURNED["failed" if failed else "done"] += 1
    if failed:
        raise job._return_value
    return job._return_value


def _return(job: JobReturn, value: Any) -> None:
    job._return_value = value


@contextmanager
def _package(arguments: Sequence[str]) -> Iterator[None]:
    """Report an unknown --package in one line."""
    package = next((each for each in arguments if each.startswith("--package=")), None)
    with redirect_stderr(io.StringIO()) if package else nullcontext() as said:
        try:
            yield
        except SystemExit:
            if said is not None and "not found in config" in said.getvalue():
                raise ValueError(f"{package} is not part of the options; --help lists them") from None
            raise


@contextmanager
def _notices(command: str) -> Iterator[None]:
    """Print notices in one line, instead of Python's two."""
    with warnings.catch_warnings():
        others = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *where: Any, **rest: Any) -> None:
            if issubclass(category, Notice):
                print(brief(f"{command}: warning: {message}"), file=sys.stderr)
            else:
                others(message, category, *where, **rest)

        warnings.showwarning = show
        yield


def _write_out(cfg: DictConfig) -> None:
    """Replace the name of a base that is a YAML of the user's own by its options, which are recorded."""
    if OmegaConf.is_dict(cfg.get("sampler")) and cfg.sampler.get("base") is not None:
        options: Any = OmegaConf.to_container(cfg.sampler, resolve=True)
        with open_dict(cfg):
            cfg.sampler = written_out("sampler", options)


def _fields(cfg: DictConfig) -> dict[str, Any]:
    """The configuration, with bases of the user's own written out; refuses one that lacks a value."""
    if missing := sorted(OmegaConf.missing_keys(cfg)):
        raise ValueError(f"{missing[0]} has no value; set it with {missing[0]}=...")
    _write_out(cfg)
    found: Any = OmegaConf.to_container(cfg, resolve=True)
    return dict(found)


def _refuse_empty(fields: Mapping[str, Any]) -> None:
    for option in flags.PATHS:
        value = _value(fields, option)
        if value == "":
            raise ValueError(f"{option}='' is empty; give a value, or leave it out")
        if isinstance(value, str) and "\0" in value:
            raise ValueError(f"{option}={value!r} contains a null byte, which is invalid in a path; give another")


def _refuse_idle_knob(fields: Mapping[str, Any]) -> None:
    """Reject a typed value of the option that a calibration card sets."""
    name = f"sampler.{CALIBRATION}"
    if not isinstance(file := _value(fields, name), str) or HydraConfig.get().job.config_name == "calibrate":
        return
    with naming({CALIBRATION: name}):
        card = Calibration.read(file)
    knob = f"sampler.{card.knob}"
    if card.value is not None and knob in given() and (value := _value(fields, knob)) != card.value:
        raise ValueError(
            f"{knob}={value!r} has no effect with {name}={file!r}, which says {card.value!r}; leave one of them out"
        )


def check_writable(option: str, value: str, file: str | None = None) -> None:
    """Reject a path that is not writable, before any work is done.

    Args:
        option: its option.
        value: the value of the option.
        file: the path to write, if it is not the value itself.

    Raises:
        ValueError: it is a folder, below a file, or not writable.
    """
    path = Path(file or value)
    try:
        kind = path.stat().st_mode
    except FileNotFoundError:
        kind = 0
    except OSError as error:
        raise ValueError(f"{option}={value!r} cannot be written ({error.strerror}); give another path") from None
    if stat.S_ISFIFO(kind) or stat.S_ISSOCK(kind):
        raise ValueError(f"{option}={value!r} cannot be written (it is a pipe); give a file")
    nearest = path if path.exists() else next(parent for parent in path.absolute().parents if parent.exists())
    if path.is_dir() or (nearest != path and not nearest.is_dir()) or not os.access(nearest, os.W_OK):
        raise ValueError(f"{option}={value!r} cannot be written ({nearest} is in the way); give another path")


def rewrite(arguments: Sequence[str], config_name: str) -> list[str]:
    """Quote free text, and let the groups `model` and `task` accept other names than their choices.

    Raises:
        ValueError: an unknown flag.
    """
    for argument in arguments:
        if not is_text(argument):
            key, separator, value = argument.partition("=")
            shown = f"{key}={value!r}" if separator else repr(key)
            raise ValueError(f"{shown} is not valid UTF-8; give UTF-8")
    # Hydra's parser accepts no options before a flag.
    given, options = flags.split(arguments)
    flags.search(given)
    if config_name in flags.POSITIONAL:
        options = _named(options, flags.POSITIONAL[config_name])
    groups = usage.groups(config_name)
    multirun = not {"-m", "--multirun"}.isdisjoint(given)
    written = [part for option in options for part in _rewrite_one(option, groups, multirun)]
    written = _with_bases(written, groups)
    _check_overrides(written, groups)
    return [*given, *written]


def _check_overrides(overrides: Sequence[str], groups: Mapping[str, str]) -> None:
    """Refuse groups without a name, and too many jobs: Hydra's own sweeper makes all before the first one runs."""
    count = 1
    for each in OverridesParser.create().parse_overrides(list(overrides)):
        name, value = each.key_or_group, each.value()
        several = (each.is_choice_sweep() and not isinstance(value, Glob)) or each.is_range_sweep()
        entries = list(islice(each.sweep_iterator(), _MOST_JOBS + 1)) if several else [value]
        count *= len(entries)
        named = each.is_delete() or isinstance(value, Glob) or all(isinstance(e, (str, QuotedString)) for e in entries)
        if name in groups and not named:
            choices = ", ".join(names(name) + variants(name))
            raise ValueError(f"{each.input_line} has no name; expected one of {choices}")
    if count > _MOST_JOBS and not any(each.startswith(("hydra/sweeper", "sweep=")) for each in overrides):
        raise ValueError(f"these are more than {_MOST_JOBS} jobs; sweep over fewer values")


def _with_bases(overrides: Sequence[str], groups: Mapping[str, str]) -> list[str]:
    """Write out a base whose options are given (sampler.base.NAME=VALUE): Hydra sets those of mappings only."""
    written, keys = list(overrides), [each.partition("=")[0] for each in overrides]
    given = dict(each.partition("=")[::2] for each in overrides)
    sampler, place = given.get("sampler", groups.get("sampler", "")), "sampler.base"
    while any(key.startswith(f"{place}.") for key in keys):
        known = names("sampler") + variants("sampler")
        base = given.get(place, options_of("sampler", sampler).get("base") if sampler in known else None)
        if base is None or base.startswith(("{", "$")):
            break
        held = options_of("sampler", base, place)
        taken = {key.removeprefix(f"{place}.").partition(".")[0] for key in keys if key.startswith(f"{place}.")}
        known_options(sorted(taken), [name for name in held if name != TARGET], f"{place}.")
        options = ", ".join(f"{name}: {json.dumps(value)}" for name, value in held.items())
        first = keys.index(place) if place in keys else next(i for i, key in enumerate(keys) if key.startswith(place))
        written[first : first + (place in keys)] = [f"{place}={{{options}}}"]
        keys[first : first + (place in keys)] = [place]
        sampler, place = base, f"{place}.base"
    return written


def _named(arguments: Sequence[str], option: str) -> list[str]:
    """Add the option's name to the positional argument; a path may contain "="."""
    named, given = list(arguments), False
    for place, argument in enumerate(arguments):
        key, separator, _ = argument.partition("=")
        bare = not separator or ("/" in key and not key.startswith("hydra/")) or os.path.exists(argument)  # noqa: PTH110  # of no length
        if given and (bare or key == option):
            raise ValueError(f"{argument!r} is a second {option}; give one, and options as name=value")
        if bare:
            named[place] = f"{option}={argument}"
        given = given or bare or key == option
    return named


def _rewrite_one(argument: str, groups: Mapping[str, Any], multirun: bool) -> list[str]:
    key, separator, value = argument.partition("=")
    name = key.lstrip("+")
    if not name or (not separator and not argument.startswith("~")):
        raise ValueError(f"unknown option {argument!r}; options are written name=value, and {_LISTED}")
    if len(name) > _LONGEST_NAME:
        raise ValueError(f"unknown option {name!r}; {_LISTED}")
    if name in groups and name not in flags.OTHERS and len(value) > _LONGEST_NAME and not multirun:
        raise ValueError(f"unknown {name}={value!r}; expected one of {', '.join(names(name))}")
    if name in groups and name in flags.OTHERS:
        paths, known = _pieces(value) if multirun else _as_typed(value, multirun), names(name)
        if not set(paths) <= set(known):
            choice, option = flags.OTHERS[name]
            if name == "task" and (both := sorted(set(paths) & set(known))):
                raise ValueError(f"{argument!r} mixes {both[0]} with others; give {name}={both[0]} a sweep of its own")
            argument = ",".join(map(_quote, paths))
            key, name = f"++{name}.{option}", f"{name}.{option}"
            _refuse_resolvers(name, argument)
            return [f"{name.partition('.')[0]}={choice}", f"{key}={argument}"]
    literal = name in _TEXTS or (name == "response_format" and _is_json(value))
    if name == "prompt" or (literal and value != "null"):
        return [f"{key}={_quote_literally(value)}"]
    if value.startswith(("[", "{")) and value.count(",") >= _MOST_ENTRIES:
        raise ValueError(f"{key}={value} has too many entries; use at most {_MOST_ENTRIES}")
    if name == "stop" and value != "null":
        return [f"{key}={_strings(value)}"]
    _refuse_resolvers(name, value)
    is_path = name in flags.PATHS or (name == "response_format" and not multirun and not value.startswith("{"))
    if not is_path or value == "null":
        if (depth := _depth(value)) > _DEEPEST:
            raise ValueError(f"{key} is nested too deep ({depth} brackets in each other); give a plainer value")
        # Hydra's grammar does not allow an unquoted ~.
        paths = _pieces(value) if multirun else [value]
        return [f"{key}={','.join(map(_quote, paths))}"] if value.startswith("~") else [argument]
    paths = [os.path.expanduser(path) for path in _as_typed(value, multirun)]  # noqa: PTH111  # as text
    return [f"{key}={','.join(map(_quote, paths))}"]


def _refuse_resolvers(name: str, value: str) -> None:
    """${NAME} refers to another option; resolvers, such as for environment variables, are rejected."""
    if not name.startswith("hydra.") and (found := re.search(r"\$\{[^}]*:[^}]*\}?", value)):
        raise ValueError(f"{name}={value!r} contains {found[0]}, which is not supported; write the value itself")


def _pieces(value: str) -> list[str]:
    """The parts of a sweep: split at commas, except within a quoted part."""
    return [piece[0] or piece[1] or piece[2] for piece in _PIECE.findall(f"{value},")]


def _as_typed(value: str, multirun: bool) -> list[str]:
    """The value of an option that is text for Hydra, without quotes around the whole; in a sweep, all its parts."""
    parts = _pieces(value)
    return parts if _QUOTED.fullmatch(value) and (multirun or len(parts) == 1) else [value]


def given() -> dict[str, str]:
    """The options of the command line as they were written, by name: without +, ++ or ~."""
    return {each.partition("=")[0].lstrip("+~"): each for each in HydraConfig.get().overrides.task}


def option_of(group: str) -> str:
    """What the user wrote to select the model or task: the group, or its option for other names."""
    option = f"{group}.{flags.OTHERS[group][1]}"
    overrides = HydraConfig.get().overrides.task if HydraConfig.initialized() else []
    # A group that took another name than its choices was rewritten with "++".
    return option if any(re.match(rf"\+?{re.escape(option)}=", each) for each in overrides) else group


class Built(NamedTuple):
    """A sampler and a cache, and the stamps of the files that they read, from before they read any."""

    sampler: Any
    cache: Any
    stamps: tuple[identity.Stamp, ...]


def build_both(cfg: DictConfig) -> Built:
    """The sampler and the cache of a configuration."""

    def made() -> tuple[Any, Any]:
        return build("sampler", cfg.sampler, Sampler), build("cache", cfg.cache, Cache)

    stamps = identity.stamps_read_by(*made())  # these may have read a card already
    return Built(*made(), stamps)


def load_model(model: Mapping[str, Any], option: str | None = None) -> Any:
    """Load the model of a group `model`; errors name its options.

    Args:
        model: the group's options.
        option: option of the model's name in errors; None to derive it.
    """
    options = {str(name): value for name, value in model.items() if name != "path"}
    _check_processes(bool(options.get("tp")))
    with naming({name: f"model.{name}" for name in options} | {"name": option or option_of("model")}):
        return dllm.load(model["path"], **options)


def _check_processes(tp: bool) -> None:
    """Reject tensor parallelism in commands that do not support it, and several processes without it."""
    if not HydraConfig.initialized():  # in an actor of a job
        return
    command = str(HydraConfig.get().job.config_name).replace("_", "-")
    if tp and command not in _DIVIDING:
        raise ValueError(f"model.tp=true is not supported by dllm {command}; use model.tp=false, without torchrun")
    launcher = str(HydraConfig.get().launcher["_target_"])
    if tp and HydraConfig.get().mode == RunMode.MULTIRUN and not launcher.endswith("BasicLauncher"):
        raise ValueError("model.tp=true runs the jobs of a sweep one after the other; use hydra/launcher=basic")
    if not tp and (count := torchrun.processes()) > 1:
        raise ValueError(
            f"torchrun started {count} processes, and model.tp=false uses one; use model.tp=true, or leave torchrun out"
        )


def _depth(value: str) -> int:
    """Maximum nesting depth of brackets."""
    steps = (1 if sign in "[{(" else -1 if sign in "]})" else 0 for sign in value)
    return max(accumulate(steps, initial=0))


def _is_json(value: str) -> bool:
    """Whether a mapping is in JSON, and not in Hydra's grammar."""
    try:
        return value.startswith("{") and bool(parse_json(value))
    except ValueError:
        return False


def _strings(value: str) -> str:
    """Quote text, or the texts of a JSON list or string; other lists are in Hydra's grammar."""
    is_list = value.startswith("[") and value.endswith("]")
    try:
        given = parse_json(value) if is_list or value.startswith('"') else value
    except ValueError:
        given = None if is_list else value
    if isinstance(given, str):
        return _quote_literally(given)
    if given is None or not all(isinstance(each, str) for each in given):
        return value
    return f"[{','.join(map(_quote_literally, given))}]"


def argument(name: str, value: Any) -> str:
    """NAME=VALUE as a user types it: the inverse of `rewrite`."""
    if name == "stop" and value is not None:
        return f"{name}={json.dumps(value)}"
    return f"{name}={value if isinstance(value, str) and name in (*flags.PATHS, *_TEXTS) else _spelt(value)}"


def _spelt(value: Any) -> str:
    """A value in Hydra's grammar."""
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case str():
            return _quote_literally(value)
        case Mapping():
            return f"{{{','.join(f'{key}:{_spelt(each)}' for key, each in value.items())}}}"
        case list():
            return f"[{','.join(map(_spelt, value))}]"
    return str(value)


def _quote_literally(value: str) -> str:
    """Quote text in which OmegaConf's ${...} and ??? are literal."""
    if value == "???":
        return "${oc.decode:\"'???'\"}"
    return _quote(re.sub(r"(\\*)\$\{", r"\1\1\\${", value))


def _quote(value: str) -> str:
    """Quote a string in Hydra's grammar: backslashes are special only before a quote."""
    escaped = re.sub(r"(\\*)'", r"\1\1\\'", value)
    escaped = re.sub(r"(\\+)$", r"\1\1", escaped)
    return f"'{escaped}'"


def _qualified(error: Exception, fields: Mapping[str, Any]) -> str:
    """An error in terms of the command line: options of a group with their prefix, files by their option."""
    if out_of_memory(error):
        return "out of memory; use a smaller model, batch_size or length"
    text = one_line(error)
    if "dtype" in (fields.get("model") or ()):  # errors of decoding, after loading the model
        text = renamed(text, {"dtype": "model.dtype"})
    if isinstance(error, OSError) and (option := _option_of_file(error.filename, fields)):
        given = _value(fields, option)
        fix = "free disk space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "give another path"
        return f"{option}={given!r} cannot be used ({error.strerror}); {fix}"
    given = ((group, fields.get(group)) for group in ("sampler", "cache"))
    groups = {group: options if isinstance(options, Mapping) else {} for group, options in given}
    for group, options in groups.items():
        for name, value in options.items():
            # An option of both groups is identified by its value.
            shared = all(name in other for other in groups.values())
            said = re.escape(repr(value)) if shared else ""
            if name not in fields:
                text = re.sub(rf"{NOT_WITHIN}{name}=(?={said})", f"{group}.{name}=", text)
    return text


def _value(fields: Any, option: str) -> Any:
    """The value of an option, possibly of a group; None if missing."""
    for name in option.split("."):
        fields = fields.get(name) if isinstance(fields, Mapping) else None
    return fields


def _option_of_file(file: Any, fields: Mapping[str, Any]) -> str | None:
    """The option that names a file or its folder; of several the most specific one."""
    given = {option: _value(fields, option) for option in flags.PATHS}
    found = [option for option, value in given.items() if value and isinstance(value, str) and _within(file, value)]
    return max(found, key=lambda option: len(given[option]), default=None)


def _within(file: Any, path: str) -> bool:
    # Some files have the option's value with another suffix.
    return isinstance(file, (str, os.PathLike)) and os.path.realpath(file).startswith(os.path.realpath(path))


def one_line(error: BaseException, config_name: str | None = None) -> str:
    """The message of an error in one line, without details of Hydra.

    Args:
        error: the exception.
        config_name: of the command, to list its options; None if the error is about something else.
    """
    text, cause = " ".join(str(error).split()), error
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if isinstance(error, OverrideParseException):
        return f"{error.override!r} cannot be read; close its brackets and quotes, or quote the value as a whole"
    if isinstance(error, MissingConfigException) and error.options:
        file = str(error.missing_cfg_file)
        group, _, name = file.rpartition("/") if file.startswith("hydra/") else file.partition("/")
        more = variants(group) if group in flags.GROUPS else []
        found = [*error.options, *more]
        return f"unknown {group}={name}{close(name, found)}; expected one of {', '.join(found)}"
    if match := re.search(r"(?:Ambiguous value for argument|Sweep parameters) '(.*)' ?(?:1\. To use|requires -)", text):
        return f"{match[1]} names several; give one, or add -m to run them one after another"
    if match := re.search(r"Could not (override|delete from config\.) '((?:(\w+)\.)?[^']+)'", text):
        verb, option, first = match.groups()
        options = usage.options(config_name) if config_name else []
        if verb != "override" and option in options:
            return f"option {option!r} cannot be removed; give it a value, {option}=..."
        group = first if config_name and first in usage.groups(config_name) else ""
        expected = f"expected one of {', '.join(options)}" if config_name else _LISTED
        fix = f"choose with {group}=NAME, and `{group}=NAME --help` lists its options" if group else expected
        return f"unknown option {option!r}{close(option, options)}; {fix}"
    while isinstance(cause, HydraException) and isinstance(cause.__cause__, (*BAD_INPUT, TypeError)):
        cause = cause.__cause__
    if isinstance(cause, OmegaConfBaseException) and cause.full_key:
        said = first_line(cause)
        if match := re.search(r"Missing mandatory value: (\S+)", said):
            return f"{match[1]} has no value; set it with {match[1]}=..."
        if match := re.search(r"Interpolation key '(.*)' not found", said):
            return f"{cause.full_key} refers to the unknown option {match[1]!r}; write the value itself"
        return f"{cause.full_key}: {said}"
    text = " ".join(str(cause).split()) or type(error).__name__
    return re.sub(r"(, set env var HYDRA_FULL_ERROR=1| full_key:).*", "", text)
