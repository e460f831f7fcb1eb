"""Validation of Hydra's flags on the command line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path

from dllm.checks import close
from dllm.resolve import search_also

# Values of each flag: none (), any (None), or one of some words.
_BARE = "--help --hydra-help --version --resolve --run --multirun --shell-completion"
_FLAGS: dict[str, tuple[str, ...] | None] = {
    **dict.fromkeys(_BARE.split(), ()),
    **dict.fromkeys(("--package", "--config-path", "--config-name", "--config-dir")),
    "--cfg": ("job", "hydra", "all"),
    "--info": ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath"),
}
_SHORT = {
    "-h": "--help", "-c": "--cfg", "-p": "--package", "-r": "--run", "-m": "--multirun", "-i": "--info",
    "-sc": "--shell-completion", "-cp": "--config-path", "-cn": "--config-name", "-cd": "--config-dir",
}  # fmt: skip
GROUPS = ("sampler", "cache", "model", "task", "sweep", "engine")
# Options whose values are quoted for Hydra, so that commas, "?" and "=" in them are literal.
PATHS = (
    "input",
    "output",
    "picture",
    "out",
    "init",
    "publish",
    "data",
    "model.path",
    "model.adapter",
    "path",
    "folder",
    "runs",
    "cards",
    "quality",
    "task.metric",
)
# Groups that accept other names than their choices: the choice for these, and its option that takes the name.
OTHERS = {"model": ("custom", "path"), "task": ("lm_eval", "name")}
# The option of a positional argument.
POSITIONAL = {"report": "folder", "show": "path"}
_FOLDERS = ("--config-path", "--config-dir")


def known() -> Mapping[str, tuple[str, ...] | None]:
    """All flags, and the values of each: none (), any (None), or one of some words."""
    return _FLAGS | {short: _FLAGS[flag] for short, flag in _SHORT.items()}


def split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The flags, each with its value as FLAG=VALUE, and the other arguments.

    Raises:
        ValueError: an unknown flag, or a missing or invalid value.
    """
    flags, others, waiting = [], [], list(reversed(arguments))
    while waiting:
        argument = waiting.pop()
        if not argument.startswith("-"):
            others.append(argument)
            continue
        typed, separator, value = argument.partition("=")
        flag = _SHORT.get(typed, typed)
        if flag not in _FLAGS:
            raise ValueError(f"unknown flag {argument!r}; options are written name=value, and --help lists them")
        takes = _FLAGS[flag]
        if takes == ():
            if separator:
                raise ValueError(f"{argument!r} has a value, and {typed} takes none; leave it out")
            flags.append(typed)
            continue
        after = waiting[-1] if waiting else "-"
        # The next argument is the value of the flag unless it is a flag or an option.
        if not separator and not after.startswith("-") and ("=" not in after or Path(after).is_dir()):
            value = waiting.pop()
        elif not separator and flag == "--info":
            value = "all"
        flags.append(f"{flag}={_checked(typed, flag, value, after)}")
    if any(flag.startswith("--package=") for flag in flags) and not any(flag.startswith("--cfg=") for flag in flags):
        raise ValueError("--package has no effect without --cfg; add --cfg job, or leave it out")
    return flags, others


def search(given: Sequence[str]) -> None:
    """Find choices in the folder of --config-dir, too; given are flags as of `split`."""
    search_also(*(Path(flag.partition("=")[2]) for flag in given if flag.startswith(("--config-dir=", "-cd="))))


def _checked(typed: str, flag: str, value: str, after: str) -> str:
    takes = _FLAGS[flag]
    if not value:
        before = "" if after == "-" else f" before {after!r}"
        raise ValueError(f"{typed} has no value{before}; write {typed}={'|'.join(takes or ['VALUE'])}")
    if takes and value not in takes:
        raise ValueError(f"unknown {typed}={value!r}{close(value, takes)}; expected one of {', '.join(takes)}")
    if flag in _FOLDERS and "://" not in value:
        if "\0" in value or not Path(value).is_dir():
            raise ValueError(f"{typed}={value!r} is not a folder; give another path")
        if flag == "--config-dir":
            _check_names(Path(value))
        return str(Path(value).absolute())
    return value


def _check_names(folder: Path) -> None:
    """Refuse a YAML with the name of one of ours, which Hydra reads first and so instead."""
    for group in (*GROUPS, "shared"):
        for file in sorted((folder / group).glob("*.yaml")):
            if (resources.files("dllm.conf") / group / file.name).is_file():
                raise ValueError(f"{file} has the name of a YAML of dllm, which is read instead; give it another name")
