"""OpenAI's requests as jobs of the engine, and its answers as OpenAI's objects.

Fields that a denoiser cannot honour are accepted at the value that changes nothing, and refused at any other: no option
is silently without effect.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

import pydantic
from pydantic import BaseModel, ConfigDict, Field

from dllm.checks import SEEDS, number, renamed
from dllm.decoding.options import Options, make_request, parse_options
from dllm.decoding.prompts import encode_one, is_chat
from dllm.escape import brief
from dllm.models.attention import BlockCausal
from dllm.models.loading import LanguageModel
from dllm.models.tokenizers import tokens_after
from dllm.serving.ticket import NAMES, Job, SamplerChoice
from dllm.structure import ResponseFormat

# Integers are those that tensors can hold.
Number = Annotated[bool | Annotated[int, Field(ge=-(2**63), lt=2**63)] | float, Field(union_mode="left_to_right")]
# Fields of OpenAI's clients that say nothing about the answer.
_SILENT = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls")
# Fields that would change the answer, and the values that do not.
_NOTHING: tuple[Any, ...] = (None, [], {"type": "text"})  # values of stop and response_format that change nothing
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,), "presence_penalty": (0,), "logit_bias": ({},), "best_of": (1,), "echo": (False,),
    "tools": ([],), "tool_choice": ("none", "auto"), "functions": ([],), "function_call": ("none", "auto"),
    "modalities": (["text"],), "prediction": (), "audio": (), "reasoning_effort": (), "verbosity": (),
    "web_search_options": (),
}  # fmt: skip


class BadRequestError(Exception):
    """What a client asked for cannot be answered.

    Attributes:
        message: one line that names the field, its value and what to use.
        param: the field; None if it is none.
        status: of HTTP.
        code: OpenAI's word for it; None for none.
    """

    def __init__(self, message: str, param: str | None = None, status: int = 400, code: str | None = None) -> None:
        super().__init__(message)
        self.message, self.status, self.code = message, status, code
        self.param = named(message) if param is None else param


def named(message: str) -> str | None:
    """The field that an error is about: its first word, if it is one; None if it is about none."""
    found = re.match(r"(?:unknown (?:field |option )?)?'?([a-z_]+(?:\.[a-z_]+)*)", message)
    fields = {*ChatRequest.model_fields, *CompletionRequest.model_fields, *_NEUTRAL}
    return found[1] if found and found[1].partition(".")[0] in fields else None


class Strict(BaseModel):
    """Refuses unknown fields, and numbers in quotes."""

    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(Strict):
    """Options of a stream."""

    include_usage: bool = False
    include_obfuscation: bool = False


class DllmOptions(Strict):
    """What OpenAI's interface has no word for.

    Attributes:
        events: "steps" tells what each step changes, in a stream.
        infill: fill the masks in the prompt.
        sampler: the policy, of those that the server allows; None for its own.
        sampler_options: of that policy: numbers and booleans.
        max_forwards: forwards after which an unfinished request fails.
        block_length: as in `dllm.Options`; the others, too.
    """

    PASSED: ClassVar = (
        "block_length",
        "top_k",
        "tempered_confidence",
        "eos_suppression",
        "stop_at_eos",
    )

    events: Literal["steps"] | None = None
    infill: bool = False
    sampler: str | None = None
    sampler_options: dict[str, Number] = Field(default_factory=dict)
    block_length: int | Literal["auto"] | None = None
    top_k: int | None = None
    tempered_confidence: bool | None = None
    eos_suppression: str | None = None
    stop_at_eos: bool | None = None
    max_forwards: int | None = None


class Request(Strict):
    """What chats and completions share."""

    model: str | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    n: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: dict[str, Any] | None = None
    dllm: DllmOptions = Field(default_factory=DllmOptions)


class ChatRequest(Request):
    """POST /v1/chat/completions."""

    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)


class CompletionRequest(Request):
    """POST /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]]
    suffix: str | None = None
    logprobs: int | None = Field(default=None, ge=0, le=20)


