"""The supervisor process of `dllm.tasks.sandbox`: runs a program in a child process and reports its outcome.

Run by its path and never imported, so that it starts fast: it needs only the standard library. On
standard output it writes a line when it is ready, and a JSON list of reason and detail at the end.

The child has its own session. All its descendants, in any session, are descendants of this process (Linux),
which counts them, sums up their memory, and kills them all. The child proves completion by a random token on
a pipe; the program has no access to this process's descriptors or memory.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import math
import os
import platform
import resource
import select
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_CHILD_SUBREAPER = 1, 4, 36
_PR_SET_NO_NEW_PRIVS, _SECCOMP_SET_MODE_FILTER, _SECCOMP_FILTER_FLAG_NEW_LISTENER = 38, 1, 8
_SECCOMP_IOCTL_NOTIF_RECV, _SECCOMP_IOCTL_NOTIF_SEND, _SECCOMP_USER_NOTIF_FLAG_CONTINUE = 0xC0502100, 0xC0182101, 1
_CLONE_NEWIPC, _CLONE_NEWUSER, _CLONE_NEWNET, _CLONE_NEWNS = 0x08000000, 0x10000000, 0x40000000, 0x00020000
_MS_BIND, _MS_PRIVATE = 0x1000, 0x44000  # the latter with all below
_SHARED = "/dev/shm"
_LINUX = sys.platform == "linux"
# Of Landlock: to write files, and to make folders, files, sockets, pipes and links.
_WRITE_FILE, _WRITING = 1 << 1, 1 << 1 | 1 << 7 | 1 << 8 | 1 << 9 | 1 << 10 | 1 << 12
_FILE_BYTES, _OPEN_FILES, _TASKS = 1 << 24, 128, 128
_END = "dllm.end"

# Numbers of system calls (asm/unistd.h) by machine: the audit architecture, seccomp, those that start a process or a
# thread, and _CALLS, of which the last four take a process as their first argument.
_CALLS = """socket memfd_create shmget semget msgget mq_open ptrace process_vm_readv process_vm_writev unshare setns bpf
perf_event_open userfaultfd add_key request_key keyctl tkill kill tgkill rt_sigqueueinfo prlimit64""".split()
_NUMBERS = {
    "x86_64": (
        0xC000003E,
        317,
        (56, 57, 58, 435),
        (41, 319, 29, 64, 68, 240, 101, 310, 311, 272, 308, 321, 298, 323, 248, 249, 250, 200, 62, 234, 129, 302),
    ),
    "aarch64": (
        0xC00000B7,
        277,
        (220, 435),
        (198, 279, 194, 190, 186, 180, 117, 270, 271, 97, 268, 280, 241, 282, 217, 218, 219, 130, 129, 131, 138, 261),
    ),
}
# The same on every machine: io_uring_*, pidfd_send_signal, pidfd_getfd; and pidfd_open, which takes a process.
_NEWER, _PIDFD_OPEN = (424, 425, 426, 427, 438), 434
_ERRORS = {"socket": errno.EAFNOSUPPORT}
# What would count as no process's memory, and may outlive the program.
_ERRORS |= dict.fromkeys(("memfd_create", "shmget", "semget", "msgget", "mq_open"), errno.ENOSYS)


def main(path: str, timeout: float, memory: int, partial: bool) -> None:
    """Run the program at `path`; see `dllm.tasks.sandbox.execute` for the arguments."""
    caller, missing = os.getppid(), []
    if _LINUX:
        # SIGTERM, to clean up the program, if the caller dies.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
        libc = ctypes.CDLL(None)
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)  # no access through /proc
        libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    if not Path(f"/proc/self/task/{os.getpid()}/children").exists():
        missing.append("find all processes of a program (no children in /proc)")
    end, refusal = os.urandom(16).hex().encode(), os.urandom(16).hex().encode()
    words = [end, refusal]
    receive, send = os.pipe()
    ours, theirs = socket.socketpair()
    print("ready", flush=True)
    child = os.fork()
    if child == 0:
        os.close(receive)
        ours.close()
        del end, refusal  # a program can inspect these frames
        _run(path, (send, theirs), words, (timeout, memory), (caller, None if partial else missing))
    os.close(send)
    theirs.close()
    forks = next(iter(socket.recv_fds(ours, 1, 1)[1]), None)
    try:
        reason = _wait(child, timeout, memory, forks)
    finally:
        status = _end_all(child)
    os.set_blocking(receive, False)
    try:
        said = os.read(receive, 1 << 16)
    except BlockingIOError:
        said = b""
    if said.startswith(refusal):
        reason = "refused", said.removeprefix(refusal).decode()
    print(json.dumps(reason or _verdict(status, end in said, said.decode(errors="replace"), timeout)), flush=True)


def _run(
    path: str,
    channels: tuple[int, socket.socket],
    words: list[bytes],
    limits: tuple[float, int],
    surroundings: tuple[int, list[str] | None],
) -> NoReturn:
    """Run the program, in the child process."""
    report = channels[0]
    audit, write, leave, describe = sys.audit, os.write, os._exit, _description
    try:
        own, getpid = os.getpid(), os.getpid
        found = _confine(*limits, surroundings[0], channels[1])
        if surroundings[1] is not None and (missing := surroundings[1] + found):
            write(report, words[1] + "; ".join(missing).encode())
            leave(0)
        source = Path(path).read_bytes()
        module = ModuleType("__main__")
        module.__file__ = path
        sys.modules["__main__"], sys.argv = module, [path]
        sys.addaudithook(_witness(report, words[0], sys._getframe()))
        words.clear()
        try:
            exec(compile(source, path, "exec", dont_inherit=True), vars(module))
        except BaseException as error:  # noqa: BLE001  # including SystemExit: the program failed
            if getpid() == own:
                write(report, describe(error).encode(errors="replace"))
        else:
            audit(_END)  # ignored in forks of the program
        leave(0)
    finally:
        leave(1)


def _witness(report: int, word: bytes, frame: Any) -> Callable[[str, Any], None]:
    """An audit hook that writes the token when `frame` completes.

    Python code cannot list audit hooks, so that a program cannot obtain the token, except by reading its own memory or
    by advancing this frame with a tracer.
    """
    write, getpid, caller, own = os.write, os.getpid, sys._getframe, os.getpid()

    def hook(event: str, _: Any) -> None:
        if event.startswith("gc."):  # gc could find this function
            raise PermissionError(event)
        if event == _END and getpid() == own and caller(1) is frame:
            write(report, word)

    return hook


def _confine(timeout: float, memory: int, caller: int, channel: socket.socket) -> list[str]:
    """Drop the privileges of this process; returns the unsupported ones."""
    own = os.getppid()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    null = os.open(os.devnull, os.O_RDWR)
    for standard in range(3):
        os.dup2(null, standard)
    os.close(null)
    os.setsid()
    os.nice(5)  # lower priority than the supervisor
    seconds = math.ceil(timeout) + 1  # if the supervisor is killed
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
    if not _LINUX:
        return [f"confine a program on {sys.platform} (Linux can)"]
    libc = ctypes.CDLL(None)
    # Without a user namespace this needs root; the seccomp filter below blocks sockets in any case.
    if libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNET | _CLONE_NEWIPC) != 0:
        libc.unshare(_CLONE_NEWNET | _CLONE_NEWIPC)
    hidden = not Path(_SHARED).exists() or _hide_shared_memory(libc, Path.cwd())
    libc.capset(struct.pack("II", 0x20080522, 0), bytes(24))
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    libc.prctl(_PR_SET_DUMPABLE, 1, 0, 0, 0)  # so that it can read its own entry in /proc
    inside = _keep_inside(libc, shut=not hidden)
    outside = {-1, own, -own, caller, -os.getpgid(caller)}
    missing, listener = [], _filter_calls(libc, sorted(outside))
    if not (hidden or inside):
        missing.append(f"keep a program's files out of {_SHARED} (neither Landlock nor a mount namespace)")
    if listener is None:
        missing.append("count processes before they start and close sockets (no seccomp filter)")
    else:
        socket.send_fds(channel, [b"forks"], [listener])
        os.close(listener)
    channel.close()
    if any(_readable(f"/proc/{process}/{name}") for process in (own, caller) for name in ("environ", "fd/1")):
        missing.append("hide the caller's processes from a program (neither Landlock nor a user namespace)")
    return missing


def _readable(path: str) -> bool:
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_NONBLOCK))
    except OSError:
        return False
    return True


def _hide_shared_memory(libc: Any, folder: Path) -> bool:
    """Put the program's folder in place of shared memory, whose files would outlive it; whether that is possible."""
    shared = Path(_SHARED).resolve()
    within = folder.relative_to(shared) if folder.is_relative_to(shared) else None
    if within is not None:  # it keeps its name there
        (folder / within).mkdir(parents=True)
    return (
        libc.unshare(_CLONE_NEWNS) == 0
        and libc.mount(None, b"/", None, _MS_PRIVATE, None) == 0  # or others would see it
        and libc.mount(os.fsencode(folder), os.fsencode(shared), None, _MS_BIND, None) == 0
        and (within is None or libc.mount(os.fsencode(shared), os.fsencode(folder), None, _MS_BIND, None) == 0)
    )


