"""Display of a trace: the canvas after one step, on a terminal or as a line of text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from rich.console import Group, RenderableType
from rich.text import Text

from dllm.decoding.colours import is_bright, shade
from dllm.escape import terminal
from dllm.evaluation.trace import Frames, Trace

Colour = Literal["commit_step", "confidence"]
OPEN, GUESS, PROMPT = "dim", "dim italic", "cyan"
ACCEPTED, REJECTED = "bold underline", "strike red"


@dataclass(frozen=True)
class Moment:
    """One sample after one step.

    Attributes:
        tokens: (G,) the canvas.
        open: (G,) True at [MASK].
        predicted: (G,) prediction of the latest forward; [MASK] where not requested.
        commit_step: (G,) step that committed the token, from 0; -1 at masks.
        confidence: (G,) of the token when it was committed, of the prediction at masks; NaN where unknown.
        drafted: (G,) token proposed as a draft in this step; [MASK] where none.
        accepted: (G,) accepted drafts.
        rejected: (G,) rejected drafts.
        computed: (P + G,) positions computed in this step; the others were read from the cache.
        nfe: forwards so far.
    """

    tokens: NDArray[np.int64]
    open: NDArray[np.bool_]
    predicted: NDArray[np.int64]
    commit_step: NDArray[np.int64]
    confidence: NDArray[np.float32]
    drafted: NDArray[np.int64]
    accepted: NDArray[np.bool_]
    rejected: NDArray[np.bool_]
    computed: NDArray[np.bool_]
    nfe: int


def moment(frames: Frames, step: int, mask: int) -> Moment:
    """The state of a sample after a step.

    Args:
        frames: of the sample.
        step: from 0.
        mask: token id of [MASK].
    """
    tokens, is_open = frames.canvas[step], frames.canvas[step] == mask
    before = np.vstack([np.full_like(tokens, mask), frames.canvas[:step]])
    changed = frames.canvas[: step + 1] != before
    # The last change of each position so far.
    written = np.where(is_open, -1, step - changed[::-1].argmax(0))
    place = np.arange(len(tokens))
    asked = np.where(is_open, step, written)
    known = is_open | (frames.predicted[asked, place] == tokens)
    drafts = frames.drafted[step] != mask
    accepted = drafts & (frames.drafted[step] == tokens)
    return Moment(
        tokens=tokens,
        open=is_open,
        predicted=frames.predicted[step],
        commit_step=written,
        confidence=np.where(known, frames.confidence[asked, place], np.nan).astype(np.float32),
        drafted=frames.drafted[step],
        accepted=accepted,
        rejected=drafts & ~accepted,
        computed=frames.computed[step],
        nfe=int(frames.nfe[step]),
    )


def word(trace: Trace, token: int) -> str:
    """Display text of a token: never empty, and escaped for a terminal."""
    if token in trace.eos_token_ids:
        return "∎"
    text = trace.words.get(token, f" {token}").replace("\n", "⏎")
    return "".join(c if c.isprintable() or c == " " else "�" for c in text) or "▯"


def draw(trace: Trace, sample: int, step: int, colour: Colour = "commit_step") -> RenderableType:
    """A sample after a step, with the computed positions and a legend.

    Args:
        trace: the run.
        sample: index into its frames.
        step: from 0.
        colour: meaning of the token colours.
    """
    frames = trace.frames[sample]
    now, steps = moment(frames, step, trace.mask_token_id), len(frames.canvas)
    head = Text.assemble(
        ("sample ", "dim"), f"{terminal(frames.id, one_line=True)} ({sample + 1} of {len(trace.frames)})",
        ("  step ", "dim"), (f"{step + 1} of {steps}", "bold"), ("  NFE ", "dim"), (str(now.nfe), "bold"),
        ("  computed ", "dim"), f"{now.computed.sum()} of {now.computed.size}",
    )  # fmt: skip
    if drafts := int(now.accepted.sum() + now.rejected.sum()):
        head.append("  drafts ", "dim").append(f"{now.accepted.sum()} of {drafts} accepted")
    prompt = Text("".join(word(trace, int(token)) for token in frames.prompt), PROMPT)
    strip = Text("".join("█" if computed else "░" for computed in now.computed))
    strip.stylize(PROMPT, 0, len(frames.prompt))
    return Group(head, Text(), prompt, _canvas(trace, now, colour, steps), Text(), strip, Text(), _legend(colour))


def line(trace: Trace, sample: int, step: int) -> str:
    """A step as one line of plain text: number, NFE so far, and canvas."""
    now = moment(trace.frames[sample], step, trace.mask_token_id)
    words = "".join("·" if o else word(trace, int(t)) for t, o in zip(now.tokens, now.open, strict=True))
    return f"{step + 1:4d}  NFE {now.nfe:4d}  {words}"


def _canvas(trace: Trace, now: Moment, colour: Colour, steps: int) -> Text:
    text = Text()
    for place, token in enumerate(now.tokens):
        rejected = bool(now.rejected[place])
        if not now.open[place]:
            share = now.commit_step[place] / max(1, steps - 1) if colour == "commit_step" else now.confidence[place]
            style = _cell(shade(colour, float(share)))
            text.append(word(trace, int(token)), f"{style} {ACCEPTED}" if now.accepted[place] else style)
        elif now.predicted[place] != trace.mask_token_id and not rejected:
            text.append(word(trace, int(now.predicted[place])), GUESS)
        elif not rejected:
            text.append("·", OPEN)
        if rejected:
            text.append(word(trace, int(now.drafted[place])), REJECTED)
    return text


def _cell(colour: tuple[int, int, int]) -> str:
    """Black or white, whichever is legible on a colour."""
    return f"{'black' if is_bright(colour) else 'white'} on rgb({','.join(map(str, colour))})"


def _legend(colour: Colour) -> Text:
    ends = {"commit_step": ("first", "last"), "confidence": ("unsure", "sure")}[colour]
    legend = Text(f"{ends[0]} ", "dim")
    for share in np.linspace(0, 1, 8):
        legend.append(" ", _cell(shade(colour, float(share))))
    legend.append(f" {ends[1]}  ", "dim")
    for text, style, meaning in (
        ("guess", GUESS, "predicted"), ("·", OPEN, "open"), ("draft", ACCEPTED, "accepted"),
        ("draft", REJECTED, "rejected"), ("█", "", "computed"), ("░", "", "cached"),
    ):  # fmt: skip
        legend.append(text, style).append(f" {meaning}  ", "dim")
    return legend
