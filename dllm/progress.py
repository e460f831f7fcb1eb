"""Progress reports: a bar on a terminal or in a notebook, a line for each tenth elsewhere."""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn

_SELDOM = 0.2  # seconds between two drawings in a notebook
_HTML = '<pre style="margin:0;font-family:ui-monospace,Menlo,Consolas,monospace">{code}</pre>'


@contextmanager
def progress_bar(
    what: str,
    total: int | None = None,
    done: int = 0,
    note: str = "",
    *,
    console: Console | None = None,
    show: bool = True,
) -> Iterator[Callable[..., object]]:
    """A progress bar, as a function with the arguments of `rich.progress.Progress.update` and a trailing `note`."""
    if not show:
        yield lambda **changed: None  # a `Progress` that is disabled prints an empty line with rich before 14.1
        return
    name, shown = (TextColumn(text, markup=False) for text in ("{task.description}", "{task.fields[note]}"))
    columns = name, BarColumn(), MofNCompleteColumn(), shown, TimeRemainingColumn(elapsed_when_finished=True)
    bar = _Notebook(*columns) if Console().is_jupyter else Progress(*columns, console=console)
    with bar as progress:
        yield partial(progress.update, progress.add_task(what, total=total, completed=done, note=note))


def watched(console: Console) -> bool:
    """Whether a progress bar is seen: on a terminal, or in a notebook."""
    return console.is_terminal or console.is_jupyter


@contextmanager
def progress_reports(what: str) -> Iterator[Callable[..., None]]:
    """A bar on a terminal or in a notebook, lines elsewhere, as a function of done, total and a note."""
    console, tenths = Console(stderr=True), 0
    with progress_bar(what, console=console, show=watched(console)) as update:

        def report(done: int, total: int, note: str = "") -> None:
            nonlocal tenths
            update(completed=done, total=total, note=note)
            if not watched(console) and 10 * done // total > tenths:
                tenths = 10 * done // total
                print(f"{what} {done}/{total}  {note}".rstrip(), file=sys.stderr, flush=True)

        yield report


class _Notebook(Progress):
    """A bar that is one output of a cell; rich's own is a widget, which needs ipywidgets and a running kernel."""

    def __init__(self, *columns: ProgressColumn) -> None:
        page = Console(
            file=io.StringIO(),
            record=True,
            width=100,
            force_jupyter=False,
            force_terminal=True,
            color_system="truecolor",
        )
        super().__init__(*columns, auto_refresh=False, console=page)
        self._output: Any = None
        self._drawn = -_SELDOM

    def start(self) -> None:
        """Nothing is shown before the first update."""

    def stop(self) -> None:
        """Draw the last state."""
        self._draw()

    def update(self, *args: Any, **changed: Any) -> None:
        """Change a task, and draw it unless that was a moment ago."""
        super().update(*args, **changed)
        if time.monotonic() - self._drawn >= _SELDOM:
            self._draw()

    def _draw(self) -> None:
        from IPython.display import HTML, display

        self._drawn = time.monotonic()
        self.console.print(self.get_renderable())
        page = HTML(self.console.export_html(inline_styles=True, code_format=_HTML))
        if self._output is None:
            self._output = display(page, display_id=True)
        else:
            self._output.update(page)
