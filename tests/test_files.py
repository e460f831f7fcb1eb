"""Files that are written whole, and JSON that is not trusted."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dllm.files import check_readable, parse_json, read_json, remove_unfinished, unfinished_in, write_json, write_whole
from dllm.tasks import humaneval


def test_a_failure_leaves_the_old_file_and_nothing_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.json"
    write_whole(file, "old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dllm.files.os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_whole(file, "new")
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "there" / "file")
    write_json(link, {"a": 1})
    assert link.is_symlink()
    assert read_json(tmp_path / "there" / "file") == {"a": 1}


def test_who_may_read_a_file_stays(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text("old")
    file.chmod(0o600)
    write_whole(file, "new")
    assert (file.read_text(), file.stat().st_mode & 0o777) == ("new", 0o600)


def test_a_device_is_written_to() -> None:
    write_whole(Path("/dev/null"), "gone")
    assert Path("/dev/null").is_char_device()


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "{", ""])
def test_what_is_no_json_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"nested too deep|Expecting"):
        parse_json(text)


def test_a_file_is_named_with_what_to_do(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text("[1]")
    with pytest.raises(ValueError, match=r"a\.json holds a JSON list, not an object; delete it"):
        read_json(file, fix="delete it")
    file.write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"a\.json is not JSON .*; copy or download it again"):
        read_json(file)


def test_a_file_that_says_a_key_twice_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text('{"a": {"b": 1, "c": 2, "b": 3}}')
    with pytest.raises(ValueError, match=r"a\.json is not JSON \(duplicate key 'b'\)"):
        read_json(file)
    assert parse_json('{"a": 1, "a": 2}') == {"a": 2}


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    left, mine = unfinished_in(tmp_path), [tmp_path / ".dllm-mine", tmp_path / "a", unfinished_in(tmp_path / "b")]
    for file in (left, *mine):
        file.parent.mkdir(exist_ok=True)
        file.write_text("x")
    remove_unfinished(tmp_path)
    remove_unfinished(tmp_path / "missing")
    assert not left.exists()
    assert all(file.exists() for file in mine)


def test_what_has_no_end_is_not_read(tmp_path: Path) -> None:
    fingerprints = pytest.importorskip("dllm.tasks.harness").fingerprints
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        for read in (
            lambda path=path: check_readable("task.data.test", path),
            lambda path=path: fingerprints({"test": str(path)}),
            lambda path=path: humaneval.task(str(path), execute=False),
        ):
            with pytest.raises(ValueError, match=r"^task\.data.* cannot be read \(it "):
                read()
    with pytest.raises(ValueError, match=r"pipe is not JSON \(it is a pipe\)"):
        read_json(tmp_path / "pipe")
    with pytest.raises(OSError, match="No such device"):  # nobody reads it
        write_whole(tmp_path / "pipe", "text")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_whole(tmp_path / "pipe", "text")
    assert os.read(reader, 9) == b"text"
    os.close(reader)
