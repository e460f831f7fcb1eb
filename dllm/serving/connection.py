"""A connection whose client has to send the headers of a request in time, and may then close its sending side."""

from __future__ import annotations

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

_PROBE_SECONDS, _PROBE_FACTOR = 0.05, 4  # between the first two probes, and how much longer each further wait is


class Connection(H11Protocol):
    """uvicorn's HTTP protocol, which by itself waits for headers as long as a client likes.

    The limit is that of the application (`dllm.serving.limits.Limits.seconds`), which has it for the body.

    A client that has sent its request may close its sending side and still read. One that is gone looks the same until
    it is written to, and then resets the connection. So both are sent `100 Continue` now and then until the answer
    begins; a client that has not asked for that ignores it (RFC 9110, 15.2.1).
    """

    _late: asyncio.TimerHandle | None = None
    _probe: asyncio.TimerHandle | None = None
    _half_closed = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in uvicorn
        """Wait for the first request."""
        super().connection_made(transport)
        self._expect_headers()

    def data_received(self, data: bytes) -> None:
        """Wait for the rest of the headers, unless they are complete."""
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._stop_waiting()
        elif self._late is None:
            self._expect_headers()

    def eof_received(self) -> bool:  # type: ignore[override]  # uvicorn always closes
        """Stay open for a client that waits for an answer; whether it does is asked as long as there is none."""
        if not self._half_closed and self._is_answering():
            self._half_closed = True
            self._ask_whether_there(_PROBE_SECONDS)
        return self._half_closed

    def on_response_complete(self) -> None:
        """Go on with the next request; after the last one of a half-closed client, close."""
        super().on_response_complete()
        if self._half_closed and self.cycle.response_complete:
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no longer."""
        self._stop_waiting()
        if self._probe is not None:
            self._probe.cancel()
        super().connection_lost(exc)

    def _is_answering(self) -> bool:
        """Whether a complete request waits for its answer, from a client that an interim answer may be sent to."""
        complete = self.conn.their_state in (h11.DONE, h11.MUST_CLOSE)
        return complete and self.conn.their_http_version != b"1.0" and not self.cycle.response_started

    def _ask_whether_there(self, seconds: float) -> None:
        # The write after the one that a reset answered fails, and that ends the connection.
        if not self.cycle.response_started:
            interim = h11.InformationalResponse(status_code=100, headers=[], reason="Continue")
            self.transport.write(self.conn.send(interim) or b"")
        self._probe = self.loop.call_later(seconds, self._ask_whether_there, seconds * _PROBE_FACTOR)

    def _expect_headers(self) -> None:
        self._late = self.loop.call_later(self.config.app.limits.seconds, self.transport.close)  # type: ignore[union-attr]

    def _stop_waiting(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None
