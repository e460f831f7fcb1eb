"""A server under clients of every kind: nothing accepted is lost, nothing is crossed, and nothing is left behind.

`DLLM_SOAK_SECONDS` makes the first test longer.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

import dllm
from commands import in_a_process
from dllm.tasks import word_problems
from models import random_llada
from warm import Process

httpx = pytest.importorskip("httpx")
for needed in ("fastapi", "prometheus_client", "uvicorn"):
    pytest.importorskip(needed)

from dllm.serving.client import Reader, ServerError  # noqa: E402
from serve_rig import serving  # noqa: E402

SECONDS = float(os.environ.get("DLLM_SOAK_SECONDS", "8"))
CLIENTS, BLOCK = 24, 8
LM = random_llada(tokenizer=True, seed=1, max_length=128)  # float64: batches change no token
PROBLEMS = [problem.question for problem in word_problems.problems(6, seed=5)]
MALFORMED = (b"", b"{", b"[1]", b"\xff\xfe", b'{"prompt": 5}', b'{"prompt": "Tom", "max_tokens": -1}', b"[" * 5000)


@dataclass(frozen=True)
class Case:
    """A request, and its answer when it is decoded alone."""

    path: str
    body: dict[str, Any]
    text: str


def cases(lm: dllm.LanguageModel, lengths: Sequence[int], samplers: Sequence[str]) -> list[Case]:
    found = []
    for place, question in enumerate(PROBLEMS):
        for sampler in samplers:
            length = lengths[place % len(lengths)]
            alone = dllm.generate(lm, [question], sampler, gen_length=length, block_length=BLOCK)
            chat = place % 2 == 0
            asked = {"messages": [{"role": "user", "content": question}]} if chat else {"prompt": question}
            own = {} if sampler == samplers[0] else {"dllm": {"sampler": sampler}}
            path = "/v1/chat/completions" if chat else "/v1/completions"
            found.append(Case(path, {**asked, "max_tokens": length, **own}, str(alone.texts[0])))
    assert len({case.text for case in found}) > len(PROBLEMS) / 2  # what is crossed would be seen
    return found


class Clients:
    """Clients of one server, and what became of their requests."""

    def __init__(self, url: str, asked: Sequence[Case]) -> None:
        self.url, self.asked, self.counts = url, asked, Counter[str]()
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=4)
        self.http = httpx.AsyncClient(base_url=url, timeout=60, limits=limits, trust_env=False)

    async def keep_asking(self, seconds: float) -> None:
        """Behave at random for a while."""
        until = time.monotonic() + seconds
        kinds: list[Callable[[random.Random], Awaitable[None]]] = [
            self.whole, self.stream, self.stream, self.slow, self.leave, self.leave_at_once, self.half, self.oversized,
            self.malformed,
        ]  # fmt: skip

        async def one(draw: random.Random) -> None:
            while time.monotonic() < until:
                await draw.choice(kinds)(draw)

        async with asyncio.timeout(seconds + 60), asyncio.TaskGroup() as group:
            for number in range(CLIENTS):
                group.create_task(one(random.Random(number)))
        await self.http.aclose()

    async def whole(self, draw: random.Random) -> None:
        """An answer in one piece."""
        case = draw.choice(self.asked)
        answer = await self.http.post(case.path, json=case.body)
        self.counts["complete"] += 1
        if answer.status_code == 429:
            await self.wait(answer.headers["retry-after"])
            return
        assert answer.status_code == 200, answer.text
        choice = answer.json()["choices"][0]
        assert (choice["message"]["content"] if "message" in choice else choice["text"]) == case.text
        self.counts["answered"] += 1

    async def stream(self, draw: random.Random, pause: float = 0.0) -> None:
        """An answer as a stream; with a pause it is read slowly, and every step is told."""
        case, reader, text = draw.choice(self.asked), Reader(), ""
        body = {**case.body, "stream": True}
        if pause:
            body["dllm"] = {**case.body.get("dllm", {}), "events": "steps"}
        async with self.http.stream("POST", case.path, json=body) as answer:
            self.counts["complete"] += 1
            if answer.status_code == 429:
                await self.wait(answer.headers["retry-after"])
                return
            assert answer.status_code == 200, await answer.aread()
            async for data in answer.aiter_bytes(256 if pause else None):
                text += reader.feed(data)
                await asyncio.sleep(pause)
        reader.end()
        assert text == case.text
        self.counts["answered"] += 1

    async def slow(self, draw: random.Random) -> None:
        """A stream that is read slowly."""
        await self.stream(draw, pause=0.002)
        self.counts["slow"] += 1

    async def leave(self, draw: random.Random) -> None:
        """A stream that is left after some of it."""
        case, pieces = draw.choice(self.asked), draw.randrange(4)
        async with self.http.stream("POST", case.path, json={**case.body, "stream": True}) as answer:
            self.counts["complete"] += 1
            async for _ in answer.aiter_bytes():
                if (pieces := pieces - 1) <= 0:
                    break
        self.counts["left"] += 1

    async def leave_at_once(self, draw: random.Random) -> None:
        """A request whose client is gone before any answer."""
        await self.raw(draw, lambda body: body)
        self.counts["gone"] += 1

    async def half(self, draw: random.Random) -> None:
        """A request that never arrives completely."""
        await self.raw(draw, lambda body: body[: draw.randrange(len(body))])
        self.counts["half"] += 1

    async def raw(self, draw: random.Random, cut: Callable[[bytes], bytes]) -> None:
        """Bytes on a connection that is closed soon."""
        host, port = self.url.removeprefix("http://").split(":")
        case = draw.choice(self.asked)
        body = json.dumps(case.body).encode()
        head = f"POST {case.path} HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(body)}\r\n\r\n"
        _, writer = await asyncio.open_connection(host, int(port))
        writer.write(head.encode() + cut(body))
        await writer.drain()
        await asyncio.sleep(draw.random() / 20)
        writer.transport.abort()

    async def oversized(self, draw: random.Random) -> None:
        """A body above the limit."""
        body = json.dumps({"prompt": "Tom " * 10_000}).encode()
        try:
            answer = await self.http.post("/v1/completions", content=body)
            assert answer.status_code == 413, answer.text
        except httpx.WriteError:  # the server closed before it had all of it
            pass
        self.counts["oversized"] += 1

    async def malformed(self, draw: random.Random) -> None:
        """A body that is no request."""
        answer = await self.http.post("/v1/completions", content=draw.choice(MALFORMED))
        self.counts["complete"] += 1
        assert answer.status_code == 400, answer.text
        assert answer.json()["error"]["message"]
        self.counts["malformed"] += 1

    async def wait(self, retry_after: str) -> None:
        """After a refusal."""
        assert float(retry_after) >= 1
        self.counts["refused"] += 1
        await asyncio.sleep(0.05)


def test_nothing_is_lost_crossed_or_left_behind() -> None:
    asked = cases(LM, (12, 20, 28), ("vanilla", "threshold"))
    process = psutil.Process()
    with serving(LM, batch_size=4, queue=6, max_body=20_000, block_length=BLOCK) as server:
        warm = Clients(server.url, asked)
        asyncio.run(warm.keep_asking(1.0))
        files = process.num_fds()
        clients = Clients(server.url, asked)
        asyncio.run(clients.keep_asking(SECONDS))
        until = time.monotonic() + 30
        while (now := server.metrics())["dllm_queue_length"] or now["dllm_slots_busy"]:
            assert time.monotonic() < until
            time.sleep(0.05)
        # Every slot still answers, and as before.
        last = Clients(server.url, asked)

        async def all_at_once() -> None:
            await asyncio.gather(*(last.whole(random.Random(number)) for number in range(8)))
            await last.http.aclose()

        asyncio.run(all_at_once())
        outcomes = {name: value for name, value in server.metrics().items() if name.startswith("dllm_requests_total")}
        assert process.num_fds() <= files + 8
    counts = warm.counts + clients.counts + last.counts
    assert last.counts["answered"] == 8
    assert all(clients.counts[kind] for kind in ("answered", "slow", "left", "gone", "half", "oversized", "malformed"))
    ended = {name.split('"')[1]: int(value) for name, value in outcomes.items()}
    assert ended["failed"] == ended["timeout"] == 0
    assert ended["finished"] >= counts["answered"]
    assert counts["complete"] <= sum(ended.values()) <= counts["complete"] + counts["gone"]


async def _ask(http: Any, case: Case, stream: bool, outcomes: Counter[str]) -> None:
    """Ask again and again until the server is gone; note how each request ended."""
    while True:
        reader, text = Reader(), ""
        try:
            async with http.stream("POST", case.path, json={**case.body, "stream": stream}) as answer:
                content = b""
                async for data in answer.aiter_bytes():
                    content += data
                    text += reader.feed(data) if stream and answer.status_code == 200 else ""
        except ServerError as error:
            outcomes["ended by an error" if "the server is stopping" in str(error) else str(error)] += 1
            continue
        except httpx.ConnectError:
            return
        except httpx.HTTPError as error:
            outcomes[f"broken off: {error!r}"] += 1
            continue
        if answer.status_code == 200:
            if stream:
                reader.end()
            else:
                choice = json.loads(content)["choices"][0]
                text = choice["message"]["content"] if "message" in choice else choice["text"]
            assert text == case.text
            outcomes["answered"] += 1
        else:
            assert answer.status_code in (429, 503), content
            assert json.loads(content)["error"]["message"]
            outcomes[str(answer.status_code)] += 1
            await asyncio.sleep(0.1)


@in_a_process
@pytest.mark.parametrize("drain", [30, 0])
def test_terminating_under_load_loses_nothing_that_was_accepted(drain: int, tmp_path: Path) -> None:
    asked = cases(dllm.load("tiny-llada", dtype="float64", device="cpu"), (16, 32), ("vanilla",))
    options = ("port=0", "model.dtype=float64", "model.device=cpu", "batch_size=4", "queue=4", f"block_length={BLOCK}")
    with (tmp_path / "log").open("w") as log_file:  # a pipe that nobody reads would fill up
        process = Process("serve", *options, f"drain={drain}", stderr=log_file.fileno())
    assert process.stdout is not None
    url = process.stdout.readline().split()[-1]
    outcomes: Counter[str] = Counter()

    async def load() -> None:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        async with httpx.AsyncClient(base_url=url, timeout=60, limits=limits, trust_env=False) as http:
            tasks = [
                asyncio.create_task(_ask(http, asked[number % len(asked)], number % 2 == 0, outcomes))
                for number in range(12)
            ]
            while not (outcomes["answered"] > 3 and outcomes["429"]):
                await asyncio.sleep(0.02)
                assert not any(task.done() for task in tasks)
            process.send_signal(signal.SIGTERM)
            await asyncio.gather(*tasks)

    asyncio.run(asyncio.wait_for(load(), 60))
    assert process.wait(60) == 143
    *log, last = (tmp_path / "log").read_text().splitlines()
    assert last == "dllm serve: stopped"
    logged = Counter(json.loads(line)["outcome"] for line in log)
    assert logged["finished"] == outcomes["answered"]
    # What broke off was never taken from the system's queue of connections: what was, has a line and an answer.
    broken = sum(count for name, count in outcomes.items() if name.startswith("broken off"))
    assert len(log) == outcomes.total() - broken, (logged, outcomes)
    assert {name for name in outcomes if "broken off" not in name} <= {"answered", "429", "503", "ended by an error"}
    if drain:
        assert outcomes["ended by an error"] == 0
        assert set(logged) <= {"finished", "refused"}
    else:
        assert outcomes["ended by an error"] + outcomes["503"] >= 1
