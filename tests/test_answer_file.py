"""Files of answers under other writers, editors, kills and full disks."""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from dllm.evaluation import claim, jsonl
from dllm.evaluation.answer_lines import is_torn, write_line
from dllm.evaluation.jsonl import AnswerFile

ANSWER = {"id": "é", "text": 'größer "\\\n', "tokens": 3, "nfe": -1, "share": 1.5e-7, "done": True, "why": None}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "answers.jsonl"


def row(name: str | int) -> dict[str, Any]:
    return {"id": name, "text": f"answer {name}", "tokens": 2, "nfe": 3, "guide_nfe": 0}


def names(path: Path) -> list[str | int]:
    return [json.loads(line)["id"] for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def one_line(caught: pytest.ExceptionInfo[BaseException]) -> str:
    assert "\n" not in str(caught.value)
    return str(caught.value)


@contextmanager
def process(work: Callable[[], Any]) -> Iterator[int]:
    """A process that does some work, and is killed if it still does it at the end."""
    if (number := os.fork()) == 0:
        with suppress(BaseException):
            work()
        os._exit(0)
    try:
        yield number
    finally:
        os.kill(number, signal.SIGKILL)
        os.waitpid(number, 0)


def wait_for(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.002)


class TestTornLines:
    @pytest.mark.parametrize(
        "answer", [ANSWER, ANSWER | {"id": -12}, {"id": "\\", "text": None}, row(5), {"id": 0, "text": "\x01\u2028"}]
    )
    def test_every_beginning_of_a_line_is_torn_and_the_whole_is_not(self, answer: dict[str, Any]) -> None:
        line = write_line(answer).rstrip(b"\n")
        assert all(is_torn(line[:length]) for length in range(len(line)))
        assert not is_torn(line)

    @pytest.mark.parametrize(
        "content",
        [
            b"notes", b"x", b"\xff\xd8\xff\xe0binary", b"\0\0\0", b'{"prompt": "Tom"}', b'{"a": 1', b"[1, 2", b"{}",
            b'{"id": 1, "prompt": "Tom has', b'{"id": 1, "question"', b'{"id":1,"text":"a', b'{"id": 1.5, "te',
            b'{"id": null', b'{"id": 1, "text": "a"} and more', b'{"id": 1, "text": "a"}}', b'"', b"{{", b"# title",
            b'{"id": 1, "prompt": "Tom"}', '{"id": 1, "text": "a"}'.encode("utf-16"), b"key: value", b"\xef\xbb\xbfx",
        ],
    )  # fmt: skip
    @pytest.mark.parametrize("before", [b"", b'{"id": 7, "text": "kept"}\n'])
    def test_what_is_no_beginning_of_an_answer_is_refused_and_left_alone(
        self, path: Path, before: bytes, content: bytes
    ) -> None:
        path.write_bytes(before + content)
        with pytest.raises(ValueError, match=r"output=.* has content other than answers; give another file") as e:
            AnswerFile(path)
        one_line(e)
        assert path.read_bytes() == before + content

    @pytest.mark.parametrize(
        "content",
        [
            b'{"id": 1, "text": "a"}',
            b'{"text": "a", "id": 1}\r\n',
            b'\xef\xbb\xbf{ "id" :1,\t"text":"a"}\r\n\r\n',
            b'\n  \n{"id": 1, "text": "a", "note": {"by": ["hand"]}}',
            b'{"id": 1, "text": "a"}\n  ',
        ],
    )
    def test_answers_that_an_editor_saved_are_kept_byte_by_byte(self, path: Path, content: bytes) -> None:
        path.write_bytes(content)
        with AnswerFile(path) as answers:
            assert answers.ids == {1}
            answers.add(row(2))
        newline = b"" if content.endswith(b"\n") else b"\n"
        assert path.read_bytes() == content + newline + write_line(row(2))
        assert AnswerFile(path).ids == {1, 2}

    @pytest.mark.parametrize("content", [b"", b"\n", b"  \r\n", b"\xef\xbb\xbf", b" "])
    def test_a_file_without_anything_takes_answers(self, path: Path, content: bytes) -> None:
        path.write_bytes(content)
        with AnswerFile(path) as answers:
            answers.add(row(1))
        assert path.read_bytes().startswith(content)
        assert AnswerFile(path).ids == {1}


class TestPlaces:
    @pytest.mark.parametrize("name", ["/dev/null", "/dev/stdout", "fifo", "loop", "."])
    def test_what_cannot_be_read_again_is_refused(self, tmp_path: Path, name: str) -> None:
        os.mkfifo(tmp_path / "fifo")
        (tmp_path / "loop").symlink_to(tmp_path / "loop")
        with pytest.raises(ValueError, match="is not an ordinary file; give the name of one"):
            AnswerFile(tmp_path / name)

    def test_the_file_that_messages_go_to_is_refused(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with path.open("w") as file:
            there = os.fstat(file.fileno())
            monkeypatch.setattr(jsonl.os, "fstat", lambda number: there)
            with pytest.raises(ValueError, match="is not an ordinary file"):
                AnswerFile(path)

    def test_a_link_stays_a_link(self, tmp_path: Path) -> None:
        link, target = tmp_path / "link.jsonl", tmp_path / "folder" / "target.jsonl"
        link.symlink_to(target)
        with AnswerFile(link) as answers:
            answers.add(row(1))
        assert link.is_symlink()
        assert names(target) == [1]


class TestSignals:
    def test_an_answer_that_is_written_as_one_comes_is_known(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write = AnswerFile._write

        def interrupted(answers: AnswerFile, data: bytes) -> None:
            write(answers, data)
            raise KeyboardInterrupt

        monkeypatch.setattr(AnswerFile, "_write", interrupted)
        with AnswerFile(path) as answers, suppress(KeyboardInterrupt):
            answers.add(row(1))
        assert answers.ids == {1}
        assert names(path) == [1]


class TestWriters:
    @pytest.fixture(autouse=True)
    def _impatient(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(claim.Claim.__init__, "__defaults__", (0.0,))

    @pytest.mark.parametrize("spelling", ["answers.jsonl", "../{}/answers.jsonl", "link.jsonl"])
    def test_the_second_writer_is_told_who_the_first_is(self, path: Path, spelling: str) -> None:
        (path.parent / "link.jsonl").symlink_to(path)
        other = path.parent / spelling.format(path.parent.name)
        with AnswerFile(path) as first:
            with (
                pytest.raises(ValueError, match="is being written by process") as caught,
                AnswerFile(other),
            ):
                pass
            told = one_line(caught)
            assert str(os.getpid()) in told
            assert str(other) in told
            first.add(row(1))
        with AnswerFile(other) as second:
            assert second.ids == {1}

    def test_a_waiting_writer_reads_again_what_the_first_wrote(self, path: Path) -> None:
        waiting = AnswerFile(path)
        with AnswerFile(path) as first:
            first.add(row(1))
            first.add(row(2))
        with waiting as second:
            assert second.ids == {1, 2}
            second.add(row(3))
        assert names(path) == [1, 2, 3]

    def test_nothing_but_the_answers_stays(self, path: Path) -> None:
        with AnswerFile(path) as answers:
            assert [each.name for each in path.parent.iterdir()] == [".answers.jsonl.lock"]
            answers.add(row(1))
        assert list(path.parent.iterdir()) == [path]

    def test_a_lock_of_a_killed_process_keeps_nobody_out(self, path: Path) -> None:
        def work() -> None:
            with AnswerFile(path) as answers:
                answers.add(row(1))
                time.sleep(60)

        with process(work):
            wait_for(lambda: path.exists() and path.read_bytes().endswith(b"\n"))
            with pytest.raises(ValueError, match="is being written"), AnswerFile(path):
                pass
        assert (path.parent / ".answers.jsonl.lock").exists()
        with AnswerFile(path) as answers:
            assert answers.ids == {1}

    def test_a_folder_that_takes_no_lock_is_told(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*_: Any, **__: Any) -> None:
            raise OSError(errno.EROFS, "Read-only file system")

        monkeypatch.setattr(claim.FileLock, "acquire", refuse)
        with pytest.raises(ValueError, match=r"output=.* cannot be locked .*Read-only") as caught, AnswerFile(path):
            pass
        one_line(caught)

    def test_writers_that_are_killed_at_any_moment_lose_and_repeat_nothing(self, path: Path) -> None:
        """Two at a time, each trying to write what is missing."""
        random.seed(0)

        def work() -> None:
            while True:
                with suppress(ValueError), AnswerFile(path) as answers:
                    for name in range(300):
                        if name not in answers.ids:
                            answers.add(row(name))
                    answers.verify()
                    return

        kept: list[str | int] = []
        for _ in range(20):
            with process(work), process(work):
                time.sleep(random.uniform(0, 0.05))
            now = names(path) if path.exists() else []
            assert now[: len(kept)] == kept
            kept = now
        work()
        assert names(path) == list(range(300))
        assert [json.loads(line) for line in path.read_text().splitlines()] == [row(name) for name in range(300)]


class TestChangesDuringARun:
    ALL = r"3 answers are lost or changed \(0, 1, 2\)"
    CHANGES: tuple[tuple[Callable[[Path], Any], str, str], ...] = (
        (Path.unlink, "removed", ALL),
        (lambda path: path.write_bytes(b""), "changed", ALL),
        (lambda path: os.truncate(path, 80), "changed", r"2 answers are lost or changed \(1, 2\)"),
        (lambda path: path.rename(path.with_name("moved")), "removed", ALL),
        (lambda path: path.write_bytes(path.read_bytes() + b"more\n"), "changed", ALL),
        (lambda path: path.write_bytes(path.read_bytes() + write_line(row(9))), "changed", "no answer is lost"),
    )

    @pytest.mark.parametrize(("change", "what", "lost"), CHANGES)
    @pytest.mark.parametrize("late", [False, True], ids=["before an answer", "before the end"])
    def test_a_file_that_something_else_changes_is_noticed(
        self, path: Path, late: bool, change: Callable[[Path], Any], what: str, lost: str
    ) -> None:
        with AnswerFile(path) as answers:
            for name in range(3):
                answers.add(row(name))
            answers.verify()
            change(path)
            with pytest.raises(OSError, match=f"was {what} by another program during this run, {lost}; run") as caught:
                answers.verify() if late else answers.add(row(3))
            one_line(caught)

    def test_an_answer_that_is_edited_in_place_is_noticed(self, path: Path) -> None:
        with AnswerFile(path) as answers:
            for name in range(3):
                answers.add(row(name))
            with path.open("r+b") as file:
                file.write(path.read_bytes().replace(b"answer 1", b"answer 7"))
            with pytest.raises(OSError, match=r"1 answers are lost or changed \(1\)"):
                answers.verify()

    def test_a_file_that_is_replaced_is_noticed(self, path: Path) -> None:
        with AnswerFile(path) as answers:
            answers.add(row(0))
            copy = path.with_name("copy")
            copy.write_bytes(path.read_bytes())
            copy.replace(path)
            with pytest.raises(OSError, match="was changed by another program"):
                answers.add(row(1))
        assert names(path) == [0]

    def test_a_link_that_leads_elsewhere_is_noticed(self, tmp_path: Path) -> None:
        link, other = tmp_path / "link.jsonl", tmp_path / "other.jsonl"
        link.symlink_to("first.jsonl")
        with AnswerFile(link) as answers:
            answers.add(row(0))
            other.write_bytes(write_line(row(5)))
            link.unlink()
            link.symlink_to(other)
            with pytest.raises(
                OSError, match=r"was changed by another program during this run, 1 answers are lost or changed \(0\)"
            ):
                answers.verify()
        assert names(other) == [5]

    def test_a_file_that_changes_before_the_first_answer_is_not_cut(self, path: Path) -> None:
        path.write_bytes(write_line(row(0)) + b'{"id": 1, "te')
        with AnswerFile(path) as answers:
            path.write_bytes(write_line(row(0)) + write_line(row(1)))
            with pytest.raises(OSError, match="changed"):
                answers.add(row(2))
        assert names(path) == [0, 1]

    def test_other_bytes_of_the_same_size_are_noticed_at_the_end(self, path: Path) -> None:
        with AnswerFile(path) as answers:
            answers.add(row(0))
            path.write_bytes(b"\0" * path.stat().st_size)
            with pytest.raises(OSError, match=r"1 answers are lost or changed \(0\)"):
                answers.verify()


@contextmanager
def room_for(size: int) -> Iterator[None]:
    """Let files grow no further: what a full disk is."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


class TestFullDisks:
    @pytest.mark.parametrize("more", [0, 1, 30])
    def test_earlier_answers_stay_whole_and_the_run_goes_on_later(self, path: Path, more: int) -> None:
        with AnswerFile(path) as answers:
            answers.add(row(0))
            answers.add(row(1))
            whole = path.read_bytes()
            with (
                room_for(len(whole) + more),
                pytest.raises(
                    OSError, match=r"output=.* cannot be written \(.*\), 2 answers are in it; free"
                ) as caught,
            ):
                answers.add(row(2))
            one_line(caught)
        assert path.read_bytes() == whole
        with AnswerFile(path) as answers:
            assert answers.ids == {0, 1}
            answers.add(row(2))
        assert names(path) == [0, 1, 2]

    def test_a_disk_that_tells_late_is_noticed(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(_: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        with AnswerFile(path) as answers:
            monkeypatch.setattr(jsonl.os, "fsync", refuse)
            with pytest.raises(OSError, match="No space left"):
                answers.add(row(0))
