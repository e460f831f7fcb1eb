"""What a notebook shows of a result: HTML with inline styles, without scripts, legible on light and dark grounds.

Its size is bounded; what is left out is counted.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from html import escape
from itertools import groupby
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from jaxtyping import Int
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from dllm.decoding.colours import RAMPS, css, shade
from dllm.escape import terminal
from dllm.models.tokenizers import text_of

if TYPE_CHECKING:
    from dllm.decoding.result import Generation
    from dllm.decoding.step import Frame

# Text, its style, and what is said of it where the pointer rests.
Cell: TypeAlias = tuple[str, str, str]
MOST_ROWS, MOST_TOKENS, MOST_PROMPT = 12, 512, 128  # shown of a result, of a row, of a prompt
SOFT, OPEN = "opacity:.65", "opacity:.45"
GUESS, NEW, REVOKED = "opacity:.6;font-style:italic", "background:#1a7f37;color:#fff", "background:#c62828;color:#fff"
_WORDS = (
    "font-family:ui-monospace,Menlo,Consolas,monospace;line-height:1.6;white-space:pre-wrap;overflow-wrap:anywhere;"
    "text-align:left"
)


@dataclass(frozen=True)
class Vocabulary:
    """What the token ids of a result mean.

    Attributes:
        tokenizer: decodes tokens; without one, ids are shown.
        mask_token_id: id of [MASK].
        eos_token_ids: ids that end a text; the first one pads.
    """

    tokenizer: PreTrainedTokenizerBase | None
    mask_token_id: int
    eos_token_ids: tuple[int, ...]

    def word(self, token: int) -> str:
        """Display text of a token: never empty."""
        if token == self.mask_token_id:
            return "·"
        if token in self.eos_token_ids:
            return "∎"
        return f" {token}" if self.tokenizer is None else visible(text_of(self.tokenizer, [token]))


def generation(result: Generation) -> str:
    """Each answer, its tokens coloured by the forward that committed them."""
    stats, rows = result.stats, len(result.completions)
    head = [
        counted(rows, "prompt"), counted(stats.tokens, "token"),
        f"NFE {result.nfe.double().mean():.1f}{' per prompt' if rows > 1 else ''}", f"TPF {stats.tpf:.2f}",
        f"{stats.seconds:.2f} s",
    ]  # fmt: skip
    parts = [line(head), *(_answer(result, row) for row in range(min(rows, MOST_ROWS)))]
    if rows > MOST_ROWS:
        parts.append(line([f"and {rows - MOST_ROWS} more"]))
    return box([*parts, _ramp("committed first", "last")])


def frame(shown: Frame) -> str:
    """The canvas after a step: new tokens highlighted, predictions pale, masks as dots."""
    tokens, guesses, committed, revoked = (
        np.atleast_2d(each.numpy()) for each in (shown.tokens, shown.provisional, shown.committed, shown.revoked)
    )
    nfe = np.atleast_1d(shown.nfe.numpy())
    errors = shown.errors or (None,) * len(tokens)
    parts = []
    for row in range(min(len(tokens), MOST_ROWS)):
        new = int(committed[row].sum())
        head = [f"#{row}"] * (len(tokens) > 1) + [f"NFE {nfe[row]}", f"{new} new"]
        head += [f"{taken} masked again" for taken in [int(revoked[row].sum())] if taken]
        head += [f"no answer: {error}" for error in [errors[row]] if error is not None]
        cells = _canvas(shown.vocabulary, tokens[row], guesses[row], committed[row], revoked[row])
        parts += [line(head), words(cells)]
    if len(tokens) > MOST_ROWS:
        parts.append(line([f"and {len(tokens) - MOST_ROWS} more"]))
    legend = [("new", NEW, ""), (" ", "", ""), ("predicted", GUESS, ""), ("  ·", OPEN, ""), (" mask", "", "")]
    return box([*parts, f'<div style="{SOFT};font-size:.85em">{spans(legend)}</div>'])


def box(parts: Iterable[str]) -> str:
    """The whole display."""
    return f'<div style="text-align:left;max-width:60em">{"".join(parts)}</div>'


def line(facts: Iterable[str]) -> str:
    """A line of facts."""
    return f'<div style="{SOFT};font-size:.85em;margin-top:.6em">{escape(" · ".join(visible(f) for f in facts))}</div>'


def words(cells: Iterable[Cell]) -> str:
    """Tokens as running text."""
    return f'<div style="{_WORDS}">{spans(cells)}</div>'


def spans(cells: Iterable[Cell]) -> str:
    """Cells, each run of one style as one element."""
    parts = []
    for (style, title), run in groupby(cells, lambda cell: cell[1:]):
        text = escape("".join(cell[0] for cell in run))
        said = f' title="{escape(title)}"' if title else ""
        parts.append(f'<span style="{style}"{said}>{text}</span>' if style or said else text)
    return "".join(parts)


def visible(text: str) -> str:
    """Text that shows its line breaks, and control characters escaped; never empty."""
    return terminal(text).replace("\n", "⏎\n") or "▯"


def counted(count: int, what: str) -> str:
    """A number of things."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def _answer(result: Generation, row: int) -> str:
    vocabulary, generated = result.vocabulary, result.completions.shape[1]
    tokens, steps = result.completions[row].numpy(), result.commit_step[row].numpy()
    real, nfe = result.attention_mask[row].numpy().astype(bool), int(result.nfe[row])
    error = result.errors[row] if result.errors else None
    start = _padding(vocabulary, tokens, steps < 0)
    tokens, steps, kept = tokens[start:], steps[start:], real[len(real) - generated + start :]
    count = int((kept & (steps >= 0)).sum())
    # A failed row keeps the masks among its tokens.
    last = np.flatnonzero(kept if error is None else steps >= 0)
    tokens, steps = (each[: last[-1] + 1 if len(last) else 0] for each in (tokens, steps))
    before = result.sequences[row].numpy()[: len(real) - generated + start]
    prompt = before[real[: len(before)]]
    cells = [(_word(vocabulary, token), SOFT, "") for token in prompt[-MOST_PROMPT:].tolist()]
    cells = [(f"… {len(prompt) - MOST_PROMPT:,} tokens …", SOFT, "")] * (len(prompt) > MOST_PROMPT) + cells
    for token, step in zip(tokens[:MOST_TOKENS].tolist(), steps[:MOST_TOKENS].tolist(), strict=True):
        if step < 0:
            given = vocabulary is None or token != vocabulary.mask_token_id
            cells.append((_word(vocabulary, token), SOFT if given else OPEN, ""))
        else:
            style = css(shade("commit_step", step / max(1, nfe - 1)))
            cells.append((_word(vocabulary, token), style, f"forward {step + 1} of {nfe}"))
    if len(tokens) > MOST_TOKENS:
        cells.append((f" … and {counted(len(tokens) - MOST_TOKENS, 'more token')}", SOFT, ""))
    head = []
    if len(result.completions) > 1:
        head += [f"#{row}", f"NFE {nfe}"] + [f"TPF {count / max(1, nfe):.2f}", counted(count, "token")] * (
            error is None
        )
    head += [f"guide NFE {guide}" for guide in [int(result.guide_nfe[row])] if guide]
    head += [] if error is None else [f"no answer: {error}"]
    return (line(head) if head else "") + words(cells)


