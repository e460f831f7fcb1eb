"""Programs of a model: what passes, what does not and why, and what they leave behind."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from dllm.tasks import humaneval, sandbox
from dllm.tasks.code import HumanEval
from dllm.tasks.sandbox import Outcome, execute

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs resource limits")

PASSED = Outcome(True, "passed", "")


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs lie where no other test's do, so that their processes are told apart from those of other tests."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def gone(pid: int) -> bool:
    """Whether a process has ended; one that waits to be collected has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


class TestVerdicts:
    @pytest.mark.parametrize(
        "program",
        [
            "",
            "import collections, dataclasses, functools, heapq, itertools, math, re, typing\nassert math.pi > 3",
            "from dataclasses import dataclass\n@dataclass\nclass A:\n    a: 'int'\nassert A(1) == A(1)",
            "assert __name__ == '__main__'\nimport __main__, pickle\nclass A: pass\npickle.dumps(A())",
            "# caf\u00e9 \U0001f600\nprint('caf\u00e9 \U0001f600')",
            "print('x' * 10**8)\nimport sys\nfor _ in range(10): print('x' * 10**7, file=sys.stderr)",
            "import sys\nassert sys.stdin.read() == ''",
            "import threading, time\nthreading.Thread(target=lambda: time.sleep(60)).start()",
        ],
        ids=["empty", "imports", "dataclass", "main", "unicode", "output", "no input", "thread"],
    )
    def test_a_program_that_runs_to_its_end_passes(self, program: str) -> None:
        assert execute(program) == PASSED

    @pytest.mark.parametrize(
        ("program", "reason", "detail"),
        [
            ("assert 1 == 2", "failed", "AssertionError"),
            ("assert 1 == 2, 'no\\nreally'", "failed", "AssertionError: no"),
            ("def f(:", "failed", "SyntaxError: invalid syntax (program.py, line 1)"),
            ("x = '\ud800'", "failed", "SyntaxError"),
            ("x = '\0'", "failed", "SyntaxError"),
            ("def f(): f()\nf()", "failed", "RecursionError"),
            ("raise ValueError('x' * 10**6)", "failed", "ValueError: " + "x" * 300),
            ("class E(Exception):\n    def __str__(self): raise E\nraise E", "failed", "E"),
            ("import sys\nsys.exit(0)", "failed", "SystemExit: 0"),
            ("exit()", "failed", "SystemExit"),
            ("import os\nos._exit(0)", "failed", "left with exit code 0 before its end"),
            ("import os\nos._exit(7)", "failed", "left with exit code 7 before its end"),
            ("import os\nos.fork() and os._exit(0)", "failed", "left with exit code 0 before its end"),
            ("input()", "failed", "EOFError"),
            ("open('big', 'wb').write(b'x' * 10**8)", "failed", "OSError: [Errno 27]"),
            ("files = [open('f', 'w') for _ in range(1000)]", "failed", "OSError: [Errno 24]"),
            ("x = [0] * 10**10", "memory", "MemoryError"),
            ("x = []\nwhile True: x.append(bytes(10**7))", "memory", "MemoryError"),
            ("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)", "crashed", "ended by signal 11"),
            ("import os\nos.killpg(0, 9)", "crashed", "ended by signal 9"),
        ],
    )
    def test_anything_else_does_not(self, program: str, reason: str, detail: str) -> None:
        outcome = execute(program)
        assert (outcome.passed, outcome.reason) == (False, reason)
        assert outcome.detail.startswith(detail)
        assert len(outcome.detail) < 330

    @pytest.mark.parametrize(
        "program", ["while True: pass", "import time\ntime.sleep(60)", "try:\n    while 1: pass\nfinally: 1"]
    )
    def test_a_program_that_takes_too_long(self, program: str) -> None:
        started = time.monotonic()
        assert execute(program, timeout=0.3) == Outcome(False, "timeout", "still running after 0.3 s")
        assert time.monotonic() - started < 10

    def test_it_may_use_what_is_allowed(self) -> None:
        program = "x = bytes(200 * 2**20)"
        assert execute(program) == PASSED
        assert execute(program, memory=1 << 27).reason == "memory"
        assert execute("", memory=1 << 26) == PASSED

    def test_a_verdict_can_be_repeated(self) -> None:
        outcomes = {execute("raise ValueError(hash('a'), list({'a', 'b', 'c'}))").detail for _ in range(3)}
        assert len(outcomes) == 1


