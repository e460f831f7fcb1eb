"""`dllm chat`: a conversation with a model on the terminal, or through pipes."""

from __future__ import annotations

if __name__ == "__main__":
    import dllm.scripts.cli

    dllm.scripts.cli.run_file(__file__)

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, get_type_hints

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

import dllm
from dllm.cache.base import Cache
from dllm.checks import choice, is_text, out_of_memory
from dllm.decoding import compatibility
from dllm.escape import terminal
from dllm.files import expanded, parse_json
from dllm.resolve import build
from dllm.samplers.base import Sampler
from dllm.scripts import app, own
from dllm.scripts.ending import Stopped, line
from dllm.scripts.partners import LOCAL, REMOTE, Display, Local, Partner, Remote, Reply, Settings

with suppress(ImportError):  # Windows
    import readline  # noqa: F401  # line editing for `input`

KINDS = get_type_hints(dllm.Options) | {"seed": int | None, "server": str | None, "api_key": str | None}
_COMMAND, _PROMPT, _BOM = "dllm chat", "> ", "\ufeff"
_SHOWS = ("auto", "live", "lines", "none")
_HELP = """\
/help               this list
/reset              forget the conversation
/undo               forget the last turn
/set                list the options
/set NAME=VALUE     change one from the next turn on: temperature=0.7, sampler=threshold, sampler.threshold=0.8
/show on|off        show an answer in the making
/save FILE          write the conversation as JSONL, one message a line
/exit               end; so does Ctrl-D. Ctrl-C stops an answer, twice it ends
Everything else is sent to the model; a line that begins with // is sent with one / less."""


def main() -> None:
    """Entry point."""
    app.run(chat, "chat", KINDS)


def chat(cfg: DictConfig) -> None:
    """Run the command."""
    choice("show", cfg.show, _SHOWS)
    fields: Any = OmegaConf.to_container(cfg, resolve=True)
    terminals = all(each is not None and each.isatty() for each in (sys.stdin, sys.stdout))
    conversation = Conversation(_partner(fields), cfg.show, terminals)
    with suppress(AttributeError):  # what is not valid UTF-8 is refused line by line
        sys.stdin.reconfigure(errors="surrogateescape", encoding="utf-8")  # type: ignore[union-attr]
    with _interrupts() as interrupted:
        failed = conversation.run(interrupted)
    if failed and not terminals:
        sys.exit(2)


def _partner(fields: dict[str, Any]) -> Partner:
    """The model or the server; bad values are rejected before a model is loaded."""
    given = app.given()
    policy = HydraConfig.get().runtime.choices["sampler"]
    sampler = build("sampler", fields["sampler"], Sampler)
    if fields["server"] is None:
        if fields["api_key"] is not None:
            raise ValueError("api_key has no effect without server; give both, or leave it out")
        settings = Settings({name: fields[name] for name in LOCAL}, policy, fields["sampler"])
        cache = build("cache", fields["cache"], Cache)
        compatibility.check(sampler, cache, fields["cfg_scale"])
        return Local(app.load_model(fields["model"]), cache, settings)
    allowed = (*REMOTE, "server", "api_key", "show", "sampler")
    for name in sorted(given):
        group = name.partition(".")[0].partition("/")[0]
        if group in fields and group not in allowed:
            raise ValueError(f"{name} has no effect with server, which has its own; leave it out")
    own_policy = any(name.partition(".")[0] == "sampler" for name in given)
    options = {name: fields[name] for name in REMOTE if name in given}
    chosen = (policy, fields["sampler"]) if own_policy else ()
    key = fields["api_key"] or os.environ.get("DLLM_API_KEY") or None
    return Remote(fields["server"], key, Settings(options, *chosen))


@dataclass(frozen=True)
class _Turn:
    question: str
    reply: Reply
    model: str


