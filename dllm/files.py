"""Files that are written whole or not at all, and JSON that is read without trusting it."""

from __future__ import annotations

import json
import os
import stat
from collections import Counter
from contextlib import suppress
from pathlib import Path
from secrets import token_hex
from typing import Any

from dllm.checks import first_line

BUNDLED = Path(__file__).parent / "checkpoints"


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file beside its place, on the disk, and move it there: whoever reads sees the old or the new one.

    A link is followed, folders that are missing are made. What is no ordinary file, such as /dev/stdout, is written to.
    A file that is replaced keeps who may read it.

    Raises:
        OSError: it cannot be written; what was there before is as it was.
    """
    try:
        _write_whole(Path(os.path.realpath(path)), content.encode() if isinstance(content, str) else content)
    except OSError as error:
        error.filename = str(path)  # not that of the unfinished file, nor none, as where the disk is full
        raise


def _write_whole(path: Path, data: bytes) -> None:
    if path.exists() and not path.is_file():
        path.write_bytes(data)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".dllm-{token_hex(8)}")  # nobody's, and no longer than names may be
    file = unfinished.open("xb")
    try:
        with file:
            with suppress(OSError):  # no file is replaced, or the disk knows no permissions
                unfinished.chmod(stat.S_IMODE(path.stat().st_mode))
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    sync_folder(path.parent)


def write_json(path: Path, content: Any) -> None:
    """Write JSON for people to read as well, as `write_whole` does; values of other types become their text."""
    write_whole(path, json.dumps(content, indent=1, ensure_ascii=False, default=str) + "\n")


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk, where the system can."""
    with suppress(OSError):
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def state(file: Path | int) -> tuple[int, int, int] | None:
    """Which file this is, by device and number, and its size; None without one."""
    try:
        found = os.fstat(file) if isinstance(file, int) else file.stat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino, found.st_size


def check_kept(path: Path, content: bytes, fix: str) -> None:
    """Make sure that a file still holds what was written to it.

    Raises:
        OSError: something else removed or changed it.
    """
    with suppress(OSError):
        if path.read_bytes() == content:
            return
    raise disturbed(str(path), path, fix)


def disturbed(called: str, path: Path, fix: str) -> OSError:
    """The error about a file that somebody else removed or changed."""
    what = "changed" if os.path.lexists(path) else "removed"
    return OSError(f"{called} was {what} by something else during this run{fix}")


def check_readable(option: str, path: Path, give: str = "another file") -> None:
    """Refuse what cannot be opened without waiting: a named pipe has no end until somebody writes to it.

    A pipe that is open already, such as /dev/stdin or the shell's <(...), is read.

    Raises:
        ValueError: there is no such file, or it may not be read.
    """
    try:
        kind = path.stat().st_mode
    except OSError as error:
        raise ValueError(f"{option}={str(path)!r} cannot be read ({error.strerror}); give {give}") from None
    if stat.S_ISFIFO(kind) and not str(path).startswith(("/dev/fd/", "/dev/std", "/proc/self/fd/")):
        raise ValueError(f"{option}={str(path)!r} cannot be read (it is a pipe); give {give}")
    if stat.S_ISCHR(kind) and str(path) in ("/dev/zero", "/dev/full", "/dev/random", "/dev/urandom"):
        raise ValueError(f"{option}={str(path)!r} cannot be read (it has no end); give {give}")


def parse_json(text: str | bytes, once: bool = False) -> Any:
    """Parse JSON from a source that is not trusted.

    Args:
        text: the JSON.
        once: refuse an object that says a key twice.

    Raises:
        ValueError: it is no JSON, or nested deeper than Python's parser goes.
    """
    try:
        return json.loads(text, object_pairs_hook=_said_once if once else None)
    except RecursionError:
        raise ValueError("nested too deep") from None


def _said_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"it says {Counter(name for name, _ in pairs).most_common(1)[0][0]!r} twice")
    return found


def read_json(path: Path, fix: str = "copy or download it again") -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Args:
        path: the file.
        fix: what errors tell the user to do.

    Raises:
        ValueError: it cannot be read or holds something else.
    """
    try:
        content = parse_json(path.read_text(encoding="utf-8"), once=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not JSON ({first_line(error)}); {fix}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a JSON {type(content).__name__}, not an object; {fix}")
    return content


def expanded(name: str | Path) -> Path:
    """A path whose ~ is a home; as it is where there is no such user."""
    with suppress(RuntimeError):
        return Path(name).expanduser()
    return Path(name)


def is_folder(path: Path) -> bool:
    """Whether there is a folder; what is no possible name is none."""
    with suppress(OSError, ValueError):
        return path.is_dir()
    return False
