"""`dllm chat`: turns and commands through pipes and on a terminal, with a model and with a server."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

import dllm
from commands import Outcome, chat, in_a_process
from dllm.checks import SEEDS
from dllm.scripts import partners
from dllm.serving.client import Reader, ServerError
from fake_server import FakeServer, serving
from models import random_llada, save_folder
from warm import Process

pytest.importorskip("httpx")

QUESTION = "Tom has 23 apples. He buys 12. How many apples does he have?"
OTHER = "Sam has 5 pens. He loses 2. How many pens does he have?"
TEMPLATE = "{% for each in messages %}{{ each['content'] }} {% endfor %}So"
LM = random_llada(tokenizer=True, seed=1, max_length=160)
SIZES = {"gen_length": 12, "block_length": 5}
OPTIONS = [f"{name}={value}" for name, value in SIZES.items()]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny random model whose template writes every message."""
    folder = save_folder(LM, tmp_path_factory.mktemp("models") / "random")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with serving() as running:
        yield running


def answers(*prompts: str, **options: Any) -> list[str | None]:
    """What the model answers to prompts as the template writes them."""
    return [
        dllm.generate(LM, [prompt], **{**SIZES, "seed": turn, **options}).texts[0]
        for turn, prompt in enumerate(prompts)
    ]


def refused(result: Outcome, named: str, lines: int = 1) -> None:
    assert (result.code, result.out, result.err.count("\n")) == (2, "", lines), result
    assert result.err.startswith("dllm chat: error: "), result
    assert named in result.err, result


def test_seeds_of_later_turns_stay_in_range() -> None:
    settings = partners.Settings({"seed": SEEDS - 1})
    assert [settings.seed(turn) for turn in range(3)] == [SEEDS - 1, 0, 1]


