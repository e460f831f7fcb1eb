"""`dllm completion`: what can be typed next, for bash, zsh and fish.

A shell asks with `dllm completion SHELL INDEX WORD...`: the words of the line and the number of the one to complete.
The answer is read from the YAML files of conf/ alone, since importing torch or Hydra takes seconds.
"""

from __future__ import annotations

if __name__ == "__main__":
    import dllm.scripts.cli

    dllm.scripts.cli.run_file(__file__)

import os
import re
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from dllm.resolve import search_also
from dllm.scripts import cli, flags, usage
from dllm.scripts.ending import fail

Words = dict[str, str]  # each with what it is
SHELLS = ("bash", "zsh", "fish")
_HELP = """Print a script that completes commands, options, groups and values in a shell.

usage: dllm completion bash|zsh|fish

Examples:

  eval "$(dllm completion bash)"                                  in ~/.bashrc
  eval "$(dllm completion zsh)"                                   in ~/.zshrc, after compinit
  dllm completion fish > ~/.config/fish/completions/dllm.fish     once
"""
_SCRIPTS = {
    "bash": r"""_dllm() {
    local kind= word
    COMPREPLY=()
    while IFS= read -r word; do
        if [[ -z $kind ]]; then kind=$word; else COMPREPLY+=("$word"); fi
    done < <(dllm completion bash "$COMP_CWORD" "${COMP_WORDS[@]}" 2>/dev/null)
    if [[ $kind == files ]]; then compopt -o filenames 2>/dev/null; fi
    if [[ ${#COMPREPLY[@]} == 1 && ${COMPREPLY[0]} == *[=./] ]]; then compopt -o nospace 2>/dev/null; fi
}
complete -F _dllm dllm
""",
    "zsh": r"""#compdef dllm
_dllm() {
    local word about
    local -a whole part wholes parts
    while IFS=$'\t' read -r word about; do
        if [[ $word == *[=./] ]]; then part+=("$word"); parts+=("$word  $about")
        else whole+=("$word"); wholes+=("$word  $about"); fi
    done < <(dllm completion zsh $((CURRENT - 1)) "${words[@]}" 2>/dev/null)
    (( $#whole )) && compadd -l -d wholes -a whole
    (( $#part )) && compadd -S '' -l -d parts -a part
}
compdef _dllm dllm
""",
    "fish": r"""function __dllm_words
    set -l before (commandline -xpc 2>/dev/null; or commandline -opc)  # -x is of fish 4
    dllm completion fish (count $before) $before (commandline -ct) 2>/dev/null
end
complete -c dllm -f -a '(__dllm_words)'
""",
}


def main() -> None:
    """Print a shell's script, or what can be typed next."""
    shell, *rest = sys.argv[1:] or ["--help"]
    if shell in ("-h", "--help"):
        print(_HELP, end="")
    elif shell not in SHELLS:
        fail("dllm completion", f"unknown shell {shell!r}; expected one of {', '.join(SHELLS)}")
    elif not rest:
        print(_SCRIPTS[shell], end="")
    elif not re.fullmatch(r"\d{1,9}", rest[0]):
        fail("dllm completion", f"{rest[0]!r} is not the number of a word; use dllm completion {shell}")
    else:
        with suppress(ValueError):  # a damaged YAML of the user's own completes nothing
            sys.stdout.writelines(f"{line}\n" for line in _reply(shell, int(rest[0]), rest[1:]))


def _reply(shell: str, index: int, words: Sequence[str]) -> list[str]:
    """The lines that a shell's script reads."""
    words = [_unquoted(word) for word in (*words, *[""] * (index == len(words)))]
    before, raw = (words[1:index], words[index]) if 0 < index < len(words) else ([], "")
    if shell != "bash":
        found, _ = candidates(before, raw)
        return [f"{word}\t{about}" for word, about in found.items()]
    # Bash splits words at = and :, and replaces the last part alone.
    before, current = _joined(before, raw)
    found, are_files = candidates(before, current)
    cut = len(current) - (0 if raw in ("=", ":") else len(raw))
    return ["files" if are_files else "words", *(word[cut:] for word in found)]


def _unquoted(word: str) -> str:
    """A word as a command gets it, without the quotes of the shell; the last one may be open."""
    for closing in ("", "'", '"'):
        with suppress(ValueError):
            return " ".join(shlex.split(word + closing))
    return word


def _joined(before: Sequence[str], raw: str) -> tuple[list[str], str]:
    """The words of a line that bash has split at = and :."""
    found: list[str] = []
    glue = False
    for part in (*before, raw):
        if found and (part in ("=", ":") or glue):
            found[-1] += part
        else:
            found.append(part)
        glue = part in ("=", ":")
    return found[:-1], found[-1]


def candidates(before: Sequence[str], current: str) -> tuple[Words, bool]:
    """What a word can be completed to, and whether these are files.

    Args:
        before: the words after `dllm`.
        current: the beginning of the word.
    """
    if not before:
        found = {name: usage.summary(cli.module(name)) for name in cli.COMMANDS} | cli.OTHERS
        return _starting(current, found | {"--help": "", "--version": ""}), False
    command, *rest = before
    if command == "completion":
        return _starting(current, dict.fromkeys(SHELLS, "")), False
    if command not in cli.COMMANDS:
        return _files(current), True
    return _of_command(cli.module(command), rest, current)


def _of_command(config_name: str, before: Sequence[str], current: str) -> tuple[Words, bool]:
    search_also(*_own_folders(before))
    if before and (of_flag := _flag_values(before[-1], current)) is not None:
        return of_flag
    name, separator, value = current.partition("=")
    if not separator:
        return _names(config_name, before, current)
    if name.startswith("-"):
        found, are_files = _flag_values(name, value) or ({}, False)
    else:
        found, are_files = _values(config_name, before, name.lstrip("+"), value)
    return {f"{name}={word}": about for word, about in found.items()}, are_files


