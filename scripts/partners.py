"""What `dllm chat` talks to: a model in this process, or a running server."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

from rich.console import Console

import dllm
from dllm.cache.base import Cache
from dllm.checks import SEEDS, known, seed
from dllm.decoding import compatibility
from dllm.decoding.display import CanvasView, live, plain
from dllm.decoding.prompts import encode
from dllm.resolve import build, option_names, options_of, with_option
from dllm.samplers.base import Sampler

if TYPE_CHECKING:
    from dllm.serving import client

# Options that a turn may change, and those of them that a server takes: at the top of a request, or within its `dllm`.
LOCAL = (
    "gen_length", "block_length", "temperature", "top_p", "top_k", "tempered_confidence", "cfg_scale", "seed",
    "stop_at_eos", "eos_token_id", "stop", "eos_suppression",
)  # fmt: skip
_TOP = ("temperature", "top_p", "stop")
_OWN = ("block_length", "top_k", "tempered_confidence", "eos_suppression", "stop_at_eos")
REMOTE = ("gen_length", "seed", *_TOP, *_OWN)
_SILENCE = 600.0  # seconds without anything from a server, which has a limit of its own


@dataclass(frozen=True)
class Reply:
    """An answer and its cost.

    Attributes:
        text: the answer.
        tokens: of it; None if unknown.
        nfe: denoiser forwards; None if unknown.
        seconds: wall time.
    """

    text: str
    tokens: int | None
    nfe: int | None
    seconds: float

    @property
    def statistics(self) -> str:
        """The costs in one line."""
        parts = [f"NFE {self.nfe}"] if self.nfe is not None else []
        parts += [f"tokens {self.tokens}"] if self.tokens is not None else []
        parts += [f"TPF {self.tokens / max(1, self.nfe):.2f}"] if self.tokens is not None and self.nfe else []
        if self.tokens is not None and self.seconds > 0:
            parts.append(f"{self.tokens / self.seconds:.1f} tokens/s")
        return "  ".join([*parts, *([] if self.tokens is not None else [f"{self.seconds:.1f} s"])])


@dataclass(frozen=True)
class Settings:
    """How turns are answered.

    Attributes:
        options: fields of `dllm.Options`; `seed` is that of the first turn.
        policy: name of the sampler in conf/; None for the server's own.
        sampler: its configuration.
    """

    options: Mapping[str, Any]
    policy: str | None = None
    sampler: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.options.get("seed") is not None:
            seed("seed", self.options["seed"], use=", or null for any")
        dllm.Options(**self.options)

    def changed(self, name: str, value: Any, names: Sequence[str]) -> Settings:
        """These settings with one of them changed: an option, `sampler`, or `sampler.NAME`.

        Raises:
            ValueError: an unknown option, or a value out of range.
        """
        group, _, option = name.partition(".")
        if group != "sampler":
            known([name], [*names, "sampler", "sampler.NAME"])
            return replace(self, options={**self.options, name: value})
        if option and self.sampler is None:
            raise ValueError(
                f"{name} is an option of a policy, and the server's own is in use; give sampler=NAME first"
            )
        policy = self.policy if option else str(value)
        sampler = self.sampler if option and self.sampler is not None else options_of("sampler", str(value))
        if option:
            known([option], option_names("sampler", sampler), "sampler.")
            sampler = with_option("sampler", sampler, option, value)
        build("sampler", sampler, Sampler)
        return replace(self, policy=policy, sampler=sampler)

    def changes(self) -> tuple[str | None, dict[str, Any]]:
        """The policy, and its options that differ from the defaults."""
        if self.policy is None or self.sampler is None:
            return None, {}
        defaults = options_of("sampler", self.policy)
        return self.policy, {key: value for key, value in self.sampler.items() if value != defaults.get(key)}

    def seed(self, turn: int) -> int:
        """Of one turn."""
        first = self.options.get("seed")
        return random.randrange(SEEDS) if first is None else (int(first) + turn) % SEEDS


@dataclass(frozen=True)
class Display:
    """Where an answer in the making is shown.

    Attributes:
        show: live (the canvas on a terminal), lines or none; for a server anything but none is text as it arrives.
        console: of the canvas.
        write: takes text as it arrives.
    """

    show: str
    console: Console
    write: Callable[[str], object]


class Local:
    """A model in this process.

    Attributes:
        names: options that may be changed.
    """

    names = LOCAL

    def __init__(self, lm: dllm.LanguageModel, cache: Cache, settings: Settings) -> None:
        if lm.tokenizer is None:
            raise ValueError(f"{lm.name} has no tokenizer, and a conversation needs one; use a model with a tokenizer")
        self.lm, self.cache, self.name = lm, cache, lm.name
        self.configure(settings)

    @property
    def chats(self) -> bool:
        """Whether the tokenizer has a chat template."""
        return self.lm.tokenizer is not None and self.lm.tokenizer.chat_template is not None

    def configure(self, settings: Settings) -> None:
        """Use other settings from now on."""
        sampler = build("sampler", settings.sampler, Sampler)
        compatibility.check(sampler, self.cache, settings.options["cfg_scale"], self.lm.backbone)
        self.settings, self.sampler = settings, sampler

    def answer(self, asked: str | Sequence[Mapping[str, str]], turn: int, display: Display) -> Reply:
        """Decode an answer, drawing its canvas."""
        try:
            [ids] = encode([asked], self.lm.tokenizer)
            options = {**self.settings.options, "seed": self.settings.seed(turn)}
            generated = options["gen_length"]
            view = CanvasView(self.lm.tokenizer, self._room(ids) if generated == "auto" else generated)
            shown: Any = nullcontext()
            callback = None
            if display.show == "live":
                shown, callback = live(view, display.console)
                shown.transient = True  # the answer takes its place
            elif display.show == "lines":
                callback = plain(view, lambda line: display.console.out(line, highlight=False))
            with shown:
                result = dllm.generate(self.lm, [ids], self.sampler, self.cache, callback=callback, **options)
        except ValueError as error:
            raise ValueError(re.sub(r"^prompts\[0\]", "the conversation", str(error))) from None
        return Reply(result.texts[0] or "", result.stats.tokens, int(result.nfe[0]), result.stats.seconds)

    def _room(self, ids: Sequence[int]) -> int:
        return max(1, self.lm.backbone.max_length - len(ids))


class Remote:
    """A model behind an HTTP interface.

    Args:
        server: its address.
        api_key: its key; None for none.
        settings: only what differs from the server's own.

    Attributes:
        names: options that may be changed.
    """

    names = REMOTE

    def __init__(self, server: str, api_key: str | None, settings: Settings) -> None:
        from dllm.serving import client

        self._module, self._server = client, server
        self._http = client.connect(server, api_key, _SILENCE)
        self._model: client.Model | None = None
        self.configure(settings)

    @property
    def model(self) -> client.Model:
        """What it says of itself; asked once it is there.

        Raises:
            ServerError: it does not say.
        """
        if self._model is None:
            with self._module.naming_failures(self._server):
                answer = self._http.get("/v1/models")
            if answer.status_code != 200:
                raise self._module.refusal(answer.status_code, answer.headers, answer.content)
            self._model = self._module.model_of(answer.content)
        return self._model

    @property
    def name(self) -> str:
        """Of its model."""
        return self.model.id

    @property
    def chats(self) -> bool:
        """Whether its model takes chats."""
        return self.model.chat

    def configure(self, settings: Settings) -> None:
        """Use other settings from now on."""
        for name, value in (("gen_length", "auto"), ("block_length", None)):
            if name in settings.options and settings.options[name] == value:
                shown = "null" if value is None else value
                raise ValueError(f"{name}={shown} cannot be asked of a server; use a whole number of at least 1")
        self.settings = settings

    def answer(self, asked: str | Sequence[Mapping[str, str]], turn: int, display: Display) -> Reply:
        """Request an answer, writing its text as it arrives."""
        path, body = self._module.request(self.model.id, asked, **self._fields(turn))
        begun, parts, reader = time.perf_counter(), list[str](), self._module.Reader()

        with self._module.naming_failures(self._server), self._http.stream("POST", path, json=body) as response:
            if response.status_code != 200:
                raise self._module.refusal(response.status_code, response.headers, response.read())
            for data in response.iter_bytes():
                if text := reader.feed(data):
                    parts.append(text)
                    if display.show != "none":
                        display.write(text)
        reader.end()
        return Reply("".join(parts), reader.tokens, reader.nfe, time.perf_counter() - begun)

    def _fields(self, turn: int) -> dict[str, Any]:
        """The settings as fields of a request."""
        given = self.settings.options
        own: dict[str, Any] = {name: given[name] for name in _OWN if given.get(name) not in (None, "auto")}
        sampler, changes = self.settings.changes()
        own |= {"sampler": sampler} if sampler else {}
        own |= {"sampler_options": changes} if changes else {}
        top = {name: given[name] for name in _TOP if given.get(name) is not None}
        seeded = {"seed": self.settings.seed(turn)} if given.get("seed") is not None else {}
        return {"max_tokens": given.get("gen_length"), **top, **seeded, **({"dllm": own} if own else {})}


Partner: TypeAlias = Local | Remote
