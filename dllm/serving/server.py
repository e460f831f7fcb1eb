"""Runs the application on a port: starts the engine's thread, and ends once what runs is finished."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import Any

import uvicorn

from dllm.cache.base import Cache
from dllm.checks import first_line
from dllm.decoding import compatibility
from dllm.models.loading import LanguageModel
from dllm.resolve import CALIBRATION, TARGET, build, names, options_of, variants
from dllm.samplers.base import Sampler
from dllm.serving.app import Service, create
from dllm.serving.connection import Connection

# Kinds of policies that a request cannot choose unless the server's options name them: they load other models or files.
_NOT_OFFERED = ("guided",)


class Server(uvicorn.Server):
    """A server that takes no more requests after a signal, finishes those that run, and then ends.

    Args:
        service: what it answers with.
        listener: of `listen`.
        drain: seconds for what runs after a signal; a second signal ends at once.
        told: called with the server's address once it answers.

    Attributes:
        signal: the signal that ended it; None for none.
    """

    def __init__(
        self, service: Service, listener: socket.socket, drain: float, told: Callable[[str], None] = lambda url: None
    ) -> None:
        # What a slow reader has not taken of its answer this long after everything is finished is lost.
        config = uvicorn.Config(
            create(service), log_config=None, access_log=False, lifespan="off", server_header=False, http=Connection,
            ws="none", timeout_keep_alive=30, timeout_graceful_shutdown=5, log_level="critical",
        )  # fmt: skip
        super().__init__(config)
        self._service, self._listener, self._drain, self._told = service, listener, drain, told
        self.signal: int | None = None

    @property
    def url(self) -> str:
        """Its address."""
        host, port = self._listener.getsockname()[:2]
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
        return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Answer requests until the end."""
        super().run(sockets or [self._listener])

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, then decode."""
        await super().startup(sockets)
        if not self.should_exit:
            loop = asyncio.get_running_loop()

            def ended() -> None:
                loop.call_soon_threadsafe(setattr, self, "should_exit", True)

            self._service.loop.start(ended)
            self._told(self.url)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop after what runs is finished; at once after a second signal."""
        if self.signal is None:
            self.stop()
        else:
            self._service.loop.stop(0)
            self.force_exit = True
        self.signal = signal.Signals(sig)

    def stop(self) -> None:
        """Take no more requests, and end once those that run are finished."""
        self._service.loop.stop(self._drain)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
        ValueError: the address cannot be used.
    """
    listener = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(2048)
    except (OSError, OverflowError, UnicodeError) as error:
        if listener is not None:
            listener.close()
        reason = getattr(error, "strerror", None) or first_line(error)
        raise ValueError(f"host={host!r}, port={port} cannot be used ({reason}); use another port, or host") from None
    return listener


def offered(
    lm: LanguageModel, cache: Cache, cfg_scale: float, wanted: Sequence[str] | None
) -> tuple[dict[str, Mapping[str, Any]], dict[str, str]]:
    """The policies that requests may choose, with those of their options that are numbers, and their kinds.

    Args:
        lm: the model.
        cache: the cache.
        cfg_scale: of the server.
        wanted: names of conf/sampler; None for all that need no other model and fit model and cache.

    Raises:
        ValueError: an unknown name, or a policy that does not fit.
    """
    options: dict[str, Mapping[str, Any]] = {}
    kinds: dict[str, str] = {}
    for name in [*names("sampler"), *variants("sampler")] if wanted is None else wanted:
        fields = options_of("sampler", name, "samplers")
        try:
            sampler: Any = build("sampler", fields, Sampler)
            compatibility.check(sampler, cache, cfg_scale, lm.backbone)
        except ValueError:
            if wanted is not None:
                raise
            continue
        kind = getattr(sampler, "kind", "committing")
        if wanted is not None or kind not in _NOT_OFFERED:
            numbers = {key: value for key, value in fields.items() if isinstance(value, (bool, int, float))}
            options[name] = {key: value for key, value in numbers.items() if key not in (TARGET, CALIBRATION)}
            kinds[name] = kind
    return options, kinds
