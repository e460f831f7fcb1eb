"""The sampler protocol: a rule that maps predictions to the tokens to commit.

A sampler is a frozen dataclass of its options. State between steps lives in the object that `start`
returns, indexed by row number (`Window.rows`), so that one sampler serves many engines at once. Row
numbers are reused: `enter` announces that a number now belongs to another request.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dllm.decoding.branches import Attention
from dllm.decoding.prediction import Prediction
from dllm.decoding.request import Request
from dllm.decoding.setup import Setup
from dllm.decoding.window import Edit, Window
from dllm.resolve import resolve


@runtime_checkable
class Denoise(Protocol):
    """Runs one denoiser forward for every row that requests predictions, and counts it."""

    def __call__(
        self,
        asked: Bool[Tensor, "*B K"] | None = None,
        columns: Int[Tensor, "*B K"] | None = None,
        tokens: Int[Tensor, "B D L"] | None = None,
        attention: Attention = "apart",
        decided: bool = False,
        ahead: bool = False,
        temperature: Float[Tensor, " B"] | None = None,
    ) -> Prediction:
        """Predict tokens.

        A call without `asked`, `columns` and `tokens` needs no device synchronization.

        Args:
            asked: requested positions; the window's masked positions by default. A row without any is left out
                of the forward.
            columns: canvas columns of `asked`; the window's by default.
            tokens: D drafts a row in place of the current canvas, counted as one forward of that row; `asked`
                then is (B, D, K), and `columns` may be. The first draft is the current canvas. A draft without
                requested positions is not computed.
            attention: how the drafts of a row are computed. "apart": as D sequences. "tree": as one sequence, in
                which each draft attends to itself only. "shadow": as one sequence of the canvas and the requested
                positions of the other drafts; each of these attends to those of its draft and to the canvas except
                the position it predicts and its own, and the canvas does not attend to it. Without `tokens` there is
                one shadow: masks at the positions of the window, requested in rows with a decided one. "joint": the
                requested positions of a sequence attend to each other, also where the model's attention is causal.
            decided: request all positions of the window to be generated, decided ones included.
            ahead: request those of later blocks, too; the prediction is then aligned to the canvas, (B, L).
            temperature: divides the logits of each row, before all else; what a model is told of its last prediction
                is of these. None divides by 1.
        """
        ...


@runtime_checkable
class Sampler(Protocol):
    """A rule for unmasking.

    Attributes:
        single_forward: whether a step calls `denoise` exactly once, for the window's own columns and tokens, and leaves
            the state unchanged, so that other samplers may run its step on drafts.
        needs: requirements that a cache may not meet, by the names in `dllm.decoding.compatibility`.
    """

    @property
    def single_forward(self) -> bool: ...  # noqa: D102

    @property
    def needs(self) -> frozenset[str]: ...  # noqa: D102

    def files(self) -> Iterable[Path]:
        """The files that its result depends on."""
        ...

    def reach(self, request: Request) -> int | None:
        """Positions that the window shows when a block begins, where the policy chooses its end (`Edit.block_length`).

        Such a block begins at the first mask. None: blocks of the request's length, side by side.
        """
        ...

    def opening(self, request: Request) -> int | None:
        """Positions to generate that a row begins with, where the policy lets it grow (`Edit.grown`); None: all."""
        ...

    def start(self, setup: Setup) -> Any:
        """Load resources, reject invalid setups (ValueError), and return the state of an engine."""
        ...

    def check(self, state: Any, request: Request) -> None:
        """Reject a request that cannot be decoded (ValueError), when it is submitted."""
        ...

    def enter(self, state: Any, row: int, request: Request) -> None:
        """Begin a row; on ValueError the request fails."""
        ...

    def step(self, window: Window, denoise: Denoise, state: Any) -> Edit:
        """Take one step: every row that is part of a forward commits a token, or leaves the block it stayed in."""
        ...


@dataclass(frozen=True)
class Knob:
    """The option of a policy that trades quality for speed.

    Attributes:
        name: of the option.
        values: from safe to fast, as `dllm calibrate` tests them.
    """

    name: str
    values: tuple[float, ...]


# Of policies that commit what is at least this probable.
CONFIDENCES = (0.9999, 0.9995, 0.999, 0.995, 0.99, 0.98, 0.97, 0.95, 0.93, 0.9, 0.85, 0.8, 0.75, 0.7, 0.6, 0.5)


# What becomes of a committed token, in the order of reports: it stays; it may be taken back or replaced; it is the one
# that another policy gives; another model judges it.
KINDS = ("committing", "revising", "lossless", "guided")


class Policy:
    """A stateless sampler without requirements; subclasses override what they need.

    Attributes:
        kind: one of `KINDS`, by which reports group policies.
        whole_canvas: whether a step edits the whole canvas (`become`), not the window's columns alone.
        knob: the option to calibrate; None for none.
    """

    kind: ClassVar[str] = "committing"
    single_forward = False
    whole_canvas = False
    needs: frozenset[str] = frozenset()
    knob: ClassVar[Knob | None] = None

    def files(self) -> Iterable[Path]:
        """None."""
        return ()

    def reach(self, request: Request) -> int | None:
        """Blocks of the request's length."""
        return None

    def opening(self, request: Request) -> int | None:
        """All positions."""
        return None

    def start(self, setup: Setup) -> Any:
        """No state."""

    def check(self, state: Any, request: Request) -> None:
        """Accept every request."""

    def enter(self, state: Any, row: int, request: Request) -> None:
        """No state to reset."""


