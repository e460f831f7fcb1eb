"""The engine loop: a thread of its own takes requests from a bounded queue, steps the engines, and tells the clients.

Only this thread touches the engines. A request joins at the next step, wherever the others are; one whose client is
gone frees its slot at the next step.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from threading import Condition, Thread
from typing import Any

from dllm.cache.base import Cache
from dllm.checks import first_line, renamed
from dllm.decoding.engine import Engine
from dllm.decoding.step import Step
from dllm.models.loading import LanguageModel
from dllm.resolve import build, options_of
from dllm.samplers.base import Sampler
from dllm.serving.metrics import Metrics
from dllm.serving.ticket import NAMES, Failure, SamplerChoice, Ticket

_LONGEST_WAIT = 60  # seconds that a client is told to wait at most
_MOST_FAILURES = 3  # of engines in a row, after which the server is no longer healthy
STOPPING = Failure(503, "the server is stopping; try again later, or another one", "refused")
GONE = Failure(499, "the client is gone", "cancelled")


def first_failure(choices: Iterable[Ticket]) -> Failure | None:
    """The first failure of a request's choices that is not due to that of another choice; None without any."""
    failures = [choice.failure for choice in choices if choice.failure is not None]
    return next((each for each in failures if each is not GONE), next(iter(failures), None))


class FullError(Exception):
    """The queue is full.

    Attributes:
        retry_after: seconds after which to try again.
    """

    def __init__(self, retry_after: int) -> None:
        super().__init__(retry_after)
        self.retry_after = retry_after


class StoppingError(Exception):
    """The server takes no more requests."""


@dataclass(frozen=True)
class Decoding:
    """What every engine of the server is made with.

    Attributes:
        lm: the model.
        sampler: the server's own policy.
        cache: the cache.
        slots: rows of an engine.
        options: others of `Engine`.
        engines: how many there are at most: one for each policy that is asked for at the same time.
    """

    lm: LanguageModel
    sampler: Sampler
    cache: Cache
    slots: int
    options: dict[str, Any] = field(default_factory=dict)
    engines: int = 2

    def engine(self, choice: SamplerChoice | None) -> Engine:
        """A new engine.

        Raises:
            ValueError: the chosen policy does not fit the cache or the model, or refuses its options.
        """
        sampler = self.sampler
        if choice is not None:
            fields = options_of("sampler", choice.name, "dllm.sampler") | dict(choice.options)
            sampler = build("sampler", fields, Sampler)
        return Engine(self.lm, sampler, self.cache, batch_size=self.slots, **self.options)


