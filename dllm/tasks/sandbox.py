"""Run a program that a model wrote, and see whether it runs to its end.

The program gets an interpreter of its own (this one, with its installed packages), a folder of its own
that is removed afterwards, an environment without the caller's variables, no input, and limits on time,
memory (of each process, and of all together), the number of processes and threads, the size of a file and
the number of open ones. Its output goes nowhere; whether it ran to its end is told on a pipe, by a random word.
On Linux it opens no socket (no network, no unix socket either), has no capabilities, can neither read nor
signal the process that called, and all processes that it starts are found and ended, whatever session
they are in. Where the system does not allow that, `execute` and `check` say what is missing and refuse, unless
told `sandbox="partial"`.

This is a guard, not a jail: the program runs as the user who called, and reads and writes the files of that user.
Its tests run in its own process, as they do everywhere with HumanEval: a program that was written to deceive them
(an __eq__ that always agrees) can. Put whatever must not be touched out of reach, best in a container or a virtual
machine that runs nothing else.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from dllm.checks import choice, number

# Seconds that starting and cleaning up may take beside the program itself, on a busy machine.
_GRACE = 30.0
Sandbox = Literal["full", "partial"]
_SUPERVISOR = Path(__file__).with_name("supervisor.py")


@dataclass(frozen=True)
class Outcome:
    """How a program ended.

    Attributes:
        passed: it ran to its end. One that leaves early did not, whatever its exit code.
        reason: passed; failed (an exception, SystemExit among them, or it left early); timeout; memory (a
            MemoryError); or crashed (ended by a signal).
        detail: what says more: the exception and the first line of its message, cut short; empty where it passed.
    """

    passed: bool
    reason: Literal["passed", "failed", "timeout", "memory", "crashed"]
    detail: str


def execute(program: str, timeout: float = 5.0, memory: int = 1 << 30, sandbox: Sandbox = "full") -> Outcome:
    """Run a Python program as a main module; see the module's docstring for what it is kept from.

    Everything it starts is ended with it, background processes too. Its string hashes are the same each time.

    Args:
        program: source code.
        timeout: seconds it may run; starting the interpreter does not count.
        memory: bytes of address space it may have in each process, and of memory in all together.
        sandbox: "full" refuses where the system cannot give all of it, "partial" takes what there is.

    Raises:
        ValueError: a value out of range, a platform without resource limits, or no full sandbox.
        RuntimeError: the interpreter could not be started.
    """
    _check_limits(timeout, memory, sandbox)
    with tempfile.TemporaryDirectory(prefix="dllm-", ignore_cleanup_errors=True) as folder:
        path = Path(folder) / "program.py"
        path.write_bytes(program.encode("utf-8", "surrogatepass"))
        # -P and -s keep the folder and the user's own packages off the path, as -I would; that one
        # would ignore the fixed hash seed as well.
        command = [sys.executable, "-B", "-P", "-s", str(_SUPERVISOR), str(path), str(timeout), str(memory), sandbox]
        with subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=folder,
            env=_environment(folder),
            start_new_session=True,
        ) as process:
            try:
                said, complaint = process.communicate(timeout=timeout + _GRACE)
            except subprocess.TimeoutExpired:
                _end(process)
                said, complaint = process.communicate()
            finally:
                _end(process)  # where it was interrupted
    lines = said.decode().splitlines()
    if not lines:
        last = complaint.decode(errors="replace").strip().rpartition("\n")[2]
        raise RuntimeError(f"the sandbox cannot start {sys.executable} ({last or f'exit {process.returncode}'})")
    if len(lines) == 1:
        return Outcome(False, "crashed", "the process that watched it is gone")
    reason, detail = json.loads(lines[1])
    if reason == "refused":
        raise ValueError(
            f"task.sandbox='full' is not possible here: this system does not let it {detail}; "
            "run where it is, or accept less with task.sandbox=partial"
        )
    return Outcome(reason == "passed", reason, detail)


def check(timeout: float, memory: int, sandbox: Sandbox = "full") -> None:
    """Refuse what `execute` would refuse, before there is a program: it runs an empty one.

    Raises:
        ValueError: a value out of range, a platform without resource limits, or no full sandbox.
    """
    _check_limits(timeout, memory, sandbox)
    if sandbox == "full":
        execute("", 60.0, 1 << 30, sandbox)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Let the supervisor end its program and itself, and end it where it does not."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(_GRACE)
        except subprocess.TimeoutExpired:
            process.kill()


def _check_limits(timeout: float, memory: int, sandbox: str) -> None:
    choice("task.sandbox", sandbox, get_args(Sandbox))
    number("timeout", timeout, "a number of seconds above 0, 3600 at most", above=0, high=3600)
    bytes_ = "a whole number of bytes, at least 67108864 (64 MiB)"
    number("memory", memory, bytes_, low=1 << 26, high=1 << 46, whole=True)
    if importlib.util.find_spec("resource") is None:
        raise ValueError(f"programs cannot be executed on {sys.platform}, which has no resource limits; use Linux")


def _environment(folder: str) -> dict[str, str]:
    kept = {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}  # to find libpython
    places = {"PATH": os.defpath, "HOME": folder, "TMPDIR": folder}
    python = {"PYTHONHASHSEED": "0", "PYTHONUTF8": "1", "LANG": "C.UTF-8"}
    # A thread for each processor would reserve more memory than the limit.
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    return kept | places | python | threads
