"""The HTTP application: OpenAI's endpoints, health, metrics and the page."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from traceback import format_tb
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException

from dllm.decoding.step import Answer
from dllm.serving.answers import Writer, dumps, error, event, failed
from dllm.serving.events import Pieces
from dllm.serving.limits import Guard, Limits, SlowReaderError
from dllm.serving.log import Log
from dllm.serving.loop import GONE, STOPPING, EngineLoop, FullError, StoppingError, first_failure
from dllm.serving.protocol import BadRequestError, ChatRequest, CompletionRequest, Plan, Terms, parse
from dllm.serving.static import HEADERS, files
from dllm.serving.ticket import Failure, News, Ticket
from dllm.structure.compiled import SECONDS


class Json(JSONResponse):
    """JSON as the streams write it."""

    def render(self, content: Any) -> bytes:
        """The body."""
        return dumps(content).encode()


class EventStream(StreamingResponse):
    """Server-sent events.

    Args:
        events: closed with the response, however that ends.
        end: called then.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[str, None], end: Callable[[], None]) -> None:
        super().__init__(events, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._events, self._end = events, end

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Send them."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._end()
            await self._events.aclose()


@dataclass(frozen=True)
class Service:
    """What the application answers with.

    Attributes:
        terms: what requests may ask.
        loop: decodes them.
        limits: of a request.
        timeout: seconds from the arrival of a request to its end.
        log: of requests.
        sampler: name of the server's own policy.
        cache: name of the cache.
        formats: reads requests with a format, one at a time: compiling one may take long, and others must not wait.
        planned: those that wait for it.
    """

    terms: Terms
    loop: EngineLoop
    limits: Limits
    timeout: float
    log: Log
    sampler: str
    cache: str
    formats: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "dllm-formats"))
    planned: set[asyncio.Future[Plan]] = field(default_factory=set)

    @property
    def late(self) -> Failure:
        """How a request that takes too long ends."""
        return Failure(504, f"no answer within {self.timeout:g} seconds; ask for less, or try again", "timeout")

    def describe(self) -> dict[str, Any]:
        """The model, as /v1/models tells it."""
        lm, terms = self.terms.lm, self.terms
        samplers = [
            {"name": name, "kind": terms.kinds[name], "options": dict(options)}
            for name, options in terms.samplers.items()
        ]
        tokenizer = lm.tokenizer
        return {
            "mask_token": None if tokenizer is None else tokenizer.mask_token,
            "eos_tokens": [Pieces(tokenizer)[token] for token in lm.backbone.eos_token_ids],
            "max_length": terms.max_length,
            "chat": tokenizer is not None and tokenizer.chat_template is not None,
            "sampler": self.sampler,
            "cache": self.cache,
            "slots": self.loop.decoding.slots,
            "gen_length": terms.defaults["gen_length"],
            "block_length": terms.defaults["block_length"],
            "temperature": terms.defaults["temperature"],
            "samplers": samplers,
        }