class TestSurroundings:
    def test_nothing_of_the_callers_environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HF_TOKEN", "secret")
        monkeypatch.setenv("HOME", "/home/somebody")
        monkeypatch.setenv("PYTHONPATH", "/somewhere")
        program = """
            import os, sys
            assert not {'HF_TOKEN', 'PYTHONPATH'} & set(os.environ)
            assert not any('secret' in value for value in os.environ.values())
            assert os.environ['HOME'] == os.environ['TMPDIR'] == os.getcwd()
            assert '/somewhere' not in sys.path and os.getcwd() not in sys.path
            assert len(sys.argv) == 1"""
        assert execute("if True:" + program) == PASSED

    def test_it_writes_into_a_folder_that_is_removed(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        program = """
            import os, tempfile
            assert os.listdir() == ['program.py']
            os.makedirs('a/b')
            open('a/b/c', 'w').write('x')
            os.chmod('a', 0)
            assert tempfile.gettempdir() == os.getcwd()
            raise ValueError(os.getcwd())"""
        outcome = execute("if True:" + program)
        folder = Path(outcome.detail.removeprefix("ValueError: "))
        assert folder.parent == tmp_path
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.skipif(sys.platform != "linux", reason="processes that leave the session are found on Linux")
    @pytest.mark.parametrize("ending", ["", "assert False", "while True: pass"])
    def test_what_it_started_is_gone_afterwards(self, tmp_path: Path, ending: str) -> None:
        pids = tmp_path / "pids"
        program = f"""
import os, subprocess, sys, time
subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        open({str(pids)!r}, 'w').write(f'{{os.getpid()}} {{os.getppid()}}')
        time.sleep(60)
    time.sleep(60)
while not os.path.exists({str(pids)!r}) or not open({str(pids)!r}).read(): time.sleep(0.01)
open({str(pids)!r}, 'a').write(f' {{os.getpid()}}')
{ending}"""
        outcome = execute(program, timeout=2.0 if "while" in ending else 20.0)
        assert outcome.reason == {"": "passed", "assert False": "failed"}.get(ending, "timeout")
        started = [int(pid) for pid in pids.read_text().split()]
        assert len(started) == 3
        assert all(gone(pid) for pid in started)

    @pytest.mark.skipif(not Path("/proc/self/ns/net").exists(), reason="needs network namespaces")
    def test_no_network_where_it_can_be_cut_off(self) -> None:
        own = str(Path("/proc/self/ns/net").readlink())
        if execute(f"import os\nassert os.readlink('/proc/self/ns/net') != {own!r}") != PASSED:
            pytest.skip("this system does not let a process leave the network")
        with socket.create_server(("127.0.0.1", 0)) as server:
            connect = f"import socket\nsocket.create_connection({server.getsockname()}, timeout=2)"
            assert execute(connect).detail.startswith("OSError")


FORGED = """
import os, sys
found, frame = [], sys._getframe()
while frame:
    for value in frame.f_locals.values():
        found += [each for each in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(each, bytes)]
    frame = frame.f_back
for number in range(3, 128):
    for text in (*found, b'end', b'passed', b'["passed", ""]'):
        try: os.write(number, text)
        except OSError: pass
"""
GRANDPARENT = "import os\nup = int(open(f'/proc/{os.getppid()}/stat').read().rpartition(')')[2].split()[1])\n"
BYTES = 1 << 28
SHARED = Path("/dev/shm")


@pytest.mark.skipif(sys.platform != "linux", reason="the full sandbox is Linux's")
class TestHostile:
    @pytest.mark.parametrize(
        "program",
        [
            "print('ready')\nprint('[\"passed\", \"\"]')\nimport os\nos._exit(0)",
            FORGED + "os._exit(0)",
            FORGED + "raise ValueError",
            "import sys, os\nsys.audit('dllm.end')\nos._exit(0)",
            "import sys\nf = sys._getframe(1)\nf.f_globals['_run'](__file__, 3, [b'a', b'b'], (1, 1 << 30), (1, None))",
            "import gc\ngc.get_objects()\nraise ValueError",
            "class end(Exception): pass\nraise end",
            "class refused(Exception): pass\nraise refused('x')",
            "import os, sys\nwrite = os.write\nos.write = lambda fd, text: write(fd, text + b'end')\nraise ValueError",
            "import atexit, os\natexit.register(os._exit, 0)\nraise ValueError",
            "import os\nopen(f'/proc/{os.getppid()}/fd/1', 'w').write('[\"passed\", \"\"]')\nos._exit(0)",
            "import os\nopen(f'/proc/{os.getppid()}/mem', 'r+b')",
            "import os\nos.kill(os.getppid(), 9)",
            GRANDPARENT + "os.kill(up, 15)",
            GRANDPARENT + "open(f'/proc/{up}/environ').read()",
            "import os\nos.kill(-1, 9)",
            "import socket\nsocket.socket(socket.AF_UNIX)",
            "import socket\nsocket.socket()",
        ],
        ids=lambda program: program.replace("\n", " ")[-40:],
    )
    def test_no_trick_passes(self, program: str) -> None:
        assert execute(program, timeout=5.0).reason in ("failed", "crashed")

    def test_no_socket_outside_is_reached(self, tmp_path: Path) -> None:
        for address in (str(tmp_path / "socket"), f"\0dllm-{tmp_path}"):
            with socket.socket(socket.AF_UNIX) as server:
                server.bind(address)
                server.listen()
                connect = f"import socket\nsocket.socket(socket.AF_UNIX).connect({address!r})"
                assert execute(connect).detail.startswith("OSError")

    @pytest.mark.parametrize(
        ("program", "reason", "detail"),
        [
            ("while True:\n    try: os.fork()\n    except OSError: pass", "failed", "more than 128 processes"),
            ("while True:\n    os.fork() or os.setsid()", "failed", "more than 128 processes"),
            (
                f"for _ in range(4):\n    if os.fork() == 0:\n        x = b'x' * {BYTES // 3}\n        time.sleep(60)\n"
                "time.sleep(60)",
                "memory",
                f"more than {BYTES} bytes in all of its processes",
            ),
        ],
        ids=["fork bomb", "fork bomb in sessions", "memory of several"],
    )
    def test_what_all_processes_may_use_together(self, program: str, reason: str, detail: str) -> None:
        outcome = execute(f"import os, time\n{program}", timeout=20.0, memory=BYTES if reason == "memory" else 1 << 30)
        assert (outcome.reason, outcome.detail[: len(detail)]) == (reason, detail)
        assert left() == []

    @pytest.mark.parametrize("call", ["shmget(0, 4096, 1023)", "msgget(0, 1023)", "semget(0, 1, 1023)"])
    def test_no_memory_outlives_it(self, call: str) -> None:
        program = f"import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\nprint(libc.{call})\n"
        assert execute(program + "raise SystemExit(f'errno {ctypes.get_errno()}')").detail == "SystemExit: errno 38"

    @pytest.mark.skipif(sys.platform != "linux" or not SHARED.is_dir(), reason="there are no files in memory")
    @pytest.mark.parametrize("namespace", [True, False])
    def test_no_file_in_memory_outlives_it(
        self, namespace: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        name = tmp_path.name + tmp_path.parent.name
        if not namespace:
            head, middle, tail = sandbox._SUPERVISOR.read_text().partition("libc.unshare(_CLONE_NEWNS) == 0")
            (tmp_path / "supervisor.py").write_text(f"{head}False{tail}")
            monkeypatch.setattr(sandbox, "_SUPERVISOR", tmp_path / "supervisor.py")
            assert middle
        made = execute(f"open('/dev/shm/{name}', 'w').write('x')")
        assert not (SHARED / name).exists()
        assert made == PASSED if namespace else made.detail.startswith("PermissionError: ")
        for other in ("x", tmp_path / "x"):
            assert (
                execute(f"import os\nopen({str(other)!r}, 'w').write('x')\nopen(os.devnull, 'w').write('x')") == PASSED
            )
        if namespace:  # programs use semaphores
            assert execute("import multiprocessing\nwith multiprocessing.Lock(): pass") == PASSED

    @pytest.mark.skipif(not os.access(SHARED, os.W_OK), reason="there are no files in memory")
    @pytest.mark.parametrize("namespace", [True, False])
    def test_its_folder_may_be_in_memory(
        self, namespace: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        if not namespace:
            text = sandbox._SUPERVISOR.read_text().replace("libc.unshare(_CLONE_NEWNS) == 0", "False")
            (tmp_path / "supervisor.py").write_text(text)
            monkeypatch.setattr(sandbox, "_SUPERVISOR", tmp_path / "supervisor.py")
        place = SHARED / f"{tmp_path.name}{tmp_path.parent.name}" / "deep"
        place.mkdir(parents=True)
        monkeypatch.setattr(sandbox.tempfile, "tempdir", str(place))
        try:
            sandbox.check(5.0, 1 << 30)
            assert execute("import os\nopen('x', 'w').write('1')\nassert open(os.path.abspath('x')).read()") == PASSED
            assert list(place.iterdir()) == []
        finally:
            shutil.rmtree(place.parent)

    def test_an_empty_program_that_fails_is_told(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sandbox, "execute", lambda *_: sandbox.Outcome(False, "failed", "left with exit code 1"))
        with pytest.raises(ValueError, match="programs cannot be executed here: an empty one left with exit code 1"):
            sandbox.check(5.0, 1 << 30)

    def test_memory_that_processes_share_counts_once(self) -> None:
        program = f"import os\nx = b'x' * {BYTES // 2}\nfor _ in range(4):\n    if os.fork() == 0: os._exit(0)\n"
        assert execute(program + "for _ in range(4): os.wait()", memory=BYTES) == PASSED

    def test_nothing_stays_where_the_caller_is_interrupted(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        def interrupted(process: subprocess.Popen[bytes], timeout: float) -> None:
            while not (tmp_path / "there").exists():
                time.sleep(0.01)
            raise KeyboardInterrupt

        monkeypatch.setattr(subprocess.Popen, "communicate", interrupted)
        program = "import os, time\nif os.fork() == 0: os.setsid()\nopen('{}', 'w')\ntime.sleep(60)"
        with pytest.raises(KeyboardInterrupt):
            execute(program.format(tmp_path / "there"), timeout=20.0)
        assert left() == []


def left() -> list[int]:
    """Processes of a sandbox that still run: they have its command line, which names a folder of this test's."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if tempfile.gettempdir() in file.read_text() and not gone(int(file.parent.name)):
                found.append(int(file.parent.name))
        except OSError:
            continue
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing is full")
class TestPartial:
    @pytest.fixture
    def lacking(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        """A system without seccomp."""
        text = sandbox._SUPERVISOR.read_text()
        head, middle, tail = text.partition("    architecture, seccomp, starts, numbers = ")
        assert middle
        (tmp_path / "supervisor.py").write_text(f"{head}    return None\n{middle}{tail}")
        monkeypatch.setattr(sandbox, "_SUPERVISOR", tmp_path / "supervisor.py")

    def test_a_system_that_cannot_give_it_is_named_and_refused(self, lacking: None, tmp_path: Path) -> None:
        words = (
            r"task\.sandbox='full' is not possible here: .* close sockets \(no seccomp filter\); .*"
            r"task\.sandbox=partial"
        )
        for refuse in (
            lambda: execute(f"open({str(tmp_path / 'ran')!r}, 'w')"),
            lambda: sandbox.check(5.0, 1 << 30),
            lambda: humaneval.task(None, execute=True),
            lambda: HumanEval(execute=True).check(),
        ):
            with pytest.raises(ValueError, match=words):
                refuse()
        assert not (tmp_path / "ran").exists()

    def test_told_so_it_runs_with_what_there_is(self, lacking: None) -> None:
        assert execute("", sandbox="partial") == PASSED
        assert execute("import os\nos.kill(os.getpid(), 9)", sandbox="partial").reason == "crashed"
        HumanEval(execute=True, sandbox="partial").check()

    def test_an_unknown_word(self) -> None:
        with pytest.raises(ValueError, match=r"unknown task\.sandbox='none'; expected one of full, partial"):
            HumanEval(sandbox="none")  # type: ignore[arg-type]


class TestErrors:
    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"timeout": 0}, "timeout=0 is out of range; use a number of seconds above 0"),
            ({"timeout": float("inf")}, "timeout=inf is out of range"),
            ({"memory": 1000}, "memory=1000 is out of range; use a whole number of bytes"),
            ({"memory": 1e9}, "memory=1000000000.0 is out of range"),
        ],
    )
    def test_limits_out_of_range(self, options: dict[str, float], words: str) -> None:
        with pytest.raises(ValueError, match=words):
            execute("", **options)  # type: ignore[arg-type]

    def test_a_platform_without_limits(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(ValueError, match=r"programs cannot be executed on .*; use Linux"):
            execute("")

    def test_an_interpreter_that_does_not_start_is_no_verdict(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setattr(sandbox, "_SUPERVISOR", tmp_path / "missing.py")
        with pytest.raises(RuntimeError, match=r"the sandbox cannot start .*missing\.py"):
            execute("")
