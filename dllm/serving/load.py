"""Load on a server: an open loop of Poisson arrivals, a closed loop that measures the capacity, and their statistics.

In an open loop requests arrive when the schedule says so, however slow the server is, and waiting counts from then: a
generator that waited for answers would offer less the slower the server gets, and hide how long its users wait.
"""

from __future__ import annotations

import asyncio
import random
import re
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import accumulate, repeat, takewhile
from typing import Any, Literal, TypeAlias

import httpx
import numpy as np

from dllm.serving.client import (
    Reader,
    ServerError,
    describe,
    model_of,
    opened,
    refusal,
    request,
    settings_of,
    shown,
)

Asked: TypeAlias = str | Sequence[Mapping[str, Any]]
_QUANTILES = (50, 95, 99)
_REQUESTS, _SLOTS = 100, 8  # unless told
_ROUNDS = 4  # requests of each client of the closed loop, at least
_LONGEST_WAIT = 1.0  # seconds after a refusal in the closed loop
_AGAIN = re.compile(r"; try again in [\d.]+ s(?:econds)?$")


@dataclass
class Record:
    """One request; times in seconds after the start.

    Attributes:
        arrival: when it was due.
        sent: when it was sent.
        first: when its first text arrived; None without any.
        ended: when it ended; None before.
        outcome: finished (a complete answer), refused (429), failed, or unfinished when the load was interrupted.
        tokens: of the answer.
        error: why it failed.
        wait: seconds after which to ask again, as the server says.
    """

    arrival: float
    sent: float = 0.0
    first: float | None = None
    ended: float | None = None
    outcome: Literal["finished", "refused", "failed", "unfinished"] = "unfinished"
    tokens: int = 0
    error: str | None = None
    wait: float | None = None

    def after(self, seconds: float) -> Record:
        """With times in seconds after a later start."""
        first, ended = (None if each is None else each - seconds for each in (self.first, self.ended))
        return replace(self, arrival=self.arrival - seconds, sent=self.sent - seconds, first=first, ended=ended)


@dataclass(frozen=True)
class Target:
    """A server and what it is asked.

    Attributes:
        server: address.
        api_key: its key; None for none.
        asked: prompts and chats, in the order of the requests, which begin again at the end.
        max_tokens: of an answer; None for the server's default.
        timeout: seconds after which a request has failed.
        fields: further fields of every request.
    """

    server: str
    api_key: str | None
    asked: Sequence[Asked]
    max_tokens: int | None = None
    timeout: float = 600.0
    fields: Mapping[str, Any] = field(default_factory=dict)

    def client(self) -> httpx.AsyncClient:
        """A client without limits, whose requests share no connections, like those of separate users."""
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        settings = settings_of(self.server, self.api_key, None) | {"timeout": None}
        return opened(httpx.AsyncClient, limits=limits, **settings)


def arrivals(rate: float, requests: int | None, duration: float | None, seed: int) -> Iterator[float]:
    """Times of a Poisson process; those of another rate and the same seed are the same, stretched.

    Args:
        rate: arrivals per second.
        requests: how many; None for no limit.
        duration: seconds; None for no limit.
        seed: of the gaps.
    """
    draw = random.Random(seed)
    gaps = (draw.expovariate(1.0) / rate for _ in (repeat(None) if requests is None else range(requests)))
    return takewhile(lambda at: duration is None or at <= duration, accumulate(gaps))


async def open_loop(target: Target, model: str, times: Iterator[float], records: list[Record]) -> None:
    """Send requests at given times, and wait for all answers.

    Args:
        target: the server.
        model: name of its model.
        times: seconds after the start.
        records: receives those of the requests, as they are sent.
    """
    async with target.client() as client, asyncio.TaskGroup() as group:
        begun = time.perf_counter()
        for number, at in enumerate(times):
            await asyncio.sleep(max(0.0, begun + at - time.perf_counter()))
            record = Record(at)
            records.append(record)
            group.create_task(_send(client, target, model, number, record, begun))


