"""Processes of commands that start at once: forked from one in which everything is imported already.

Arguments, environment, working directory, standard streams, signals and exit code are those of a real process; what is
about the import itself, or about another interpreter, starts one. Run as a program this is the process that forks.
"""

from __future__ import annotations

import atexit
import gc
import io
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

COMMAND = "dllm.scripts.cli"


class Process:
    """A forked `dllm` process, as a `subprocess.Popen` in text mode.

    Args:
        arguments: of the command.
        stdin: a file descriptor of standard input; None for the null device.
        stdout: the same of standard output; None for a pipe.
        stderr: the same of standard error; None for a pipe.
        env: environment; None for that of this process.
    """

    def __init__(
        self, *arguments: str, stdin: int | None = None, stdout: int | None = None, stderr: int | None = None,
        env: dict[str, str] | None = None,
    ) -> None:  # fmt: skip
        null = os.open(os.devnull, os.O_RDONLY)
        (self.stdout, out), (self.stderr, err) = _stream(stdout), _stream(stderr)
        what = {"arguments": arguments, "cwd": str(Path.cwd()), "env": dict(os.environ if env is None else env)}
        self.pid: int = _ask(what, [null if stdin is None else stdin, out, err])
        self.returncode: int | None = None
        for number, given in ((null, None), (out, stdout), (err, stderr)):
            if given is None:
                os.close(number)

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = _ask({"poll": self.pid})
        return self.returncode

    def wait(self, timeout: float = 60) -> int:
        until = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > until:
                raise subprocess.TimeoutExpired(COMMAND, timeout)
            time.sleep(0.01)
        return code

    def communicate(self, timeout: float = 60) -> tuple[str, str]:
        """What it writes until it ends."""
        streams = [each for each in (self.stdout, self.stderr) if each is not None and not each.closed]
        with ThreadPoolExecutor(2) as readers:
            reading = {each: readers.submit(each.read) for each in streams}
            try:
                self.wait(timeout)
            except subprocess.TimeoutExpired:
                self.kill()
                raise
        for each in streams:
            each.close()
        out, err = (reading[each].result() if each in reading else "" for each in (self.stdout, self.stderr))
        return out, err

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _stream(given: int | None) -> tuple[Any, int]:
    """What is read here, and the file descriptor that is written to there."""
    if given is not None:
        return None, given
    reading, writing = os.pipe()
    return os.fdopen(reading), writing


@cache
def _server() -> socket.socket:
    """The process that forks, with everything imported."""
    here, there = socket.socketpair()
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # no threads of torch, which a fork would not have
    subprocess.Popen([sys.executable, __file__, str(there.fileno())], pass_fds=[there.fileno()], env=environment)
    there.close()
    return here


def _ask(what: dict[str, Any], streams: Sequence[int] = ()) -> Any:
    server, message = _server(), json.dumps(what).encode()
    socket.send_fds(server, [len(message).to_bytes(4, "big")], streams)
    server.sendall(message)
    return json.loads(_line(server))


def _line(server: socket.socket) -> bytes:
    line = b""
    while not line.endswith(b"\n"):
        if not (part := server.recv(1)):
            raise EOFError("the process that forks ended")
        line += part
    return line


def _serve(client: socket.socket) -> dict[str, Any]:
    """Fork for each that is asked for, and tell how they ended; return, in the forked one, what it is to do."""
    while True:
        length, streams, _, _ = socket.recv_fds(client, 4, 3)
        if not length:
            os._exit(0)
        asked = json.loads(client.recv(int.from_bytes(length, "big"), socket.MSG_WAITALL))
        if "poll" in asked:
            ended, status = os.waitpid(asked["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if ended else None
        elif (answer := os.fork()) == 0:
            client.close()
            for place, stream in enumerate(streams):
                os.dup2(stream, place)
            return asked
        for stream in streams:
            os.close(stream)
        client.sendall(json.dumps(answer).encode() + b"\n")


def _become(asked: dict[str, Any]) -> None:
    """Make this process what `python -m` starts, run it, and end it without freeing what was imported."""
    os.chdir(asked["cwd"])
    os.environ.clear()
    os.environ.update(asked["env"])
    sys.argv = ["dllm", *asked["arguments"]]
    sys.stdin, sys.stdout, sys.stderr = (
        io.TextIOWrapper(
            os.fdopen(number, mode, closefd=False), asked["env"].get("PYTHONIOENCODING"), line_buffering=line
        )
        for number, mode, line in ((0, "rb", False), (1, "wb", os.isatty(1)), (2, "wb", True))
    )
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr
    code: Any = 0
    try:
        runpy.run_module(COMMAND, run_name="__main__", alter_sys=True)
    except SystemExit as leaving:
        code = leaving.code or 0
        if not isinstance(code, int):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:  # noqa: BLE001  # as the interpreter does
        traceback.print_exc()
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
    except OSError:
        traceback.print_exc()
        code = 120
    os._exit(code)


if __name__ == "__main__":
    from importlib import import_module

    import torch
    from hydra.core.plugins import Plugins

    sys.path[0] = ""  # as for -m: the folder of this file is not on the path
    for name in ("generate", "evaluate", "show", "train_filter", "report"):
        import_module(f"dllm.scripts.{name}")
    Plugins.instance()
    torch.set_num_threads(1)
    gc.freeze()  # or the first collection after a fork would copy all of it
    _become(_serve(socket.socket(fileno=int(sys.argv[1]))))