def _keep_inside(libc: Any, shut: bool) -> bool:
    """Landlock: no access to processes that are not descendants; from Linux 6.12 on also no signals.

    Args:
        libc: the C library.
        shut: write no files into shared memory either.

    Returns:
        Whether it is in force.
    """
    no_devices = 1 << 11  # a ruleset must restrict something; programs do not need this
    handled = no_devices | _WRITING if shut else no_devices
    for rules in (struct.pack("QQQ", handled, 0, 3), struct.pack("Q", handled)):
        domain = libc.syscall(444, rules, ctypes.c_size_t(len(rules)), 0)
        if domain >= 0:
            for place in (Path.cwd(), *_others(Path(_SHARED).resolve())) if shut else ():
                file = os.open(place, os.O_PATH)
                allowed = struct.pack("=Qi", _WRITING if place.is_dir() else _WRITE_FILE, file)
                libc.syscall(445, domain, 1, allowed, 0)
                os.close(file)
            found = libc.syscall(446, domain, 0)
            os.close(domain)
            return bool(found == 0)
    return False


def _others(path: Path) -> list[Path]:
    """What is beside a path, and beside the folders that it is in."""
    beside = [each for parent in path.parents for each in parent.iterdir()]
    return [each for each in beside if each not in (path, *path.parents) and each.exists()]


