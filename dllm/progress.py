"""Progress reports: a bar on a terminal, a line for each tenth elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


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
    with Progress(*columns, console=console) as progress:
        yield partial(progress.update, progress.add_task(what, total=total, completed=done, note=note))


@contextmanager
def progress_reports(what: str) -> Iterator[Callable[..., None]]:
    """A bar on a terminal, lines elsewhere, as a function of done, total and a note."""
    console, tenths = Console(stderr=True), 0
    with progress_bar(what, console=console, show=console.is_terminal) as update:

        def report(done: int, total: int, note: str = "") -> None:
            nonlocal tenths
            update(completed=done, total=total, note=note)
            if not console.is_terminal and 10 * done // total > tenths:
                tenths = 10 * done // total
                print(f"{what} {done}/{total}  {note}".rstrip(), file=sys.stderr, flush=True)

        yield report
