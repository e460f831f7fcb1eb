"""Run a generated program in a sandbox, and check whether it runs to completion.

The program gets its own interpreter (this one, with its installed packages), its own folder, which is
removed afterwards, an environment without the caller's variables, no input, and limits on time, memory
(of each process, and of all together), the number of processes and threads, the size of files and the
number of open files. Its output is discarded; completion is reported on a pipe, by a random token.
On Linux it cannot open sockets (network or unix), has no capabilities, can neither read nor signal the
calling process, what it writes into shared memory goes into its folder (or nowhere, where the system allows no mount),
and all processes that it starts are found and killed, in any session. If the system does
not support this, `execute` and `check` raise an error that names what is missing, unless
`sandbox="partial"`.

This is not a complete isolation: the program runs as the calling user, with access to that user's files. Its tests run
in its own process, as usual for HumanEval: a malicious program can deceive them (an __eq__ that is always True). Run it
in a container or a virtual machine to protect other data.
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

# Maximum seconds for start-up and clean-up, on a busy machine.
_GRACE = 30.0
Sandbox = Literal["full", "partial"]
_SUPERVISOR = Path(__file__).with_name("supervisor.py")


@dataclass(frozen=True)
class Outcome:
    """The outcome of a program.

    Attributes:
        passed: it ran to completion. An early exit does not count, whatever its exit code.
        reason: passed; failed (an exception, including SystemExit, or an early exit); timeout; memory (a
            MemoryError); or crashed (killed by a signal).
        detail: the exception and the first line of its message, truncated; empty if passed.
    """

    passed: bool
    reason: Literal["passed", "failed", "timeout", "memory", "crashed"]
    detail: str


def execute(program: str, timeout: float = 5.0, memory: int = 1 << 30, sandbox: Sandbox = "full") -> Outcome:
    """Run a Python program as a main module; see the module's docstring for the isolation.

    All its processes are killed at the end. Its string hashes are deterministic.

    Args:
        program: source code.
        timeout: time limit in seconds, without the start of the interpreter.
        memory: limit in bytes, of the address space of each process, and of the memory of all together.
        sandbox: "full" raises an error if the system does not support all of it, "partial" uses what it supports.

    Raises:
        ValueError: a value out of range, a platform without resource limits, or no full sandbox.
        RuntimeError: the interpreter could not be started.
    """
    _check_limits(timeout, memory, sandbox)
    with tempfile.TemporaryDirectory(prefix="dllm-", ignore_cleanup_errors=True) as folder:
        path = Path(folder) / "program.py"
        path.write_bytes(program.encode("utf-8", "surrogatepass"))
        # -P and -s remove the folder and the user's packages from the path, like -I, which would also
        # ignore the fixed hash seed.
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
                _end(process)  # after an interruption
    lines = said.decode().splitlines()
    if not lines:
        last = complaint.decode(errors="replace").strip().rpartition("\n")[2]
        raise RuntimeError(f"the sandbox cannot start {sys.executable} ({last or f'exit {process.returncode}'})")
    if len(lines) == 1:
        return Outcome(False, "crashed", "its supervisor process was killed")
    reason, detail = json.loads(lines[1])
    if reason == "refused":
        raise ValueError(
            f"task.sandbox='full' is not possible here: this system does not let it {detail}; "
            "use another system, or task.sandbox=partial"
        )
    return Outcome(reason == "passed", reason, detail)


def check(timeout: float, memory: int, sandbox: Sandbox = "full") -> None:
    """Reject what `execute` would reject, by running an empty program.

    Raises:
        ValueError: a value out of range, a platform without resource limits, no full sandbox, or nothing runs.
    """
    _check_limits(timeout, memory, sandbox)
    if sandbox == "full":
        outcome = execute("", 60.0, 1 << 30, sandbox)
        if not outcome.passed:
            raise ValueError(f"programs cannot be executed here: an empty one {outcome.detail or outcome.reason}")


def _end(process: subprocess.Popen[bytes]) -> None:
    """Terminate the supervisor, which kills its program; kill it if that fails."""
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
    # One thread per processor would exceed the memory limit.
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    return kept | places | python | threads
