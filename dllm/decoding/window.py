"""What passes between the canvas and a sampler, Window and Edit, and between the canvas and everyone else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Int
from numpy.typing import NDArray
from torch import Tensor

from dllm.decoding.nonfinite import Broken


@dataclass(frozen=True)
class Window:
    """What a sampler sees in one step: the rows still being decoded, each at its own block.

    Attributes:
        rows: number of the row of each of the B entries; index state kept per row with it.
        tokens: the whole canvas of these rows. Never write to it.
        first: column of each row's first token, behind the padding.
        region: True at all positions of these rows to generate, decoded or not, in any block.
        start: column of the first position to generate.
        span: columns from there to the last position to generate.
        columns: canvas columns of each row's active block; past the end they repeat the last column.
        inside: True at positions to generate, decoded or not; False past the end of a short block and
            where a token was given.
        masked: True where a token may be committed now.
        index: flat indices of `masked`, worked out on the host.
        block: number of each row's active block.
        entry_masks: masked positions the row had when it entered this block.
        step: steps the row has spent in this block.
        block_length: columns of a block of this row, at most K.
        ends: (B, E) ids that end a row's text, the one that fills canvases first; -1 where a row has fewer.
        stop_at_eos: True where a row is finished once everything up to its first end-of-text is decoded.
        uniform: draws (B, K) numbers in [0, 1), each row from its own generator.
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
    index: Int[Tensor, " N"]
    block: Int[Tensor, " B"]
    entry_masks: Int[Tensor, " B"]
    step: Int[Tensor, " B"]
    block_length: Int[Tensor, " B"]
    ends: Int[Tensor, "B E"]
    stop_at_eos: Bool[Tensor, " B"]
    uniform: Callable[[], Tensor]

    def taken(self, entries: Int[Tensor, " N"]) -> Window:
        """Some entries in this order, repeats allowed; `index` and `uniform` stay those of all."""
        whole = {"index", "uniform"}
        return replace(self, **{name: each[entries] for name, each in vars(self).items() if name not in whole})


@dataclass(frozen=True)
class Edit:
    """What a sampler wants written: `tokens` at `columns` where `write`; writing [MASK] revokes a token.

    `columns` need not be those of the window, so that a policy can edit anywhere it may.

    Attributes:
        columns: canvas columns the edit is about.
        tokens: what to write there.
        write: where.
        end: column each row ends before: what lies from there on is filled with end-of-text, never decoded
            and no longer looked at. None for no change; only where nothing is given behind a mask.
        finished: rows that are complete with this edit, for policies that may edit after the last mask is gone; what
            ends a text early still does. None for those without a mask.
        drafted: tokens that were judged as drafts, accepted where they are written; [MASK] where there were none.
            None where the policy drafts nothing.
        guide_forwards: forwards of a guide model that each row took part in for this edit; None for none.
        guide_seconds: wall time of those.
        broken: rows for which a model that the policy asked gave no numbers; None for none.
    """

    columns: Int[Tensor, "B K"]
    tokens: Int[Tensor, "B K"]
    write: Bool[Tensor, "B K"]
    end: Int[Tensor, " B"] | None = None
    finished: Bool[Tensor, " B"] | None = None
    drafted: Int[Tensor, "B K"] | None = None
    guide_forwards: NDArray[np.int64] | None = None
    guide_seconds: float = 0.0
    broken: Broken | None = None

    def on(self, tokens: Int[Tensor, "B L"]) -> Int[Tensor, "B L"]:
        """What these canvases would be with the edit; they themselves are left alone."""
        length = tokens.shape[1]
        spare = torch.cat((tokens, tokens[:, :1]), dim=1)  # takes the writes that are not wanted
        return spare.scatter(1, self.columns.where(self.write, length), self.tokens)[:, :length]


@dataclass(frozen=True)
class Change:
    """What an edit did, on the host, for the rows of the window it belongs to.

    Attributes:
        rows: numbers of the rows of the B entries.
        committed: positions whose token changed to something other than [MASK].
        edited: positions among those that held another token before.
        revoked: positions that became [MASK] again.
        filled: positions that an early end of the row filled, whatever stood there.
        gained: (B,) how many masks fewer each row has.
        finished: rows that are complete now.
        failed: rows that are given up.
    """

    rows: NDArray[np.int64]
    committed: NDArray[np.bool_]
    edited: NDArray[np.bool_]
    revoked: NDArray[np.bool_]
    filled: NDArray[np.bool_]
    gained: NDArray[np.int64]
    finished: NDArray[np.int64]
    failed: NDArray[np.int64]

    @property
    def idle(self) -> NDArray[np.bool_]:
        """(B,) rows in which nothing changed and that go on."""
        touched = (self.committed | self.revoked | self.filled).any(1)
        return ~touched & ~np.isin(self.rows, [*self.finished, *self.failed])


@dataclass(frozen=True)
class Exchange:
    """Rows that entered, and where the others are now.

    Attributes:
        rows: numbers of those that entered.
        slots: theirs.
        moved: (M, 2) slots whose row went to another slot, and that one.
    """

    rows: NDArray[np.int64]
    slots: NDArray[np.int64]
    moved: NDArray[np.int64]