@dataclass(frozen=True)
class Saturation:
    """What a server does while some clients ask again at once after every answer.

    Attributes:
        rate: answers per second.
        records: of the requests that ended; times in seconds after the begin of the measurement.
        busy: share of the slots that had a request; None without /metrics.
    """

    rate: float
    records: Sequence[Record]
    busy: float | None


async def closed_loop(target: Target, model: str, clients: int, requests: int) -> Saturation:
    """What is answered when some clients ask again at once after every answer.

    Measured from when each could have had its first answer until the last request is sent: all of them are busy then.

    Args:
        target: the server.
        model: name of its model.
        clients: how many; enough to keep every slot of the server busy.
        requests: in all; at least four for each client.

    Raises:
        ServerError: a request failed, or all clients are refused.
    """
    requests = max(requests, _ROUNDS * clients)
    numbers, records, finished, refused = iter(range(requests)), list[Record](), 0, 0
    edges: list[tuple[int, float, asyncio.Task[dict[str, float]]]] = []
    begun = time.perf_counter()

    def note_edge() -> None:
        edges.append((finished, time.perf_counter() - begun, asyncio.create_task(metrics(target))))

    async def ask(client: httpx.AsyncClient) -> None:
        nonlocal finished, refused
        for number in numbers:
            if number == requests - 1:
                note_edge()
            while True:
                record = Record(time.perf_counter() - begun)
                await _send(client, target, model, number, record, begun)
                records.append(record)
                if record.outcome == "finished":
                    break
                refused += 1
                if record.outcome != "refused" or refused > requests:
                    raise ServerError(f"the capacity cannot be measured: {record.error}; give rate")
                await asyncio.sleep(min(record.wait or _LONGEST_WAIT, _LONGEST_WAIT))
            finished += 1
            if finished == clients:
                note_edge()

    async with target.client() as client:
        tasks = [asyncio.create_task(ask(client)) for _ in range(clients)]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, *(reading for _, _, reading in edges), return_exceptions=True)
    (before, from_, first), (after, until, last) = edges
    within = [record.after(from_) for record in records if from_ < (record.ended or 0.0) <= until]
    return Saturation((after - before) / (until - from_), within, busy_share(first.result(), last.result()))


async def warm_up(target: Target, model: str, requests: int) -> None:
    """Send some requests together, whatever becomes of them: the first ones take longer than others."""
    async with target.client() as client, asyncio.TaskGroup() as group:
        for number in range(requests):
            group.create_task(_send(client, target, model, number, Record(0.0), time.perf_counter()))


async def _send(
    client: httpx.AsyncClient, target: Target, model: str, number: int, record: Record, begun: float
) -> None:
    path, body = request(model, target.asked[number % len(target.asked)], target.max_tokens, **target.fields)
    record.sent, reader = time.perf_counter() - begun, Reader()
    try:
        async with asyncio.timeout(target.timeout), client.stream("POST", path, json=body) as response:
            if response.status_code != 200:
                raise refusal(response.status_code, response.headers, await response.aread())
            async for data in response.aiter_bytes():
                if reader.feed(data) and record.first is None:
                    record.first = time.perf_counter() - begun
        reader.end()
        record.outcome = "finished"
        record.tokens = reader.tokens or 0
    except ServerError as error:
        record.outcome = "refused" if error.status == 429 else "failed"
        record.error, record.wait = str(error), error.retry_after
    except TimeoutError:
        record.outcome, record.error = "failed", f"no answer within {target.timeout:g} s"
    except httpx.HTTPError as error:
        record.outcome, record.error = "failed", describe(error, target.server)
    record.ended = time.perf_counter() - begun


async def ask_model(target: Target) -> tuple[str, int | None]:
    """Name of the server's model, and how many requests it decodes together.

    Raises:
        ServerError: it cannot be asked.
    """
    answer = await _get(target, "/v1/models")
    if answer.status_code != 200:
        raise refusal(answer.status_code, answer.headers, answer.content)
    model = model_of(answer.content)
    return model.id, model.slots


async def metrics(target: Target) -> dict[str, float]:
    """The values at /metrics that have no labels, by name; empty without any."""
    found: dict[str, float] = {}
    with suppress(ServerError):
        answer = await _get(target, "/metrics", 5.0)
        for line in answer.text.splitlines() if answer.status_code == 200 else ():
            with suppress(ValueError):
                name, value = line.split()
                found[name] = float(value)
    return found


