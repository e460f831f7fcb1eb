"""One line of JSON for each request: what it cost and how it ended, without its text unless that is wanted."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from secrets import token_hex
from typing import Any, TextIO

from dllm.serving.loop import first_failure
from dllm.serving.protocol import ChatRequest, CompletionRequest, Plan
from dllm.serving.ticket import Ticket


class Log:
    """Writes lines to a stream.

    Args:
        prompts: with prompts and answers.
        stream: where to; None for stderr.
    """

    def __init__(self, prompts: bool = False, stream: TextIO | None = None) -> None:
        self.prompts, self._stream = prompts, stream

    def entry(self, path: str) -> Entry:
        """The entry of a request."""
        return Entry(self, path)

    def write(self, **fields: Any) -> None:
        """Write one line; a log that cannot be written, such as a closed pipe or a full disk, costs no answer."""
        moment = datetime.now(UTC).isoformat(timespec="milliseconds")
        with suppress(OSError, ValueError):  # the latter of a closed file
            print(json.dumps({"time": moment, **fields}), file=self._stream or sys.stderr, flush=True)


class Entry:
    """What the log says of one request.

    Args:
        log: to write to.
        path: of the request.
    """

    def __init__(self, log: Log, path: str) -> None:
        self._log, self._started = log, time.monotonic()
        self._fields: dict[str, Any] = {"request": token_hex(6), "path": path}

    def refused(self, status: int, why: str) -> None:
        """The request did not reach the queue."""
        self._log.write(**self._fields, status=status, outcome="refused", reason=why if self._log.prompts else status)

    def accepted(self, plan: Plan, request: ChatRequest | CompletionRequest) -> None:
        """The request is in the queue."""
        self._fields |= {"stream": plan.stream, "choices": len(plan.jobs), "prompt_tokens": plan.prompts}
        if self._log.prompts:
            asked = request.messages if isinstance(request, ChatRequest) else request.prompt
            self._fields["prompt"] = asked

    def ended(self, tickets: Sequence[Ticket]) -> None:
        """The request has ended."""
        outcomes = [ticket.outcome for ticket in tickets]
        failure = first_failure(tickets)
        answers = [ticket.answer for ticket in tickets if ticket.answer is not None]
        fields = {
            "status": 200 if failure is None else failure.status,
            "outcome": next((each for each in outcomes if each != "finished"), "finished"),
            "tokens": sum(ticket.generated for ticket in tickets),
            "nfe": sum(answer.nfe for answer in answers),
            "seconds": round(time.monotonic() - self._started, 4),
            "queued_seconds": round(max((t.entered or t.accepted) - t.accepted for t in tickets), 4),
        }
        if self._log.prompts:
            fields["answers"] = [answer.text for answer in answers]
        self._log.write(**self._fields, **fields)