def _filter_calls(libc: Any, outside: Sequence[int]) -> int | None:
    """Block sockets, and system calls on other processes; `outside` must not be signalled.

    Returns:
        Descriptor of the seccomp notifications for starts of processes and threads; None if unsupported.
    """
    if platform.machine() not in _NUMBERS:
        return None
    architecture, seccomp, starts, numbers = _NUMBERS[platform.machine()]
    load, equal, at_least, give = 0x20, 0x15, 0x35, 0x06
    allow, ask, kill, refuse = (give, 0, 0, 0x7FFF0000), (give, 0, 0, 0x7FC00000), (give, 0, 0, 0x80000000), 0x00050000
    no = (give, 0, 0, refuse | errno.EPERM)
    # The architecture must be this one, without its other ABIs.
    code = [(load, 0, 0, 4), (equal, 1, 0, architecture), kill, (load, 0, 0, 0), (at_least, 0, 1, 1 << 30), no]
    for number in starts:
        code += [(equal, 0, 1, number), ask]
    for name, number in zip(_CALLS[:-4], numbers, strict=False):
        code += [(equal, 0, 1, number), (give, 0, 0, refuse | _ERRORS.get(name, errno.EPERM))]
    for number in _NEWER:
        code += [(equal, 0, 1, number), no]
    for number in (*numbers[-4:], _PIDFD_OPEN):
        pids = [part for pid in outside for part in ((equal, 0, 1, pid & 0xFFFFFFFF), no)]
        code += [(equal, 0, len(pids) + 2, number), (load, 0, 0, 16), *pids, allow]
    code.append(allow)
    text = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *each) for each in code))
    program = struct.pack("HxxxxxxQ", len(code), ctypes.addressof(text))
    listener = libc.syscall(seccomp, _SECCOMP_SET_MODE_FILTER, _SECCOMP_FILTER_FLAG_NEW_LISTENER, program)
    return None if listener < 0 else int(listener)


def _description(error: BaseException) -> str:
    kind = "MemoryError" if isinstance(error, MemoryError) else type(error).__name__
    try:
        message = str(error).strip().partition("\n")[0][:300]
    except BaseException:  # noqa: BLE001  # the message is the program's own code
        message = ""
    return f"{kind}: {message}" if message else kind