def busy_share(before: Mapping[str, float], after: Mapping[str, float]) -> float | None:
    """Share of the server's slots that had a request, over the steps between two readings of /metrics."""
    names = ("dllm_busy_slot_steps_total", "dllm_slot_steps_total")
    busy, slots = (after.get(name, np.nan) - before.get(name, np.nan) for name in names)
    return float(busy / slots) if slots > 0 and busy >= 0 else None


async def _get(target: Target, path: str, seconds: float = 60.0) -> httpx.Response:
    async with target.client() as client:
        try:
            async with asyncio.timeout(seconds):
                return await client.get(path)
        except TimeoutError:
            raise ServerError(f"{shown(target.server)}{path} did not answer in time") from None
        except httpx.HTTPError as error:
            raise ServerError(describe(error, target.server)) from None


@dataclass(frozen=True)
class Plan:
    """How much load there is at each rate.

    Attributes:
        requests: how many; None for 100, or with a duration as many as arrive in it.
        duration: seconds in which requests arrive; None for no limit.
        deadline: seconds within which an answer counts for goodput; None for any time.
        clients: of the closed loop that measures the capacity; None for twice the slots of the server.
        seed: of the arrivals.
    """

    requests: int | None = None
    duration: float | None = None
    deadline: float | None = None
    clients: int | None = None
    seed: int = 0


class Load:
    """Puts load on a server, one rate after the other.

    Args:
        target: the server.
        plan: how much.
        memory: bytes that the server occupies; None if unknown.
        run: `asyncio.run`, or what runs a coroutine in its place.

    Attributes:
        rows: what became of the measurement of the capacity and of each rate; of one that was interrupted, what it had.
        capacity: requests per second; None before it was measured.

    Raises:
        ServerError: the server cannot be asked for its model.
    """

    def __init__(
        self,
        target: Target,
        plan: Plan,
        memory: Callable[[], int | None] = lambda: None,
        run: Callable[[Coroutine[Any, Any, Any]], Any] = asyncio.run,
    ) -> None:
        self.target, self.plan, self.memory, self._run = target, plan, memory, run
        self.model, slots = run(ask_model(target))
        self.slots = slots or _SLOTS
        self.rows: list[Row] = []
        self.capacity: float | None = None

    def warm_up(self) -> None:
        """Fill every slot once."""
        self._run(warm_up(self.target, self.model, self.slots))

    def measure_capacity(self) -> float:
        """Requests per second that the server can answer; what became of those that measured it is a row, too.

        Raises:
            ServerError: it cannot be measured.
        """
        plan, memory, clients = self.plan, self.memory(), self.plan.clients or 2 * self.slots
        found = self._run(closed_loop(self.target, self.model, clients, plan.requests or _REQUESTS))
        more = {"busy": found.busy, "rss_start": memory, "rss_end": self.memory(), "clients": clients}
        row = summarise(found.records, found.rate, None, plan.deadline, **more)
        self.rows.append(replace(row, offered=found.rate))
        self.capacity = found.rate
        return self.capacity

    def put(self, rate: float | None = None, multiple: float | None = None) -> Row:
        """Send requests at a rate, and wait for their answers.

        Args:
            rate: requests per second.
            multiple: of the capacity, instead, which is measured before the first one.
        """
        plan, records = self.plan, list[Record]()
        if rate is None:
            rate = (multiple or 1.0) * (self.measure_capacity() if self.capacity is None else self.capacity)
        requests = _REQUESTS if plan.requests is None and plan.duration is None else plan.requests
        times = arrivals(rate, requests, plan.duration, plan.seed)
        before, memory = self._run(metrics(self.target)), self.memory()
        try:
            self._run(open_loop(self.target, self.model, times, records))
        finally:
            busy = busy_share(before, self._run(metrics(self.target)))
            more = {"busy": busy, "rss_start": memory, "rss_end": self.memory()}
            self.rows.append(summarise(records, rate, multiple, plan.deadline, **more))
        return self.rows[-1]


