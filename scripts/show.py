"""`dllm show`: displays a trace step by step."""

from __future__ import annotations

if __name__ == "__main__":
    import dllm.scripts.cli

    dllm.scripts.cli.run_file(__file__)

import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

from omegaconf import DictConfig
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from dllm.checks import choice, number
from dllm.evaluation.run_folder import load_trace
from dllm.evaluation.trace import Trace
from dllm.files import check_readable
from dllm.reports.player import Colour, draw, line
from dllm.scripts import app
from dllm.scripts.ending import Stopped

try:
    import termios
    import tty
except ImportError:  # Windows: lines only
    _KEYBOARD = False
else:
    _KEYBOARD = True

KINDS = {"sample": str | int | None, "step": int | None}
_HELP = "← → step   home end first, last   ↑ ↓ sample   c colours   q leave"
# Escape sequences of terminals, and alternative letters.
_KEYS = {
    "next": ("\x1b[C", "\x1bOC", "l", " "),
    "back": ("\x1b[D", "\x1bOD", "h", "\x7f", "\x08"),
    "first": ("\x1b[H", "\x1bOH", "\x1b[1~", "\x1b[7~"),
    "last": ("\x1b[F", "\x1bOF", "\x1b[4~", "\x1b[8~"),
    "next sample": ("\x1b[B", "\x1bOB", "n", "j"),
    "sample before": ("\x1b[A", "\x1bOA", "p", "k"),
    "colour": ("c",),
    "leave": ("q", "\x03", "\x04"),
}
_MEANING = {key: meaning for meaning, keys in _KEYS.items() for key in keys}


@dataclass(frozen=True)
class View:
    """The displayed state.

    Attributes:
        sample: index among those with frames.
        step: from 0.
        colour: meaning of the token colours.
    """

    sample: int = 0
    step: int = 0
    colour: Colour = "commit_step"


def main() -> None:
    """Entry point."""
    app.run(show, "show", KINDS)


def show(cfg: DictConfig) -> None:
    """Load a trace and display it."""
    choice("colour", cfg.colour, get_args(Colour))
    trace, console = _load(Path(cfg.path)), Console()
    view = View(_sample(trace, cfg.sample), colour=cfg.colour)
    steps = len(trace.frames[view.sample].canvas)
    if cfg.step is not None:
        number("step", cfg.step, f"1 to {steps}", low=1, high=steps, whole=True)
        console.print(draw(trace, view.sample, cfg.step - 1, view.colour))
    elif cfg.plain or not (_KEYBOARD and console.is_terminal and sys.stdin.isatty()):
        for step in range(steps):
            print(line(trace, view.sample, step))
    else:
        with _keyboard() as read, Live(console=console, screen=True, auto_refresh=False) as display:
            play(trace, view, keys(read), lambda drawing: display.update(drawing, refresh=True))


def play(trace: Trace, view: View, pressed: Iterator[str], see: Callable[[RenderableType], object]) -> View:
    """Draw, and redraw after each key, until quit.

    Args:
        trace: the trace.
        view: initial state.
        pressed: keys, one by one.
        see: displays a drawing.

    Returns:
        The final state.
    """
    help_line = Text(_HELP, "dim", no_wrap=True)
    see(Group(draw(trace, view.sample, view.step, view.colour), Text(), help_line))
    for key in pressed:
        meaning = _MEANING.get(key)
        if meaning == "leave":
            break
        if meaning is not None:
            view = moved(trace, view, meaning)
            see(Group(draw(trace, view.sample, view.step, view.colour), Text(), help_line))
    return view


def moved(trace: Trace, view: View, meaning: str) -> View:
    """The state after a key: steps are clamped, samples wrap around."""
    last = len(trace.frames[view.sample].canvas) - 1
    match meaning:
        case "next" | "back":
            return replace(view, step=min(max(view.step + (1 if meaning == "next" else -1), 0), last))
        case "first" | "last":
            return replace(view, step=0 if meaning == "first" else last)
        case "colour":
            return replace(view, colour="confidence" if view.colour == "commit_step" else "commit_step")
        case _:
            turn = 1 if meaning == "next sample" else -1
            return View((view.sample + turn) % len(trace.frames), 0, view.colour)


def keys(read: Callable[[], str]) -> Iterator[str]:
    """Single keys from terminal input, which may contain several at once; ends at end of input."""
    try:
        while text := read():
            yield from re.findall(r"\x1b[\[O][0-9;]*[A-Za-z~]|.", text, re.DOTALL)
    except Stopped:
        raise
    except KeyboardInterrupt:
        return


@contextmanager
def _keyboard() -> Iterator[Callable[[], str]]:
    """Reads keys without echo and line buffering."""
    terminal = sys.stdin.fileno()
    before = termios.tcgetattr(terminal)
    try:
        tty.setcbreak(terminal)
        yield lambda: os.read(terminal, 64).decode(errors="replace")
    finally:
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)


def _load(path: Path) -> Trace:
    file = path / "trace.safetensors" if path.is_dir() else path
    if path.is_dir() and not file.is_file():
        raise ValueError(f"path={str(path)!r} has no trace.safetensors; give a trace, or the folder of a run with one")
    check_readable("path", file)
    trace = load_trace(file)
    frames = tuple(each for each in trace.frames if len(each.canvas))
    if not frames:
        raise ValueError(f"path={str(path)!r} has no sample step by step; give the trace of a run that recorded some")
    return replace(trace, frames=frames)


def _sample(trace: Trace, wanted: str | int | None) -> int:
    """The index of a sample; an id takes precedence over a number."""
    ids = [each.id for each in trace.frames]
    if wanted is None:
        return 0
    if str(wanted) in ids:
        return ids.index(str(wanted))
    if isinstance(wanted, int) and 1 <= wanted <= len(ids):
        return wanted - 1
    known = ", ".join(ids[:8]) + (", ..." if len(ids) > 8 else "")
    raise ValueError(f"sample={wanted!r} was not recorded step by step; use 1 to {len(ids)}, or an id: {known}")
