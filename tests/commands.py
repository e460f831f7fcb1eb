"""Running the `dllm` command in this process, in another one, or on a terminal of its own."""

from __future__ import annotations

import io
import os
import pty
import re
import subprocess
import sys
from contextlib import nullcontext, redirect_stderr, redirect_stdout, suppress
from typing import NamedTuple
from unittest import mock

import pytest
from hydra._internal.hydra import Hydra
from hydra.core.global_hydra import GlobalHydra

from dllm.scripts import cli
from warm import Process

# What may say that there are several jobs. Without it Hydra finds that nothing does by composing the whole
# configuration once more, which takes half as long as a refused command.
_SWEEPS = re.compile("sweep|hydra|config")


class Outcome(NamedTuple):
    """What a command did."""

    code: int | str | None
    out: str
    err: str


def command(*arguments: str) -> Outcome:
    """Run `dllm ARGUMENTS` in this process."""
    code: int | str | None = 0
    one_job = mock.patch.object(Hydra, "get_mode", return_value=None)
    GlobalHydra.instance().clear()
    with (
        redirect_stdout(io.StringIO()) as out,
        redirect_stderr(io.StringIO()) as err,
        mock.patch.object(sys, "argv", ["dllm", *arguments]),
        mock.patch.dict(os.environ),
        nullcontext() if any(map(_SWEEPS.search, arguments)) else one_job,
    ):
        try:
            cli.main()
        except SystemExit as leaving:
            code = leaving.code
    return Outcome(code, out.getvalue(), err.getvalue())


def unread(*arguments: str) -> int | str | None:
    """Run `dllm ARGUMENTS` in this process, with an unbuffered standard output that nobody reads; return its code."""
    reading, writing = os.pipe()
    os.close(reading)
    out = io.TextIOWrapper(os.fdopen(writing, "wb", buffering=0), write_through=True)
    GlobalHydra.instance().clear()
    with (
        out,
        redirect_stdout(out),
        mock.patch.object(sys, "argv", ["dllm", *arguments]),
        mock.patch.dict(os.environ),
        pytest.raises(SystemExit) as leaving,
    ):
        cli.main()
    return leaving.value.code


# Tests of processes share the one that starts them.
in_a_process = pytest.mark.xdist_group("processes")


def start(*arguments: str) -> Process:
    """Start `dllm ARGUMENTS` as a process of its own, in which everything is imported already."""
    return Process(*arguments)


def start_cold(*arguments: str) -> subprocess.Popen[str]:
    """Start `dllm ARGUMENTS` as a process of its own, with a new interpreter."""
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-m", "dllm.scripts.cli", *arguments], stdout=pipe, stderr=pipe, text=True)


class Terminal:
    """A `dllm` process on a terminal of its own, 100 columns wide."""

    def __init__(self, *arguments: str) -> None:
        self._master, slave = pty.openpty()
        environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "100", "LINES": "30", "NO_COLOR": ""}
        self._process = Process(*arguments, stdout=slave, stderr=slave, env=environment)
        os.close(slave)

    def read(self) -> str:
        """Everything it drew, control sequences included; fails unless it ended well."""
        parts = []
        with suppress(OSError):  # how Linux tells that the other side is gone
            while part := os.read(self._master, 65536):
                parts.append(part)
        os.close(self._master)
        assert self._process.wait(60) == 0, b"".join(parts)
        return b"".join(parts).decode()


def chat(lines: str, *arguments: str) -> Outcome:
    """Run `dllm chat` with lines on a pipe."""
    with mock.patch.object(sys, "stdin", io.StringIO(lines)):
        return command("chat", *arguments)