class OverPolicy(Policy):
    """A policy that runs the steps of another one on predictions of its own.

    Attributes:
        base: that policy: a name of conf/sampler or an object; any stateless policy with one forward per step.
    """

    base: str | Sampler

    @cached_property
    def _base(self) -> Sampler:
        return resolve("sampler", self.base, Sampler, "base")

    @property
    def knob(self) -> Knob | None:  # type: ignore[override]
        """The knob of the base."""
        knob: Knob | None = getattr(self._base, "knob", None)
        return None if knob is None else replace(knob, name=f"base.{knob.name}")

    def _check_base(self, what: str = "be a base", whole_canvas: bool = False) -> None:
        """Reject a base whose step is not one forward about the active block, or changes its state (ValueError).

        Args:
            what: it cannot do, in the error.
            whole_canvas: take one whose edits are of the whole canvas.
        """
        if getattr(self._base, "whole_canvas", False) and not whole_canvas:
            raise ValueError(
                f"base={self.base!r} cannot {what}: it edits the whole canvas, not the active block; use a policy such "
                "as vanilla or threshold"
            )
        if not self._base.single_forward:
            raise ValueError(
                f"base={self.base!r} cannot {what}: its step is more than one forward about the active block, or "
                "depends on earlier ones; use a policy such as vanilla or threshold (learn2pd with eotp=off)"
            )

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """Requirements for the cache (`dllm.decoding.compatibility`): those of the base."""
        return self._base.needs

    def files(self) -> Iterable[Path]:
        """The files of the base."""
        return self._base.files()

    def check(self, state: Any, request: Request) -> None:
        """Reject what the base rejects; `state` holds the base and its state."""
        state.base.check(state.state, request)

    def enter(self, state: Any, row: int, request: Request) -> None:
        """Begin the row in the base."""
        state.base.enter(state.state, row, request)


def constant_denoiser(prediction: Prediction) -> Denoise:
    """A denoiser that always returns this prediction: applies a policy to a prediction that was made before."""

    def denoise(
        asked: Tensor | None = None,
        columns: Tensor | None = None,
        tokens: Tensor | None = None,
        attention: Attention = "apart",
        decided: bool = False,
        ahead: bool = False,
        temperature: Tensor | None = None,
    ) -> Prediction:
        return prediction

    return denoise


def commit(window: Window, prediction: Prediction, chosen: Bool[Tensor, "B K"]) -> Edit:
    """The edit that commits the predicted tokens at the chosen positions of the window."""
    return Edit(window.columns, prediction.tokens, chosen)


def permitted(window: Window, edit: Edit, made_by: Sequence[Prediction]) -> Edit:
    """An edit of some rows without what would leave the format of their answers.

    Args:
        window: the rows, or drafts of them.
        edit: of these.
        made_by: the prediction that it was made by, aligned to the columns of the window; empty if there was none.
    """
    return edit if window.permit is None or not made_by else window.permit(window, edit, made_by[0])


def become(window: Window, tokens: Int[Tensor, "B L"]) -> Edit:
    """The edit that replaces the window's canvases by these."""
    columns = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    return Edit(columns, tokens, tokens != window.tokens)
