"""A request on its way through the server: what is asked of the engine, and what comes back step by step."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from dllm.checks import renamed
from dllm.decoding.ending import count_tokens, cut, decode_text, without_beginning
from dllm.decoding.request import Request
from dllm.decoding.step import Answer, Event
from dllm.serving.events import Pieces, TextLogprobs, TokenLogprob, begun, changed, logprobs

_SHOWN = 256  # unread steps after which a slow client is no longer told what is provisional
_PARTIAL = "\ufffd"  # decoded from tokens that hold part of a character
# Options of the engine, as a client calls them.
NAMES = {"gen_length": "max_tokens", "prompts": "prompt"} | {
    name: f"dllm.{name}"
    for name in ("block_length", "top_k", "tempered_confidence", "eos_suppression", "stop_at_eos", "max_forwards")
}


@dataclass(frozen=True)
class SamplerChoice:
    """A policy that a request chose.

    Attributes:
        name: of conf/sampler.
        options: those that differ from the defaults of that name, in order of their names.
    """

    name: str
    options: tuple[tuple[str, bool | int | float], ...] = ()


@dataclass(frozen=True)
class Job:
    """What a client asks of the engine: one choice of an answer.

    Attributes:
        request: of the engine.
        prompt: tokens that the client gave.
        middle: first position and number of the masks whose text is the answer; None for the whole text.
        sampler: the policy; None for the server's own.
        text: tell the text while it becomes final.
        steps: tell what each step changes.
        top_logprobs: tell log-probabilities: of the committed token and of this many others; None for none.
    """

    request: Request
    prompt: int
    middle: tuple[int, int] | None = None
    sampler: SamplerChoice | None = None
    text: bool = False
    steps: bool = False
    top_logprobs: int | None = None

    def completion(self, tokens: NDArray[np.int64]) -> NDArray[np.int64]:
        """The part of a row, without padding, whose text is the answer."""
        if self.middle is not None:
            return tokens[self.middle[0] : self.middle[0] + self.middle[1]]
        return tokens[self.request.answer_start :]


@dataclass(frozen=True)
class Failure:
    """Why a request has no answer.

    Attributes:
        status: of HTTP.
        message: for the client.
        outcome: for the statistics: failed, cancelled, refused or timeout.
    """

    status: int
    message: str
    outcome: str = "failed"


@dataclass(frozen=True)
class News:
    """What happened to a request since the client last looked.

    Attributes:
        text: that became final.
        logprobs: of the tokens whose text that completes, and with the answer of all others; None without any.
        steps: what each step changed, of a request with `steps`.
        answer: once it is finished.
        failure: once it failed.
    """

    text: str
    logprobs: TextLogprobs | None
    steps: Sequence[Mapping[str, Any]]
    answer: Answer | None
    failure: Failure | None

    @property
    def last(self) -> bool:
        """Whether nothing else will happen."""
        return self.answer is not None or self.failure is not None


class FinalText:
    """The text of a row that no later step can change, from the left.

    Args:
        tokenizer: decodes tokens; None gives no text.
        stops: stop strings: a part at the end that may begin one is kept back.
        eos_token_ids: ids that end the text.

    Attributes:
        told: the text so far.
        kept: whether the complete text began with it.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase | None, stops: Sequence[str], eos_token_ids: Sequence[int]
    ) -> None:
        self._tokenizer, self._stops, self._eos = tokenizer, stops, eos_token_ids
        self.told, self.kept, self._read = "", True, 0

    def grow(self, tokens: NDArray[np.int64]) -> str:
        """The text that is new.

        Args:
            tokens: all final ones, from the first.
        """
        if len(tokens) <= self._read:
            return ""
        self._read = len(tokens)
        text, _ = cut(self._tokenizer, tokens, self._stops, self._eos)
        if (
            self._tokenizer is not None
            and (sure := without_beginning(self._tokenizer, tokens, self._stops, self._eos)) is not None
        ):
            text = sure
        return self._tell((text or "").rstrip(_PARTIAL))

    def finish(self, text: str) -> str:
        """The rest of the complete text; nothing if it does not begin with what was told."""
        self.kept = text.startswith(self.told)
        return self._tell(text)

    def within(self, tokens: NDArray[np.int64], least: int = 0) -> int:
        """How many tokens have all of their text in what was told.

        Args:
            tokens: all final ones, from the first.
            least: how many had it before.
        """
        count = int(count_tokens(tokens[None], self._eos)[0])
        # What was not told is part of a character or of a stop string: few tokens.
        while count > least and not self.told.startswith(decode_text(self._tokenizer, tokens[:count]) or ""):
            count -= 1
        return count

    def _tell(self, text: str) -> str:
        if not text.startswith(self.told):
            return ""
        new, self.told = text[len(self.told) :], text
        return new


