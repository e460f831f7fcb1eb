"""Atomic writes of files, and reading of untrusted JSON."""

from __future__ import annotations

import json
import os
import re
import stat
from collections import Counter
from contextlib import suppress
from pathlib import Path
from secrets import token_hex
from typing import Any

from dllm.checks import first_line

BUNDLED = Path(__file__).parent / "checkpoints"
UNFINISHED = re.compile(r"\.dllm-[0-9a-f]{16}")  # what a process that was killed may leave


def portable(path: Path) -> str:
    """The path of a file of this package within it, the same in every installation; of other files, the path itself."""
    package = BUNDLED.parent
    return (path.relative_to(package) if path.is_relative_to(package) else path).as_posix()


def unfinished_in(folder: Path) -> Path:
    """A name for what is not whole yet: unique, short enough for any file system, and known by `UNFINISHED`."""
    return folder / f".dllm-{token_hex(8)}"


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file atomically (temporary file, fsync, rename): readers see the old or the new content.

    Links are followed, missing folders are created. Special files, such as /dev/stdout, are written to directly.
    A replaced file keeps its permissions.

    Raises:
        OSError: it cannot be written; the old content is unchanged.
    """
    try:
        _write_whole(Path(os.path.realpath(path)), content.encode() if isinstance(content, str) else content)
    except OSError as error:
        error.filename = str(path)  # not the temporary file, nor none, as when the disk is full
        raise


def _write_whole(path: Path, data: bytes) -> None:
    if path.exists() and not path.is_file():
        waits = os.O_NONBLOCK if path.is_fifo() else 0  # a named pipe that nobody reads is an error instead
        number = os.open(path, os.O_WRONLY | waits)
        os.set_blocking(number, True)
        with os.fdopen(number, "wb") as special:
            special.write(data)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = unfinished_in(path.parent)
    file = unfinished.open("xb")
    try:
        with file:
            with suppress(OSError):  # no file is replaced, or the file system has no permissions
                unfinished.chmod(stat.S_IMODE(path.stat().st_mode))
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    sync_folder(path.parent)


def remove_unfinished(folder: Path) -> None:
    """Remove what killed processes left in a folder that no other process writes to."""
    with suppress(OSError):  # missing, or read-only
        for path in folder.iterdir():
            if UNFINISHED.fullmatch(path.name) and path.is_file() and not path.is_symlink():
                path.unlink()


def write_json(path: Path, content: Any) -> None:
    """Write readable JSON atomically; values of other types are converted to text."""
    write_whole(path, json.dumps(content, indent=1, ensure_ascii=False, default=str) + "\n")


def sync_folder(folder: Path) -> None:
    """Sync a folder to disk, if supported."""
    with suppress(OSError):
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def state(file: Path | int) -> tuple[int, int, int] | None:
    """Identity of a file (device, inode, size); None if it does not exist."""
    try:
        found = os.fstat(file) if isinstance(file, int) else file.stat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino, found.st_size


def check_kept(path: Path, content: bytes, fix: str) -> None:
    """Verify that a file still has the content that was written.

    Raises:
        OSError: another program removed or changed it.
    """
    with suppress(OSError):
        if path.read_bytes() == content:
            return
    raise disturbed(str(path), path, fix)


def disturbed(called: str, path: Path, fix: str) -> OSError:
    """The error about a file that another program removed or changed."""
    what = "changed" if os.path.lexists(path) else "removed"
    return OSError(f"{called} was {what} by another program during this run{fix}")


def check_readable(option: str, path: Path, give: str = "another file") -> None:
    """Reject files whose reading would block: a named pipe has no end until a writer closes it.

    An open pipe, such as /dev/stdin or the shell's <(...), is allowed.

    Raises:
        ValueError: the file does not exist or is not readable.
    """
    try:
        kind = path.stat().st_mode
    except OSError as error:
        raise ValueError(f"{option}={str(path)!r} cannot be read ({error.strerror}); give {give}") from None
    if _is_pipe(path):
        raise ValueError(f"{option}={str(path)!r} cannot be read (it is a pipe); give {give}")
    if stat.S_ISCHR(kind) and str(path) in ("/dev/zero", "/dev/full", "/dev/random", "/dev/urandom"):
        raise ValueError(f"{option}={str(path)!r} cannot be read (it has no end); give {give}")


def _is_pipe(path: Path) -> bool:
    """Whether a file is a named pipe, which blocks until another program opens it, too."""
    return path.is_fifo() and not str(path).startswith(("/dev/fd/", "/dev/std", "/proc/self/fd/"))


def parse_json(text: str | bytes, once: bool = False) -> Any:
    """Parse untrusted JSON.

    Args:
        text: the JSON.
        once: reject duplicate keys.

    Raises:
        ValueError: invalid JSON, or nested too deep for Python's parser.
    """
    try:
        return json.loads(text, object_pairs_hook=_said_once if once else None)
    except RecursionError:
        raise ValueError("nested too deep") from None


def with_sorted_header(data: bytes) -> bytes:
    """A safetensors file with sorted metadata; safetensors writes them in random order."""
    length = int.from_bytes(data[:8], "little")
    header = parse_json(data[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def _said_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"duplicate key {Counter(name for name, _ in pairs).most_common(1)[0][0]!r}")
    return found


def read_json(path: Path, fix: str = "copy or download it again") -> dict[str, Any]:
    """Read a JSON object from a file.

    Args:
        path: the file.
        fix: advice in errors.

    Raises:
        ValueError: it cannot be read or is not a JSON object.
    """
    try:
        if _is_pipe(path):
            raise ValueError("it is a pipe")
        content = parse_json(path.read_text(encoding="utf-8"), once=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not JSON ({first_line(error)}); {fix}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a JSON {type(content).__name__}, not an object; {fix}")
    return content


def expanded(name: str | Path) -> Path:
    """A path with ~ expanded; unchanged if there is no such user."""
    with suppress(RuntimeError):
        return Path(name).expanduser()
    return Path(name)


def is_folder(path: Path) -> bool:
    """Whether a folder exists; False for invalid names."""
    with suppress(OSError, ValueError):
        return path.is_dir()
    return False