@dataclass(frozen=True)
class Row:
    """One rate, or the measurement of the capacity, and what became of its requests.

    Seconds count from a request's scheduled arrival; where clients ask again at once, from when it was sent.

    Attributes:
        rate: nominal requests per second.
        load: multiple of the measured capacity; None if the rate was given.
        requests: number of requests.
        seconds: from the start to the last answer.
        offered: requests per second until the last arrival.
        achieved: finished requests per second.
        goodput: those within the deadline.
        finished: complete answers.
        refused: answers of 429.
        failed: other errors.
        unfinished: still running when the load was interrupted.
        first_p50: median of the time to the first text of finished requests, or to the end of an answer without text;
            None without any.
        first_p95: 95th percentile.
        first_p99: 99th percentile.
        whole_p50: median of the time to the whole answer.
        whole_p95: 95th percentile.
        whole_p99: 99th percentile.
        tokens_per_second: of finished answers.
        lag_p99: 99th percentile of the time by which requests were sent late.
        busy: share of busy slots; None without /metrics.
        rss_start: memory of the server at the start, in bytes; None if it was not started here.
        rss_end: memory at the end.
        errors: most frequent errors with their numbers.
        clients: that asked again at once, to measure the capacity; None where requests arrived at a rate.
    """

    rate: float
    load: float | None
    requests: int
    seconds: float
    offered: float
    achieved: float
    goodput: float
    finished: int
    refused: int
    failed: int
    unfinished: int
    first_p50: float | None
    first_p95: float | None
    first_p99: float | None
    whole_p50: float | None
    whole_p95: float | None
    whole_p99: float | None
    tokens_per_second: float
    lag_p99: float | None
    busy: float | None = None
    rss_start: int | None = None
    rss_end: int | None = None
    errors: Mapping[str, int] = field(default_factory=dict)
    clients: int | None = None


def summarise(records: Sequence[Record], rate: float, load: float | None, deadline: float | None, **more: Any) -> Row:
    """The statistics of one rate.

    Args:
        records: of its requests.
        rate: nominal requests per second.
        load: multiple of the capacity; None if the rate was given.
        deadline: seconds within which an answer counts for goodput; None for any time.
        **more: further fields of the row.
    """
    finished = [record for record in records if record.outcome == "finished"]
    whole = [record.ended - record.arrival for record in finished if record.ended is not None]
    # Where there is no text, that is known at the end.
    known = [record.ended if record.first is None else record.first for record in finished]
    first = [at - record.arrival for record, at in zip(finished, known, strict=True) if at is not None]
    seconds = max((max(record.arrival, record.ended or 0.0) for record in records), default=0.0)
    outcomes = Counter(record.outcome for record in records)
    quantiles: dict[str, Any] = {
        f"{name}_p{quantile}": value
        for name, values in (("first", first), ("whole", whole))
        for quantile, value in zip(_QUANTILES, _percentiles(values), strict=True)
    }
    # Refusals differ in the time after which to try again, and would hide the other errors.
    errors = Counter(_AGAIN.sub("", record.error) for record in records if record.error is not None)
    return Row(
        rate=rate,
        load=load,
        requests=len(records),
        seconds=seconds,
        offered=_per_second(len(records), max((record.arrival for record in records), default=0.0)),
        achieved=_per_second(len(finished), seconds),
        goodput=_per_second(sum(deadline is None or each <= deadline for each in whole), seconds),
        finished=len(finished),
        refused=outcomes["refused"],
        failed=outcomes["failed"],
        unfinished=outcomes["unfinished"],
        tokens_per_second=_per_second(sum(record.tokens for record in finished), seconds),
        lag_p99=_percentiles([max(0.0, record.sent - record.arrival) for record in records])[-1],
        errors=dict(errors.most_common(5)),
        **quantiles,
        **more,
    )


def _percentiles(values: Sequence[float]) -> list[float | None]:
    return [float(each) for each in np.percentile(values, _QUANTILES)] if values else [None] * len(_QUANTILES)


def _per_second(count: int, seconds: float) -> float:
    return count / seconds if seconds > 0 else 0.0