def _wait(child: int, timeout: float, memory: int, forks: int | None) -> tuple[str, str] | None:
    """Watch until the child ends; reason and detail if a limit is exceeded."""
    deadline, pause, look, tasks = time.monotonic() + timeout, 0.001, 0.0, 0
    listener = select.poll()
    if forks is not None:
        listener.register(forks, select.POLLIN)
    while True:
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return None
        left = deadline - time.monotonic()
        if left <= 0:
            return "timeout", f"still running after {timeout:g} s"
        if _LINUX and (left <= deadline - look or tasks > _TASKS):
            found, look = _below(os.getpid()), time.monotonic() + pause
            tasks = sum(map(_tasks, found))
            if tasks > _TASKS:
                return "failed", f"more than {_TASKS} processes and threads"
            if sum(map(_resident, found)) > memory and sum(map(_proportional, found)) > memory:
                return "memory", f"more than {memory} bytes in all of its processes"
        if any(event & select.POLLIN for _, event in listener.poll(1000 * min(pause, left))) and forks is not None:
            _allow_one(forks)
            tasks += 1  # until the next count
        pause = min(2 * pause, 0.01)


def _allow_one(forks: int) -> None:
    """Allow one process or thread to start; each waits for this, so the count cannot be outrun."""
    asked = bytearray(80)
    try:
        fcntl.ioctl(forks, _SECCOMP_IOCTL_NOTIF_RECV, asked)
        answer = struct.pack("QqiI", struct.unpack_from("Q", asked)[0], 0, 0, _SECCOMP_USER_NOTIF_FLAG_CONTINUE)
        fcntl.ioctl(forks, _SECCOMP_IOCTL_NOTIF_SEND, answer)
    except OSError:  # the process is gone
        pass


def _below(process: int) -> list[int]:
    """All current descendants."""
    found, last = _children(process), 0
    while last < len(found):
        found += _children(found[last])
        last += 1
    return found


def _children(process: int) -> list[int]:
    found: list[int] = []
    try:
        for task in Path(f"/proc/{process}/task").iterdir():
            found += map(int, (task / "children").read_text().split())
    except OSError:  # it is gone
        pass
    return found


def _tasks(process: int) -> int:
    try:
        return len(list(Path(f"/proc/{process}/task").iterdir()))
    except OSError:
        return 0


def _resident(process: int) -> int:
    """Resident bytes; shared memory counts for each process."""
    return _number(f"/proc/{process}/statm", 1) * resource.getpagesize()


def _proportional(process: int) -> int:
    """Proportional set size in bytes, if available: shared memory counts once."""
    return _number(f"/proc/{process}/smaps_rollup", "Pss:") * 1024 or _resident(process)


def _number(path: str, place: int | str) -> int:
    """The number at an index, or after a word, in a file; 0 if unreadable."""
    try:
        parts = Path(path).read_text().split()
        return int(parts[place if isinstance(place, int) else parts.index(place) + 1])
    except (OSError, ValueError, IndexError):
        return 0


def _end_all(child: int) -> int | None:
    """Kill all descendants of the program, generation by generation; returns the child's status."""
    found = None
    for kill in (os.kill, os.killpg):
        try:
            kill(child, signal.SIGKILL)
        except OSError:  # it is gone
            continue
    while True:
        # Killed processes cannot fork: their children are found below them, or below this process.
        for pid in _children(os.getpid()) if _LINUX else ():
            todo = [pid]
            while todo:
                each = todo.pop()
                try:
                    os.kill(each, signal.SIGKILL)
                except OSError:
                    continue
                todo += _children(each)
        try:
            pid, status = os.waitpid(-1, 0)
            while pid:
                found = status if pid == child else found
                pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return found


def _verdict(status: int | None, ended: bool, said: str, timeout: float) -> tuple[str, str]:
    """Reason and detail."""
    code = os.waitstatus_to_exitcode(status or 0)
    if code == -signal.SIGXCPU:
        return "timeout", f"more than {timeout:g} s of processor time"
    if code < 0:
        return "crashed", f"ended by signal {-code} ({signal.strsignal(-code)})"
    if code == 0 and ended:
        return "passed", ""
    if code > 0 or not said:
        return "failed", f"left with exit code {code} before its end"
    return ("memory" if said.startswith("MemoryError") else "failed"), said.strip().partition("\n")[0][:320]


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "partial")
