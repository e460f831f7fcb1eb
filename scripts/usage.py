"""Help texts, generated from the comments in the YAML files."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from dllm.checks import close
from dllm.resolve import TARGET, defaults_list, names, sources, text, variants
from dllm.scripts import flags

_PACKAGE = "# @package _global_\n"  # first line of a YAML that sets options of the command itself


def summary(config_name: str) -> str:
    """The first line of a command's description."""
    return _comment(config_name)[0]


def groups(config_name: str) -> dict[str, str]:
    """The config groups of a command and what each is by default."""
    pairs = [pair for each in defaults_list(config_name) if isinstance(each, dict) for pair in each.items()]
    return {group: choice or "null" for group, choice in pairs}


def options(config_name: str) -> list[str]:
    """What a command takes: its own options and its groups."""
    return [*entries(config_name), *groups(config_name)]


def asked(config_name: str, arguments: Sequence[str]) -> str | None:
    """The help text, if the arguments ask for it; no library is imported for it.

    Raises:
        ValueError: an unknown flag, or an unknown choice of a group.
    """
    given, options_ = flags.split(arguments)
    flags.search(given)
    return describe(config_name, options_) if {"-h", "--help"} & set(given) else None


def describe(config_name: str, arguments: Sequence[str] = ()) -> str:
    """The help text of a command: how it is called, what it does, options and groups with defaults, and the rest.

    Args:
        config_name: its YAML in conf/.
        arguments: of the command line; the choices of groups there are explained.

    Raises:
        ValueError: an unknown choice of a group.
    """
    defaults = groups(config_name)
    chosen = defaults | {key: value for key, _, value in (a.partition("=") for a in arguments) if key in defaults}
    for group, (other, _) in flags.OTHERS.items():  # other names than the choices
        if group in chosen and chosen[group] not in (*names(group), *variants(group), "null"):
            chosen[group] = other
    first, *more = _comment(config_name)
    paragraphs = re.split(r"\n{2,}", "\n".join(more).strip("\n"))
    examples = [each for each in paragraphs if each.startswith("  ")]
    plain = [each for each in paragraphs if each not in examples]
    head = [first, _usage(config_name), *plain, _KINDS, "Examples:", *examples]
    parts = ["\n\n".join(filter(None, head)), "", "Options and their defaults, changed with NAME=VALUE:"]
    parts += _options(config_name)
    for group, choice in chosen.items():
        parts += ["", *_describe_group(group, choice, defaults[group])]
    return "\n".join([*parts, "", *_rest(config_name)])


_KINDS = """A value is of the kind of the default: number, true or false, text, [a, list] or {a: mapping}; null is none,
and stands for what its line says. With --multirun (-m) options may have several values, a,b,c: one job for each."""
_EXIT = {
    "0": "done",
    "1": "the program that reads the output closed it, or a fault of dllm, with a traceback",
    "2": "bad input, or what cannot be read or written: one line on stderr; jobs of a sweep, all of a search, failed",
    "130": "interrupted by Ctrl-C; what was written is kept. 143: the same, by SIGTERM",
}
# What is read beside the options, and by which commands: those with this option or group.
_READ = {
    "--config-dir=FOLDER": (None, "YAML files of your own, in FOLDER/sampler, FOLDER/cache, FOLDER/model, FOLDER/task"),
    "DLLM_API_KEY": ("api_key", "the key of the server, where api_key is null"),
    "HF_HOME, HF_TOKEN, HF_HUB_OFFLINE": ("model", "cache of and access to the Hugging Face hub"),
    "XDG_CACHE_HOME": ("model", "its dllm/digests has the digests of checkpoints; default ~/.cache"),
    "CUDA_VISIBLE_DEVICES": ("model", "GPUs that may be used"),
    "OMP_NUM_THREADS": ("model", "CPU threads, where threads is null or no option"),
    "NO_COLOR": (None, "set: no colours on a terminal"),
}
_SEE = {
    "generate": "dllm chat, dllm serve; docs/usage.md, docs/scale.md",
    "chat": "dllm generate, dllm serve; docs/usage.md, docs/serving.md",
    "serve": "dllm chat, dllm bench-serve; docs/serving.md",
    "evaluate": "dllm calibrate, dllm report, dllm results; docs/evaluation.md",
    "calibrate": "dllm evaluate, dllm results; docs/evaluation.md",
    "report": "dllm evaluate, dllm results, dllm show; docs/evaluation.md",
    "results": "dllm calibrate, dllm evaluate, dllm report; docs/evaluation.md",
    "show": "dllm evaluate, dllm report; docs/evaluation.md",
    "bench": "dllm bench-serve; docs/performance.md",
    "bench_serve": "dllm serve, dllm bench; docs/serving.md",
    "compatibility": "docs/compatibility.md, docs/policies.md",
    "train_filter": "dllm distill, dllm calibrate; docs/training.md",
    "train_tiny": "dllm adapt, dllm distill; docs/training.md",
    "distill": "dllm train-filter, dllm calibrate; docs/training.md",
    "adapt": "dllm train-tiny; docs/training.md",
}


