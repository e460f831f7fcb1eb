"""How commands end that are interrupted, terminated, or that nobody reads any more."""

from __future__ import annotations

import asyncio
import importlib
import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from commands import command, in_a_process, start, start_cold
from dllm.scripts import cli, ending, generate, show

LONG = ("evaluate", "task.limit=5000", "batch_size=1", "baselines=0")


@pytest.fixture
def signalled(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Send this process a signal; what would end it at once raises instead."""

    class Ended(Exception):
        pass

    def end(code: int) -> None:
        raise Ended(code)

    monkeypatch.setattr(os, "_exit", end)
    monkeypatch.setattr(os, "write", lambda number, text: len(text))
    return signal.raise_signal


class TestSignals:
    @pytest.mark.parametrize(("number", "code", "word"), [(2, 130, "interrupted"), (15, 143, "terminated")])
    def test_a_signal_during_work_gives_one_line_and_its_code(
        self, number: int, code: int, word: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(generate, "generate", lambda cfg: signal.raise_signal(number))
        result = command("generate")
        assert (result.code, result.out) == (code, "")
        assert result.err == f"dllm generate: error: {word}; what was written is kept\n"

    def test_a_signal_ends_a_whole_sweep(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.chdir(tmp_path)
        seen = []

        def work(cfg: Any) -> None:
            seen.append(cfg.seed)
            signal.raise_signal(signal.SIGTERM)

        monkeypatch.setattr(generate, "generate", work)
        assert command("generate", "-m", "seed=1,2,3").code == 143
        assert seen == [1]

    def test_the_second_signal_does_not_wait(self, signalled: Callable[[int], None]) -> None:
        with pytest.raises(Exception, match="130"), ending.watching("dllm"), ending.working():  # noqa: PT012
            try:
                signalled(signal.SIGINT)
            except ending.Stopped:
                signalled(signal.SIGINT)

    def test_the_cursor_is_shown_where_a_signal_does_not_wait_for_the_display(
        self, signalled: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        written = []
        monkeypatch.setattr(os, "isatty", lambda number: True)
        monkeypatch.setattr(os, "write", lambda number, text: written.append(text))
        with pytest.raises(Exception, match="130"), ending.watching("dllm"):
            signalled(signal.SIGINT)
        assert written[0] == b"\x1b[?25h"

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_outside_of_work_a_signal_ends_the_process_at_once(
        self, signalled: Callable[[int], None], number: int
    ) -> None:
        with pytest.raises(Exception, match=str(128 + number)), ending.watching("dllm"):
            signalled(number)

    def test_handlers_are_those_from_before_afterwards(self) -> None:
        before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
        command("--version")
        assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before

    def test_an_ignored_signal_stays_ignored(self, monkeypatch: pytest.MonkeyPatch) -> None:
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            with ending.watching("dllm"):
                signal.raise_signal(signal.SIGINT)
        finally:
            signal.signal(signal.SIGINT, before)

    def test_a_signal_that_a_finaliser_swallows_is_heard(self, signalled: Callable[[int], None]) -> None:
        codes = []

        class Finalised:
            def __del__(self) -> None:
                signalled(signal.SIGINT)

        with ending.watching("dllm"), ending.working():
            hook = sys.unraisablehook

            def heard(lost: Any) -> None:
                try:
                    hook(lost)
                except Exception as error:  # noqa: BLE001  # what ends the process
                    codes.append(error.args)

            sys.unraisablehook = heard
            del [Finalised()][0]
        assert codes == [(130,)]

    def test_a_signal_that_is_swallowed_is_raised_again(self) -> None:
        with pytest.raises(ending.Stopped, match="15"), ending.watching("dllm"), ending.working():  # noqa: PT012
            with suppress(BaseException):
                signal.raise_signal(signal.SIGTERM)
            with suppress(BaseException):
                time.sleep(5)
            time.sleep(5)

    def test_what_cleans_up_after_a_signal_is_not_disturbed(self) -> None:
        done = []

        def clean_up() -> None:
            with suppress(ZeroDivisionError):
                1 / 0  # noqa: B018
            try:
                raise ValueError
            except ValueError:
                time.sleep(3 * ending._AGAIN)
            time.sleep(3 * ending._AGAIN)
            done.append(True)

        with pytest.raises(KeyError), ending.watching("dllm"), ending.working():  # noqa: PT012
            try:
                signal.raise_signal(signal.SIGINT)
            except ending.Stopped:
                try:
                    raise KeyError
                finally:
                    clean_up()
        assert done == [True]
        assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)

    def test_a_signal_that_is_swallowed_at_the_end_is_told(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def work(cfg: Any) -> None:
            with suppress(BaseException):
                signal.raise_signal(signal.SIGTERM)

        monkeypatch.setattr(generate, "generate", work)
        result = command("generate")
        assert result.code == 143
        assert result.err == "dllm generate: error: terminated; what was written is kept\n"

    def test_a_signal_during_an_import_ends_the_process_at_once(
        self, signalled: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def importing(name: str) -> None:
            with suppress(ending.Stopped):
                signalled(signal.SIGTERM)

        monkeypatch.setattr(importlib, "import_module", importing)
        with pytest.raises(Exception, match="143"):
            command("generate")

    def test_a_player_is_left_by_a_signal(self) -> None:
        def read() -> str:
            raise ending.Stopped(15)

        with pytest.raises(ending.Stopped):
            list(show.keys(read))

    @pytest.mark.parametrize("place", ["before", "task", "finaliser", "between"])
    def test_a_signal_cancels_the_work_of_an_event_loop(self, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
        done: list[str] = []

        class Finalised:
            def __del__(self) -> None:
                signal.raise_signal(signal.SIGTERM)

        run = asyncio.Handle._run

        def interrupted(handle: asyncio.Handle) -> None:
            monkeypatch.setattr(asyncio.Handle, "_run", run)
            signal.raise_signal(signal.SIGTERM)
            run(handle)

        async def child() -> None:
            if place == "task":
                signal.raise_signal(signal.SIGTERM)
            elif place == "finaliser":
                Finalised()
            elif place == "between":  # a step is taken from the queue, and begun
                monkeypatch.setattr(asyncio.Handle, "_run", interrupted)
            await asyncio.sleep(0)
            try:
                await asyncio.sleep(60)
            finally:
                done.append("child")

        async def work() -> None:
            async with asyncio.TaskGroup() as group:
                group.create_task(child())

        async def clean_up() -> None:
            await asyncio.sleep(2 * ending._AGAIN)
            done.append("cleaned up")

        def new_loop() -> asyncio.AbstractEventLoop:
            if place == "before" and not done:
                signal.raise_signal(signal.SIGTERM)
            return asyncio.new_event_loop()

        with pytest.raises(ending.Stopped, match="15"), ending.watching("dllm"), ending.working():  # noqa: PT012
            try:
                with mock.patch.object(asyncio.events, "new_event_loop", new_loop):
                    ending.in_loop(work())
            finally:
                ending.in_loop(clean_up())
        assert done[-1] == "cleaned up"

    @pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")
    def test_a_tied_process_ends_with_the_one_that_started_it(self) -> None:
        code = """if True:
            import os, subprocess, sys, time
            from dllm.scripts.ending import tied
            child = subprocess.Popen(tied([sys.executable, "-c", "print(1, flush=True); import time; time.sleep(60)"]))
            time.sleep(float(sys.argv[1]))
            os._exit(0)
        """
        for delay in ("0", "0.3"):  # the pipe is closed by the last process
            subprocess.run([sys.executable, "-c", code, delay], stdout=subprocess.PIPE, timeout=30, check=True)

    @in_a_process
    @pytest.mark.parametrize(
        ("number", "delay", "code"), [(signal.SIGINT, 0.3, 130), (signal.SIGTERM, 1.5, 143), (signal.SIGINT, None, 130)]
    )
    def test_a_process_ends_at_any_moment_with_one_line(
        self, number: int, delay: float | None, code: int, tmp_path: Path
    ) -> None:
        for later in (0.0, 0.5, 1.0, 2.0):
            process: Any = (start if delay is None else start_cold)(*LONG, f"out={tmp_path}")
            if delay is None:  # once it is at work; before, it imports
                while not any(tmp_path.rglob("journal.jsonl")):
                    time.sleep(0.05)
            time.sleep((delay or 0.5) + later)
            process.send_signal(number)
            err = process.communicate(timeout=60)[1]
            if "Traceback" not in err or "scripts/cli.py" in err:
                break  # else Python itself was not up yet, on a busy machine
        told = [line for line in err.splitlines() if not line.startswith("vanilla: ")]  # how far it was
        assert process.returncode == code
        assert told == [
            f"dllm evaluate: error: {'interrupted' if code == 130 else 'terminated'}; what was written is kept"
        ]

    @pytest.mark.parametrize("kind", [ModuleNotFoundError, ValueError, ZeroDivisionError])
    def test_a_signal_that_a_library_turns_into_another_error_is_told(
        self, kind: type[Exception], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def imports(command: str, given: list[str]) -> None:
            with ending.working():
                try:
                    signal.raise_signal(signal.SIGINT)
                except BaseException as error:
                    raise kind("cannot be imported") from error

        monkeypatch.setattr(cli, "_dispatch", imports)
        monkeypatch.setattr(sys, "argv", ["dllm", "evaluate"])
        with pytest.raises(SystemExit) as left:
            cli.main()
        assert left.value.code == 130
        assert capsys.readouterr().err == "dllm evaluate: error: interrupted; what was written is kept\n"


class TestPipes:
    @pytest.mark.parametrize("arguments", [[], ["generate", "--help"], ["--version"], ["compatibility"]])
    def test_a_closed_pipe_ends_a_command_quietly(
        self, arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        reading, writing = os.pipe()
        os.close(reading)
        monkeypatch.setattr(sys, "argv", ["dllm", *arguments])
        with os.fdopen(writing, "w") as closed:  # and so flushed as at exit
            monkeypatch.setattr(sys, "stdout", closed)
            with pytest.raises(SystemExit) as left:
                cli.main()
        assert left.value.code == 1
        assert capsys.readouterr().err == ""

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
    @pytest.mark.parametrize("arguments", [[], ["generate", "--help"], ["compatibility"]])
    def test_a_full_disk_behind_the_output_is_one_line(
        self, arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with Path("/dev/full").open("w") as full:
            monkeypatch.setattr(sys, "stdout", full)
            monkeypatch.setattr(sys, "argv", ["dllm", *arguments])
            with pytest.raises(SystemExit) as left:
                cli.main()
        told = capsys.readouterr().err
        assert (left.value.code, told.count("\n")) == (2, 1)
        assert "No space left" in told

    def test_what_an_encoding_lacks_is_escaped(self, monkeypatch: pytest.MonkeyPatch) -> None:
        written = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, "ascii"))
        monkeypatch.setattr(sys, "argv", ["dllm", "generate", "prompt=é", "gen_length=8"])
        cli.main()
        lines = written.getvalue().decode("ascii").splitlines()
        assert lines[0] == "\\xe9"
        assert "\\xb7" in lines[1]

    def test_arguments_are_utf_8_in_any_locale(self) -> None:
        ascii_only = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
        asked = [sys.executable, "-m", "dllm.scripts.cli", "é"]
        ran = subprocess.run(asked, env=ascii_only, capture_output=True, timeout=120, check=False)
        assert ran.returncode == 2
        assert ran.stderr.startswith("dllm: error: unknown command 'é'; expected one of".encode())

    def test_no_network_is_no_full_disk(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def unreachable(command: str, given: list[str]) -> None:
            raise ConnectionError("the hub cannot be reached")

        monkeypatch.setattr(cli, "_dispatch", unreachable)
        assert command("lm-eval").err == "dllm lm-eval: error: the hub cannot be reached\n"

    def test_a_process_in_a_pipe_ends_quietly(self) -> None:
        line = f"{sys.executable} -m dllm.scripts.cli generate --help 2>&1 | true; echo ${{PIPESTATUS[0]}}"
        ran = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=120, check=True)
        assert (ran.stdout, ran.stderr) == ("1\n", "")

    def test_an_error_is_told_where_standard_output_is_closed(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(sys, "stdout", None)
        monkeypatch.setattr(sys, "argv", ["dllm", "show", "/no/such"])
        with pytest.raises(SystemExit) as left:
            cli.main()
        assert left.value.code == 2
        assert capsys.readouterr().err.count("\n") == 1
