"""`dllm chat` and `dllm bench-serve` with servers that answer nonsense, odd addresses, and what cannot be written."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from commands import Outcome, chat, command
from dllm.scripts import bench_serve, ending
from fake_server import FakeServer, serving

pytest.importorskip("httpx")

from dllm.serving import client

DONE = "data: [DONE]\n\n"


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with serving() as running:
        yield running


def bench(*arguments: str) -> Outcome:
    return command("bench-serve", "rate=500", "requests=2", *arguments)


def event(**fields: Any) -> str:
    return f"data: {json.dumps(fields)}\n\n"


def refused(result: Outcome, named: str) -> None:
    assert (result.code, result.out, result.err.count("\n")) == (2, "", 1), result
    assert named in result.err, result


class TestNonsense:
    @pytest.mark.parametrize("count", [10**400, -5, True, "abc", [1], {"a": 1}, 1.5, float("inf"), None])
    def test_counts_that_are_none_are_left_out(self, server: FakeServer, count: Any) -> None:
        told = event(choices=[{"delta": {"content": "hi"}}], usage={"completion_tokens": count},
                     dllm={"nfe": count, "tokens": count}) + DONE  # fmt: skip
        server.scripted = [(200, {}, told)]
        result = chat("Hi\n", f"server={server.url}")
        assert (result.code, result.out) == (0, "hi\n")
        assert "tokens" not in result.err.replace("tokens 1 ", "")
        server.scripted = [(200, {}, told)] * 10  # those before the load, too
        result = bench(f"server={server.url}")
        assert result.code == 0, result.err
        assert "| 2 of 2 |" in result.out

    def test_text_that_cannot_be_encoded_does_not_spoil_the_conversation(
        self, server: FakeServer, tmp_path: Path
    ) -> None:
        server.scripted = [(200, {}, event(choices=[{"delta": {"content": "a\ud800b"}}]) + DONE)]
        path = tmp_path / "saved.jsonl"
        result = chat(f"Hi\nHo\n/save {path}\n", f"server={server.url}")
        assert (result.code, result.out) == (0, "a\ufffdb\nThe answer is 8.\n")
        assert server.asked[1][2]["messages"][1]["content"] == "a\ufffdb"
        assert len(path.read_text().splitlines()) == 4

    def test_errors_that_cannot_be_encoded_are_written(self, server: FakeServer, tmp_path: Path) -> None:
        server.scripted = [(500, {}, {"error": {"message": "no\udfff"}})] * 10
        assert bench(f"server={server.url}", f"out={tmp_path / 'load'}").code == 0
        row = json.loads((tmp_path / "load.jsonl").read_text())
        assert row["errors"] == {"the server answered 500: no\ufffd": 2}

    @pytest.mark.parametrize("named", [None, 5, {"a": 1}, ["x"]])
    def test_a_model_without_a_name_is_none(self, server: FakeServer, named: Any) -> None:
        with mock.patch.object(FakeServer, "_told", return_value=(200, {}, {"data": [{"id": named}]})):
            for result in (chat("Hi\n", f"server={server.url}"), bench(f"server={server.url}")):
                refused(result, "/v1/models names no model")

    def test_a_name_that_cannot_be_encoded_is_sent_as_it_can_be(self, server: FakeServer) -> None:
        with mock.patch.object(FakeServer, "_told", return_value=(200, {}, {"data": [{"id": "a\ud800"}]})):
            assert chat("Hi\n", f"server={server.url}").code == 0
        assert server.asked[0][2]["model"] == "a\ufffd"

    @pytest.mark.parametrize("slots", [-5, 0, True, 1.5, "8", 10**9, 10**30])
    def test_slots_that_cannot_be_are_not_believed(self, slots: Any) -> None:
        found = client.model_of(json.dumps({"data": [{"id": "m", "dllm": {"slots": slots}}]}).encode()).slots
        assert found is None or 1 <= found <= 4096

    @pytest.mark.parametrize(
        ("body", "named"),
        [
            ("<html>hello</html>", "(no event came; give the address of an OpenAI-compatible server)"),
            ('{"choices": [{"message": {"content": "whole"}}]}', "(no event came;"),
            ("", "(no event came;"),
            ("data: [DO", "before it was complete (no event came;"),
            (event(choices=[]), "before it was complete\n"),
            (event(error=[1]), "ended the answer: it does not say why"),
        ],
    )
    def test_what_is_no_stream_is_told(self, server: FakeServer, body: str, named: str) -> None:
        server.scripted = [(200, {"Content-Type": "text/html"}, body)]
        refused(chat("Hi\n", f"server={server.url}"), named)

    def test_refusals_do_not_hide_other_errors(self, server: FakeServer) -> None:
        full = {"error": {"message": "the queue is full"}}
        own = [{"error": {"message": f"the queue is full; try again in {n} seconds"}} for n in range(5)]
        server.scripted = [
            *[(429, {"Retry-After": str(wait)}, full) for wait in range(6)], *[(429, {}, each) for each in own],
            (500, {}, "x"),
        ]  # fmt: skip
        with mock.patch("dllm.serving.load.Load.warm_up"):
            result = command("bench-serve", "rate=500", "requests=12", f"server={server.url}")
        assert "11 times: the server answered 429: the queue is full\n1 times: the server answered 500\n" in result.out


class TestAddresses:
    def test_a_password_is_not_shown(self, server: FakeServer, tmp_path: Path) -> None:
        secret = server.url.replace("//", "//me:hidden@")
        result = bench(f"server={secret}", f"out={tmp_path / 'load'}")
        assert result.code == 0
        assert server.asked[0][1]["authorization"].startswith("Basic ")
        texts = [result.out, result.err, *(path.read_text() for path in tmp_path.iterdir())]
        assert len(texts) == 4
        assert not any("hidden" in text for text in texts)

    @pytest.mark.parametrize(
        "where",
        ["http://me:hidden@127.0.0.1:9", "http://me:hidden@127.0.0.1:x", "http://me:hidden@a b", "//me:hidden@a"],
    )
    def test_nor_in_errors(self, where: str) -> None:
        for result in (chat("Hi\n", f"server={where}"), bench(f"server={where}")):
            refused(
                result, "127.0.0.1:9 cannot be reached" if where.endswith(":9") else "is not the address of a server"
            )
            assert "hidden" not in result.err

    def test_a_user_name_and_a_key_exclude_each_other(self, monkeypatch: pytest.MonkeyPatch) -> None:
        where = "server=http://me:hidden@127.0.0.1:9"
        refused(chat("Hi\n", where, "api_key=x"), "give one of them")
        monkeypatch.setenv("DLLM_API_KEY", "x")
        refused(bench(where), "api_key (or DLLM_API_KEY) is given, too")

    @pytest.mark.parametrize("host", ["a..b", "a" * 300, "xn--", ".", "[::1", "127.0.0.1:99999"])
    def test_hosts_that_cannot_be(self, host: str) -> None:
        for result in (chat("Hi\n", f"server=http://{host}"), bench(f"server=http://{host}")):
            refused(result, "is not the address of a server; use http://HOST:PORT")

    def test_an_empty_key_of_the_environment_is_none(self, server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("DLLM_API_KEY", "")
        assert chat("Hi\n", f"server={server.url}").code == bench(f"server={server.url}").code == 0
        monkeypatch.setenv("DLLM_API_KEY", "  ")
        refused(chat("Hi\n", f"server={server.url}"), "api_key is empty")

    @pytest.mark.parametrize(
        "variables",
        [
            {"ALL_PROXY": "gopher://x"}, {"HTTP_PROXY": "foo://x"}, {"NO_PROXY": "\x01[", "HTTP_PROXY": "http://x"},
            {"SSL_CERT_FILE": "/no/such"},
        ],
    )  # fmt: skip
    def test_an_environment_that_cannot_be_used_is_one_line(self, variables: dict[str, str]) -> None:
        with mock.patch.dict(os.environ, variables):
            for result in (chat("Hi\n", "server=http://a.invalid"), bench("server=http://a.invalid")):
                refused(result, "the proxy or the certificates of the environment cannot be used (")

    def test_a_proxy_that_needs_what_is_not_installed_is_one_line(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "socksio", None)
        monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:1")
        refused(chat("Hi\n", "server=http://a.invalid"), "cannot be used (Using SOCKS proxy")


class TestOptions:
    @pytest.mark.parametrize(
        ("option", "named"),
        [
            ("fields={1:2}", "fields has the name 1, which is no text"),
            ("fields={true:1}", "fields has the name True"),
            ("fields={temperature:nan}", "fields.temperature=nan is not valid in JSON; give finite numbers"),
            ("fields={dllm:{a:[-inf]}}", "fields.dllm="),
            ("clients=100000000", "clients=100000000 is out of range; use a whole number from 1 to 10000, or null"),
            ("duration=inf", "duration=inf is out of range; use a number of seconds above 0, up to 1000000"),
            ("out=/", "out='/' is a folder"),
            ("out=.", "out='.' is a folder"),
            ("out=some/where/", "out='some/where/' is a folder"),
        ],
    )
    def test_bad_options_of_a_load_are_one_line(self, option: str, named: str) -> None:
        refused(bench("server=http://127.0.0.1:9", option), named)

    @pytest.mark.parametrize("key", ["5", "true", "[a]"])
    def test_the_key_of_a_server_of_its_own_is_text(self, key: str) -> None:
        refused(bench(f"serve={{api_key:{key}}}"), "serve.api_key=")

    @pytest.mark.parametrize("value", ["NaN", "1e999"])
    def test_numbers_that_no_request_can_have_are_found_in_the_input(self, tmp_path: Path, value: str) -> None:
        path = tmp_path / "asked.jsonl"
        path.write_text(f'{{"prompt": "a"}}\n{{"messages": [{{"role": "user", "content": "a", "x": {value}}}]}}\n')
        refused(bench("server=http://127.0.0.1:9", f"input={path}"), "line 2 has a number that is not finite")

    def test_fields_may_have_any_name(self, server: FakeServer) -> None:
        assert bench(f"server={server.url}", "fields={asked:1,path:2,self:3}").code == 0
        assert server.asked[0][2]["asked"] == 1

    def test_a_null_byte_is_in_no_path(self, server: FakeServer) -> None:
        result = chat("Hi\n/save a\0b\nHo\n", f"server={server.url}")
        assert "error: /save='a\\x00b' contains a null byte" in result.err
        assert len(result.out.splitlines()) == 2


class TestEnds:
    def test_ctrl_c_ends_a_pipe_that_waits_for_a_question(self, server: FakeServer) -> None:
        class Pipe(io.StringIO):
            def readline(self, *size: Any) -> str:
                return super().readline() or signal.raise_signal(signal.SIGINT) or ""

        with mock.patch.object(sys, "stdin", Pipe("Hi\n")):
            result = command("chat", f"server={server.url}")
        assert (result.code, result.out) == (130, "The answer is 8.\n")
        assert result.err.endswith("dllm chat: error: interrupted; what was written is kept\n")
        assert "forgotten" not in result.err

    def test_a_byte_order_mark_before_the_first_line_is_no_text(self, server: FakeServer) -> None:
        chat("\ufeff/reset\nHi\n", f"server={server.url}")
        assert [body["messages"][-1]["content"] for _, _, body in server.asked] == ["Hi"]

    def test_a_terminal_without_standard_output_is_none(self, server: FakeServer) -> None:
        typed = io.StringIO("Hi\n")
        typed.isatty = lambda: True  # type: ignore[method-assign]
        with mock.patch.object(sys, "stdin", typed), mock.patch("commands.redirect_stdout", nothing):
            assert command("chat", f"server={server.url}").code == 0

    def test_an_error_that_cannot_be_written_has_its_code(self) -> None:
        class Full(io.StringIO):
            def write(self, text: str) -> int:
                raise OSError(28, "No space left on device")

        with redirect_stderr(Full()), pytest.raises(SystemExit) as leaving:
            ending.fail("dllm chat", "it failed")
        assert leaving.value.code == 2

    def test_a_server_of_its_own_that_dies_is_told_after_what_there_is(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        program = tmp_path / "serve.py"
        program.write_text(DYING.format(tests=str(Path(__file__).parent)))
        monkeypatch.setattr(bench_serve, "_COMMAND", (sys.executable, str(program)))
        result = command("bench-serve", "rate=[200,201]", "requests=5", f"out={tmp_path / 'load'}")
        assert result.code == 2
        assert result.err.endswith("error: the server ended during the load: out of memory\n")
        assert "| 201.00 |" in result.out
        assert len((tmp_path / "load.jsonl").read_text().splitlines()) == 2


@contextmanager
def nothing(out: io.StringIO) -> Iterator[io.StringIO]:
    """A process without a standard output."""
    with mock.patch.object(sys, "stdout", None):
        yield out


# What stands in for a `dllm serve` that is killed.
DYING = """
import os, sys, time
sys.path[:0] = [{tests!r}]
from fake_server import serving
options = dict(each.split("=", 1) for each in sys.argv[1:])
with serving(port=int(options["port"])) as server:
    while len(server.asked) < 4 + 8:
        time.sleep(0.001)
    print("dllm serve: error: out of memory", '{{"time": "its log"}}', sep="\\n", flush=True)
    os._exit(2)
"""