class _Room:
    """An engine and the requests that are in it."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.tickets, self.used = engine, dict[int, Ticket](), time.monotonic()

    def add(self, ticket: Ticket) -> None:
        try:
            ticket.id = self.engine.submit(ticket.job.request)
        except ValueError as error:
            ticket.fail(Failure(400, renamed(str(error), NAMES), "refused"))
            return
        except Exception as error:  # noqa: BLE001  # what one client asks must not end the others
            ticket.fail(Failure(500, f"the request cannot be decoded: {first_line(error)}"))
            return
        self.tickets[ticket.id] = ticket
        ticket.admitted = True
        ticket.notify()
        self.used = time.monotonic()

    def drop(self, ticket: Ticket) -> None:
        if ticket.id is not None and self.tickets.pop(ticket.id, None) is not None:
            self.engine.abort(ticket.id)


class EngineLoop:
    """Decodes the requests of a server.

    Args:
        decoding: the model and its options.
        queue: requests that may wait for a slot; more are refused.
        metrics: statistics of the server.

    Attributes:
        max_length: positions of a row.
        pattern: the attention pattern of the engines.
        ready: whether requests are decoded.

    Raises:
        ValueError: the server's own policy does not fit the cache or the model.
    """

    def __init__(self, decoding: Decoding, queue: int, metrics: Metrics) -> None:
        self.decoding, self.queue, self.metrics = decoding, queue, metrics
        # The server's own engine comes first, so that bad options are refused, and is there for the first request.
        self._rooms: dict[SamplerChoice | None, _Room] = {None: _Room(decoding.engine(None))}
        own = self._rooms[None].engine
        self.max_length, self.pattern = own.max_length, own.pattern
        self._changed = Condition()
        self._arrived: deque[Ticket] = deque()
        self._gone: set[Ticket] = set()
        self._open: set[Ticket] = set()  # accepted and not ended
        self._until = math.inf  # when a server that is stopping gives up what still runs
        self._failures = 0
        self.ready = False
        self._on_end: Callable[[], None] = lambda: None
        self._thread = Thread(target=self._run, name="dllm-engine", daemon=True)
        metrics.watch(lambda: self.waiting, lambda: self.busy)

    def start(self, on_end: Callable[[], None] = lambda: None) -> None:
        """Begin; `on_end` is called from the thread when it ends."""
        self._on_end = on_end
        self._thread.start()

    @property
    def stopping(self) -> bool:
        """Whether no more requests are taken."""
        return self._until < math.inf

    @property
    def healthy(self) -> bool:
        """Whether requests can be decoded."""
        return self._thread.is_alive() and self._failures < _MOST_FAILURES

    @property
    def most(self) -> int:
        """Requests that may be open at the same time."""
        return self.decoding.slots + self.queue

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        with self._changed:
            return sum(ticket.entered is None for ticket in self._open)

    @property
    def busy(self) -> int:
        """Requests that have a slot."""
        with self._changed:
            return sum(ticket.entered is not None and not ticket.done for ticket in self._open)

    def submit(self, tickets: Sequence[Ticket]) -> None:
        """Queue the choices of one request: all of them, or none.

        Raises:
            FullError: the queue is full.
            StoppingError: the server is stopping.
        """
        with self._changed:
            if self.stopping or not self._thread.is_alive():
                raise StoppingError
            if len(self._open) + len(tickets) > self.most:
                raise FullError(self._retry_after())
            self._arrived.extend(tickets)
            self._open.update(tickets)
            self._changed.notify()

    def cancel(self, ticket: Ticket, failure: Failure | None = None) -> None:
        """Give up a request; its slot is free at the next step. No effect on one that has ended."""
        with self._changed:
            if ticket not in self._open:
                return
        ticket.fail(failure or GONE)  # before the engine's thread does
        with self._changed:
            if ticket in self._open:
                self._gone.add(ticket)
                self._changed.notify()

    def stop(self, seconds: float) -> None:
        """Take no more requests, and end once those that run are finished, or after some seconds."""
        with self._changed:
            self._until = min(self._until, time.monotonic() + seconds)
            self._changed.notify()

    def _retry_after(self) -> int:
        mean = self.metrics.mean_seconds
        return max(1, min(_LONGEST_WAIT, math.ceil(mean * len(self._open) / self.decoding.slots / 2)))

    def _run(self) -> None:
        try:
            self.ready = True
            while self._wait():
                self._take()
                for choice, room in list(self._rooms.items()):
                    if room.tickets:
                        self._step(choice, room)
        finally:
            self.ready = False
            with self._changed:
                self._until, left = -math.inf, list(self._open)
            for ticket in left:
                self._end(ticket, STOPPING)
            for room in self._rooms.values():
                room.engine.close()
            self._on_end()

    def _wait(self) -> bool:
        """Wait for work; whether to go on."""
        with self._changed:
            while not (self._arrived or self._gone or any(room.tickets for room in self._rooms.values())):
                if self.stopping and not self._open:
                    return False
                self._changed.wait()
            return time.monotonic() < self._until

    def _take(self) -> None:
        """Let requests enter their engines and leave them."""
        with self._changed:
            gone, self._gone = self._gone, set()
            arrived, self._arrived = self._arrived, deque()
        for ticket in gone:
            if room := self._rooms.get(ticket.job.sampler):
                room.drop(ticket)
            self._end(ticket, GONE)
        later: list[Ticket] = []
        closed: set[SamplerChoice | None] = set()  # engines that take no more, until another has their place
        for ticket in arrived:
            if ticket.done:
                continue
            room = None if ticket.job.sampler in closed else self._room(ticket)
            if room is not None:
                room.add(ticket)
            elif not ticket.done:
                later.append(ticket)
                closed.add(self._next_to_go())
            if ticket.done:
                self._end(ticket, None)
        with self._changed:
            self._arrived.extendleft(reversed(later))

    def _room(self, ticket: Ticket) -> _Room | None:
        """The engine for a request; None if it must wait for one, or has failed."""
        choice = ticket.job.sampler
        if choice in self._rooms:
            return self._rooms[choice]
        if len(self._rooms) >= self.decoding.engines:
            idle = [(room.used, other) for other, room in self._rooms.items() if not room.tickets]
            if not idle:
                return None
            self._rooms.pop(min(idle, key=lambda each: each[0])[1]).engine.close()
        try:
            self._rooms[choice] = _Room(self.decoding.engine(choice))
        except ValueError as error:
            message = str(error).replace("sampler.", "dllm.sampler_options.")
            ticket.fail(Failure(400, message, "refused"))
            return None
        except Exception as error:  # noqa: BLE001  # whatever a client chose, the others go on
            self._failures += choice is None or isinstance(error, (RuntimeError, MemoryError))
            ticket.fail(Failure(500, f"no engine could be made: {first_line(error)}"))
            return None
        return self._rooms[choice]

    def _next_to_go(self) -> SamplerChoice | None:
        """The engine with the fewest requests; the server's own only if there is no other."""
        others = [choice for choice in self._rooms if choice is not None]
        return min(others, key=lambda choice: len(self._rooms[choice].tickets)) if others else None

    def _step(self, choice: SamplerChoice | None, room: _Room) -> None:
        begun_at = time.monotonic()
        try:
            step = room.engine.step()
        except Exception as error:  # noqa: BLE001  # whatever it is, the server goes on with a new engine
            self._failures += choice is None  # what a client chose may be at fault, and not the server
            for ticket in room.tickets.values():
                self._end(ticket, Failure(500, f"decoding failed: {first_line(error)}"))
            del self._rooms[choice]
            return
        self._failures = 0
        if not isinstance(step, Step):
            return
        self.metrics.step(step)
        for event in step:
            if event.id not in room.tickets:
                continue
            ticket = room.tickets[event.id]
            try:
                ticket.follow(event, begun_at)
            except Exception as error:  # noqa: BLE001  # what one client asked to be told must not end the others
                room.drop(ticket)
                self._end(ticket, Failure(500, f"the answer cannot be told: {first_line(error)}"))
                continue
            if event.answer is not None:
                self._end(room.tickets.pop(event.id), None)
        room.used = time.monotonic()

    def _end(self, ticket: Ticket, failure: Failure | None) -> None:
        if failure is not None:
            ticket.fail(failure)
        with self._changed:
            known = ticket in self._open
            self._open.discard(ticket)
            self._changed.notify()
        if known:
            self.metrics.end(ticket)
