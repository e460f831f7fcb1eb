"""Pictures of a canvas that a policy filled: a short decode by a bundled model, run when the site is built."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from html import escape
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

import dllm
from dllm.decoding.colours import UNKNOWN, css, shade
from dllm.decoding.step import Step
from dllm.resolve import build, options_of, variants
from dllm.samplers.base import Sampler

PROMPT = "Tom has 23 apples. He buys 12, then loses 7. How many apples does he have?"
_CELL, _STEP, _LEFT = 8, 6, 30  # pixels: width of a position, height of a step, and the margin with the steps' numbers
_MASK, _DECIDED, _COMMITTED, _REVOKED, _ABSENT = "mask", "decided", "committed", "revoked", "absent"


@dataclass(frozen=True)
class Run:
    """What to decode the prompt with."""

    sampler: str
    cache: str = "none"
    model: str = "tiny-llada"
    options: dict[str, Any] = field(default_factory=dict)  # of the request
    own: dict[str, Any] = field(default_factory=dict)  # of the sampler

    @property
    def command(self) -> str:
        """The same on the command line."""
        parts = [f"sampler={self.sampler}", *(f"sampler.{name}={value}" for name, value in self.own.items())]
        parts += [f"cache={self.cache}"] if self.cache != "none" else []
        parts += [f"{name}={value}" for name, value in self.options.items()]
        return f'dllm generate model={self.model} {" ".join(parts)} \\\n    prompt="{PROMPT}"'


@dataclass(frozen=True)
class Decode:
    """A decode of one prompt: S steps, L positions, the first P of which are the prompt.

    Attributes:
        run: how it was decoded.
        start: P.
        words: text of the L tokens at the end.
        states: (S, L) after each step: mask, decided, committed or masked again by it, absent.
        computed: (S, L) positions computed in the step; the others were read from the cache.
        forwards: of the model.
        computed_share: positions computed, of those of a decode that computes all in every forward.
    """

    run: Run
    start: int
    words: list[str]
    states: NDArray[Any]
    computed: NDArray[np.bool_]
    forwards: int
    computed_share: float

    @property
    def steps(self) -> int:
        """S."""
        return len(self.states)

    @property
    def written(self) -> list[int]:
        """(L,) step that committed each token, from 0; -1 for none."""
        committed = self.states == _COMMITTED
        found: list[int] = np.where(committed.any(0), self.steps - 1 - committed[::-1].argmax(0), -1).tolist()
        return found


def run_of_policy(name: str) -> Run | None:
    """How the picture of a policy is made; None if no bundled model can show it."""
    chosen = f"tiny/{name}" if f"tiny/{name}" in variants("sampler") else name
    needs = build("sampler", options_of("sampler", name), Sampler).needs
    if "noise" in needs:
        return None
    if "causal" in needs:
        return Run(chosen, model="tiny-block", options={"gen_length": 64, "block_length": 1})
    if "growth" in needs:
        return Run(chosen, options={"gen_length": 64}, own={"initial": 16})
    return Run(chosen, options={"gen_length": 64, "block_length": 32})


def run_of_cache(name: str) -> Run:
    """How the picture of a cache is made."""
    if name in ("block", "sub_blocks"):  # these gain where attention is causal over blocks
        sampler = "tiny/sub_blocks" if name == "sub_blocks" else "tiny/threshold"
        return Run(sampler, name, "tiny-block", {"gen_length": 64, "block_length": 16})
    return Run("tiny/threshold", name, options={"gen_length": 64, "block_length": 16})


@cache
def _model(name: str) -> dllm.LanguageModel:
    return dllm.load(name, device="cpu")


def decode(run: Run) -> Decode:
    """Decode the prompt."""
    lm, steps = _model(run.model), list[Step]()
    sampler = build("sampler", options_of("sampler", run.sampler) | run.own, Sampler)
    out = dllm.generate(lm, PROMPT, sampler, run.cache, callback=steps.append, seed=0, **run.options)
    assert lm.tokenizer is not None  # of bundled models
    last = steps[-1].tokens[0]
    ends = set(steps[-1].ends[0].tolist())
    return Decode(
        run=run,
        start=len(last) - int(run.options["gen_length"]),
        words=["∎" if int(token) in ends else str(lm.tokenizer.decode([int(token)])) for token in last],
        states=_states(steps, ends),
        computed=np.array([step.recomputed[0] for step in steps]),
        forwards=int(out.nfe[0]),
        computed_share=out.stats.computed_share,
    )


def _states(steps: Sequence[Step], ends: set[int]) -> NDArray[Any]:
    tokens = np.array([step.tokens[0] for step in steps])
    committed, revoked = (
        np.array([getattr(step.change, name)[0] for step in steps]) for name in (_COMMITTED, _REVOKED)
    )
    # Positions after the end of the text, or that the canvas has yet to grow by.
    absent = np.isin(tokens, list(ends)) & ~np.logical_or.accumulate(committed)
    masked = tokens == steps[0].mask_token_id
    return np.select([revoked, masked, committed, absent], [_REVOKED, _MASK, _COMMITTED, _ABSENT], _DECIDED)


def tokens_html(made: Decode) -> str:
    """The answer, each token on the colour of the step that committed it, and numbered with it."""
    cells = []
    for word, step in zip(made.words[made.start :], made.written[made.start :], strict=True):
        colour = _colour(step, made.steps)
        title = f"step {step + 1}" if step >= 0 else "not committed"
        label = escape(word).replace(" ", "&nbsp;")
        number = step + 1 if step >= 0 else "·"
        cells.append(f'<span class="token" style="{css(colour)}" title="{title}">{label}<small>{number}</small></span>')
        if word == "∎":
            break
    return f'<div class="canvas">{"".join(cells)}</div>'


def grid_svg(made: Decode, computed: bool) -> str:
    """A row for each step and a column for each position: what the step committed, or what it computed."""
    width, height = _LEFT + made.states.shape[1] * _CELL, made.steps * _STEP + 14
    label = f"{made.steps} steps from top to bottom, prompt and canvas from left to right"
    parts = [
        f'<svg class="grid" viewBox="0 0 {width} {height}" role="img" aria-label="{label}">',
        *(part for step in range(made.steps) for part in _row(made, step, computed)),
        f'<line x1="{_LEFT + made.start * _CELL}" y1="0" x2="{_LEFT + made.start * _CELL}" y2="{height - 14}"/>',
    ]
    for step in (1, made.steps):
        parts += [f'<text x="{_LEFT - 4}" y="{step * _STEP}" text-anchor="end">{step}</text>']
    for place, text in ((_LEFT, "prompt"), (_LEFT + made.start * _CELL + 2, "canvas")):
        parts += [f'<text x="{place}" y="{height - 3}">{text}</text>']
    return "".join([*parts, "</svg>"])


def _row(made: Decode, step: int, computed: bool) -> Iterator[str]:
    """The cells of a step, neighbours of the same look as one."""
    looks = ["computed" if each else "cached" for each in made.computed[step]] if computed else made.states[step]
    for look, places in groupby(range(len(looks)), key=lambda place: looks[place]):
        first, *rest = places
        fill = f' fill="rgb{_colour(step, made.steps)}"' if look == _COMMITTED else ""
        if look != _ABSENT:
            width = (len(rest) + 1) * _CELL
            yield (
                f'<rect class="{look}" x="{_LEFT + first * _CELL}" y="{step * _STEP}" width="{width}" '
                f'height="{_STEP - 1}"{fill}/>'
            )


def _colour(step: int, steps: int) -> tuple[int, int, int]:
    """Of the tokens that a step committed; -1 is none."""
    return shade("commit_step", step / max(1, steps - 1)) if step >= 0 else UNKNOWN