def _canvas(
    vocabulary: Vocabulary | None,
    tokens: Int[np.ndarray, " L"],
    guesses: Int[np.ndarray, " L"],
    committed: NDArray[np.bool_],
    revoked: NDArray[np.bool_],
) -> list[Cell]:
    start, end = _padding(vocabulary, tokens, ~committed), len(tokens)
    mask, ends = (-1, ()) if vocabulary is None else (vocabulary.mask_token_id, vocabulary.eos_token_ids)
    plain = np.isin(tokens, ends) & ~committed
    while end > start + 1 and plain[end - 1] and plain[end - 2]:  # one stands for all at the end
        end -= 1
    left = max(0, end - start - MOST_TOKENS)
    cells = [(f"… {left:,} tokens …", SOFT, "")] * bool(left)
    for place in range(start + left, end):
        token, guess = int(tokens[place]), int(guesses[place])
        if revoked[place]:
            cells.append((_word(vocabulary, token), REVOKED, "masked again"))
        elif token != mask:
            cells.append((_word(vocabulary, token), NEW if committed[place] else "", ""))
        elif guess != mask:
            cells.append((_word(vocabulary, guess), GUESS, "predicted"))
        else:
            cells.append((_word(vocabulary, token), OPEN, ""))
    return cells + [(f" x{len(tokens) - end + 1}", SOFT, "")] * (end < len(tokens))


def _padding(vocabulary: Vocabulary | None, tokens: Int[np.ndarray, " n"], unwritten: NDArray[np.bool_]) -> int:
    """The number of padding positions on the left."""
    if vocabulary is None:
        return 0
    real = np.flatnonzero(~(np.isin(tokens, vocabulary.eos_token_ids[:1]) & unwritten))
    return int(real[0]) if len(real) else 0


def _word(vocabulary: Vocabulary | None, token: int) -> str:
    return f" {token}" if vocabulary is None else vocabulary.word(token)


def _ramp(low: str, high: str) -> str:
    colours = [f"rgb{colour}" for colour in RAMPS["commit_step"]]
    bar = f"display:inline-block;width:8em;height:.8em;background:linear-gradient(to right,{','.join(colours)})"
    return f'<div style="font-size:.85em;margin-top:.6em">{low} <span style="{bar}"></span> {high}</div>'