def _usage(config_name: str) -> str:
    """How the command is called."""
    positional = flags.POSITIONAL.get(config_name)
    parts = [f"usage: dllm {config_name.replace('_', '-')}", *([positional.upper()] if positional else [])]
    return " ".join([*parts, *(["[GROUP=NAME ...]"] if groups(config_name) else []), "[OPTION=VALUE ...] [FLAG ...]"])


def _options(config_name: str) -> list[str]:
    """The options of a command; those of decoding, which it shares with others, apart."""
    found = entries(config_name)
    shared = entries("shared/decoding") if "shared/decoding" in defaults_list(config_name) else {}
    own = [part for name, part in found.items() if name not in shared]
    lines = "".join(own).rstrip("\n").splitlines()
    if shared:
        lines += ["", "# Decoding", *"".join(found[name] for name in shared).rstrip("\n").splitlines()]
    return ["", *_indent(line for line, before in zip(lines, [".", *lines], strict=False) if line or before)]


def _rest(config_name: str) -> list[str]:
    """What all commands have in common: exit status, what is read, and where more is said."""
    taken = {*groups(config_name), *({"api_key"} & entries(config_name).keys())}
    read = {name: about for name, (of, about) in _READ.items() if of is None or of in taken}
    lines = ["Exit status:", "", *_aligned(_EXIT), "", "Files and environment:", "", *_aligned(read), ""]
    told = "Flags are Hydra's, which reads the options: -m, --cfg job (print the options), --info; see --hydra-help."
    return [*lines, told, f"See also: {_SEE[config_name]}"]


def _aligned(entries: Mapping[str, str]) -> list[str]:
    width = max(map(len, entries))
    return [f"  {name:<{width}}  {about}" for name, about in entries.items()]


def _describe_group(group: str, choice: str, default: str) -> list[str]:
    found = choices(group)
    if choice not in (*found, default):
        raise ValueError(f"unknown {group}={choice}{close(choice, found)}; expected one of {', '.join(found)}")
    width = max(map(len, found))
    lines = [f"{group}=NAME, by default {default}:", ""]
    lines += _indent(f"{name:<{width}}  {about}" for name, about in found.items())
    file = f"{group}/{choice}"
    if choice == "null" or not entries(file):
        return lines
    everywhere = text(file).startswith(_PACKAGE)
    title = (
        f"{group}={choice} sets:" if everywhere else f"Options of {group}={choice}, changed with {group}.NAME=VALUE:"
    )
    return [*lines, "", title, *_body(file)]


def choices(group: str) -> dict[str, str]:
    """The choices of a group, and what each is."""
    return {name: _comment(f"{group}/{name}")[0] for name in names(group) + variants(group)}


def _comment(file: str) -> list[str]:
    """The leading comment of a YAML."""
    head = re.split(r"^(?!#)", text(file).removeprefix(_PACKAGE), maxsplit=1, flags=re.MULTILINE)[0]
    return [line.removeprefix("#").removeprefix(" ") for line in head.splitlines()] or [""]


def entries(file: str) -> dict[str, str]:
    """The options of a YAML and of those it includes, with comments, without Hydra's own keys."""
    parts = [part for each in sources(file) for part in re.split(r"^(?=\w)", each, flags=re.MULTILINE)[1:]]
    named = {part.partition(":")[0]: part for part in parts}
    return {name: part for name, part in named.items() if name not in ("defaults", "hydra", TARGET)}


def _body(file: str) -> list[str]:
    return ["", *_indent("".join(entries(file).values()).rstrip("\n").splitlines())]


def _indent(lines: Iterable[str]) -> list[str]:
    return [f"  {line}" if line else "" for line in lines]
