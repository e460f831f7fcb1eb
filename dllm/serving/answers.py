"""The engine's answers as OpenAI's objects: complete ones, and the chunks of a stream."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from secrets import token_hex
from typing import Any

from dllm.decoding.step import Answer
from dllm.serving.events import TextLogprobs
from dllm.serving.protocol import Plan, named
from dllm.serving.ticket import Failure, News, Ticket


@dataclass(frozen=True)
class Writer:
    """Writes the answer to one request.

    Attributes:
        plan: the request.
        tickets: one for each choice.
        name: of the model.
        sampler: name of the server's own policy.
        cache: name of the cache.
        id: of the answer.
        created: seconds since 1970.
    """

    plan: Plan
    tickets: Sequence[Ticket]
    name: str
    sampler: str
    cache: str
    id: str
    created: int

    @classmethod
    def of(cls, plan: Plan, tickets: Sequence[Ticket], name: str, sampler: str, cache: str) -> Writer:
        """A writer with a new id."""
        kind = "chatcmpl" if plan.chat else "cmpl"
        return cls(plan, tickets, name, sampler, cache, f"{kind}-{token_hex(12)}", int(time.time()))

    def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """The answer in one object."""
        choices = []
        for index, (ticket, answer) in enumerate(zip(self.tickets, answers, strict=True)):
            text = ticket.text(answer)
            message = {"role": "assistant", "content": text, "refusal": None}
            said: dict[str, Any] = {"message": message} if self.plan.chat else {"text": text}
            choices.append({
                "index": index,
                **said,
                "logprobs": self._logprobs(ticket, ticket.text_logprobs(answer)),
                "finish_reason": _reason(ticket, answer),
            })  # fmt: skip
        kind = "chat.completion" if self.plan.chat else "text_completion"
        return {
            **self._head(kind),
            "choices": choices,
            "usage": self.usage(answers),
            "dllm": self.told(range(len(answers)), answers),
        }

    def first(self, index: int) -> dict[str, Any]:
        """The chunk that begins a choice."""
        return self._chunk(index, {"role": "assistant", "content": ""} if self.plan.chat else "")

    def part(self, index: int, news: News | None, step: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """A chunk with the text of some news, and what a step changed."""
        chunk = self._text(index, news)
        return chunk if step is None else chunk | {"dllm": {"choice": index, **step}}

    def last(self, index: int, news: News, answer: Answer) -> dict[str, Any]:
        """The chunk that ends a choice; with the whole text, where that does not begin with what was sent."""
        ticket, chunk = self.tickets[index], self._text(index, news)
        chunk["choices"][0]["finish_reason"] = _reason(ticket, answer)
        chunk["dllm"] = {"choice": index, **self.told([index], [answer])}
        if not ticket.kept:
            chunk["dllm"]["text"] = ticket.text(answer)
        return chunk

    def closing(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """The chunk with the usage, after all choices."""
        return {**self._head(self._chunks), "choices": [], "usage": self.usage(answers)}

    def usage(self, answers: Sequence[Answer]) -> dict[str, int]:
        """Tokens of the prompts, each counted once, and of the texts up to their end."""
        generated = sum(ticket.generated for ticket in self.tickets)
        return {
            "prompt_tokens": self.plan.prompts,
            "completion_tokens": generated,
            "total_tokens": self.plan.prompts + generated,
        }

    def told(self, indices: Sequence[int], answers: Sequence[Answer]) -> dict[str, Any]:
        """What some choices cost."""
        tickets = [self.tickets[index] for index in indices]
        queued = max((ticket.entered or ticket.accepted) - ticket.accepted for ticket in tickets)
        seconds = max((ticket.ended or 0.0) - ticket.accepted for ticket in tickets)
        tokens = sum(ticket.generated for ticket in tickets)
        nfe = [answer.nfe for answer in answers]
        choice = tickets[0].job.sampler
        return {
            "nfe": nfe,
            "guide_nfe": [answer.guide_nfe for answer in answers],
            "tokens": tokens,
            "tokens_per_forward": round(tokens / max(1, sum(nfe)), 3),
            "tokens_per_second": round(tokens / max(seconds, 1e-9), 1),
            "seconds": round(seconds, 4),
            "queued_seconds": round(queued, 4),
            "seconds_to_first_text": max(
                (round(ticket.written - ticket.accepted, 4) for ticket in tickets if ticket.written is not None),
                default=None,
            ),
            "computed_positions": sum(answer.positions for answer in answers),
            "reused_positions": sum(answer.reused for answer in answers),
            "sampler": self.sampler if choice is None else choice.name,
            "cache": self.cache,
        }

    @property
    def _chunks(self) -> str:
        return "chat.completion.chunk" if self.plan.chat else "text_completion"

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.name}

    def _chunk(self, index: int, said: Any) -> dict[str, Any]:
        field = "delta" if self.plan.chat else "text"
        choice = {"index": index, field: said, "logprobs": None, "finish_reason": None}
        return {**self._head(self._chunks), "choices": [choice]}

    def _text(self, index: int, news: News | None) -> dict[str, Any]:
        """A chunk with the text of some news, and the log-probabilities of its tokens."""
        text = "" if news is None else news.text
        chunk = self._chunk(index, ({"content": text} if text else {}) if self.plan.chat else text)
        if news is not None:
            chunk["choices"][0]["logprobs"] = self._logprobs(self.tickets[index], news.logprobs)
        return chunk

    def _logprobs(self, ticket: Ticket, told: TextLogprobs | None) -> dict[str, Any] | None:
        """The log-probabilities of a text's tokens, in the form of OpenAI's chats or completions."""
        if told is None:
            return None
        pieces, found = ticket.pieces, told.tokens

        def entry(token: int, logprob: float | None) -> dict[str, Any]:
            return {"token": pieces.shown(token), "logprob": logprob, "bytes": [*pieces.written(token)]}

        if self.plan.chat:
            content = [
                {**entry(each.token, each.logprob), "top_logprobs": [entry(*other) for other in each.top]}
                for each in found
            ]
            return {"content": content, "refusal": None}
        top = [{pieces.shown(token): share for token, share in each.top} for each in found]
        return {
            "tokens": [pieces.shown(each.token) for each in found],
            "token_logprobs": [each.logprob for each in found],
            "top_logprobs": top if ticket.job.top_logprobs else None,
            "text_offset": told.offsets,
        }


def _reason(ticket: Ticket, answer: Answer) -> str:
    return "stop" if ticket.ended_itself(answer) else "length"


def event(content: Mapping[str, Any] | str) -> str:
    """A server-sent event."""
    return f"data: {content if isinstance(content, str) else dumps(content)}\n\n"


def dumps(content: Any) -> str:
    """JSON in one line; a lone surrogate, which is not valid text, is escaped."""
    return json.dumps(content, ensure_ascii=True, separators=(",", ":"), allow_nan=False)


def error(message: str, status: int, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """OpenAI's error object."""
    kind = "authentication_error" if status == 401 else "rate_limit_error" if status == 429 else None
    kind = kind or ("invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def failed(failure: Failure) -> dict[str, Any]:
    """The error object of a request without an answer."""
    return error(failure.message, failure.status, named(failure.message))
