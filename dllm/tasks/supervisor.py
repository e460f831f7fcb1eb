"""What `dllm.tasks.sandbox` starts: runs a program in a child of its own, and says how that ended.

Run by its path and never imported, so that it starts fast: it needs nothing but the standard library. On
standard output it writes a line when it is ready, and a JSON list of reason and detail at the end.

The child proves that it ran to its end, or tells what it raised, by a word on a pipe that no program writes
by accident. Whatever it leaves running, in its session or out of it, becomes a child of this process
(Linux; elsewhere only what stays in the session is found) and is ended.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import resource
import signal
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import NoReturn

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_CLONE_NEWUSER, _CLONE_NEWNET = 0x10000000, 0x40000000
_LINUX = sys.platform == "linux"
_FILE_BYTES, _OPEN_FILES = 1 << 24, 128


def main(path: str, timeout: float, memory: int) -> None:
    """Run the program at `path`; see `dllm.tasks.sandbox.execute` for the arguments."""
    if _LINUX:
        libc = ctypes.CDLL(None)
        libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        # Without a user namespace only root may do without the network; who may do neither keeps it.
        if libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNET) != 0:
            libc.unshare(_CLONE_NEWNET)
    word = os.urandom(16).hex()
    receive, send = os.pipe()
    print("ready", flush=True)
    child = os.fork()
    if child == 0:
        os.close(receive)
        _run(path, send, word, timeout, memory)
    status = _wait(child, timeout)
    if status is None:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    _end_strays()
    os.set_blocking(receive, False)
    os.write(send, b" ")  # so that there is something to read
    said = os.read(receive, 1 << 16).decode(errors="replace")
    print(json.dumps(_verdict(status, said.partition(word)[2].strip(), timeout)), flush=True)
    os.killpg(0, signal.SIGKILL)  # this process as well, and where strays are not found, most of them


def _run(path: str, report: int, word: str, timeout: float, memory: int) -> NoReturn:
    """Be the program."""
    try:
        own = os.getpid()
        _confine(timeout, memory)
        source = Path(path).read_bytes()
        module = ModuleType("__main__")
        module.__file__ = path
        sys.modules["__main__"], sys.argv = module, [path]
        try:
            exec(compile(source, path, "exec", dont_inherit=True), vars(module))
            said = "end"
        except BaseException as error:  # noqa: BLE001  # SystemExit too: whatever it is, the program did not end well
            said = _description(error)
        if os.getpid() == own:  # a fork of the program gets here as well
            os.write(report, f"{word}{said}".encode(errors="replace"))
            os._exit(0)
    finally:
        os._exit(1)


def _confine(timeout: float, memory: int) -> None:
    if _LINUX:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    null = os.open(os.devnull, os.O_RDWR)
    for standard in range(3):
        os.dup2(null, standard)
    os.close(null)
    seconds = math.ceil(timeout) + 1  # should nobody be left to watch the time
    for kind, soft, hard in (
        (resource.RLIMIT_AS, memory, memory),
        (resource.RLIMIT_CPU, seconds, seconds + 1),
        (resource.RLIMIT_FSIZE, _FILE_BYTES, _FILE_BYTES),
        (resource.RLIMIT_NOFILE, _OPEN_FILES, _OPEN_FILES),
        (resource.RLIMIT_CORE, 0, 0),
    ):
        most = resource.getrlimit(kind)[1]
        if most != resource.RLIM_INFINITY:
            soft, hard = min(soft, most), min(hard, most)
        resource.setrlimit(kind, (soft, hard))


def _description(error: BaseException) -> str:
    kind = "MemoryError" if isinstance(error, MemoryError) else type(error).__name__
    try:
        message = str(error).strip().partition("\n")[0][:300]
    except BaseException:  # noqa: BLE001  # the message is the program's own code
        message = ""
    return f"{kind}: {message}" if message else kind


def _wait(child: int, timeout: float) -> int | None:
    """The child's status; None where it takes too long."""
    deadline, pause = time.monotonic() + timeout, 0.001
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        left = deadline - time.monotonic()
        if done or left <= 0:
            return status if done else None
        time.sleep(min(pause, left))
        pause = min(2 * pause, 0.02)


def _end_strays() -> None:
    """End everything that the program left behind, generation after generation."""
    while _LINUX:
        for entry in Path("/proc").glob("[0-9]*/stat"):
            try:
                parent = int(entry.read_text(errors="replace").rpartition(")")[2].split()[1])
            except OSError:  # it is gone
                continue
            if parent == os.getpid():
                os.kill(int(entry.parent.name), signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def _verdict(status: int | None, said: str, timeout: float) -> tuple[str, str]:
    """Reason and detail."""
    if status is None:
        return "timeout", f"still running after {timeout:g} s"
    code = os.waitstatus_to_exitcode(status)
    if code == -signal.SIGXCPU:
        return "timeout", f"more than {timeout:g} s of processor time"
    if code < 0:
        return "crashed", f"ended by signal {-code} ({signal.strsignal(-code)})"
    if code > 0 or not said:
        return "failed", f"left with exit code {code} before its end"
    if said == "end":
        return "passed", ""
    return ("memory" if said.startswith("MemoryError") else "failed"), said


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), int(sys.argv[3]))
