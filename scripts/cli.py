"""The `dllm` command: the first argument selects the command, the rest goes to Hydra."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import NoReturn

from dllm.scripts import torchrun
from dllm.scripts.ending import (
    Stopped,
    fail,
    heard,
    in_any_locale,
    interruption,
    leave_quietly,
    piped,
    watching,
    working,
)

COMMANDS = (
    "generate",
    "chat",
    "serve",
    "evaluate",
    "calibrate",
    "report",
    "results",
    "show",
    "bench",
    "bench-serve",
    "compatibility",
    "train-filter",
    "train-tiny",
    "distill",
    "adapt",
)
# Commands without Hydra options, with their summaries.
OTHERS = {
    "lm-eval": "The command line of lm-evaluation-harness, with these models as `--model dllm`.",
    "completion": "Completion of commands, options and values in bash, zsh and fish.",
}


def main(command: str | None = None) -> None:
    """Dispatch `dllm COMMAND ...`.

    Args:
        command: its name; None for the first argument.
    """
    in_any_locale()
    given = sys.argv[1:]
    if command is None:
        command, *given = given or ["--help"]
    else:  # a file of this folder was run, which would shadow packages such as lm_eval
        here = Path(__file__).resolve().parent
        sys.path[:] = [path for path in sys.path if Path(path).resolve() != here]
    called = f"dllm {command}" if command in (*COMMANDS, *OTHERS) else "dllm"
    with watching(called), piped(called):
        try:
            if not _is_somewhere():  # libraries end the process while they are imported
                fail(called, "the working directory does not exist any more; change to another one")
            _dispatch(command, given)
        except KeyboardInterrupt as stopped:
            number = stopped.number if isinstance(stopped, Stopped) else 2
            if isinstance(stopped, Stopped) and stopped.expected:
                print(f"{called}: stopped", file=sys.stderr)
                sys.exit(128 + number)
            fail(called, interruption(number), code=128 + number)
        except BrokenPipeError:
            leave_quietly()
        except OSError as error:
            if error.errno is None or error.filename is not None:  # not about stdout: network or files
                fail(called, str(error))
            fail(called, f"{error.strerror or error}; free disk space, or redirect the output elsewhere")
        except Exception:
            if number := heard():
                fail(called, interruption(number), code=128 + number)
            raise


def _is_somewhere() -> bool:
    try:
        Path.cwd()
    except FileNotFoundError:
        return False
    return True


def run_file(file: str) -> NoReturn:
    """Run the command of a file of this folder before its imports, so that signals are handled."""
    main(Path(file).stem.replace("_", "-"))
    raise SystemExit


def _dispatch(command: str, given: list[str]) -> None:
    if command in ("-h", "--help", "help"):
        print(_help())
    elif command in ("-V", "--version"):
        from importlib.metadata import version

        print(f"dllm {version('dllm-samplers')}")
    elif command not in (*COMMANDS, *OTHERS):
        from dllm.checks import close

        every = (*COMMANDS, *OTHERS)
        fail("dllm", f"unknown command {command!r}{close(command, every)}; expected one of {', '.join(every)}")
    else:
        sys.argv = [f"dllm {command}", *given]
        with torchrun.together(sys.argv[0]):
            if _helped(command, given):
                return
            # Nothing is lost while it is imported, and compiled modules do not bear an exception then.
            application = importlib.import_module(f"dllm.scripts.{module(command)}")
            with working():
                application.main()
            if number := heard():  # too late for its exception to be raised again
                raise Stopped(number)


def _helped(command: str, given: list[str]) -> bool:
    """Print the help of a command, if it is asked for, without the imports of the command."""
    if command not in COMMANDS or {"-h", "--help"}.isdisjoint(given):
        return False
    from dllm.scripts import usage

    try:
        text = usage.asked(module(command), given)
    except ValueError as error:
        fail(f"dllm {command}", str(error))
    if text is not None:
        print(text)
    return text is not None


def _help() -> str:
    from dllm.scripts.usage import summary

    width = max(map(len, COMMANDS))
    lines = [
        "Decode diffusion language models with any unmasking policy, cache and backbone.",
        "",
        "usage: dllm COMMAND [option=value ...]",
        "",
        *(f"  {name:<{width}}  {summary(module(name))}" for name in COMMANDS),
        *(f"  {name:<{width}}  {purpose}" for name, purpose in OTHERS.items()),
        "",
        "dllm COMMAND --help lists a command's options and groups; dllm --version prints the version.",
    ]
    return "\n".join(lines)


def module(command: str) -> str:
    """The module, and the YAML, of a command."""
    return command.replace("-", "_")


if __name__ == "__main__":
    main()