def parse(kind: type[Request], body: bytes) -> Any:
    """A request from its body.

    Raises:
        BadRequestError: not JSON, a missing, unknown or ineffective field, or a value of another type.
    """
    try:
        fields = pydantic.TypeAdapter(dict[str, Any]).validate_json(body)
    except pydantic.ValidationError as error:
        raise BadRequestError(f"the body is not a JSON object ({error.errors()[0]['msg']})") from None
    for name in _SILENT:
        fields.pop(name, None)
    for name, neutral in _NEUTRAL.items():
        if (value := fields.pop(name, None)) is not None and value not in neutral:
            raise BadRequestError(f"{name}={brief(repr(value))} is not supported; leave it out", name)
    if fields.get("dllm", ()) is None:
        del fields["dllm"]
    try:
        return kind.model_validate(fields)
    except pydantic.ValidationError as error:
        raise _complaint(error, kind, fields) from None


def _complaint(error: pydantic.ValidationError, kind: type[Request], fields: Any) -> BadRequestError:
    """The first of pydantic's errors in one line; of alternatives that all fail, what they are."""
    errors = error.errors(include_url=False)
    first = errors[0]
    path = [str(part) for part in first["loc"]]
    if first["type"] == "extra_forbidden":
        model = DllmOptions if path[0] == "dllm" else StreamOptions if path[0] == "stream_options" else kind
        name = ".".join(path)
        return BadRequestError(f"unknown field {name!r}; expected one of {', '.join(model.model_fields)}", name)
    depth = {"dllm": 3 if path[1:2] == ["sampler_options"] else 2, "stream_options": 2}.get(path[0], 1)
    name = ".".join(path[:depth])
    if first["type"] == "missing":
        return BadRequestError(f"{name} is missing; give it", name)
    same = [each["msg"] for each in errors if each["loc"][:depth] == first["loc"][:depth]]
    wanted = list(
        dict.fromkeys(
            each.removeprefix("Input should be ").replace("valid ", "").replace("integer", "whole number")
            for each in same
        )
    )
    value = fields
    for part in path[:depth]:
        value = value.get(part) if isinstance(value, dict) else first["input"]
    return BadRequestError(f"{name}={brief(repr(value))} is not valid; give {' or '.join(wanted)}", name)


@dataclass(frozen=True)
class Plan:
    """A request as the server carries it out.

    Attributes:
        jobs: one for each choice.
        prompts: tokens of all prompts.
        chat: whether it is a chat.
        stream: whether to stream, and with usage at the end.
        usage: tell the usage at the end of a stream.
    """

    jobs: Sequence[Job]
    prompts: int
    chat: bool
    stream: bool
    usage: bool


