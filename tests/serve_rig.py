"""A server in a thread of this process, and clients of it."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx

import dllm
from dllm.cache.base import Cache
from dllm.models.loading import LanguageModel
from dllm.resolve import merged, options_of, resolve
from dllm.samplers.base import Sampler
from dllm.scripts.serve import make_service
from dllm.serving.server import Server, listen

QUESTION = "Tom has 23 apples. He buys 12. How many apples does he have?"


class Quiet:
    """A log that keeps its lines."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []

    def write(self, text: str) -> int:
        self.lines += [json.loads(line) for line in text.splitlines() if line]
        return len(text)

    def flush(self) -> None:
        """Nothing is kept back."""


class Running:
    """A server that answers.

    Args:
        server: it.
        service: what it answers with.
        log: its lines.
    """

    def __init__(self, server: Server, service: Any, log: Quiet) -> None:
        self.server, self.service, self.log = server, service, log
        self.url = server.url.rstrip("/")

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        """POST JSON, or bytes as they are."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return httpx.post(f"{self.url}/v1/{path}", content=content, timeout=120, **options)

    def complete(self, **body: Any) -> dict[str, Any]:
        """A completion that succeeds."""
        answer = self.post("completions", {"prompt": QUESTION, "max_tokens": 64} | body)
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    def refused(self, **body: Any) -> dict[str, Any]:
        """The error of a completion that is refused as a bad request."""
        answer = self.post("completions", {"prompt": QUESTION, "max_tokens": 64} | body)
        assert answer.status_code in (400, 404), answer.text
        return dict(answer.json()["error"])

    def stream(self, path: str = "completions", **body: Any) -> list[dict[str, Any]]:
        """The chunks of a stream that ends well."""
        with httpx.stream("POST", f"{self.url}/v1/{path}", json={"stream": True} | body, timeout=120) as answer:
            assert answer.status_code == 200, answer.read()
            lines = [line for line in answer.iter_lines() if line]
        assert all(line.startswith("data: ") for line in lines)
        assert lines.pop() == "data: [DONE]"
        return [json.loads(line[6:]) for line in lines]

    def metrics(self) -> dict[str, float]:
        """The statistics, by name and labels."""
        lines = httpx.get(f"{self.url}/metrics").text.splitlines()
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[:1] != "#")}


@contextmanager
def serving(
    lm: LanguageModel | str = "tiny-llada", sampler: Any = "vanilla", cache: Any = "none", **options: Any
) -> Iterator[Running]:
    """A server on a free port."""
    own = options_of("sampler", sampler) if isinstance(sampler, str) else {}
    fields = {**merged("serve"), "sampler": own, **options}
    model = dllm.load(lm, device="cpu") if isinstance(lm, str) else lm
    policy, reuse = resolve("sampler", sampler, Sampler), resolve("cache", cache, Cache)
    service = make_service(fields, model, policy, reuse, {"sampler": str(sampler), "cache": str(cache)})
    log = Quiet()
    service.log._stream = log
    started = threading.Event()
    with listen("127.0.0.1", 0) as listener:
        server = Server(service, listener, fields["drain"], lambda url: started.set())
        thread = threading.Thread(target=server.run)
        thread.start()
        assert started.wait(60)
        try:
            yield Running(server, service, log)
        finally:
            service.loop.stop(0)
            thread.join(30)
            assert not thread.is_alive()