class TestPipes:
    def test_only_answers_are_printed_and_costs_are_told(self, model: Path) -> None:
        result = chat(f"{QUESTION}\n\n", f"model={model}", *OPTIONS)
        expected = dllm.generate(LM, [f"{QUESTION} So"], **SIZES, seed=0)
        assert (result.code, result.out) == (0, f"{expected.texts[0]}\n")
        costs = re.fullmatch(r"NFE (\d+)  tokens (\d+)  TPF \d+\.\d\d  \d+\.\d tokens/s\n", result.err)
        assert costs is not None
        assert (int(costs[1]), int(costs[2])) == (int(expected.nfe[0]), expected.stats.tokens)

    def test_the_bundled_model_solves_a_problem(self) -> None:
        result = chat("Tom has 3 apples. He buys 5. How many apples does he have?\n", "sampler=tiny/threshold")
        assert "The answer is 8." in result.out

    def test_a_conversation_goes_through_the_template(self, model: Path) -> None:
        first, second = answers(f"{QUESTION} So", "?")[0], None
        second = answers("", f"{QUESTION} {first} {OTHER} So")[1]
        assert chat(f"{QUESTION}\n{OTHER}", f"model={model}", *OPTIONS).out == f"{first}\n{second}\n"

    def test_without_a_template_every_line_is_a_prompt_which_is_told_once(self, model: Path, tmp_path: Path) -> None:
        bare = save_folder(LM, tmp_path / "bare")
        (bare / "chat_template.jinja").unlink()
        result = chat(f"{QUESTION}\n{OTHER}\n", f"model={bare}", *OPTIONS)
        assert result.out.splitlines() == answers(QUESTION, OTHER)
        assert result.err.count("this model has no chat template") == 1

    def test_undo_and_reset_forget(self, model: Path) -> None:
        once, twice = answers(f"{QUESTION} So")[0], answers(f"{OTHER} So")[0]
        for forget in ("/undo", "/reset"):
            assert chat(f"{QUESTION}\n{forget}\n{OTHER}\n", f"model={model}", *OPTIONS).out == f"{once}\n{twice}\n"

    def test_set_changes_the_next_turns(self, model: Path) -> None:
        lines = [
            "/set temperature=1.2",
            "/set sampler=threshold",
            "/set sampler.threshold=0.3",
            "/set seed=7",
            QUESTION,
        ]
        expected = dllm.generate(LM, [f"{QUESTION} So"], dllm.samplers.Threshold(0.3), **SIZES, seed=7, temperature=1.2)
        assert chat("\n".join(lines), f"model={model}", *OPTIONS).out == f"{expected.texts[0]}\n"

    def test_set_alone_lists_the_options(self, model: Path) -> None:
        told = chat("/set\n", f"model={model}", *OPTIONS, "sampler=threshold").err.splitlines()
        assert {"gen_length=12", "temperature=0.0", 'sampler="threshold"', "sampler.threshold=0.9"} <= set(told)

    def test_lines_show_the_canvas_beside_the_answers(self, model: Path) -> None:
        result = chat(f"/show on\n{QUESTION}\n/show off\n{QUESTION}", f"model={model}", *OPTIONS)
        assert len(result.out.splitlines()) == 2
        assert len(re.findall(r"^ +\d+  ", result.err, re.MULTILINE)) >= 6

    @pytest.mark.parametrize(
        ("typed", "named"),
        [
            ("/nope", "unknown command '/nope'; /help lists them"),
            ("/set temperature=-1", "temperature=-1 is out of range"),
            ("/set temperature=hot", "temperature='hot'"),
            ("/set seed=[1]", "seed=[1] is out of range"),
            ("/set batch_size=3", "unknown option 'batch_size'; expected one of gen_length"),
            ("/set sampler=nope", "unknown sampler='nope'; expected one of"),
            ("/set sampler.nope=1", "unknown option 'sampler.nope'; expected one of"),
            ("/set sampler.tokens_per_step=0", "tokens_per_step=0 is out of range"),
            ("/set gen_length", "has no value"),
            ("/undo", "the conversation is empty"),
            ("/undo 3", "takes no value"),
            ("/show maybe", "/show maybe is unknown"),
            ("/save", "has no file"),
            ("/save x", "the conversation is empty"),
            ("Tom " * 200, "the conversation has 20"),
            ("Tom \udcff", "this line is not valid UTF-8"),
            ("Tom <|mdm_mask|>", "the conversation contains [MASK]"),
        ],
    )
    def test_a_line_that_fails_is_told_in_one_line_and_the_conversation_goes_on(
        self, model: Path, typed: str, named: str
    ) -> None:
        result = chat(f"{typed}\n{QUESTION}\n", f"model={model}", *OPTIONS)
        [told] = [each for each in result.err.splitlines() if each.startswith("dllm chat: error: ")]
        assert named in told
        assert (result.code, result.out.splitlines()) == (2, answers(f"{QUESTION} So"))
        assert result.err.count("\n") == 2

    def test_control_characters_are_escaped(self, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        reply = partners.Reply("a\x1b[2Jb\u202ec", 3, 3, 1.0)
        monkeypatch.setattr(partners.Local, "answer", lambda *_: reply)
        assert chat("Tom\n", f"model={model}").out == "a\\x1b[2Jb\\u202ec\n"

    def test_exit_ends(self, model: Path) -> None:
        assert chat(f"/exit\n{QUESTION}\n", f"model={model}").out == ""

    def test_two_slashes_send_one(self, server: FakeServer) -> None:
        chat("//help me\n", f"server={server.url}")
        assert server.asked[0][2]["messages"][0]["content"] == "/help me"

    def test_running_out_of_memory_does_not_end_it(self, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def answer(*_: Any) -> Any:
            raise RuntimeError("can't allocate memory: you tried to allocate")

        monkeypatch.setattr(partners.Local, "answer", answer)
        result = chat("Tom\nAnn\n", f"model={model}")
        assert result.err.count("out of memory; /reset") == result.err.count("\n") == 2

    def test_an_interruption_stops_one_answer_and_two_in_a_row_end(
        self, model: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        replies = iter([signal.SIGINT, 0, signal.SIGINT, signal.SIGINT, 0])

        def answer(*_: Any) -> partners.Reply:
            if number := next(replies):
                signal.raise_signal(number)
            return partners.Reply("done", 1, 1, 1.0)

        monkeypatch.setattr(partners.Local, "answer", answer)
        result = chat("a\nb\nc\nd\ne\n", f"model={model}")
        assert (result.code, result.out) == (130, "done\n")
        assert result.err.count("stopped, and this turn forgotten") == 2
        assert result.err.endswith("dllm chat: error: interrupted; what was written is kept\n")
        assert next(replies) == 0

    def test_a_fault_of_the_program_is_not_hidden(self, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(partners.Local, "answer", mock.Mock(side_effect=RuntimeError("a bug")))
        with pytest.raises(RuntimeError, match="a bug"):
            chat("Tom\n", f"model={model}")


class TestSave:
    def test_messages_are_lines_and_saved_again(self, server: FakeServer, tmp_path: Path) -> None:
        path = tmp_path / "new" / "it's a chat.jsonl"
        result = chat(f"Hi\n/save {path}\nHo\n/save {path}\n", f"server={server.url}")
        assert result.code == 0
        rows = [json.loads(row) for row in path.read_text().splitlines()]
        assert [(row["role"], row["content"]) for row in rows] == [
            ("user", "Hi"), ("assistant", "The answer is 8."), ("user", "Ho"), ("assistant", "The answer is 8."),
        ]  # fmt: skip
        assert rows[1]["dllm"] == {"model": "fake", "nfe": 4, "tokens": 10}

    @pytest.mark.parametrize("theirs", ["mine\n", '{"role": "user", "content": "Hi"}\n', "[1]\n[2]\n", "\xff"])
    def test_files_of_others_are_left_alone(self, server: FakeServer, tmp_path: Path, theirs: str) -> None:
        path = tmp_path / "notes.jsonl"
        path.write_text(theirs, encoding="latin-1")
        result = chat(f"Hi\n/save {path}\nHo\n", f"server={server.url}")
        assert f"/save='{path}': {path} exists and is not a conversation of dllm chat" in result.err
        assert path.read_text(encoding="latin-1") == theirs
        assert len(result.out.splitlines()) == 2

    @pytest.mark.parametrize("where", ["", "/dev/full", "x" * 300])
    def test_a_path_that_cannot_be_written_is_one_line(self, server: FakeServer, tmp_path: Path, where: str) -> None:
        result = chat(f"Hi\n/save {tmp_path / where}\nHo\n", f"server={server.url}")
        assert result.err.count("error: ") == 1
        assert len(result.out.splitlines()) == 2


class TestServer:
    def test_sends_the_conversation_and_prints_the_answers(self, server: FakeServer) -> None:
        result = chat("Hi\nHo\n", f"server={server.url}/v1/", "api_key=a,b=c", "temperature=0.5", "seed=3")
        assert result.out == "The answer is 8.\n" * 2
        assert re.fullmatch(r"(NFE 4  tokens 10  TPF 2\.50  \d+\.\d tokens/s\n){2}", result.err)
        path, headers, body = server.asked[1]
        assert (path, headers["authorization"]) == ("/v1/chat/completions", "Bearer a,b=c")
        assert body == {
            "model": "fake", "stream": True, "stream_options": {"include_usage": True}, "temperature": 0.5, "seed": 4,
            "messages": [
                {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "The answer is 8."},
                {"role": "user", "content": "Ho"},
            ],
        }  # fmt: skip

    def test_only_what_was_chosen_is_sent(self, server: FakeServer) -> None:
        chat("Hi\n/set block_length=16\n/set gen_length=64\n/set top_k=5\nHo\n", f"server={server.url}",
             "sampler=threshold", "sampler.threshold=0.5", 'stop=["x"]')  # fmt: skip
        [first, second] = [body for _, _, body in server.asked]
        assert first["dllm"] == {"sampler": "threshold", "sampler_options": {"threshold": 0.5}}
        assert first["stop"] == ["x"]
        assert "max_tokens" not in first
        assert second["dllm"] == first["dllm"] | {"block_length": 16, "top_k": 5}
        assert second["max_tokens"] == 64

    def test_a_model_without_chats_is_sent_prompts(self) -> None:
        with serving(chat=False) as server:
            result = chat("Hi\nHo\n", f"server={server.url}")
        assert result.out == "The answer is 8.\n" * 2
        assert [(path, body["prompt"]) for path, _, body in server.asked] == [
            ("/v1/completions", "Hi"), ("/v1/completions", "Ho"),
        ]  # fmt: skip
        assert result.err.count("no chat template") == 1

    def test_a_key_may_be_in_the_environment(self, server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("DLLM_API_KEY", "hidden")
        chat("Hi\n", f"server={server.url}")
        assert server.asked[0][1]["authorization"] == "Bearer hidden"

    @pytest.mark.parametrize(
        ("answer", "named"),
        [
            ((401, {}, {"error": {"message": "no"}}), "answered 401: no; give api_key, or set DLLM_API_KEY"),
            ((429, {"Retry-After": "7"}, {"error": {"message": "full"}}), "answered 429: full; try again in 7 s"),
            ((429, {"Retry-After": "7"}, {"error": {"message": "try again later"}}), "answered 429: try again later\n"),
            ((429, {"Retry-After": "Fri, 1 Jan 2100 00:00:00 GMT"}, ""), "answered 429"),
            ((503, {"Retry-After": "nan"}, {"error": {"message": "a\x1b\nb"}}), "answered 503: a\\x1b b"),
            ((400, {}, {"error": {"message": "temperature=9 is out of range"}}), "temperature=9 is out of range"),
            ((500, {}, "<html>"), "answered 500"),
            ((307, {"Location": "http://elsewhere"}, ""), "answered 307"),
            ((200, {}, {"choices": []}), "ended the answer before it was complete"),
            (b'data: {"error": {"message": "drained"}}\n\n', "ended the answer: drained"),
            (b'data: {"choices": [{"delta": {"content": "The"}}]}\n\n', "broke off"),
            (b"data: nonsense\n\n", "an event that is not a JSON object"),
            (b"data: [1]\n\n", "an event that is not a JSON object"),
        ],
    )  # fmt: skip
    def test_errors_are_one_line_and_the_conversation_goes_on(
        self, server: FakeServer, answer: Any, named: str
    ) -> None:
        server.scripted = [answer]
        result = chat("Hi\nHo\n", f"server={server.url}")
        errors = [each for each in result.err.splitlines(keepends=True) if "error: " in each]
        assert [named in each for each in errors] == [True], result.err
        assert (result.code, result.out) == (2, "The answer is 8.\n")
        assert [each["content"] for each in server.asked[1][2]["messages"]] == ["Ho"]

    def test_an_end_without_an_answer_is_no_answer(self) -> None:
        reader = Reader()
        assert reader.feed(b"data: [DONE]\n\n") == ""
        with pytest.raises(ServerError, match="ended the answer before it was complete"):
            reader.end()

    def test_a_server_that_is_not_there_is_one_line_for_each_turn(self) -> None:
        refused(chat("Hi\nHo\n", "server=http://127.0.0.1:9"), "http://127.0.0.1:9 cannot be reached", lines=2)

    def test_separators_within_an_event_do_not_break_it(self) -> None:
        with serving(pieces=("a\u2028b", "\x85c\r\n", "d")) as server:
            assert chat("Hi\n", f"server={server.url}").out == "a\\u2028b\\x85c\\r\nd\n"


class TestRefusals:
    @pytest.mark.parametrize(
        ("arguments", "named"),
        [
            (["server=nonsense"], "server='nonsense' is not the address of a server; use http://HOST:PORT"),
            (["server=ftp://x"], "server='ftp://x' is not"),
            (["server=http://"], "server='http://' is not"),
            (["server=http://a:b"], "server='http://a:b' is not"),
            (["server=http://a b"], "server='http://a b' is not"),
            (["server=http://ä"], "server='http://ä' is not"),
            (["server="], "server='' is not"),
            (["server=http://x", "api_key=ä"], "api_key is empty or has characters"),
            (["server=http://x", "model=tiny-dream"], "model has no effect with server"),
            (["server=http://x", "cache=dual"], "cache has no effect with server"),
            (["server=http://x", "batch_size=4"], "batch_size has no effect with server"),
            (["server=http://x", "model.dtype=float32"], "model.dtype has no effect with server"),
            (["server=http://x", "gen_length=auto"], "gen_length=auto cannot be asked of a server"),
            (["server=http://x", "block_length=null"], "block_length=null cannot be asked of a server"),
            (["server=http://x", "temperature=-1"], "temperature=-1 is out of range"),
            (["api_key=x"], "api_key has no effect without server"),
            (["show=film"], "unknown show='film'; expected one of auto, live, lines, none"),
            (["seed=-1"], "seed=-1 is out of range"),
            (["sampler=threshold", "sampler.threshold=-1"], "sampler.threshold=-1 is out of range"),
            (["gen_length=0"], "gen_length=0 is out of range"),
        ],
    )
    def test_a_bad_option_is_one_line(self, arguments: list[str], named: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(dllm, "load", lambda *_, **__: pytest.fail("a model was loaded"))
        refused(chat("Hi\n", *arguments), named)

    def test_a_model_without_a_tokenizer_is_refused(self, tmp_path: Path) -> None:
        refused(chat("Hi\n", f"model={save_folder(random_llada(), tmp_path / 'm')}"), "has no tokenizer")

    def test_a_missing_library_names_the_extra(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "httpx", None)
        monkeypatch.delitem(sys.modules, "dllm.serving.client", raising=False)
        monkeypatch.delattr("dllm.serving.client", raising=False)
        refused(chat("Hi\n", "server=http://x"), "pip install 'dllm-samplers[serve]'")


class Session:
    """A conversation on a terminal of its own."""

    def __init__(self, *arguments: str, **environment: str) -> None:
        self.terminal, slave = pty.openpty()
        environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "100", "LINES": "30"} | environment
        self.process = Process("chat", *arguments, stdin=slave, stdout=slave, stderr=slave, env=environment)
        os.close(slave)
        self.drawn = ""

    def until(self, wanted: str, seconds: float = 60) -> str:
        """What it draws up to some text, from where the last call ended."""
        end = time.monotonic() + seconds
        while wanted not in self.drawn:
            assert time.monotonic() < end, self.drawn
            if select.select([self.terminal], [], [], 0.1)[0]:
                self.drawn += os.read(self.terminal, 65536).decode(errors="replace")
        seen, _, self.drawn = self.drawn.partition(wanted)
        return seen

    def prompted(self) -> None:
        """Wait for the prompt, and until it reads: `input` misses a signal that comes in between."""
        self.until("> ")
        time.sleep(0.3)

    def type(self, text: str) -> None:
        os.write(self.terminal, text.encode())


@in_a_process
class TestTerminal:
    def test_the_canvas_fills_and_gives_way_to_the_answer(self, model: Path) -> None:
        session = Session(f"model={model}", *OPTIONS)
        session.until("> ")
        session.type(f"{QUESTION}\n")
        drawn = session.until("tokens/s")
        [answer] = answers(f"{QUESTION} So")
        assert "·" in drawn
        assert str(answer) in drawn
        session.prompted()
        session.type("\x04")
        assert session.process.wait() == 0

    def test_an_encoding_without_its_characters_loses_no_turn_and_no_cursor(self, model: Path, tmp_path: Path) -> None:
        session = Session(f"model={model}", *OPTIONS, PYTHONIOENCODING="ascii")
        session.until("> ")
        session.type("Tom is at the café\n")
        drawn = session.until("tokens/s")
        assert drawn.rfind("\x1b[?25h") > drawn.rfind("\x1b[?25l") > -1
        session.prompted()
        session.type(f"/save {tmp_path}/kept.jsonl\n")
        session.until("2 messages are in")
        assert json.loads((tmp_path / "kept.jsonl").read_text().splitlines()[0])["content"] == "Tom is at the café"
        session.prompted()
        session.type("\x04")
        assert session.process.wait() == 0

    def test_ctrl_c_stops_the_answer_and_twice_the_conversation(self) -> None:
        with serving(seconds=60, pieces=("begun", " never")) as server:
            session = Session(f"server={server.url}")
            session.until("> ")
            session.type("Hi\n")
            deadline = time.monotonic() + 30
            while not server.asked:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            os.kill(session.process.pid, signal.SIGINT)
            session.until("stopped, and this turn forgotten")
            server.seconds = 0
            session.type("Ho\n")
            session.until("tokens/s")
            assert [each["content"] for each in server.asked[1][2]["messages"]] == ["Ho"]
            session.prompted()
            os.kill(session.process.pid, signal.SIGINT)
            session.until("Ctrl-C again, or Ctrl-D, ends")
            session.prompted()
            os.kill(session.process.pid, signal.SIGINT)
            session.until("interrupted; what was written is kept")
            assert session.process.wait() == 130

    def test_an_answer_that_breaks_off_ends_its_line(self) -> None:
        with serving() as server:
            server.scripted = [b'data: {"choices": [{"delta": {"content": "The ans"}}]}\n\n']
            session = Session(f"server={server.url}")
            session.until("> ")
            session.type("Hi\n")
            assert session.until("dllm chat: error: ").replace("\x1b[0m", "").endswith("The ans\r\n")
            session.prompted()
            session.type("\x04")
            assert session.process.wait() == 0

    def test_terminating_ends_at_once(self, model: Path) -> None:
        session = Session(f"model={model}", *OPTIONS)
        session.prompted()
        os.kill(session.process.pid, signal.SIGTERM)
        assert session.process.wait() == 143
