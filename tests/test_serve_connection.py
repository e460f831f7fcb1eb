"""Clients that close the sending side of their connection, and those that are gone."""

from __future__ import annotations

import http.client
import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest

import dllm

for needed in ("httpx", "fastapi", "prometheus_client", "uvicorn"):
    pytest.importorskip(needed)

from serve_rig import QUESTION, Running, serving  # noqa: E402

pytestmark = pytest.mark.xdist_group("serve")
SHORT = {"prompt": QUESTION, "max_tokens": 24}
LONG = {"prompt": QUESTION, "max_tokens": 400, "dllm": {"stop_at_eos": False, "block_length": 400}}  # of seconds


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with serving(dllm.load("tiny-llada", device="cpu"), batch_size=1) as running:
        yield running


def raw(body: dict[str, Any], *headers: str, version: str = "1.1") -> bytes:
    """A request as bytes."""
    content = json.dumps(body).encode()
    lines = [f"POST /v1/completions HTTP/{version}", "Host: x", f"Content-Length: {len(content)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + content


def connect(server: Running) -> socket.socket:
    return socket.create_connection(server.server._listener.getsockname()[:2], timeout=60)


def half_closed(server: Running, sent: bytes) -> bytes:
    """Everything that a client reads after it has sent something and closed its sending side."""
    with connect(server) as client, client.makefile("rb") as answer:
        client.sendall(sent)
        client.shutdown(socket.SHUT_WR)
        return answer.read()  # to the end of the connection


def last(server: Running, begun: int) -> dict[str, Any]:
    """The log's line of the request after `begun` others."""
    until = time.monotonic() + 60
    while len(server.log.lines) <= begun:
        assert time.monotonic() < until
        time.sleep(0.01)
    return server.log.lines[begun]


@pytest.mark.parametrize("headers", [(), ("Connection: close",)])
def test_a_half_closed_client_has_its_answer_and_then_the_connection_ends(server: Running, headers: Any) -> None:
    expected = server.complete(**SHORT)["choices"]
    interim, _, answer = half_closed(server, raw(SHORT, *headers)).rpartition(b"HTTP/1.1 200")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["choices"] == expected
    assert interim.replace(b"HTTP/1.1 100 Continue\r\n\r\n", b"") == b""


def test_a_client_ignores_that_it_is_asked_whether_it_is_there(server: Running) -> None:
    client = http.client.HTTPConnection(*server.server._listener.getsockname()[:2], timeout=60)
    client.request("POST", "/v1/completions", json.dumps(SHORT))
    client.sock.shutdown(socket.SHUT_WR)
    answer = client.getresponse()
    assert answer.status == 200
    assert json.load(answer)["choices"] == server.complete(**SHORT)["choices"]
    client.close()


def test_a_half_closed_client_has_its_whole_stream(server: Running) -> None:
    expected = server.complete(**SHORT)["choices"][0]["text"]
    lines = half_closed(server, raw({**SHORT, "stream": True})).splitlines()
    events = [line[6:] for line in lines if line.startswith(b"data: ")]
    assert events.pop() == b"[DONE]"
    assert "".join(json.loads(each)["choices"][0]["text"] for each in events) == expected


def test_requests_that_were_sent_together_are_all_answered(server: Running) -> None:
    health = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
    answers = half_closed(server, raw(SHORT) + raw({**SHORT, "max_tokens": 8}) + health)
    assert answers.count(b"HTTP/1.1 200") == 3


def test_half_a_request_of_a_half_closed_client_has_no_answer(server: Running) -> None:
    for sent in (raw(SHORT)[:-5], b"POST /v1/comp", b""):
        assert half_closed(server, sent) == b""
    assert half_closed(server, raw(SHORT) + raw(SHORT)[:30]).count(b"HTTP/1.1 200") == 1


@pytest.mark.parametrize("version", ["1.0", "1.1"])
@pytest.mark.parametrize("first", [False, True], ids=["at once", "after half-closing"])
def test_a_client_that_is_gone_frees_its_slot(server: Running, version: str, first: bool) -> None:
    begun = len(server.log.lines)
    client = connect(server)
    client.sendall(raw(LONG, version=version))
    while not server.metrics()["dllm_slots_busy"]:
        time.sleep(0.01)
    if first:
        client.shutdown(socket.SHUT_WR)
        time.sleep(0.1)
    client.close()
    assert last(server, begun)["outcome"] == "cancelled"
