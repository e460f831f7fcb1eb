"""Accepting within an entropy bound, and renoising the rest (DiffusionGemma's published sampler).

Rule:

    accept i, in order of H(p_i), lowest first,  while  sum of H(p_j) over those before i  <=  entropy_bound
    redraw   every other position, uniformly
    p = softmax(logits / t(n)),   t(n) = t_min + (t_max - t_min) n / N

For models that denoise uniformly random tokens. A block of a canvas x takes at most N steps, n = N, ..., 1. Each
predicts all of its positions at the temperature t(n), draws a token of every position, and accepts those within the
bound on the sum of the entropies H of their distributions p, so always the best one (the rule of EB-Sampler, arXiv
2505.24857). x keeps the drawn tokens there and gets new random ones everywhere else; nothing accepted is final. The
block is finished, with the most probable tokens of its last step, where n = 1, or these are those of the
`stability_threshold` steps before and the mean entropy is below `confidence_threshold`.

All random numbers of a row come from a generator of its own, in the order of the published code, whose decodes with
`torch.manual_seed` on the same device are those with the same seed here. Difference: a block with given tokens, or a
last one that is shorter, has fewer positions, and the mean is over these.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dllm.checks import number
from dllm.decoding.request import Request
from dllm.decoding.setup import Setup
from dllm.decoding.window import Edit, Window
from dllm.samplers.base import Denoise, Knob, Policy

_PER_POSITION = 16  # steps; the engine stops what takes more


@dataclass(frozen=True)
class Canvases:
    """State of an engine, by row.

    Attributes:
        mask_token_id: id of [MASK], the number of tokens that are drawn.
        noise: the random token of each position of the active block.
        best: the most probable tokens of the active block in the last steps, the latest one last; -1 for none.
        sources: generators of all draws.
    """

    mask_token_id: int
    noise: Int[Tensor, "rows L"]
    best: Int[Tensor, "rows S L"]
    sources: dict[int, torch.Generator] = field(default_factory=dict)


@dataclass(frozen=True)
class Renoise(Policy):
    """Accept tokens within an entropy bound, and renoise all others.

    Args:
        max_steps: denoising steps of a block.
        entropy_bound: bound, in nats, on the sum of the entropies before the last accepted one; larger accepts more.
        t_min: temperature towards the last step.
        t_max: temperature at the first step.
        stability_threshold: earlier steps with the same most probable tokens that an early end needs; 0 for none.
        confidence_threshold: mean entropy, in nats, below which a block may end early.

    Raises:
        ValueError: a number out of range.
    """

    kind = "revising"
    needs = frozenset({"noise", "whole_blocks"})
    knob = Knob("entropy_bound", (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0))

    max_steps: int = 48
    entropy_bound: float = 0.1
    t_min: float = 0.4
    t_max: float = 0.8
    stability_threshold: int = 1
    confidence_threshold: float = 0.005

    def __post_init__(self) -> None:
        number("max_steps", self.max_steps, "a whole number of at least 1 (48 is published)", low=1, whole=True)
        number("entropy_bound", self.entropy_bound, "0 or more nats (0.1 is published)", low=0)
        number("t_min", self.t_min, "a number of at least 0 (0.4 is published)", low=0, high=1e6)
        number("t_max", self.t_max, "a number above 0 (0.8 is published)", above=0, high=1e6)
        if self.t_max < self.t_min:
            raise ValueError(f"t_max={self.t_max} is below t_min={self.t_min}; use at least t_min")
        use = "a whole number from 0 to 1000 (1 is published)"
        number("stability_threshold", self.stability_threshold, use, low=0, high=1000, whole=True)
        number("confidence_threshold", self.confidence_threshold, "0 or more nats (0.005 is published)", low=0)

    def start(self, setup: Setup) -> Canvases:
        """Allocate the state of every row."""
        noise = torch.zeros((setup.slots, setup.length), dtype=torch.long, device=setup.device)
        best = noise[:, None].repeat(1, self.stability_threshold, 1)
        return Canvases(setup.mask_token_id, noise, best)

    def check(self, state: Canvases, request: Request) -> None:
        """Reject more steps than a row may take, and a temperature beside those of the schedule."""
        most = _PER_POSITION * request.span // request.block_count
        if self.max_steps > most:
            raise ValueError(
                f"max_steps={self.max_steps} is out of range; use at most {most} ({_PER_POSITION} steps per generated "
                "position), or a larger gen_length"
            )
        if request.sampling.temperature > 0:
            raise ValueError(
                f"temperature={request.sampling.temperature} has no effect on renoise, which has a schedule; set "
                "t_min and t_max"
            )

    def enter(self, state: Canvases, row: int, request: Request) -> None:
        """Seed the generator of the row."""
        state.sources[row] = torch.Generator(state.noise.device).manual_seed(request.seed)

    def step(self, window: Window, denoise: Denoise, state: Canvases) -> Edit:
        """Accept some of the drawn tokens, and draw others for all other positions."""
        rows, inside, left = window.rows.tolist(), window.inside, self.max_steps - window.step  # synchronizes
        at = window.rows[:, None], window.columns
        entered = window.step == 0
        # Synchronizes: each row draws by its own generator.
        self._renoise(window, state, [row for row, new in zip(rows, entered.tolist(), strict=True) if new])
        state.best[window.rows[entered]] = -1
        shown = Edit(window.columns, state.noise[at], window.masked).on(window.tokens)
        temperature = (self.t_min + (self.t_max - self.t_min) * (left.float() / self.max_steps)).clamp(min=1e-30)
        both = denoise(inside[:, None], tokens=shown[:, None], temperature=temperature)
        prediction = both.arranged(lambda values: values[:, 0])
        logits = prediction.logits[:, : state.mask_token_id]
        # Rows whose logits are not finite fail; they draw from ones, as NaN would be an error.
        shares = logits.softmax(-1, dtype=torch.float32).where(logits.amax(-1, keepdim=True).isfinite(), 1.0)
        entropy = prediction.aligned(torch.special.entr(shares).sum(-1), torch.inf)
        drawn = prediction.aligned(self._drawn(shares, rows, inside, state), 0)
        best = prediction.aligned(logits.argmax(-1), 0)
        self._renoise(window, state, rows)
        done = (left == 1) | (self._stable(best, window, state) & self._confident(entropy, inside))
        tokens = drawn.where(self._accepted(entropy) & inside, state.mask_token_id)
        return Edit(window.columns, best.where(done[:, None], tokens), inside, held=~done, final=False)

    def _accepted(self, entropy: Float[Tensor, "B K"]) -> Bool[Tensor, "B K"]:
        """The positions of lowest entropy within the bound."""
        ranked, place = entropy.sort(dim=-1, stable=True)
        within = ranked.cumsum(-1) - ranked <= self.entropy_bound
        return torch.zeros_like(within).scatter(-1, place, within)

    def _stable(self, best: Int[Tensor, "B K"], window: Window, state: Canvases) -> Bool[Tensor, " B"]:
        """Whether the most probable tokens are those of the steps before; remember them."""
        width = best.shape[1]
        before = state.best[window.rows, :, :width]
        state.best[window.rows, :, :width] = torch.cat((before, best[:, None]), dim=1)[:, 1:]
        return ((before == best[:, None]) | ~window.inside[:, None]).all(-1).all(-1)

    def _confident(self, entropy: Float[Tensor, "B K"], inside: Bool[Tensor, "B K"]) -> Bool[Tensor, " B"]:
        mean = entropy.where(inside, 0).sum(-1) / inside.sum(-1)
        return mean < self.confidence_threshold

    def _drawn(
        self, shares: Float[Tensor, "N V"], rows: list[int], inside: Bool[Tensor, "B K"], state: Canvases
    ) -> Int[Tensor, " N"]:
        """A token of each position."""
        # Row by row on purpose, as in `_renoise`: each has its own generator.
        parts = shares.split(inside.sum(-1).tolist())  # synchronizes: the sizes of the draws
        return torch.cat([self._sample(part, state.sources[row]) for row, part in zip(rows, parts, strict=True)])

    def _renoise(self, window: Window, state: Canvases, rows: list[int]) -> None:
        """Draw random tokens for the active blocks of some rows."""
        for row, columns, inside in zip(window.rows.tolist(), window.columns, window.inside, strict=True):
            if row in rows:
                where = columns[inside]
                state.noise[row, where] = self._uniform(len(where), state.mask_token_id, state.sources[row])

    def _sample(self, shares: Float[Tensor, "n V"], source: torch.Generator) -> Int[Tensor, " n"]:
        return torch.multinomial(shares, 1, generator=source)[:, 0]

    def _uniform(self, count: int, vocabulary: int, source: torch.Generator) -> Int[Tensor, " n"]:
        return torch.randint(vocabulary, (count,), generator=source, device=source.device)
