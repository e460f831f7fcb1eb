"""What a sampler is: a rule that looks at predictions and decides which tokens to write.

A sampler is a frozen dataclass of its options. What it must remember between steps lives in the
state object that `start` returns, kept under the numbers of the rows (`Window.rows`), so that one
sampler serves many engines at once. The numbers are used again: `enter` says that one has become
another request's.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from dllm.decoding.branches import Attention
from dllm.decoding.prediction import Prediction
from dllm.decoding.request import Request
from dllm.decoding.setup import Setup
from dllm.decoding.window import Edit, Window


@runtime_checkable
class Denoise(Protocol):
    """Runs the denoiser once for every row that asks something, and counts it."""

    def __call__(
        self,
        asked: Bool[Tensor, "*B K"] | None = None,
        columns: Int[Tensor, "*B K"] | None = None,
        tokens: Int[Tensor, "B D L"] | None = None,
        attention: Attention = "apart",
        decided: bool = False,
    ) -> Prediction:
        """Predict tokens.

        What concerns the window's own columns and tokens costs no read of the device.

        Args:
            asked: where predictions are wanted; the window's masked positions by default. A row
                that asks nothing takes no part in the forward.
            columns: canvas columns that `asked` is about; the window's by default.
            tokens: D drafts a row to look at instead of the current canvas, which count as one forward of
                that row; `asked` then is (B, D, K), and `columns` may be. The first draft is the canvas as
                it is. A draft that asks nothing is not computed.
            attention: how the drafts of a row are computed: "apart" as D sequences; "tree" as one, in which each
                attends to itself only; "shadow" as one, in which the first is the canvas and, of the others, the
                columns asked about are added to it: each attends to itself and to the canvas, but not to the token it
                predicts, nor to the one in its own place; and nothing attends to it.
            decided: ask about all positions of the window to be generated, the decided ones as well.
        """
        ...


@runtime_checkable
class Sampler(Protocol):
    """A rule for unmasking.

    Attributes:
        single_forward: a promise that a step calls `denoise` once, for the window's own columns and tokens, and leaves
            the state as it is: then others may run its step on drafts.
        needs: what it relies on that a cache may not give, in the words of `dllm.decoding.compatibility`.
    """

    @property
    def single_forward(self) -> bool: ...  # noqa: D102

    @property
    def needs(self) -> frozenset[str]: ...  # noqa: D102

    def files(self) -> Iterable[Path]:
        """The files that its result depends on."""
        ...

    def start(self, setup: Setup) -> Any:
        """Load what is needed, refuse (ValueError) what cannot work, and return an engine's state."""
        ...

    def check(self, state: Any, request: Request) -> None:
        """Refuse a request that cannot be decoded (ValueError), when it is made."""
        ...

    def enter(self, state: Any, row: int, request: Request) -> None:
        """Begin a row; where that is impossible (ValueError) the request fails."""
        ...

    def step(self, window: Window, denoise: Denoise, state: Any) -> Edit:
        """Decide one step: every row that takes part in a forward commits at least one token."""
        ...


class Policy:
    """A sampler that has nothing to prepare or refuse and remembers nothing, but for what it overrides."""

    single_forward = False
    needs: frozenset[str] = frozenset()

    def files(self) -> Iterable[Path]:
        """None."""
        return ()

    def start(self, setup: Setup) -> Any:
        """Nothing to prepare."""

    def check(self, state: Any, request: Request) -> None:
        """Nothing to refuse."""

    def enter(self, state: Any, row: int, request: Request) -> None:
        """Nothing to remember."""


def told(prediction: Prediction) -> Denoise:
    """A denoiser that answers with this prediction, whatever is asked: to let a policy look at what is known."""

    def denoise(
        asked: Tensor | None = None,
        columns: Tensor | None = None,
        tokens: Tensor | None = None,
        attention: Attention = "apart",
        decided: bool = False,
    ) -> Prediction:
        return prediction

    return denoise


def commit(window: Window, prediction: Prediction, chosen: Bool[Tensor, "B K"]) -> Edit:
    """The edit that writes the predicted tokens at the chosen positions of the window."""
    return Edit(window.columns, prediction.tokens, chosen)


def become(window: Window, tokens: Int[Tensor, "B L"]) -> Edit:
    """The edit that turns the window's canvases into these."""
    columns = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    return Edit(columns, tokens, tokens != window.tokens)
