"""Running the `dllm` command in this process, in another one, or on a terminal of its own."""

from __future__ import annotations

import io
import os
import pty
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout, suppress
from typing import NamedTuple
from unittest import mock

from hydra.core.global_hydra import GlobalHydra

from dllm.scripts import cli


class Outcome(NamedTuple):
    """What a command did."""

    code: int | str | None
    out: str
    err: str


def command(*arguments: str) -> Outcome:
    """Run `dllm ARGUMENTS` in this process."""
    code: int | str | None = 0
    GlobalHydra.instance().clear()
    with (
        redirect_stdout(io.StringIO()) as out,
        redirect_stderr(io.StringIO()) as err,
        mock.patch.object(sys, "argv", ["dllm", *arguments]),
        mock.patch.dict(os.environ),
    ):
        try:
            cli.main()
        except SystemExit as leaving:
            code = leaving.code
    return Outcome(code, out.getvalue(), err.getvalue())


def start(*arguments: str) -> subprocess.Popen[str]:
    """Start `dllm ARGUMENTS` as a process of its own."""
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-m", "dllm.scripts.cli", *arguments], stdout=pipe, stderr=pipe, text=True)


class Terminal:
    """A `dllm` process on a terminal of its own, 100 columns wide."""

    def __init__(self, *arguments: str) -> None:
        self._master, slave = pty.openpty()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "dllm.scripts.cli", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=slave,
            stderr=slave,
            env=os.environ | {"TERM": "xterm-256color", "COLUMNS": "100", "LINES": "30", "NO_COLOR": ""},
        )
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
