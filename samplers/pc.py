"""PC-Sampler: position-aware calibration of the confidence (arXiv 2508.13021).

Rule:

    commit the k masked positions i with the largest  exp(-position_weight * i) * min(-p(y) * log(q(y) + 1e-9), clip)

By its confidence alone a model decodes the ends of a text first, and words that are frequent everywhere. Here p is the
probability of a position's predicted token y and q its frequency in a corpus, i the position's offset in the block, and
k what LLaDA's uniform schedule gives this step (see `vanilla`). A large position_weight decodes from left to right;
position_weight = 0 and a uniform q are the order of the confidence.

The frequencies of any corpus are counted with `dllm.frequencies.count_tokens`. The reference ranks by the probabilities
in the dtype of the model, here by those in float64.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from dllm.checks import number
from dllm.decoding.request import Request
from dllm.decoding.setup import Setup
from dllm.decoding.window import Edit, Window
from dllm.files import expanded
from dllm.frequencies import Frequencies, bundled_frequencies, load_frequencies
from dllm.samplers.base import Denoise, Policy, commit
from dllm.samplers.schedule import check_steps, uniform_quota
from dllm.samplers.selection import top


@dataclass(frozen=True)
class PC(Policy):
    """Commit a scheduled number of early positions with informative tokens.

    Args:
        table: file of token frequencies, or a `dllm.frequencies.Frequencies`; None for the bundled table of
            the model's tokenizer.
        position_weight: how much earlier positions of the block are preferred; 0 for not at all.
        clip: largest score of a token.
        steps: denoising steps for the whole generated region; None for one token per step.

    Raises:
        ValueError: an option out of range; at the start of a run: a table that cannot be read, or one of
            another tokenizer.
    """

    single_forward = True

    table: str | Path | Frequencies | None = None
    position_weight: float = 0.25
    clip: float = 10.0
    steps: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.table, Path):
            object.__setattr__(self, "table", str(self.table))
        if self.table is not None and not isinstance(self.table, (str, Frequencies)):
            raise ValueError(f"table={self.table!r} is not a table of token frequencies; give a file, or null")
        number("position_weight", self.position_weight, "0 to 1e6 (0.25 is published)", low=0, high=1e6)
        number("clip", self.clip, "a positive number (10 is published)", above=0)
        if self.steps is not None:
            use = "a whole number of at least 1, or null for one token per step"
            number("steps", self.steps, use, low=1, whole=True)

    def files(self) -> Iterable[Path]:
        """The file of the table."""
        match self.table:
            case None:
                return bundled_frequencies()
            case str():
                return [expanded(self.table)]
            case _:
                return ()

    def start(self, setup: Setup) -> Float[Tensor, " V"]:
        """Load the table; the state is -log of the frequencies."""
        shares = self._find(setup).shares(setup.vocab_size)
        return -(shares.to(setup.device) + 1e-9).log()

    def check(self, state: Any, request: Request) -> None:
        """Reject steps that cannot be divided among the blocks."""
        if self.steps is not None:
            check_steps(self.steps, request)

    def step(self, window: Window, denoise: Denoise, state: Float[Tensor, " V"]) -> Edit:
        """Commit the scheduled number of the best positions."""
        prediction = denoise()
        offset = torch.arange(window.masked.shape[1], device=state.device)
        weight = (-self.position_weight * offset).double().exp()
        score = weight * (prediction.confidence * state[prediction.tokens]).clamp(max=self.clip)
        count = 1 if self.steps is None else uniform_quota(self.steps, window)
        return commit(window, prediction, top(score, count, window.masked))

    def _find(self, setup: Setup) -> Frequencies:
        """The table of the model's tokenizer."""
        if self.table is None:
            for path in bundled_frequencies():
                table = load_frequencies(path)
                if setup.tokenizer is not None and table.fits(setup.tokenizer, setup.vocab_size):
                    return table
            raise ValueError(
                "table=null: there is no bundled table for the tokenizer of this model; count a corpus with "
                "dllm.frequencies.count_tokens and give its file"
            )
        table = self.table if isinstance(self.table, Frequencies) else load_frequencies(self.table)
        if not table.fits(setup.tokenizer, setup.vocab_size):
            named = "of token frequencies" if isinstance(self.table, Frequencies) else repr(self.table)
            raise ValueError(
                f"table={named} was counted with another tokenizer; count a corpus with "
                "dllm.frequencies.count_tokens and the tokenizer of this model"
            )
        return table
