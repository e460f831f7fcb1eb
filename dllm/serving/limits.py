"""What a client may not do: come without the key, send more than the limit or slower than it, or never read."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from dllm.serving.answers import dumps, error
from dllm.serving.log import Entry, Log

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
_GUARDED = "/v1/"


@dataclass(frozen=True)
class Limits:
    """Limits of a request.

    Attributes:
        body: bytes.
        seconds: for the whole body to arrive, and for a client to read what is sent before it counts as gone.
        key: that requests must carry as a bearer token; None for none.
    """

    body: int
    seconds: float
    key: str | None = None


class Guard:
    """ASGI middleware that applies the limits, and gives the application complete bodies only.

    Args:
        app: the application.
        limits: of a request.
        log: of the requests that are refused here.
    """

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]], limits: Limits, log: Log) -> None:
        self.app, self.limits, self.log = app, limits, log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a connection."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers, entry = dict(scope["headers"]), self.log.entry(scope["path"])
        if self.limits.key is not None and scope["path"].startswith(_GUARDED) and not self._has_key(headers):
            message = "this server needs an API key; send it as Authorization: Bearer KEY"
            await _refuse(send, entry, 401, message, "invalid_api_key", (b"www-authenticate", b"Bearer"))
            return
        body = b""
        if scope["method"] not in ("GET", "HEAD", "OPTIONS"):
            try:
                async with asyncio.timeout(self.limits.seconds):
                    body = await self._read(headers, receive)
            except TimeoutError:
                message = f"the body did not arrive within {self.limits.seconds:g} seconds; send it faster"
                await _refuse(send, entry, 408, message)
                return
            except _TooLargeError:
                await _refuse(send, entry, 413, f"the body is larger than {self.limits.body} bytes; send less")
                return
            except _GoneError:
                return
        given = False

        async def replay() -> MutableMapping[str, Any]:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        async def write(message: MutableMapping[str, Any]) -> None:
            try:
                async with asyncio.timeout(self.limits.seconds):
                    await send(message)
            except TimeoutError:
                raise SlowReaderError from None

        with suppress(SlowReaderError):  # its connection is closed
            await self.app(scope, replay, write)

    def _has_key(self, headers: MutableMapping[bytes, bytes]) -> bool:
        kind, _, key = headers.get(b"authorization", b"").partition(b" ")
        return kind.lower() == b"bearer" and hmac.compare_digest(key.strip(), (self.limits.key or "").encode())

    async def _read(self, headers: MutableMapping[bytes, bytes], receive: Receive) -> bytes:
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self.limits.body:
            raise _TooLargeError
        parts, size, more = [], 0, True
        while more:
            message = await receive()
            if message["type"] != "http.request":
                raise _GoneError
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > self.limits.body:
                raise _TooLargeError
            more = message.get("more_body", False)
        return b"".join(parts)


class SlowReaderError(Exception):
    """A client does not read what it is sent."""


class _TooLargeError(Exception):
    pass


class _GoneError(Exception):
    pass


async def _refuse(
    send: Send, entry: Entry, status: int, message: str, code: str | None = None, *headers: tuple[bytes, bytes]
) -> None:
    entry.refused(status, message)
    body = dumps(error(message, status, code=code)).encode()
    own = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),
    ]
    await send({"type": "http.response.start", "status": status, "headers": [*own, *headers]})
    await send({"type": "http.response.body", "body": body})
