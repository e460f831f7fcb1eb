"""The data exchanged by the canvas with samplers (Window, Edit) and with caches and recorders (Change, Exchange)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from numpy.typing import NDArray
from torch import Tensor

from dllm.decoding.nonfinite import Broken

if TYPE_CHECKING:
    from dllm.decoding.prediction import Prediction


class Unforeseen(Exception):
    """A step cannot be taken before the last one is read."""


class Draws(Unforeseen):
    """The policy draws random numbers."""


@dataclass(frozen=True)
class Window:
    """A sampler's view of one step: the active rows, each at its own block.

    Attributes:
        rows: row number of each of the B entries; index per-row state with it.
        tokens: the whole canvas of these rows. Never write to it.
        first: column of each row's first token, after the padding.
        region: True at all positions to generate, masked or not, in any block.
        start: column of the first position to generate.
        span: columns from there to the last position to generate.
        columns: canvas columns of each row's active block; past the end they repeat the last column.
        inside: True at positions to generate, masked or not; False past the end of a short block, at
            given tokens and where the last edit hides them.
        masked: True where a token may be committed now.
        block: number of each row's active block.
        entry_masks: masked positions the row had when it entered this block.
        step: steps of the row in this block so far.
        block_length: length of the active block, at most K; it may exceed what is left of the row.
        ends: (B, E) end-of-text ids of a row, the fill token first; -1 where a row has fewer.
        stop_at_eos: True where a row is finished once everything up to its first end-of-text is decoded.
        uniform: draws (B, K) numbers in [0, 1), each row from its own generator; that of the engine also takes `times`,
            and draws (T, B, K) for T of at most `times`, of a row as many as it has positions (0 beyond).
        permit: takes from an edit of (some of) these rows, made by a prediction aligned to their columns, what would
            leave the format of their answers. The engine passes every edit through it; a policy that goes ahead of the
            canvas in a step does so, too. None where no row has a format.
    """

    rows: Int[Tensor, " B"]
    tokens: Int[Tensor, "B L"]
    first: Int[Tensor, " B"]
    region: Bool[Tensor, "B L"]
    start: Int[Tensor, " B"]
    span: Int[Tensor, " B"]
    columns: Int[Tensor, "B K"]
    inside: Bool[Tensor, "B K"]
    masked: Bool[Tensor, "B K"]
    block: Int[Tensor, " B"]
    entry_masks: Int[Tensor, " B"]
    step: Int[Tensor, " B"]
    block_length: Int[Tensor, " B"]
    ends: Int[Tensor, "B E"]
    stop_at_eos: Bool[Tensor, " B"]
    uniform: Callable[..., Tensor]
    permit: Callable[[Window, Edit, Any], Edit] | None = None

    def taken(self, entries: Int[Tensor, " N"]) -> Window:
        """Some entries in this order, repeats allowed; `uniform` and `permit` are unchanged."""
        whole = {"uniform", "permit"}
        return replace(self, **{name: each[entries] for name, each in vars(self).items() if name not in whole})


@dataclass(frozen=True)
class Edit:
    """The edit of a sampler: write `tokens` at `columns` where `write`; writing [MASK] revokes a token.

    `columns` need not be those of the window: a policy can edit any generated position.

    Attributes:
        columns: canvas columns of the edit.
        tokens: tokens to write there.
        write: where to write.
        end: column before which each row ends: columns from there on are filled with end-of-text, never decoded
            and no longer attended to. None for no change; only without given tokens after a mask.
        until: column from which on nothing is attended to in the next step, nor part of its window, which must keep a
            mask; the canvas length to hide nothing. None hides nothing of any row.
        finished: rows that are complete with this edit, for policies that may edit after the last mask is gone; an
            early end of a text still finishes it. None: rows without masks.
        block_length: length of the active block from now on, of policies that choose it (`Sampler.reach`): at most that
            of the window; 0 for no change. None: no change.
        grown: positions by which each row grows at its end, of policies that choose the length (`Sampler.opening`);
            this edit writes them. None: no growth.
        held: rows that stay at their block although it has no mask left, so that the policy may revise it; they are not
            finished either. None: no row.
        final: whether committed tokens stay. Where they may change until their block is complete, neither end-of-text
            nor a stop string in an incomplete block finishes a row, as what it follows may change too.
        drafted: tokens that were verified as drafts, accepted where they are written; [MASK] where there were none.
            None if the policy does not draft.
        source: (B, L) the draft whose prediction the token of a column of the canvas is of, or would be.
            None: the first.
        prediction: the one that the tokens are of where the policy changed what the model predicts for the columns of
            the window. None: the latest.
        guide_forwards: forwards of a guide model per row for this edit; None for none.
        guide_seconds: wall time of those.
        broken: rows with non-finite logits of a guide model; None for none.
    """

    columns: Int[Tensor, "B K"]
    tokens: Int[Tensor, "B K"]
    write: Bool[Tensor, "B K"]
    end: Int[Tensor, " B"] | None = None
    until: Int[Tensor, " B"] | None = None
    finished: Bool[Tensor, " B"] | None = None
    block_length: Int[Tensor, " B"] | None = None
    grown: Int[Tensor, " B"] | None = None
    held: Bool[Tensor, " B"] | None = None
    final: bool = True
    drafted: Int[Tensor, "B K"] | None = None
    source: Int[Tensor, "B L"] | None = None
    prediction: Prediction | None = None
    guide_forwards: NDArray[np.int64] | None = None
    guide_seconds: float = 0.0
    broken: Broken | None = None

    @property
    def is_plain(self) -> bool:
        """Whether it writes tokens and does nothing else."""
        plain = ("columns", "tokens", "write", "final", "drafted", "source", "prediction", "guide_seconds")
        return self.final and all(value is None for name, value in vars(self).items() if name not in plain)

    def on(self, tokens: Int[Tensor, "B L"]) -> Int[Tensor, "B L"]:
        """These canvases with the edit applied, out of place."""
        length = tokens.shape[1]
        spare = torch.cat((tokens, tokens[:, :1]), dim=1)  # the last column absorbs masked-out writes
        return spare.scatter(1, self.columns.where(self.write, length), self.tokens)[:, :length]


@dataclass(frozen=True)
class Change:
    """The effect of an edit on the rows of its window, on the host.

    Attributes:
        rows: row numbers of the B entries.
        committed: positions whose token changed to something other than [MASK].
        edited: positions among those that had another token before.
        revoked: positions that became [MASK] again.
        filled: positions that an early end of the row filled.
        gained: (B,) decrease of the number of masks of each row.
        finished: rows that are complete.
        failed: rows that failed.
        grown: (B,) positions that rows gained at their end.
        held: (B,) rows that the policy keeps at their block.
        settled: (B,) the column before which no token changes any more.
    """

    rows: NDArray[np.int64]
    committed: NDArray[np.bool_]
    edited: NDArray[np.bool_]
    revoked: NDArray[np.bool_]
    filled: NDArray[np.bool_]
    gained: NDArray[np.int64]
    finished: NDArray[np.int64]
    failed: NDArray[np.int64]
    grown: NDArray[np.int64]
    held: NDArray[np.bool_]
    settled: NDArray[np.int64]

    @property
    def ended(self) -> NDArray[np.bool_]:
        """(B,) rows that are finished or failed."""
        return np.asarray((self.rows[:, None] == np.concatenate((self.finished, self.failed))).any(1))

    @property
    def idle(self) -> NDArray[np.bool_]:
        """(B,) unfinished rows without any change, other than those held."""
        touched = (self.committed | self.revoked | self.filled).any(1) | (self.grown > 0) | self.held
        return ~touched & ~self.ended


@dataclass(frozen=True)
class Exchange:
    """Rows that entered, and rows that moved.

    Attributes:
        rows: numbers of the rows that entered.
        slots: of the rows that entered.
        moved: (M, 2) source and target slots of the rows that moved.
    """

    rows: NDArray[np.int64]
    slots: NDArray[np.int64]
    moved: NDArray[np.int64]
