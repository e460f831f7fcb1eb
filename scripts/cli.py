"""The `dllm` command: one word chooses the application, the rest goes to Hydra."""

from __future__ import annotations

import importlib
import sys
from importlib.metadata import version

from dllm.scripts.app import fail
from dllm.scripts.usage import summary

COMMANDS = (
    "generate",
    "evaluate",
    "report",
    "show",
    "bench",
    "caches",
    "compatibility",
    "policies",
    "tradeoff",
    "train-filter",
    "train-tiny",
)
# Commands whose options are not Hydra's, with what they are for.
OTHERS = {"lm-eval": "The command line of lm-evaluation-harness, with these models as `--model dllm`."}


def main() -> None:
    """Dispatch `dllm COMMAND ...`."""
    command, *arguments = sys.argv[1:] or ["--help"]
    if command in ("-h", "--help", "help"):
        print(_help())
    elif command in ("-V", "--version"):
        print(f"dllm {version('dllm-samplers')}")
    elif command not in (*COMMANDS, *OTHERS):
        fail("dllm", f"{command!r} is no command; use one of {', '.join((*COMMANDS, *OTHERS))}")
    else:
        sys.argv = [f"dllm {command}", *arguments]
        importlib.import_module(f"dllm.scripts.{_module(command)}").main()


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [
        "Decode diffusion language models with any unmasking policy, cache and backbone.",
        "",
        "usage: dllm COMMAND [option=value ...]",
        "",
        *(f"  {name:<{width}}  {summary(_module(name))}" for name in COMMANDS),
        *(f"  {name:<{width}}  {purpose}" for name, purpose in OTHERS.items()),
        "",
        "dllm COMMAND --help lists a command's options and groups; dllm --version tells the version.",
    ]
    return "\n".join(lines)


def _module(command: str) -> str:
    return command.replace("-", "_")


if __name__ == "__main__":
    main()