@dataclass(frozen=True)
class Terms:
    """What the server offers.

    Attributes:
        lm: the model.
        name: that clients call it by.
        defaults: options of `Engine.add` where a request has none.
        seed: of such requests; None for a random one.
        max_length: positions of a row.
        pattern: the attention pattern of the engines.
        samplers: policies that a request may choose, with their options.
        kinds: of these policies (`dllm.samplers.base.KINDS`).
        own: the server's own policy, where it is one of them.
        most_choices: answers to one request at most.
        most_open: answers that the slots and the queue hold.
    """

    lm: LanguageModel
    name: str
    defaults: Mapping[str, Any]
    seed: int | None
    max_length: int
    pattern: BlockCausal | None
    samplers: Mapping[str, Mapping[str, Any]]
    kinds: Mapping[str, str]
    own: SamplerChoice | None
    most_choices: int
    most_open: int

    def plan(self, request: ChatRequest | CompletionRequest) -> Plan:
        """What to ask of the engine for a request.

        Raises:
            BadRequestError: it cannot be carried out.
        """
        if request.model not in (None, self.name):
            raise self.unknown_model(request.model)
        count = 1 if request.n is None else request.n
        if not 1 <= count <= self.most_choices:
            raise BadRequestError(f"n={count} is out of range; use 1 to {self.most_choices}", "n")
        if request.dllm.events is not None and not request.stream:
            raise BadRequestError("dllm.events needs stream=true; set it, or leave events out", "dllm.events")
        if request.stream_options is not None and not request.stream:
            raise BadRequestError("stream_options needs stream=true; set it, or leave it out", "stream_options")
        if getattr(request, "top_logprobs", None) is not None and not request.logprobs:
            raise BadRequestError("top_logprobs needs logprobs=true; set it, or leave top_logprobs out", "top_logprobs")
        try:
            prompts, options = self._prompts(request), self._options(request)
            seed = self.seed if request.seed is None else request.seed
            number("seed", seed or 0, f"a whole number from 0 to {SEEDS - 1}", low=0, high=SEEDS - 1, whole=True)
            seed = random.randrange(SEEDS) if seed is None else seed
            if (wanted := len(prompts) * count) > self.most_open:
                raise ValueError(f"n={count} asks for {wanted} answers; this server has room for {self.most_open}")
            jobs = [
                self._job(request, ids, options, seed + place)
                for place, ids in enumerate([ids for ids in prompts for _ in range(count)])
            ]
        except ValueError as error:
            raise BadRequestError(renamed(str(error), NAMES)) from None
        usage = request.stream_options is not None and request.stream_options.include_usage
        return Plan(
            jobs,
            sum(job.prompt for job in jobs[::count]),
            isinstance(request, ChatRequest),
            bool(request.stream),
            usage,
        )

    def unknown_model(self, name: str | None) -> BadRequestError:
        """The error for another model's name."""
        message = f"model={brief(repr(name))} is not served here; use {self.name!r}"
        return BadRequestError(message, "model", 404, "model_not_found")

    def _prompts(self, request: ChatRequest | CompletionRequest) -> list[list[int]]:
        tokenizer = self.lm.tokenizer
        if isinstance(request, ChatRequest):
            if not request.messages:
                raise ValueError("messages=[] is empty; give at least one")
            for place, message in enumerate(request.messages):
                if not is_chat([message]):
                    raise ValueError(f"messages[{place}]={brief(repr(message))} is no message; give role and content")
            return [encode_one(request.messages, tokenizer, called="messages")]
        prompt: Any = request.prompt
        if not isinstance(prompt, str) and not prompt:
            raise ValueError("prompt=[] is empty; give a text")
        several = isinstance(prompt, list) and not isinstance(prompt[0], int)
        if several and len(prompt) > self.most_choices:
            raise ValueError(f"prompt has {len(prompt)} entries; give at most {self.most_choices}")
        named = {f"prompt[{place}]": each for place, each in enumerate(prompt)} if several else {"prompt": prompt}
        return [encode_one(each, tokenizer, called=name) for name, each in named.items()]

    def _options(self, request: ChatRequest | CompletionRequest) -> Options:
        given = {name: getattr(request, name) for name in ("temperature", "top_p", "stop", "response_format")}
        given |= {name: getattr(request.dllm, name) for name in DllmOptions.PASSED}
        given["gen_length"] = self._length(request)
        return parse_options(dict(self.defaults) | {name: value for name, value in given.items() if value is not None})

    def _length(self, request: ChatRequest | CompletionRequest) -> int | None:
        """The room for the answer that a request asks for."""
        other = getattr(request, "max_completion_tokens", None)
        if None not in (other, request.max_tokens):
            raise ValueError("max_tokens and max_completion_tokens are the same; give one of them")
        name, length = ("max_tokens", request.max_tokens) if other is None else ("max_completion_tokens", other)
        if length is not None:
            number(name, length, "a whole number of at least 1", low=1, whole=True)
        return length

    def _job(self, request: ChatRequest | CompletionRequest, ids: list[int], options: Options, seed: int) -> Job:
        infill, after, most = request.dllm.infill, self._suffix(request, ids), request.dllm.max_forwards
        if most is not None:
            number("max_forwards", most, "a whole number of at least 1, or null", low=1, whole=True)
        if (infill or after is not None) and request.dllm.stop_at_eos is not None:
            raise ValueError("dllm.stop_at_eos has no effect on infilling; leave it out")
        form = options.response_format
        if isinstance(form, ResponseFormat) and form.scaffold and request.dllm.stop_at_eos is not None:
            raise ValueError("dllm.stop_at_eos has no effect with response_format.scaffold; leave it out")
        if isinstance(form, ResponseFormat) and form.value_length is not None and self._length(request) is not None:
            raise ValueError("max_tokens has no effect beside response_format.value_length; leave one of them out")
        if infill:
            for name in ("stop", "max_tokens", "max_completion_tokens"):
                if getattr(request, name, None) not in _NOTHING:
                    raise ValueError(f"{name} has no effect on infilling; leave it out")
        options = replace(options, gen_length=self._fitting(request, options.gen_length, len(ids), after))
        prompt, middle = len(ids) + len(after or ()), None
        if after is not None:
            assert isinstance(options.gen_length, int)
            middle = (len(ids), options.gen_length)
            ids = [*ids, *[self.lm.backbone.mask_token_id] * options.gen_length, *after]
        elif infill:
            prompt -= ids.count(self.lm.backbone.mask_token_id)
        whole = infill or middle is not None
        made = make_request(
            self.lm, ids, replace(options, stop=None) if whole else options, seed, whole, "prompt", self.pattern,
            self.max_length,
        )  # fmt: skip
        wanted = request.logprobs
        top = getattr(request, "top_logprobs", None) or 0 if isinstance(wanted, bool) else wanted
        return Job(
            request=replace(made, max_forwards=most),
            prompt=prompt,
            middle=middle,
            sampler=self._sampler(request.dllm),
            text=bool(request.stream),
            steps=request.dllm.events == "steps",
            top_logprobs=None if wanted is False else top,
        )

    def _suffix(self, request: ChatRequest | CompletionRequest, ids: list[int]) -> list[int] | None:
        """The tokens of the text after the answer to a prompt; None without one."""
        suffix, tokenizer = getattr(request, "suffix", None), self.lm.tokenizer
        if suffix is None:
            return None
        if request.dllm.infill:
            raise ValueError("suffix and dllm.infill exclude each other; give one of them")
        if tokenizer is None:
            raise ValueError("suffix needs a tokenizer, and this model has none; leave it out")
        for name in ("stop", "response_format"):
            if getattr(request, name) not in _NOTHING:
                raise ValueError(f"{name} has no effect on infilling; leave it out")
        after = tokens_after(tokenizer, suffix, "suffix")
        for name, part in (("prompt", ids), ("suffix", after)):
            if self.lm.backbone.mask_token_id in part:
                raise ValueError(f"{name} contains [MASK]; use dllm.infill without suffix to fill such a text")
        return after

    def _fitting(
        self, request: ChatRequest | CompletionRequest, length: int | Any, prompt: int, after: list[int] | None
    ) -> Any:
        """Positions for the answer: those asked for, or else as many as fit up to the default.

        Raises:
            ValueError: they do not fit beside the text, or the text alone does not fit into a row.
        """
        text = "messages have" if isinstance(request, ChatRequest) else "prompt has"
        text = f"{text if after is None else 'prompt and suffix have'} {prompt + len(after or ())} tokens"
        text += f", and a row of the server {self.max_length}"
        room = self.max_length - prompt - len(after or ())
        if room < (0 if request.dllm.infill else 1):
            raise ValueError(f"{text}, which leaves no room for an answer; shorten the text")
        if request.dllm.infill:
            return length
        if length == "auto":
            if after is not None:
                raise ValueError("suffix needs the length of the answer before it; give max_tokens")
            return length
        if self._length(request) is None:
            return min(length, room)
        if length > room:
            raise ValueError(f"max_tokens={length} does not fit: {text}; shorten one of them")
        return length

    def _sampler(self, options: DllmOptions) -> SamplerChoice | None:
        name, given = options.sampler, options.sampler_options
        if name is None:
            if given:
                raise ValueError("dllm.sampler_options needs dllm.sampler; give its name, too")
            return None
        if name not in self.samplers:
            raise ValueError(f"unknown dllm.sampler={brief(repr(name))}; expected one of {', '.join(self.samplers)}")
        known = self.samplers[name]
        if strange := sorted(given.keys() - known.keys()):
            expected = ", ".join(known) or "none"
            raise ValueError(f"unknown option dllm.sampler_options.{strange[0]}; expected one of {expected}")
        other = {each: value for each, value in given.items() if value != known[each]}
        choice = SamplerChoice(name, tuple(sorted(other.items())))
        return None if choice == self.own else choice
