"""Display of a canvas: live on a terminal, as plain lines elsewhere, or as an SVG."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from itertools import groupby
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.live import Live
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from dllm.decoding.step import Step
from dllm.escape import terminal
from dllm.files import write_whole
from dllm.models.tokenizers import text_of

FRESH, SETTLED, PROVISIONAL, MASKED = "bold black on green", "default", "dim italic", "dim"


class CanvasView:
    """Shows the generated region of one row after each step.

    Args:
        tokenizer: decodes tokens; without one, ids are shown.
        generated: number of positions to show at the end of the canvas; None for the whole row, past end-of-text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None, generated: int | None) -> None:
        self.tokenizer, self.generated = tokenizer, generated

    def draw(self, step: Step, row: int = 0) -> Text:
        """The canvas: new tokens highlighted, provisional ones dim, masks as dots, end-of-text omitted."""
        entry = int(np.flatnonzero(step.ids == row)[0])
        tokens = self._tokens(step, entry)
        shown = self._columns(step, entry)
        guesses, fresh = step.provisional[entry, shown], step.change.committed[entry, shown]
        masked = tokens == step.mask_token_id
        ends = self._ends(step, entry)
        ended = np.isin(tokens, ends)
        text = Text()
        for token, guess, new, mask, end in zip(tokens, guesses, fresh, masked, ended, strict=False):
            if mask and guess != step.mask_token_id and guess not in ends:
                text.append(self._word(int(guess)), PROVISIONAL)
            elif mask:
                text.append("·", MASKED)
            elif end:
                text.append("∎" if new else "", FRESH)
            else:
                text.append(self._word(int(token)), FRESH if new else SETTLED)
        return text

    def line(self, step: Step, row: int = 0) -> str:
        """The canvas as plain text: masks as dots, end-of-text omitted."""
        entry = int(np.flatnonzero(step.ids == row)[0])
        text = "".join(self._symbol(step, entry, token) for token in self._tokens(step, entry))
        return text if self.generated is None else text.rstrip("·") or "·"

    def _tokens(self, step: Step, entry: int) -> NDArray[np.int64]:
        """The tokens to show, up to an end-of-text without masks before it."""
        tokens = step.tokens[entry, self._columns(step, entry)]
        ended, masked = np.isin(tokens, self._ends(step, entry)), tokens == step.mask_token_id
        done = ended.any() and not masked[: ended.argmax()].any()
        return tokens[: ended.argmax() + 1] if done else tokens

    def _columns(self, step: Step, entry: int) -> slice:
        return slice(int(step.padding[entry]) if self.generated is None else -self.generated, None)

    def _ends(self, step: Step, entry: int) -> list[int]:
        return [] if self.generated is None else step.ends[entry].tolist()

    def _symbol(self, step: Step, entry: int, token: int) -> str:
        if token == step.mask_token_id:
            return "·"
        return "" if token in self._ends(step, entry) else self._word(int(token))

    def _word(self, token: int) -> str:
        if self.tokenizer is None:
            return f" {token}"
        return terminal(text_of(self.tokenizer, [token])).replace("\n", "⏎")


def live(view: CanvasView, console: Console) -> tuple[Live, Callable[[Step], None]]:
    """A live display and the callback that updates it."""
    display = Live(console=console, auto_refresh=False)
    return display, lambda step: display.update(view.draw(step), refresh=True)


def plain(view: CanvasView, write: Callable[[str], object]) -> Callable[[Step], None]:
    """A callback that writes a numbered line for each step that changes the display."""
    count, seen = 0, ""

    def draw(step: Step) -> None:
        nonlocal count, seen
        count, line = count + 1, view.line(step)
        if line != seen:
            write(f"{count:4d}  {line}")
        seen = line

    return draw


def save_picture(frames: list[Text], title: str, path: Path, most: int = 12) -> None:
    """Write an SVG of evenly chosen frames.

    Args:
        frames: the canvas after each step.
        title: heading.
        path: of the file.
        most: maximum number of frames, including the first and the last.
    """
    chosen: NDArray[np.int64] = np.unique(np.linspace(0, len(frames) - 1, most).round().astype(int))
    console = Console(record=True, width=100, file=io.StringIO(), force_terminal=True)
    for index in chosen:
        console.print(Text(f"step {index + 1:2d}  ", "dim cyan") + _tidy(frames[index]))
    drawn = console.export_svg(title=terminal(title, one_line=True))
    # Without rich's two web fonts, which a viewer would download.
    write_whole(path, re.sub(r"\s*@font-face \{.*?\}", "", drawn, count=2, flags=re.DOTALL))


def _tidy(text: Text) -> Text:
    """Omit the undecoded tail, and merge runs of one style: viewers place each run separately."""
    plain = text.plain.rstrip("·∎")
    styles = [SETTLED] * len(plain)
    for span in text.spans:
        styles[span.start : span.end] = [str(span.style)] * len(plain[span.start : span.end])
    for i, character in enumerate(plain):
        if character == " " and i > 0:
            styles[i] = styles[i - 1]  # some viewers drop a leading space of a run
    tidy = Text()
    for style, run in groupby(range(len(plain)), key=lambda i: styles[i]):
        tidy.append("".join(plain[i] for i in run), style)
    return tidy
