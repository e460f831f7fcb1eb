"""Reading prompts, and writing answers that an interruption cannot spoil."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dllm.evaluation.jsonl import AnswerFile, PromptLine, read_questions

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tmp_path / "questions.jsonl"


def error_of(path: Path, content: bytes | str) -> str:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # every caller looks at the message
        read_questions(path)
    assert len(str(caught.value).splitlines()) == 1
    assert str(caught.value).startswith(f"input={str(path)!r}")
    return str(caught.value)


class TestQuestions:
    def test_plain_prompts_and_chats_with_and_without_ids(self, source: Path) -> None:
        rows: list[dict[str, Any]] = [
            {"id": "a", "prompt": "One"},
            {"prompt": "Two", "other": 5},
            {"id": 7, "messages": CHAT},
            {"messages": CHAT},
        ]
        source.write_text("\n".join(map(json.dumps, rows)))
        questions = read_questions(source)
        assert [(q.id, q.number, q.prompt) for q in questions] == [
            ("a", 0, "One"), (1, 1, "Two"), (7, 2, CHAT), (3, 3, CHAT),
        ]  # fmt: skip
        assert "line 1" in questions[0].place
        assert "'a'" in questions[0].place
        assert questions[1].place.endswith("line 2")

    def test_blank_lines_are_skipped_and_keep_the_numbers_of_others(self, source: Path) -> None:
        source.write_bytes(b'\n{"prompt": "One"}\r\n  \r\n{"prompt": "Two"}\n\n')
        assert [(q.id, q.number, q.prompt) for q in read_questions(source)] == [(1, 1, "One"), (3, 3, "Two")]

    def test_a_byte_order_mark_is_no_part_of_the_first_line(self, source: Path) -> None:
        source.write_bytes(b'\xef\xbb\xbf{"prompt": "One"}')
        assert [q.prompt for q in read_questions(source)] == ["One"]

    @pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\\n", "\u3000"])
    def test_only_a_newline_ends_a_line(self, source: Path, separator: str) -> None:
        source.write_text(f'{{"prompt": "One{separator}Two"}}\n', encoding="utf-8")
        assert [q.prompt for q in read_questions(source)] == [f"One{separator}Two".replace("\\n", "\n")]

    @pytest.mark.parametrize(
        ("line", "named"),
        [
            ("{", "not JSON"),
            ('{"prompt": "x"} {"prompt": "y"}', "not JSON"),
            ('{"prompt": "x", "prompt": "y"}', "duplicate key 'prompt'"),
            ("[1]", "prompt or messages"),
            ('"text"', "prompt or messages"),
            ('{"id": 1}', "prompt or messages"),
            ('{"question": "x"}', "prompt or messages"),
            ('{"prompt": "x", "messages": [{"role": "user", "content": "x"}]}', "prompt or messages"),
            ('{"prompt": 5}', "invalid prompt"),
            ('{"prompt": null}', "invalid prompt"),
            ('{"prompt": ["a", "b"]}', "invalid prompt"),
            ('{"prompt": [{"role": "user", "content": "x"}]}', "invalid prompt"),
            ('{"messages": "x"}', "invalid prompt"),
            ('{"messages": []}', "invalid prompt"),
            ('{"messages": [{"role": "user"}]}', "invalid prompt"),
            ('{"messages": [{"role": "user", "content": 5}]}', "invalid prompt"),
            ('{"id": null, "prompt": "x"}', "id None"),
            ('{"id": 1.5, "prompt": "x"}', "id 1.5"),
            ('{"id": true, "prompt": "x"}', "id True"),
            ('{"id": [1], "prompt": "x"}', "id [1]"),
            ('{"prompt": "\\ud800"}', "surrogate"),
        ],
    )
    def test_a_bad_line_is_named_with_its_fault(self, source: Path, line: str, named: str) -> None:
        message = error_of(source, f'{{"id": "ok", "prompt": "x"}}\n{line}\n')
        assert "line 2" in message
        assert named in message

    @pytest.mark.parametrize(
        "rows", ['{"id": "a", "prompt": "x"}\n{"id": "a", "prompt": "y"}', '{"id": 1, "prompt": "x"}\n{"prompt": "y"}']
    )
    def test_an_id_that_occurs_twice_is_refused(self, source: Path, rows: str) -> None:
        assert "line 2: id " in error_of(source, rows)

    def test_the_number_1_and_the_text_1_are_two_ids(self, source: Path) -> None:
        source.write_text('{"id": 1, "prompt": "x"}\n{"id": "1", "prompt": "y"}')
        assert [q.id for q in read_questions(source)] == [1, "1"]

    @pytest.mark.parametrize("content", [b"", b"\n \n", b"\xff\xfe\x00"])
    def test_a_file_without_lines_or_text_is_refused(self, source: Path, content: bytes) -> None:
        error_of(source, content)

    @pytest.mark.parametrize("name", [".", "missing.jsonl", "missing/file.jsonl"])
    def test_what_is_no_file_is_refused(self, tmp_path: Path, name: str) -> None:
        with pytest.raises(ValueError, match=r"input=.* cannot be read .*; give a JSONL file"):
            read_questions(tmp_path / name)


ROWS = [
    {"id": "é", "text": "größer\u2028\n", "nfe": 1},
    {"id": 2, "text": "", "nfe": 2},
    {"id": "2", "text": "x", "nfe": 3},
]


def written(path: Path, rows: list[dict[str, Any]]) -> bytes:
    with AnswerFile(path) as answers:
        for row in rows:
            answers.add(row)
    return path.read_bytes()


class TestAnswers:
    def test_every_answer_is_on_disk_as_soon_as_it_is_added(self, tmp_path: Path) -> None:
        path = tmp_path / "new" / "folder" / "answers.jsonl"
        with AnswerFile(path) as answers:
            for count, row in enumerate(ROWS, 1):
                answers.add(row)
                assert [json.loads(line) for line in path.read_bytes().splitlines()] == ROWS[:count]

    def test_nothing_is_touched_before_the_first_answer(self, tmp_path: Path) -> None:
        path = tmp_path / "folder" / "answers.jsonl"
        with AnswerFile(path):
            pass
        assert not path.parent.exists()
        cut = tmp_path / "cut.jsonl"
        cut.write_bytes(b'{"id": 1, "te')
        with AnswerFile(cut) as answers:
            assert answers.ids == set()
        assert cut.read_bytes() == b'{"id": 1, "te'

    def test_answers_that_are_there_stay_and_are_known(self, tmp_path: Path) -> None:
        path = tmp_path / "answers.jsonl"
        written(path, ROWS[:2])
        with AnswerFile(path) as answers:
            assert answers.ids == {"é", 2}
            answers.add(ROWS[2])
            assert answers.ids == {"é", 2, "2"}
        assert [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]] == ROWS

    def test_a_line_cut_anywhere_is_written_again(self, tmp_path: Path) -> None:
        path = tmp_path / "answers.jsonl"
        whole = written(path, ROWS)
        ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
        for length in range(len(whole) + 1):
            path.write_bytes(whole[:length])
            kept = sum(end - 1 <= length for end in ends)  # the newline itself may be missing
            with AnswerFile(path) as answers:
                assert answers.ids == {row["id"] for row in ROWS[:kept]}
                for row in ROWS[kept:]:
                    answers.add(row)
            assert path.read_bytes() == whole[: length if kept == len(ROWS) else None]

    @pytest.mark.parametrize(
        "content",
        [
            b"hello\n",
            b'{"id": 1}\n',
            b'{"text": "x"}\n',
            b"[1]\n",
            b'"x"\n',
            b"5\n",
            b"\xff\n",
            b'{"id": [1], "text": ""}\n',
            b'{"id": 1, "text": ""}\n{"id": 1, "text": ""}\n',
        ],
    )
    def test_a_file_of_something_else_is_refused_and_left_alone(self, tmp_path: Path, content: bytes) -> None:
        path = tmp_path / "answers.jsonl"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"output=.* has content other than answers; give another file"):
            AnswerFile(path)
        assert path.read_bytes() == content

    def test_a_folder_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="output="):
            AnswerFile(tmp_path)


def test_questions_read_their_own_ids_back_from_answers(tmp_path: Path) -> None:
    source, path = tmp_path / "q.jsonl", tmp_path / "a.jsonl"
    source.write_text('{"id": "1", "prompt": "x"}\n{"id": 1, "prompt": "y"}\n{"prompt": "z"}\n')
    questions: list[PromptLine] = read_questions(source)
    written(path, [{"id": questions[1].id, "text": ""}, {"id": questions[2].id, "text": ""}])
    assert [q.prompt for q in questions if q.id not in AnswerFile(path).ids] == ["x"]


def test_a_line_that_is_put_in_front_leaves_the_draws_of_others_apart(tmp_path: Path) -> None:
    file = tmp_path / "q.jsonl"
    lines = [json.dumps({"id": name, "prompt": "x"}) for name in ("a", "b", 7)]
    file.write_text("\n".join(lines))
    before = {question.id: question.seed for question in read_questions(file)}
    file.write_text("\n".join(['{"id": "c", "prompt": "x"}', *lines]))
    after = {question.id: question.seed for question in read_questions(file)}
    assert before.items() <= after.items()
    assert len(set(after.values())) == 4
    file.write_text('{"prompt": "x"}\n{"prompt": "x"}')
    assert [question.seed for question in read_questions(file)] == [0, 1]
