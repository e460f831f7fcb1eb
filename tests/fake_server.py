"""A server with the HTTP interface of `dllm serve` and no model, in a thread: for clients and load generators."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

Answer = tuple[int, dict[str, str], Any]  # status, headers, body


@dataclass
class FakeServer:
    """Answers after a while, so many at a time.

    Attributes:
        slots: requests answered at a time; the others wait.
        seconds: that an answer takes; the first half of it before its first text.
        queue: requests that may wait; None for any number.
        pieces: texts of an answer.
        chat: whether its model takes chats.
        scripted: answers to the next requests instead: status, headers and body; or bytes of a stream, then the end.
        asked: paths, headers and bodies of the requests.
    """

    slots: int = 4
    seconds: float = 0.0
    queue: int | None = None
    pieces: Sequence[str] = ("The answer", " is 8.")
    chat: bool = True
    scripted: list[Answer | bytes] = field(default_factory=list)
    asked: list[tuple[str, dict[str, str], dict[str, Any]]] = field(default_factory=list)
    port: int = 0
    url: str = ""
    waiting: int = 0
    busy: float = 0.0
    steps: float = 0.0
    cut: int = 0
    free: Any = None

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer the requests of one connection."""
        with suppress(asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            while await self._one(reader, writer):
                pass
        writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        method, path, _ = head[0].split(" ")
        headers = {name.lower(): value.strip() for name, _, value in (each.partition(":") for each in head[1:] if each)}
        body = json.loads(await reader.readexactly(int(headers.get("content-length", 0))) or b"{}")
        if method == "GET":
            self._write(writer, self._told(path))
            return True
        self.asked.append((path, headers, body))
        scripted = self.scripted.pop(0) if self.scripted else None
        if isinstance(scripted, tuple):
            self._write(writer, scripted)
            return True
        if self.queue is not None and self.waiting >= self.slots + self.queue:
            self._write(writer, (429, {"Retry-After": "2"}, {"error": {"message": "the queue is full"}}))
            return True
        self.waiting += 1
        try:
            async with self.free:
                await self._stream(writer, path.endswith("/chat/completions"), scripted)
        except (ConnectionError, asyncio.CancelledError):
            self.cut += 1
            raise
        finally:
            self.waiting -= 1
        return scripted is None

    async def _stream(self, writer: asyncio.StreamWriter, chat: bool, scripted: bytes | None) -> None:
        self.busy, self.steps = self.busy + 3, self.steps + 4
        await asyncio.sleep(self.seconds / 2)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        if scripted is not None:
            writer.write(b"%x\r\n%s\r\n" % (len(scripted), scripted))
            await writer.drain()
            return
        for place, piece in enumerate(self.pieces):
            choice: dict[str, Any] = {"index": 0, **({"delta": {"content": piece}} if chat else {"text": piece})}
            if place:
                await asyncio.sleep(self.seconds / 2 / (len(self.pieces) - 1))
            await self._event(writer, {"choices": [choice]})
        own = {"choice": 0, "nfe": 4, "tokens": 10, "seconds": self.seconds}
        await self._event(writer, {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}], "dllm": own})
        await self._event(writer, {"choices": [], "usage": {"completion_tokens": 10}})
        writer.write(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")
        await writer.drain()

    async def _event(self, writer: asyncio.StreamWriter, chunk: dict[str, Any]) -> None:
        data = f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n".encode()
        writer.write(b"%x\r\n%s\r\n" % (len(data), data))
        await writer.drain()

    def _told(self, path: str) -> Answer:
        if path == "/v1/models":
            own = {"chat": self.chat, "slots": self.slots, "sampler": "vanilla"}
            return 200, {}, {"data": [{"id": "fake", "dllm": own}]}
        if path == "/metrics":
            return 200, {}, f"dllm_slot_steps_total {self.steps}\ndllm_busy_slot_steps_total {self.busy}\n"
        return (200, {}, "ok") if path in ("/ready", "/health") else (404, {}, "nothing there")

    def _write(self, writer: asyncio.StreamWriter, answer: Answer) -> None:
        status, headers, body = answer
        data = (body if isinstance(body, str) else json.dumps(body)).encode()
        lines = [f"HTTP/1.1 {status} Because", *(f"{name}: {value}" for name, value in headers.items())]
        writer.write("\r\n".join([*lines, f"Content-Length: {len(data)}", "", ""]).encode() + data)


@contextmanager
def serving(**options: Any) -> Iterator[FakeServer]:
    """A server that runs in this context."""
    server, started, stop = FakeServer(**options), threading.Event(), asyncio.Event()
    loop = asyncio.new_event_loop()

    async def run() -> None:
        server.free = asyncio.Semaphore(server.slots)
        listening = await asyncio.start_server(server.serve, "127.0.0.1", server.port, backlog=4096)
        server.url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
        started.set()
        await stop.wait()
        listening.close()

    thread = threading.Thread(target=lambda: loop.run_until_complete(run()))
    thread.start()
    started.wait(10)
    try:
        yield server
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()