def _flag_values(flag: str, value: str) -> tuple[Words, bool] | None:
    """What the value of a flag can be completed to; None if it takes none."""
    taken = flags.known().get(flag, ())
    if taken is None:
        return _files(value), True
    return (_starting(value, dict.fromkeys(taken, "")), False) if taken else None


def _names(config_name: str, before: Sequence[str], current: str) -> tuple[Words, bool]:
    """Options, groups and flags."""
    if current.startswith("-"):
        return _starting(current, dict.fromkeys(flags.known(), "")), False
    given = {each.partition("=")[0] for each in before}
    defaults = usage.groups(config_name)
    prefix, dot, _ = current.partition(".")
    if dot and prefix in defaults:
        held = _group_options(prefix, _chosen(prefix, defaults[prefix], before))
        return _starting(current, {f"{prefix}.{name}=": _about(text) for name, text in held.items()}), False
    if "/" in current and config_name in flags.POSITIONAL:
        return _files(current), True
    found = {f"{name}=": _about(text) for name, text in usage.entries(config_name).items() if name not in given}
    for group, choice in defaults.items():
        found |= {} if group in given else {f"{group}=": f"by default {choice}"}
        found |= {f"{group}.": f"options of {group}"} if group != "sweep" else {}
    if config_name in flags.POSITIONAL:
        found |= _files(current)
    return _starting(current, found), False


def _values(config_name: str, before: Sequence[str], name: str, value: str) -> tuple[Words, bool]:
    """Values of an option or a group; of several, the last."""
    defaults = usage.groups(config_name)
    if name in defaults:
        found = usage.choices(name)
        first, comma, last = value.rpartition(",")
        matching = {first + comma + word: about for word, about in _starting(last, found).items()}
        return (matching, False) if matching or name not in flags.OTHERS else (_files(value), True)
    group, dot, inner = name.partition(".")
    if dot and group in defaults:
        text = _group_options(group, _chosen(group, defaults[group], before)).get(inner, "")
    else:
        text = usage.entries(config_name).get(name, "")
    listed = re.fullmatch(r"(\[(?:[^,\]]*,)*|)([^,\]]*)", value)
    if name in ("samplers", "caches") and listed and (listed[1] or not value):
        found = usage.choices(name.removesuffix("s"))
        return {(listed[1] or "[") + word: "" for word in _starting(listed[2], found)}, False
    if words := _words(text):
        return _starting(value, words), False
    return (_files(value), True) if name in flags.PATHS or _names_a_file(text) else ({}, False)


def _words(text: str) -> Words:
    """The values that the line of an option names: its default, and those of "a | b | c"."""
    default, about = _default(text), _about(text)
    if not text or _names_a_file(text):
        return {}
    found = {} if default in ("???", "") or default.startswith(("[", "{", "$", "\n")) else {default: "default"}
    if default in ("true", "false"):
        return found | {"true": "", "false": ""} | found
    plain = re.sub(r" *\([^)]*\)", "", about)
    if several := re.search(r"[\w-]+(?: \| [\w-]+)+", plain):
        found |= dict.fromkeys(several[0].split(" | "), "") | found
    if examples := re.search(r"((?:[\w:]+, )+)\.\.\.", plain):
        found |= dict.fromkeys(examples[1].rstrip(", ").split(", "), "") | found
    if default in usage.choices("sampler"):
        found |= usage.choices("sampler")
    return found | ({"null": ""} if re.search(r"(^|[;|] )null\b", about) and default != "null" else {})


def _default(text: str) -> str:
    written = text.partition(":")[2].partition("#")[0].strip()
    return written.strip("\"'")


def _about(text: str) -> str:
    """The comment of an option, in one line."""
    return " ".join(part.strip() for part in re.findall(r"#(.*)", text))


def _names_a_file(text: str) -> bool:
    return _default(text) in ("null", "???", "") and bool(re.search(r"\b(files?|folder|FOLDER|card)\b", _about(text)))


def _group_options(group: str, choice: str) -> Mapping[str, str]:
    """The options of a choice, with the lines of its YAML; none for one that is not known."""
    if choice in usage.choices(group):
        return usage.entries(f"{group}/{choice}")
    other = flags.OTHERS.get(group)
    return usage.entries(f"{group}/{other[0]}") if other else {}


def _chosen(group: str, default: str, before: Iterable[str]) -> str:
    """The choice of a group on the line, else the default."""
    given = [value for name, _, value in (each.partition("=") for each in before) if name == group]
    return given[-1].rpartition(",")[2] if given else default


def _own_folders(before: Sequence[str]) -> list[Path]:
    """The folder of --config-dir, whose YAML files are choices, too."""
    found = []
    for flag, follows in zip(before, [*before[1:], ""], strict=False):
        name, separator, value = flag.partition("=")
        if name in ("--config-dir", "-cd"):
            found.append(Path(value if separator else follows).expanduser())
    return found


def _files(value: str) -> Words:
    """Files and folders whose path begins so; hidden ones if asked for."""
    folder, separator, begun = value.rpartition("/")
    found = {}
    with suppress(OSError, ValueError):
        for entry in sorted(os.scandir(os.path.expanduser(folder + separator) or "."), key=lambda each: each.name):  # noqa: PTH111
            if entry.name.startswith(begun) and (begun or not entry.name.startswith(".")):
                found[f"{folder}{separator}{entry.name}" + "/" * entry.is_dir()] = ""
    return found


def _starting(current: str, found: Mapping[str, str]) -> Words:
    return {word: about for word, about in found.items() if word.startswith(current)}
