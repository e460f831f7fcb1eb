"""Learn2PD: a learned filter decides which predictions are final (arXiv 2509.25188, sections 3.3 and 3.4).

Rule:

    commit i  if  sigmoid(filter(c))_i > threshold,  and always the `at_least` most confident ones

Per step, over the masked positions of the block, with c the confidences of all its K positions. At unmasked positions c
is the probability of the token that is predicted there now. Positions missing in a short block, and given tokens, have
confidence 1 in the published filter and are zero padding in the other (see `dllm.filters`).

End-of-text prediction (`eotp`) discards the canvas after a predicted end-of-text, at a cut p:

    published  the first end-of-text that the filter accepted in the block; else, of all masked
               positions of the whole canvas that predict end-of-text, the most confident
    accepted   the first end-of-text that the filter accepted in the block (the reference's form with a
               cache, which predicts only the block)
    safe       the first masked position of the block after the commits, if it predicts end-of-text

Everything after p becomes end-of-text and is no longer attended to; p itself need not be committed yet.
On the bundled models none of them saves forwards over eotp=off, as rows stop at their first end-of-text
anyway; so off is the default. It may help with stop_at_eos=false.

Differences: after a cut within a block the reference raises an error, as its filter has a fixed input
size; here the discarded positions are treated as those of a short block.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dllm.checks import Notice, choice, number
from dllm.decoding.flags import flagged
from dllm.decoding.prediction import Prediction
from dllm.decoding.request import Request
from dllm.decoding.setup import Setup
from dllm.decoding.window import Edit, Window
from dllm.filters import ANCHORED, Filter, FilterNetwork, filter_files, find_filter, load_filter
from dllm.samplers.base import Denoise, Knob, Policy, commit
from dllm.samplers.selection import is_eos, leftmost, top


@dataclass(frozen=True)
class FilterState:
    """State of an engine: the filter for each block length, and the setup."""

    networks: dict[int, FilterNetwork]
    setup: Setup


@dataclass(frozen=True)
class Learn2PD(Policy):
    """Commit the predictions that a learned filter classifies as final.

    Args:
        filter: a bundled filter or a file; None for the bundled filter of the model, "anchored" for its bundled filter
            under the policy of that name.
        threshold: a position is committed where the filter's probability exceeds this.
        eotp: end-of-text prediction: off, published, accepted or safe.
        at_least: tokens committed per step whatever the filter's output.
        allow_mismatch: use the filter although it was trained for another model or block length, or does not
            record them. A file in the published form, which never does, is accepted without this option: it is
            used at the block length of its shape, with a warning.

    Raises:
        ValueError: an option out of range; at the start of a run: no such filter, or one for another
            block length or model.
    """

    knob = Knob(
        "threshold", (0.9999, 0.9995, 0.999, 0.998, 0.995, 0.99, 0.98, 0.96, 0.94, 0.92, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5)
    )

    filter: str | Filter | None = None
    threshold: float = 0.96
    eotp: Literal["off", "published", "accepted", "safe"] = "off"
    at_least: int = 1
    allow_mismatch: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.filter, (str, Path, Filter, type(None))):
            raise ValueError(f"filter={self.filter!r} is not a filter; give its file or name, or a loaded one")
        number("threshold", self.threshold, "a number from 0 to 1 (0.96 is published)", low=0, high=1)
        choice("eotp", self.eotp, ("off", "published", "accepted", "safe"))
        number("at_least", self.at_least, "a whole number of at least 1", low=1, whole=True)
        choice("allow_mismatch", self.allow_mismatch, (True, False))

    @property
    def single_forward(self) -> bool:  # type: ignore[override]
        """Whether a step depends on the active block alone."""
        return self.eotp == "off"

    def files(self) -> Iterable[Path]:
        """The files of the filter."""
        return () if isinstance(self.filter, Filter) else filter_files(self.filter)

    def start(self, setup: Setup) -> FilterState:
        """Filters are loaded when the first request with their block length is checked."""
        return FilterState({}, setup)

    def check(self, state: FilterState, request: Request) -> None:
        """Load the filter, and reject one of another model or block length."""
        if request.has_gaps and self.eotp != "off":
            raise ValueError(f"eotp={self.eotp} would discard given text; use eotp=off to infill")
        setup, length = state.setup, request.block_length
        if length in state.networks:
            return
        if self.filter in (None, ANCHORED):
            found = find_filter(setup.fingerprint(), length, None if self.filter is None else ANCHORED)
        else:
            found = self.filter if isinstance(self.filter, Filter) else load_filter(self.filter)
        _check(found, setup.fingerprint, length, self.allow_mismatch)
        state.networks[length] = found.network.to(setup.device)

    def step(self, window: Window, denoise: Denoise, state: FilterState) -> Edit:
        """Commit accepted positions and always the best; cut after a predicted end-of-text."""
        everywhere = None
        if self.eotp == "published":
            everywhere = _ask_everywhere(window, denoise, state.setup.mask_token_id)
            prediction = everywhere.arranged(lambda values: values.gather(1, window.columns))
        else:
            prediction = denoise(decided=True)
        accepted = (self._probability(window, prediction, state) > self.threshold) & window.masked
        edit = commit(window, prediction, accepted | top(prediction.confidence, self.at_least, window.masked))
        if self.eotp == "off":
            return edit
        ends, none = is_eos(prediction.tokens, window), state.setup.length
        if self.eotp == "safe":
            cut = _first(leftmost(window.masked & ~edit.write) & ends, window, none)
        else:
            cut = _first(accepted & ends, window, none)
        if everywhere is not None:
            cut = torch.where(cut < none, cut, _most_confident_end(window, everywhere, state.setup.mask_token_id))
        return replace(edit, end=(cut + 1).clamp(max=none))

    def _probability(self, window: Window, prediction: Prediction, state: FilterState) -> Float[Tensor, "B K"]:
        """Probability that each prediction is final, by the filter for the row's block length."""
        confidence = prediction.confidence.float()
        probability, width = torch.zeros_like(confidence), confidence.shape[1]
        for length, network in tuple(state.networks.items()):
            # The window is as wide as the longest block in it, and at most the canvas.
            own = (F.pad(each, (0, length - width)) for each in (confidence, window.masked, window.inside))
            found = F.pad(network(*own).sigmoid(), (0, width - length))
            probability = found.where((window.block_length == length)[:, None], probability)
        return probability


