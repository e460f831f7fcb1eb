"""What an unfinished run notes survives the death of its process, and nothing is noted twice."""

from __future__ import annotations

import os
import re
import resource
from pathlib import Path

import pytest

from dllm.evaluation.journal import Journal


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "journal.jsonl"


def test_what_was_noted_is_there_for_the_next_process(path: Path) -> None:
    journal = Journal(path)
    journal.add("record", "a", {"text": "ünï\u2028code", "value": 0.1 + 0.2})
    journal.add("film", "a", "0")
    journal.close()
    again = Journal(path)
    assert again.get("record", "a") == {"text": "ünï\u2028code", "value": 0.1 + 0.2}
    assert list(again.of("film")) == ["a"]
    assert again.get("record", "b") is None


@pytest.mark.parametrize("lost", range(1, 25))
def test_a_line_cut_off_anywhere_is_dropped_and_the_rest_goes_on(path: Path, lost: int) -> None:
    journal = Journal(path)
    for name in ("first", "second"):
        journal.add("record", name, {"text": "añ"})
    journal.close()
    content = path.read_bytes()
    path.write_bytes(content[:-lost])
    again = Journal(path)
    assert list(again.of("record")) == ["first"]
    again.add("record", "second", {"text": "añ"})
    again.close()
    assert path.read_bytes() == content


def test_a_line_of_another_run_or_one_that_was_changed_is_refused(path: Path) -> None:
    journal = Journal(path, run="one")
    journal.add("record", "a", {"text": "añ\ud800", "nfe": 0.1 + 0.2})
    journal.close()
    content = path.read_bytes()
    for run, changed in (
        ("other", content),
        ("one", content.replace(b'"a\xc3', b'"b\xc3')),
        ("one", content[:-4] + b'0"}\n'),
    ):
        path.write_bytes(changed)
        with pytest.raises(ValueError, match=r"in line 1 \(it is of another run, or was changed\); remove that line"):
            Journal(path, run=run, patience=0)
    path.write_bytes(content)
    assert Journal(path, run="one").get("record", "a") == {"text": "añ?", "nfe": 0.1 + 0.2}


def test_lines_of_earlier_versions_are_read(path: Path) -> None:
    path.parent.mkdir()
    path.write_text('{"kind": "record", "id": "a", "value": 1}\n')
    journal = Journal(path, run="one")
    journal.add("record", "b", 2)
    journal.close()
    assert Journal(path, run="one").of("record") == {"a": 1, "b": 2}


def test_nothing_is_noted_twice(path: Path) -> None:
    journal = Journal(path)
    journal.add("record", "a", 1)
    with pytest.raises(RuntimeError, match="already"):
        journal.add("record", "a", 2)


def test_one_process_writes_at_a_time(path: Path) -> None:
    journal = Journal(path)
    with pytest.raises(ValueError, match=rf"being written by process {os.getpid()} .*; wait for it"):
        Journal(path, patience=0)
    journal.close()
    Journal(path).close()


@pytest.mark.parametrize("content", [b"[1]\n", b"no json\n", b'{"kind": "record"}\n', b"\xff\n"])
def test_a_file_of_another_kind_is_left_alone(path: Path, content: bytes) -> None:
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(ValueError, match="not a journal of a run"):
        Journal(path)
    assert path.read_bytes() == content


def test_in_memory_nothing_is_written(tmp_path: Path) -> None:
    journal = Journal(None)
    journal.add("record", "a", 1)
    journal.close()
    assert not list(tmp_path.iterdir())


def test_a_closed_one_is_free(path: Path) -> None:
    journal = Journal(path)
    journal.add("record", "a", 1)
    journal.close()
    journal.close()
    assert Journal(path, patience=0).get("record", "a") == 1


def test_a_full_disk_names_the_journal_and_leaves_what_was_whole(path: Path) -> None:
    journal = Journal(path)
    journal.add("film", "a", "0.safetensors")
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 9, limits[1]))
    try:
        with pytest.raises(OSError, match=re.escape(str(path))):
            journal.add("film", "b", "1.safetensors")
        journal.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    again = Journal(path)
    assert list(again.of("film")) == ["a"]
    again.close()
    assert path.read_bytes() == before