def create(service: Service) -> Guard:
    """The application."""
    app = FastAPI(title="dllm", docs_url=None, redoc_url=None, default_response_class=Json)
    terms, loop = service.terms, service.loop
    pieces = Pieces(terms.lm.tokenizer)
    started = int(time.time())
    model = {"id": terms.name, "object": "model", "created": started, "owned_by": "dllm", "dllm": service.describe()}

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await _answer(service, pieces, request, ChatRequest)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await _answer(service, pieces, request, CompletionRequest)

    @app.get("/v1/models")
    async def models() -> Response:
        return Json({"object": "list", "data": [model]})

    @app.get("/v1/models/{name:path}")
    async def one(name: str) -> Response:
        if name != terms.name:
            raise terms.unknown_model(name)
        return Json(model)

    @app.get("/health")
    async def health() -> Response:
        return Json({"status": "ok"}) if loop.healthy else Json({"status": "failed"}, 503)

    @app.get("/ready")
    async def ready() -> Response:
        status = "stopping" if loop.stopping else "ready" if loop.ready else "loading"
        return Json({"status": status}, 200 if status == "ready" else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(loop.metrics.text(), media_type=loop.metrics.content_type)

    for path, (content, kind) in files().items():
        app.get(path)(_sends(content, kind))

    @app.exception_handler(BadRequestError)
    async def bad(request: Request, problem: BadRequestError) -> Response:
        return Json(error(problem.message, problem.status, problem.param, problem.code), problem.status)

    @app.exception_handler(Exception)
    async def bug(request: Request, problem: Exception) -> Response:
        if not isinstance(problem, SlowReaderError):
            # Without its message, which may quote a prompt.
            trace = f"{type(problem).__name__}\n{''.join(format_tb(problem.__traceback__))}"
            service.log.write(path=request.url.path, status=500, outcome="failed", error=trace)
        return Json(error("the server failed; its log says how", 500), 500)

    @app.exception_handler(HTTPException)
    async def other(request: Request, problem: HTTPException) -> Response:
        message = f"{request.method} {request.url.path} is not served here; GET /v1/models tells what is"
        return Json(error(message, problem.status_code), problem.status_code, headers=problem.headers)

    return Guard(app, service.limits, service.log)


def _sends(content: bytes, kind: str) -> Callable[[], Awaitable[Response]]:
    """The handler of a file of the page."""

    async def send() -> Response:
        return Response(content, media_type=kind, headers=HEADERS)

    return send


async def _answer(
    service: Service, pieces: Pieces, http: Request, kind: type[ChatRequest] | type[CompletionRequest]
) -> Response:
    """Answer a request, whole or as a stream."""
    loop = service.loop
    body = await http.body()
    entry, late = service.log.entry(http.url.path), time.monotonic() + service.timeout
    news, asyncio_loop = asyncio.Event(), asyncio.get_running_loop()

    def notify() -> None:
        with suppress(RuntimeError):  # the server has stopped
            asyncio_loop.call_soon_threadsafe(news.set)

    try:
        request = parse(kind, body)
        plan = await _plan(service, request, http)
        tickets = [Ticket(job, pieces, notify) for job in plan.jobs]
        loop.submit(tickets)
    except BadRequestError as problem:
        loop.metrics.refuse()
        entry.refused(problem.status, problem.message)
        raise
    except FullError as full:
        loop.metrics.refuse()
        entry.refused(429, "the queue is full")
        message = f"the queue is full; try again in {full.retry_after} seconds"
        return Json(error(message, 429), 429, headers={"Retry-After": str(full.retry_after)})
    except StoppingError:
        loop.metrics.refuse()
        entry.refused(503, "stopping")
        return Json(failed(STOPPING), 503, headers={"Retry-After": "5"})
    entry.accepted(plan, request)
    following = Following(service, tickets, news, late)
    writer = Writer.of(plan, tickets, service.terms.name, service.sampler, service.cache)

    def end() -> None:
        following.give_up()
        entry.ended(tickets)

    try:
        async with _while_there(http, following.give_up):
            # A stream begins once the engine has accepted the request: until then it can be an error of its own.
            until = following.admitted if plan.stream else following.answered
            while not until() and following.failure is None:
                await following.wait()
    except BaseException:
        end()
        raise
    if plan.stream and following.failure is None:
        return EventStream(_stream(following, writer), end)
    end()
    if (failure := following.failure) is not None:
        retry = {"Retry-After": "5"} if failure.status == 503 else None
        return Json(failed(failure), failure.status, headers=retry)
    return Json(writer.whole([ticket.answer for ticket in tickets if ticket.answer is not None]))


async def _plan(service: Service, request: ChatRequest | CompletionRequest, http: Request) -> Plan:
    """What a request asks for, within its time, and while its client is there and the server runs.

    Raises:
        BadRequestError: it cannot be carried out.
        FullError: too many others wait for their formats.
    """
    plan, loop = service.terms.plan, service.loop
    try:
        async with asyncio.timeout(service.timeout):
            if request.response_format in (None, {"type": "text"}):
                return await run_in_threadpool(plan, request)
            if len(service.planned) >= loop.most:
                raise FullError(SECONDS)
            planned = asyncio.get_running_loop().run_in_executor(service.formats, plan, request)
            service.planned.add(planned)
            planned.add_done_callback(service.planned.discard)
            async with _while_there(http, planned.cancel):
                return await planned
    except TimeoutError:
        failure = service.late
    except asyncio.CancelledError:
        failure = STOPPING if loop.stopping else GONE
    raise BadRequestError(failure.message, status=failure.status)


@asynccontextmanager
async def _while_there(http: Request, leave: Callable[[], object]) -> AsyncIterator[None]:
    """Call a function once the client is gone."""

    async def gone() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass
        leave()

    watch = asyncio.create_task(gone())
    try:
        yield
    finally:
        watch.cancel()


class Following:
    """Waits for the news of a request's choices.

    Args:
        service: the server.
        tickets: the choices.
        news: set whenever one of them has news.
        until: when it takes too long (`time.monotonic`).
    """

    def __init__(self, service: Service, tickets: Sequence[Ticket], news: asyncio.Event, until: float) -> None:
        self._service, self.tickets, self._news, self._until = service, tickets, news, until

    def admitted(self) -> bool:
        """Whether the engine has accepted all choices."""
        return all(ticket.admitted for ticket in self.tickets)

    def answered(self) -> bool:
        """Whether all choices are finished."""
        return all(ticket.answer is not None for ticket in self.tickets)

    async def wait(self) -> None:
        """Wait for news; a request that takes too long ends with a failure."""
        try:
            async with asyncio.timeout(max(0.0, self._until - time.monotonic())):
                await self._news.wait()
        except TimeoutError:
            self.give_up(self._service.late)
        self._news.clear()

    def give_up(self, failure: Failure | None = None) -> None:
        """End what is still running."""
        for ticket in self.tickets:
            self._service.loop.cancel(ticket, failure)

    @property
    def failure(self) -> Failure | None:
        """The first failure of a choice."""
        return first_failure(self.tickets)

    def take(self) -> list[tuple[int, News]]:
        """The news of each choice that has any."""
        found = [(index, ticket.news()) for index, ticket in enumerate(self.tickets)]
        return [(index, news) for index, news in found if news.text or news.steps or news.last]


async def _stream(following: Following, writer: Writer) -> AsyncGenerator[str, None]:
    """The answer as server-sent events."""
    answers: dict[int, Answer] = {}
    for index in range(len(following.tickets)):
        yield event(writer.first(index))
    while len(answers) < len(following.tickets):
        for index, news in following.take():
            if index in answers:
                continue
            text = news if news.answer is None and news.text else None
            for step in news.steps[:-1]:
                yield event(writer.part(index, None, step))
            if news.steps or text:
                yield event(writer.part(index, text, news.steps[-1] if news.steps else None))
            if news.failure is not None:
                yield event(failed(news.failure))
                return
            if news.answer is not None:
                answers[index] = news.answer
                yield event(writer.last(index, news, news.answer))
        if len(answers) < len(following.tickets):
            await following.wait()
    if writer.plan.usage:
        yield event(writer.closing([answers[index] for index in sorted(answers)]))
    yield event("[DONE]")