def _most_confident_end(window: Window, everywhere: Prediction, mask_token_id: int) -> Int[Tensor, " B"]:
    """The most confident masked position of the canvas that predicts end-of-text; the canvas length if none does."""
    ends = (window.tokens == mask_token_id) & window.region & is_eos(everywhere.tokens, window)
    score = everywhere.confidence.masked_fill(~ends, -torch.inf)
    return torch.where(ends.any(-1), score.argmax(-1), ends.shape[1])


def _ask_everywhere(window: Window, denoise: Denoise, mask_token_id: int) -> Prediction:
    """Predictions for the whole block and for the masks of the whole canvas."""
    columns = torch.arange(window.tokens.shape[1], device=window.tokens.device).expand_as(window.tokens)
    block = flagged(torch.zeros_like(window.region), window.columns, window.inside)
    return denoise(block | ((window.tokens == mask_token_id) & window.region), columns)


def _first(where: Bool[Tensor, "B K"], window: Window, none: int) -> Int[Tensor, " B"]:
    """Canvas column of each row's first True; `none` without one."""
    return window.columns.masked_fill(~where, none).amin(-1)


def _check(found: Filter, fingerprint: Callable[[], str], block_length: int, allow_mismatch: bool) -> None:
    """Reject a filter of another model or block length."""
    card, only = found.card, found.network.block_length
    if only is not None and only != block_length:
        raise ValueError(
            f"filter={found.name!r} fits block_length={only} only, not {block_length}; set block_length={only}"
        )
    if allow_mismatch:
        return
    if card is None and only is not None:
        message = f"filter={found.name!r} has no card: it fits block_length={only}, its model is unknown"
        warnings.warn(message, Notice, stacklevel=2)
        return
    use = "train one with `dllm train-filter`, or set allow_mismatch=true to use it anyway"
    if card is None:
        raise ValueError(f"filter={found.name!r} does not record its model; {use}")
    if card.fingerprint != fingerprint():
        raise ValueError(f"filter={found.name!r} is for the weights of {card.backbone!r}; {use}")
    if card.block_length != block_length:
        raise ValueError(f"filter={found.name!r} is for block_length={card.block_length}, not {block_length}; {use}")
