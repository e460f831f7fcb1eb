"""Client side of the HTTP interface of `dllm serve`: addresses, requests, streams of events and their errors."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import isfinite
from typing import Any, TypeVar
from urllib.parse import urlsplit

from dllm.checks import first_line
from dllm.files import parse_json

try:
    import httpx
except ImportError:
    raise ValueError("a server is asked through httpx: pip install 'dllm-samplers[serve]'") from None

_LOOPBACK = ("localhost", "127.", "::1")
_LONGEST_EVENT = 1 << 24  # bytes
_CONNECT_SECONDS = 10.0
_MOST_SLOTS = 4096  # that are believed
_LARGEST_COUNT = 1 << 53

AnyClient = TypeVar("AnyClient", httpx.Client, httpx.AsyncClient)


class ServerError(ValueError):
    """A request without a complete answer.

    Args:
        message: what happened, in one line.
        status: HTTP status; None if the server gave none, or broke off after it.
        retry_after: seconds after which to ask again, as the server says.
    """

    def __init__(self, message: str, status: int | None = None, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.status, self.retry_after = status, retry_after


@dataclass(frozen=True)
class Model:
    """What a server says of its model.

    Attributes:
        id: name.
        chat: whether it takes chats; servers other than `dllm serve` are assumed to.
        slots: requests decoded together; None if unknown.
    """

    id: str
    chat: bool = True
    slots: int | None = None


def settings_of(server: str, api_key: str | None, seconds: float | None) -> dict[str, Any]:
    """Arguments for `httpx.Client` and `httpx.AsyncClient`.

    Args:
        server: address, as the user gave it.
        api_key: sent as a bearer token; None for none.
        seconds: maximum time between two pieces of an answer; None for no limit.

    Raises:
        ValueError: not an address, or a key that no header can hold, or that the address leaves no room for.
    """
    url, problem = server.rstrip("/").removesuffix("/v1"), "is not the address of a server; use http://HOST:PORT"
    try:
        parts = urlsplit(url)
        fits = parts.scheme in ("http", "https") and parts.hostname and not parts.query and not parts.fragment
        name = httpx.URL(url, port=parts.port).host
        if ":" not in name:
            name.encode("idna")
    except (ValueError, httpx.InvalidURL):
        fits = False
    if not fits or not url.isascii() or any(character.isspace() for character in url):
        raise ValueError(f"server={shown(server)!r} {problem}")
    if api_key is not None and not (api_key.isascii() and api_key.isprintable() and api_key.strip()):
        raise ValueError("api_key is empty or has characters other than printable ASCII; give the key of the server")
    if api_key is not None and parts.username is not None:
        raise ValueError("server has a user name in it, and api_key (or DLLM_API_KEY) is given, too; give one of them")
    return {
        "base_url": url,
        "headers": {} if api_key is None else {"Authorization": f"Bearer {api_key}"},
        "timeout": httpx.Timeout(seconds, connect=_CONNECT_SECONDS, pool=None),
        # A proxy does not reach this machine's own addresses.
        "trust_env": not str(parts.hostname).startswith(_LOOPBACK),
    }


def connect(server: str, api_key: str | None, seconds: float | None) -> httpx.Client:
    """A client for one request at a time; arguments as for `settings_of`."""
    return opened(httpx.Client, **settings_of(server, api_key, seconds))


def opened(kind: type[AnyClient], **settings: Any) -> AnyClient:
    """A client.

    Raises:
        ValueError: what the environment says of proxies and certificates cannot be used.
    """
    try:
        return kind(**settings)
    except (ImportError, OSError, ValueError, httpx.InvalidURL) as error:
        variables = "HTTP_PROXY, HTTPS_PROXY, ALL_PROXY, NO_PROXY and SSL_CERT_FILE"
        raise ValueError(
            f"the proxy or the certificates of the environment cannot be used ({first_line(error)}); check {variables}"
        ) from None


def shown(server: str) -> str:
    """An address without the user name and the password in it."""
    return re.sub(r"(?<=//)[^/?#]*@", "", server)


def model_of(content: bytes) -> Model:
    """The model in an answer to GET /v1/models.

    Raises:
        ServerError: it names none.
    """
    try:
        entry = parse_json(content)["data"][0]
        own, name = entry.get("dllm") or {}, mended(entry["id"])
        slots = _count(own.get("slots"))
        return Model(name, bool(own.get("chat", True)), min(slots, _MOST_SLOTS) if slots else None)
    except (ValueError, LookupError, TypeError, AttributeError):
        raise ServerError("/v1/models names no model; give the address of an OpenAI-compatible server") from None


def mended(text: str) -> str:
    """Text that can be encoded, with U+FFFD for each lone surrogate; JSON may hold those.

    Raises:
        AttributeError: it is no text.
    """
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _count(value: Any) -> int | None:
    """A number of things, as a server tells it; None if it is none."""
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _LARGEST_COUNT else None


def request(
    model: str, asked: str | Sequence[Mapping[str, Any]], /, max_tokens: int | None, **more: Any
) -> tuple[str, dict[str, Any]]:
    """Path and body of a request that streams.

    Args:
        model: name.
        asked: a prompt or chat messages.
        max_tokens: of the answer; None for the server's default.
        **more: further fields.
    """
    chat = not isinstance(asked, str)
    body: dict[str, Any] = {"model": model, "messages" if chat else "prompt": asked, "stream": True}
    body |= {"stream_options": {"include_usage": True}, **({} if max_tokens is None else {"max_tokens": max_tokens})}
    return "/v1/chat/completions" if chat else "/v1/completions", body | more


class Reader:
    """Puts a stream of server-sent events together.

    Attributes:
        tokens: of the answer, as the server counts them; None before it did.
        nfe: forwards for the answer; None before the server told them.
        done: whether the stream is complete.
    """

    def __init__(self) -> None:
        self._rest = b""
        self.tokens: int | None = None
        self.nfe: int | None = None
        self.done = self._begun = self._answered = False

    def feed(self, data: bytes) -> str:
        """Take the next bytes; return the text that they complete.

        Raises:
            ServerError: an error of the server within the stream, or something else than events.
        """
        # Lines of JSON may hold every separator but a newline, at which str.splitlines would break them.
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > _LONGEST_EVENT:
            raise ServerError("the server sent an event that does not end")
        return "".join(self._take(line[5:].strip()) for line in lines if line.startswith(b"data:"))

    def end(self) -> None:
        """Check that the stream was complete.

        Raises:
            ServerError: it was not.
        """
        if not self.done:
            why = "" if self._begun else " (no event came; give the address of an OpenAI-compatible server)"
            raise ServerError(f"the server ended the answer before it was complete{why}")

    def _take(self, event: bytes) -> str:
        self._begun = True
        if event == b"[DONE]":
            self.done = self._answered
            return ""
        try:
            chunk = parse_json(event)
        except ValueError:
            chunk = None
        if not isinstance(chunk, dict):
            raise ServerError("the server sent an event that is not a JSON object")
        if chunk.get("error"):
            raise ServerError(f"the server ended the answer: {_message(chunk) or 'it does not say why'}")
        usage, own = chunk.get("usage"), chunk.get("dllm")
        if isinstance(own, dict) and "nfe" in own:
            nfe = own["nfe"]
            self.nfe = _count(nfe[0] if isinstance(nfe, list) and nfe else nfe)
            self.tokens = self.tokens if (told := _count(own.get("tokens"))) is None else told
        if isinstance(usage, dict) and (told := _count(usage.get("completion_tokens"))) is not None:
            self.tokens = told
        choices = chunk.get("choices")
        choice = choices[0] if isinstance(choices, list) and choices else None
        if not isinstance(choice, dict):
            return ""
        self._answered = True
        delta = choice.get("delta")
        text = delta.get("content") if isinstance(delta, dict) else choice.get("text")
        return mended(text) if isinstance(text, str) else ""


def refusal(status: int, headers: Mapping[str, str], content: bytes) -> ServerError:
    """The error of an answer with a status other than 200."""
    try:
        said = _message(parse_json(content))
    except ValueError:
        said = ""
    message = f"the server answered {status}{': ' if said else ''}{said}"
    try:
        wait: float | None = max(0.0, float(headers.get("retry-after", "")))
    except ValueError:
        wait = None
    wait = wait if wait is not None and isfinite(wait) else None
    if status in (429, 503) and wait is not None and "try again" not in said:
        message += f"; try again in {wait:g} s"
    elif status in (401, 403):
        message += "; give api_key, or set DLLM_API_KEY"
    return ServerError(message, status, wait)


@contextmanager
def naming_failures(server: str) -> Iterator[None]:
    """Report requests that fail on their way: no connection, a closed one, or silence.

    Args:
        server: its address, as the user gave it.

    Raises:
        ServerError: such a request.
    """
    try:
        yield
    except httpx.HTTPError as error:
        raise ServerError(describe(error, server)) from None


def describe(error: httpx.HTTPError, server: str) -> str:
    """A failed request in one line."""
    server = shown(server)
    if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
        reason = "no answer in time" if isinstance(error, httpx.ConnectTimeout) else first_line(error)
        return f"{server} cannot be reached ({reason}); start it with `dllm serve`"
    if isinstance(error, httpx.TimeoutException):
        return f"{server} did not answer in time"
    return f"{server} broke off ({first_line(error)})"


def _message(answer: Any) -> str:
    """The message of an error object; empty if it has none."""
    error = answer.get("error", answer.get("detail")) if isinstance(answer, dict) else None
    message = error.get("message") if isinstance(error, dict) else error
    return mended(" ".join(message.split())) if isinstance(message, str) else ""