class Conversation:
    """The turns so far, and the commands that change them.

    Args:
        partner: answers.
        show: option of the command.
        terminals: whether input and output are a terminal.
    """

    def __init__(self, partner: Partner, show: str, terminals: bool) -> None:
        self.partner, self.terminals = partner, terminals
        self.turns: list[_Turn] = []
        self._making = ("live" if terminals else "lines") if show in ("auto", "none") else show
        self._show = self._making if show != "none" and (terminals or show != "auto") else "none"
        # Without a terminal, only answers go to stdout.
        self._out, self._notes = Console(), Console(stderr=not terminals)
        self._told = self._within_line = False
        self._first = True  # line of a pipe
        self._commands: dict[str, Callable[[str], None]] = {
            "help": lambda _: self._say(_HELP),
            "reset": self._reset,
            "undo": self._undo,
            "set": self._set,
            "show": self._switch,
            "save": self._save,
        }

    def run(self, interrupted: list[int]) -> int:
        """Answer line by line, to the end of the input or /exit; return how many lines failed.

        Args:
            interrupted: Ctrl-C so far; cleared when a line was typed or an answer finished.
        """
        failed = 0
        if self.terminals:
            self._say("/help lists the commands; Ctrl-D ends.")
        while True:
            text: str | None = ""
            try:
                text = self._read()
                if text is None or text.split()[:1] == ["/exit"]:
                    return failed
                if self.terminals:
                    interrupted.clear()
                try:
                    self._take(text)
                    interrupted.clear()
                except Exception as error:
                    if not (isinstance(error, ValueError) or out_of_memory(error)):
                        raise
                    failed += 1
                    self._end_line()
                    print(line(_COMMAND, _told(error)), file=sys.stderr, flush=True)
            except Stopped:
                raise
            except KeyboardInterrupt:
                if len(interrupted) > 1 or not (text or self.terminals):  # nothing is asked, and nobody types
                    raise
                failed += 1
                if self.terminals:  # after ^C
                    self._out.print()
                self._say(f"{'stopped, and this turn forgotten; ' if text else ''}Ctrl-C again, or Ctrl-D, ends")

    def _read(self) -> str | None:
        """The next line; None at the end."""
        if self.terminals:
            try:
                return input(_PROMPT)
            except EOFError:
                self._out.print()
                return None
        typed = (sys.stdin.readline() if sys.stdin is not None else "") or None
        first, self._first = self._first, False
        return typed.removeprefix(_BOM) if first and typed is not None else typed

    def _take(self, text: str) -> None:
        """A command, or a question."""
        text = text.strip("\r\n")
        if not text.strip():
            return
        if not is_text(text):
            raise ValueError("this line is not valid UTF-8; give UTF-8")
        if text.startswith("/") and not text.startswith("//"):
            name, _, rest = text[1:].strip().partition(" ")
            if name not in self._commands:
                raise ValueError(f"unknown command '/{name}'; /help lists them")
            self._commands[name](rest.strip())
            return
        self._ask(text[1:] if text.startswith("//") else text)

    def _ask(self, question: str) -> None:
        chats = self.partner.chats
        if not chats and not self._told:
            self._say("this model has no chat template: every line is a prompt of its own")
            self._told = True
        asked = [*self._messages(), {"role": "user", "content": question}] if chats else question
        display = Display(self._show, self._notes, self._write)
        reply = self.partner.answer(asked, len(self.turns), display)
        if not self.terminals:
            print(terminal(reply.text), flush=True)
        elif isinstance(self.partner, Local) or self._show == "none":
            self._write(reply.text)
        self._end_line()
        self.turns.append(_Turn(question, reply, self.partner.name))
        self._say(reply.statistics)

    def _messages(self) -> list[dict[str, Any]]:
        messages = []
        for turn in self.turns:
            messages += [{"role": "user", "content": turn.question}]
            messages += [{"role": "assistant", "content": turn.reply.text}]
        return messages

    def _write(self, text: str) -> None:
        """Text of an answer, possibly a part of it."""
        if self.terminals:
            self._out.out(terminal(text), style="green", end="", highlight=False)
            self._out.file.flush()
            self._within_line = not text.endswith("\n")

    def _end_line(self) -> None:
        """Begin a new line after text of an answer."""
        if self._within_line:
            self._out.print()
        self._within_line = False

    def _say(self, text: str) -> None:
        """Everything else than answers."""
        self._notes.print(terminal(text), style="dim", markup=False, highlight=False, soft_wrap=True)

    def _reset(self, rest: str) -> None:
        _nothing("reset", rest)
        self.turns.clear()

    def _undo(self, rest: str) -> None:
        _nothing("undo", rest)
        if not self.turns:
            raise ValueError("/undo: the conversation is empty")
        self.turns.pop()

    def _set(self, rest: str) -> None:
        settings, names = self.partner.settings, self.partner.names
        if not rest:
            options = {name: settings.options[name] for name in names if name in settings.options}
            policy = {f"sampler.{name}": value for name, value in (settings.sampler or {}).items() if name[0] != "_"}
            for name, value in {**options, "sampler": settings.policy, **policy}.items():
                self._say(f"{name}={json.dumps(value, ensure_ascii=False, default=str)}")
            return
        name, separator, value = rest.partition("=")
        if not separator:
            raise ValueError(f"/set {rest} has no value; write /set NAME=VALUE")
        self.partner.configure(settings.changed(name.strip(), _value(value.strip()), names))

    def _switch(self, rest: str) -> None:
        if rest not in ("on", "off"):
            raise ValueError(f"/show {rest} is unknown; write /show on or /show off")
        self._show = self._making if rest == "on" else "none"

    def _save(self, rest: str) -> None:
        if not rest:
            raise ValueError("/save has no file; write /save FILE")
        if "\0" in rest:
            raise ValueError(f"/save={rest!r} contains a null byte, which is invalid in a path; give another")
        if not self.turns:
            raise ValueError("/save: the conversation is empty")
        rows: list[dict[str, Any]] = []
        for turn in self.turns:
            costs = {"model": turn.model, "nfe": turn.reply.nfe, "tokens": turn.reply.tokens}
            rows += [{"role": "user", "content": turn.question}]
            rows += [{"role": "assistant", "content": turn.reply.text, "dllm": costs}]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        try:
            own.write("/save", rest, {expanded(rest): (own.CONVERSATION, text)})
        except OSError as error:
            raise ValueError(f"/save='{rest}' cannot be written ({error.strerror}); give another path") from None
        self._say(f"{len(rows)} messages are in {rest}")


def _nothing(name: str, rest: str) -> None:
    if rest:
        raise ValueError(f"/{name} takes no value; leave {rest!r} out")


def _value(text: str) -> Any:
    """A value as typed: JSON, otherwise text."""
    try:
        return parse_json(text)
    except ValueError:
        return text


def _told(error: Exception) -> str:
    """The message for a line that failed."""
    if out_of_memory(error):
        return "out of memory; /reset the conversation, or /set a smaller gen_length"
    return app.one_line(error)


@contextmanager
def _interrupts() -> Iterator[list[int]]:
    """Let Ctrl-C raise an exception every time, and count it."""
    count: list[int] = []

    def stop(number: int, frame: object) -> None:
        count.append(number)
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    heard = before is not signal.SIG_IGN
    with suppress(ValueError):  # only the main thread can handle signals
        if heard:
            signal.signal(signal.SIGINT, stop)
    try:
        yield count
    finally:
        with suppress(ValueError):
            signal.signal(signal.SIGINT, before)
