"""DAEDAL: the canvas grows while the model does not end its text on it (arXiv 2508.00819, algorithm 1).

Rule:

    length   the row begins with `initial` masks and gains `factor` masks per step while E < enough; then half as
             many end-of-text tokens as `check_positions` follow
    filling  per step, in the first block with a mask: commit every mask with p(top token) > high, or the best one; and
             where E < expand, replace the least probable mask with p < low that is left by `factor` masks

until no mask is left, with E the sum of p(end-of-text) over the last `check_positions` positions that predict it,
divided by that number. A row never exceeds the generated length of its request; what it does not use is filled with
end-of-text. Every step commits a token or adds positions, so a row ends within twice its longest length.

It needs predictions for the whole canvas, and inserted masks move what follows them: there is no cache for it, it does
not infill, and it needs a model that attends to the whole canvas.

Near the longest length an insertion moves what no longer fits off the end, as in the reference.

Differences: where no end-of-text tokens fit, the reference repeats the forward over the same canvas.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dllm.checks import number
from dllm.decoding.prediction import Prediction
from dllm.decoding.request import Request
from dllm.decoding.setup import Setup
from dllm.decoding.window import Edit, Window
from dllm.samplers.base import CONFIDENCES, Denoise, Knob, Policy, become
from dllm.samplers.selection import is_eos, leftmost, top


@dataclass(frozen=True)
class Lengths:
    """State of an engine.

    Attributes:
        mask_token_id: id of [MASK].
        filling: whether a row's length was found.
        most: positions to generate at most.
        block: block length of the request.
    """

    mask_token_id: int
    filling: Bool[Tensor, " rows"]
    most: Int[Tensor, " rows"]
    block: Int[Tensor, " rows"]


@dataclass(frozen=True)
class Daedal(Policy):
    """Find the length of the text, and insert masks where more room is needed.

    Args:
        initial: positions to generate that a row begins with.
        factor: masks added or inserted in one step.
        enough: end-of-text confidence at which the initial length is long enough.
        expand: end-of-text confidence below which masks are inserted while filling; 0 inserts none.
        high: probability above which a token is committed.
        low: probability below which a mask may be replaced by several.
        check_positions: positions of the end-of-text confidence.

    Raises:
        ValueError: a value out of range; a request to infill; a model that is causal over blocks.
    """

    knob = Knob("high", CONFIDENCES)
    needs = frozenset({"growth"})

    initial: int = 64
    factor: int = 8
    enough: float = 0.5
    expand: float = 0.9
    high: float = 0.9
    low: float = 0.1
    check_positions: int = 32

    def __post_init__(self) -> None:
        for name, value in (("initial", 64), ("factor", 8), ("check_positions", 32)):
            use = f"a whole number of at least 1 ({value} is published)"
            number(name, getattr(self, name), use, low=1, high=2**31 - 1, whole=True)
        for name, share in (("enough", 0.5), ("expand", 0.9), ("high", 0.9), ("low", 0.1)):
            number(name, getattr(self, name), f"0 or more ({share} is published)", low=0)

    def reach(self, request: Request) -> int:
        """The whole canvas."""
        return request.span

    def opening(self, request: Request) -> int:
        """The initial length."""
        return min(self.initial, request.span)

    def start(self, setup: Setup) -> Lengths:
        """Reject models that do not see the end of the canvas."""
        if setup.pattern is not None:
            raise ValueError(
                "daedal looks for the end of the text on the whole canvas, and this model attends to blocks in order; "
                "use another sampler"
            )
        most, block = torch.zeros((2, setup.slots), dtype=torch.long, device=setup.device)
        filling = torch.zeros(setup.slots, dtype=torch.bool, device=setup.device)
        return Lengths(setup.mask_token_id, filling, most, block)

    def check(self, state: Lengths, request: Request) -> None:
        """Reject a request to infill."""
        if request.infill:
            raise ValueError("daedal inserts masks, which would move given text; use another sampler to infill")

    def enter(self, state: Lengths, row: int, request: Request) -> None:
        """Begin to look for the length."""
        state.filling[row], state.most[row], state.block[row] = False, request.span, request.block_length

    def step(self, window: Window, denoise: Denoise, state: Lengths) -> Edit:
        """Grow, or commit and insert."""
        prediction = denoise(decided=True)
        length, most = window.inside.sum(-1), state.most[window.rows]
        ended = self._ended(window, prediction)
        filling = state.filling[window.rows]
        grows = ~filling & (ended < self.enough) & (length < most)
        ends = torch.where(filling | grows, 0, (most - length).clamp(max=self.check_positions // 2))
        state.filling[window.rows] = ~grows
        filling = ~grows & (ends == 0)

        chosen, place = self._choose(window, prediction, filling, (ended < self.expand) & (length < most), state)
        column = torch.arange(window.tokens.shape[1], device=window.tokens.device)
        end = (window.start + length)[:, None]
        tokens = Edit(window.columns, prediction.tokens, chosen).on(window.tokens)
        tokens = tokens.masked_fill(column >= end, state.mask_token_id)  # where the row may grow
        inserted = torch.where(place.any(-1), (most - length).clamp(max=self.factor - 1), 0)
        grown = torch.where(grows, (most - length).clamp(max=self.factor), ends + inserted)
        tokens = self._inserted(window, tokens, place, state.mask_token_id)
        tokens = torch.where((column >= end) & (column < end + ends[:, None]), window.ends[:, :1], tokens)
        tokens = tokens.where(column < end + grown[:, None], window.tokens)
        return replace(become(window, tokens), grown=grown)

    def _ended(self, window: Window, prediction: Prediction) -> Float[Tensor, " B"]:
        """How confident the model is that the text ends on the canvas."""
        ends = is_eos(prediction.tokens, window) & window.inside
        last = ends & (ends.flip(-1).cumsum(-1).flip(-1) <= self.check_positions)
        return prediction.confidence.masked_fill(~last, 0).sum(-1) / self.check_positions

    def _choose(
        self,
        window: Window,
        prediction: Prediction,
        filling: Bool[Tensor, " B"],
        short: Bool[Tensor, " B"],
        state: Lengths,
    ) -> tuple[Bool[Tensor, "B K"], Bool[Tensor, "B K"]]:
        """Masks to commit, and the one to replace by several."""
        offset = torch.arange(window.columns.shape[1], device=filling.device)
        block = state.block[window.rows, None]
        first = window.masked.int().argmax(-1, keepdim=True) // block
        masked = window.masked & (offset // block == first) & filling[:, None]
        sure = (prediction.confidence > self.high) & masked
        chosen = torch.where(sure.any(-1, keepdim=True), sure, top(prediction.confidence, 1, masked))
        left = masked & ~chosen & (prediction.confidence < self.low) & short[:, None]
        score = prediction.confidence.masked_fill(~left, torch.inf)
        return chosen, leftmost(left & (score == score.amin(-1, keepdim=True)))

    def _inserted(
        self,
        window: Window,
        tokens: Int[Tensor, "B L"],
        place: Bool[Tensor, "B K"],
        mask_token_id: int,
    ) -> Int[Tensor, "B L"]:
        """The canvases with one mask replaced by several, which moves what follows it."""
        column = torch.arange(tokens.shape[1], device=tokens.device)
        at = window.columns.masked_fill(~place, tokens.shape[1]).amin(-1, keepdim=True)
        moved = column >= at + self.factor
        shifted = tokens.gather(1, (column - (self.factor - 1) * moved).clamp(min=0))
        return torch.where((column >= at) & ~moved, mask_token_id, shifted)