@dataclass(eq=False)
class Ticket:
    """A request in the queue or in the engine. The engine's thread writes, the client's reads.

    Attributes:
        job: what is asked.
        pieces: texts of single tokens.
        notify: called from the engine's thread whenever there is news.
        admitted: whether its engine has accepted it.
        accepted: when the request came, in seconds of the monotonic clock.
        entered: when its first step began; None until that has ended.
        committed: when its first token was committed.
        written: when the first text was final.
        ended: when it was finished or failed.
        id: in its engine; None before it is there.
        logprobs: of the committed tokens, by position.
    """

    job: Job
    pieces: Pieces
    notify: Callable[[], None]
    admitted: bool = False
    accepted: float = field(default_factory=time.monotonic)
    entered: float | None = None
    committed: float | None = None
    written: float | None = None
    ended: float | None = None
    id: int | None = None
    logprobs: dict[int, TokenLogprob] = field(default_factory=dict)

    def __post_init__(self) -> None:
        request = self.job.request
        ends = () if request.infill and self.job.middle is None else request.eos_token_ids
        self._text = FinalText(self.pieces.tokenizer, request.stops, ends)
        self._lock, self._new, self._steps = Lock(), "", deque[Mapping[str, Any]]()
        self._told: list[TokenLogprob] = []  # those of the text so far
        self._sent = 0  # of them
        self._answer: Answer | None = None
        self._failure: Failure | None = None

    def follow(self, event: Event, begun_at: float) -> None:
        """Take in one step, which began at this time of the monotonic clock."""
        now, step, entry, job = time.monotonic(), event.step, event.entry, self.job
        steps: list[Mapping[str, Any]] = []
        origin = int(step.padding[entry]) + job.request.answer_start
        if self.entered is None:
            self.entered = begun_at
            if job.steps:
                steps.append(begun(event, origin, job.request.infill, self.pieces))
        if self.committed is None and step.change.committed[entry].any():
            self.committed = now
        if job.steps:
            steps.append(changed(event, origin, self.pieces, brief=len(self._steps) > _SHOWN))
        if job.top_logprobs is not None:
            self.logprobs |= logprobs(event, origin, job.top_logprobs)
        answer, text = event.answer, ""
        told = self._told
        if answer is not None and answer.error is None:
            text = self._text.finish(self.text(answer))
            told = self._logprobs(self.tokens(answer))
        elif job.text and answer is None:
            settled = int(step.change.settled[entry])
            tokens = job.completion(step.tokens[entry, int(step.padding[entry]) : settled])
            text = self._text.grow(tokens)
            if text and job.top_logprobs is not None:
                told = self._logprobs(tokens[: self._text.within(tokens, len(told))].tolist())
        if text and self.written is None:
            self.written = now
        if answer is not None:
            self.ended = now
        with self._lock:
            if self._failure is not None:  # the client gave up
                return
            self._new += text
            self._told = told
            self._steps.extend(steps)
            if answer is not None and answer.error is not None:
                limited = answer.error.startswith("max_forwards=")
                self._failure = Failure(400 if limited else 500, renamed(answer.error, NAMES))
            else:
                self._answer = answer
        if text or steps or answer is not None:
            self.notify()

    def fail(self, failure: Failure) -> None:
        """End without an answer; no effect on a request that has ended."""
        with self._lock:
            if self.done:
                return
            self._failure, self.ended = failure, time.monotonic()
        self.notify()

    @property
    def answer(self) -> Answer | None:
        """The answer, once it is finished."""
        return self._answer

    @property
    def failure(self) -> Failure | None:
        """Why there is none."""
        return self._failure

    @property
    def kept(self) -> bool:
        """Whether the complete text begins with what was told before."""
        return self._text.kept

    @property
    def done(self) -> bool:
        """Whether it has ended."""
        return self._answer is not None or self._failure is not None

    @property
    def outcome(self) -> str:
        """What became of it, for the statistics."""
        return "finished" if self._failure is None else self._failure.outcome

    @property
    def generated(self) -> int:
        """Tokens of the answer up to its end; 0 without one."""
        answer = self._answer
        return 0 if answer is None else answer.tokens if self.job.middle is None else len(self.tokens(answer))

    def news(self) -> News:
        """What happened since the last call."""
        with self._lock:
            now = self._told[self._sent :]
            found = TextLogprobs(now, self._offsets(self._told)[self._sent :]) if now else None
            news = News(self._new, found, tuple(self._steps), self._answer, self._failure)
            self._new, self._sent = "", len(self._told)
            self._steps.clear()
        return news

    def text_logprobs(self, answer: Answer) -> TextLogprobs | None:
        """The log-probabilities of the tokens of an answer; None where they are not asked for."""
        if self.job.top_logprobs is None:
            return None
        told = self._logprobs(self.tokens(answer))
        return TextLogprobs(told, self._offsets(told))

    def _offsets(self, told: Sequence[TokenLogprob]) -> list[int]:
        return self.pieces.offsets([each.token for each in told])

    def _logprobs(self, tokens: Sequence[int]) -> list[TokenLogprob]:
        """Those of the first tokens of the text; none where they are not asked for."""
        if self.job.top_logprobs is None:
            return []
        first = 0 if self.job.middle is None else self.job.middle[0]
        return [self.logprobs.get(place, TokenLogprob(token, None)) for place, token in enumerate(tokens, start=first)]

    def text(self, answer: Answer) -> str:
        """The text of an answer."""
        if self.job.middle is None:
            return answer.text or ""
        return cut(self.pieces.tokenizer, self._middle(answer), (), self.job.request.eos_token_ids)[0] or ""

    def _middle(self, answer: Answer) -> NDArray[np.int64]:
        # The answer to an infilled text begins with its first token.
        return self.job.completion(np.asarray(answer.completion, dtype=np.int64))

    def tokens(self, answer: Answer) -> list[int]:
        """The tokens of an answer, up to and including its end."""
        request = self.job.request
        if self.job.middle is None:
            return answer.completion if request.infill else answer.completion[: answer.tokens]
        tokens = self._middle(answer)
        return tokens[: cut(self.pieces.tokenizer, tokens, (), request.eos_token_ids)[1]].tolist()

    def ended_itself(self, answer: Answer) -> bool:
        """Whether the text ended before its room did: by end-of-text or a stop string."""
        tokens, request = self.tokens(answer), self.job.request
        if request.constraint is not None or (request.infill and self.job.middle is None):
            return True
        room = len(answer.completion) if self.job.middle is None else self.job.middle[1]
        if len(tokens) < room or tokens[-1] in request.eos_token_ids:
            return True
        # A stop string may be completed by the very last token.
        whole = cut(self.pieces.tokenizer, np.asarray(tokens, dtype=np.int64), (), request.eos_token_ids)[0]
        return bool(request.stops) and whole != answer.text
