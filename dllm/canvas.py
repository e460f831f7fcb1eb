"""The canvas being decoded, and the two things that pass between it and a sampler: Window and Edit.

Tokens live on the device. A copy on the host is refreshed once a step, and everything that decides
what happens next (blocks, finished rows, end-of-text) is worked out there with NumPy, for all rows
at once: one read of the device per step, however many rows there are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from jaxtyping import Bool, Int
from numpy.typing import NDArray
from torch import Tensor

from dllm.ending import StopStrings
from dllm.nonfinite import Broken
from dllm.transfer import put, send


@dataclass(frozen=True)
class Window:
    """What a sampler sees in one step: the rows still being decoded, each at its own block.

    Attributes:
        rows: canvas row of each of the B entries; index state kept per row with it.
        tokens: the whole canvas of these rows. Never write to it.
        first: column of each row's first token, behind the padding.
        region: True at all positions of these rows to generate, decoded or not, in any block.
        columns: canvas columns of each row's active block; past the end they repeat the last column.
        inside: True at positions to generate, decoded or not; False past the end of a short block and
            where a token was given.
        masked: True where a token may be committed now.
        index: flat indices of `masked`, worked out on the host.
        block: number of each row's active block.
        entry_masks: masked positions the row had when it entered this block.
        step: steps the row has spent in this block.
        uniform: draws (B, K) numbers in [0, 1), each row from its own generator.
    """

    rows: Int[Tensor, " B"]
    tokens: Int[Tensor, "B L"]
    first: Int[Tensor, " B"]
    region: Bool[Tensor, "B L"]
    columns: Int[Tensor, "B K"]
    inside: Bool[Tensor, "B K"]
    masked: Bool[Tensor, "B K"]
    index: Int[Tensor, " N"]
    block: Int[Tensor, " B"]
    entry_masks: Int[Tensor, " B"]
    step: Int[Tensor, " B"]
    uniform: Callable[[], Tensor]

    def taken(self, entries: Int[Tensor, " N"]) -> Window:
        """Some entries in this order, repeats allowed; `index` and `uniform` stay those of all."""
        names = "rows tokens first region columns inside masked block entry_masks step".split()
        return replace(self, **{name: getattr(self, name)[entries] for name in names})


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
        rows: canvas rows of the B entries.
        committed: positions whose token changed to something other than [MASK].
        edited: positions among those that held another token before.
        revoked: positions that became [MASK] again.
        filled: positions that an early end of the row filled, whatever stood there.
        gained: (B,) how many masks fewer each row has.
        finished: canvas rows that are complete now.
        moved: (M, 2) slots whose row went to another slot, and that one.
        failed: canvas rows that are given up; they are left as they were before the step.
        entered: slots that a row which waited entered.
    """

    rows: NDArray[np.int64]
    committed: NDArray[np.bool_]
    edited: NDArray[np.bool_]
    revoked: NDArray[np.bool_]
    filled: NDArray[np.bool_]
    gained: NDArray[np.int64]
    finished: NDArray[np.int64]
    moved: NDArray[np.int64]
    failed: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    entered: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))


class Canvas:
    """Rows of prompt and generated region, left-padded to one length.

    Some of them are being decoded, each in a slot; when one is finished, the next that waits takes its slot. The
    busy slots are always the first ones: where nobody waits, the last row moves to a slot that became free.

    Args:
        sequences: token ids of each row; what is to be generated is `mask_token_id`.
        mask_token_id: id of [MASK].
        eos_token_ids: ids that end a text; the first one pads and fills.
        block_length: columns K of a block, counted from each row's first mask; None for one block.
        stop_at_eos: finish a row once everything up to its first end-of-text is decoded.
        seeds: one seed a row.
        device: where the tokens live.
        slots: rows decoded at a time; None for all.

    Attributes:
        rows: the row in each busy slot.
        slots: how many there are.
        active: columns, inside and masked of the latest window, on the host.
        errors: why rows were given up.
        doomed: rows that are given up in their first step, and why.
        stops: strings that finish a row once what is decoded without a gap holds one: what comes after it becomes
            end-of-text. None for none, and in `fresh` canvases, so that what is reproduced does not depend on them.
    """

    def __init__(
        self,
        sequences: Sequence[Sequence[int]],
        mask_token_id: int,
        eos_token_ids: tuple[int, ...],
        block_length: int | None,
        stop_at_eos: bool,
        seeds: Sequence[int],
        device: torch.device,
        slots: int | None = None,
    ) -> None:
        self._made_of = sequences, mask_token_id, eos_token_ids, block_length, stop_at_eos, seeds, device, slots
        self.mask_token_id, self.eos_token_ids, self.stop_at_eos = mask_token_id, eos_token_ids, stop_at_eos
        self.length = max(len(sequence) for sequence in sequences)
        padding = self.padding = np.array([self.length - len(sequence) for sequence in sequences])
        self.host = np.full((len(sequences), self.length), eos_token_ids[0], dtype=np.int64)
        for row, sequence in enumerate(sequences):
            self.host[row, padding[row] :] = sequence
        self.real: NDArray[np.bool_] = np.arange(self.length) >= padding[:, None]
        self.cut: NDArray[np.bool_] = np.zeros_like(self.real)  # ended before
        self.region: NDArray[np.bool_] = (self.host == mask_token_id) & self.real
        # Rows without a mask have nothing to do; their region is empty.
        self.start = np.where(self.region.any(1), self.region.argmax(1), self.length)
        self.end = self.length - np.where(self.region.any(1), self.region[:, ::-1].argmax(1), self.length)
        self.block_length = block_length or max(1, int((self.end - self.start).max()))
        self.step = np.zeros(len(sequences), dtype=np.int64)
        self.block = np.full(len(sequences), -1, dtype=np.int64)
        self.entry_masks = np.zeros(len(sequences), dtype=np.int64)
        unfinished = np.flatnonzero(self.region.any(1))
        self.rows, self._waiting = np.split(unfinished, [len(unfinished) if slots is None else slots])
        self.slots = len(self.rows)
        self._enter_blocks()

        self.device = device
        self.errors: dict[int, str] = {}
        self.doomed: dict[int, str] = {}
        # One spare column takes the writes that are not wanted, so that an edit is a single scatter; in another one
        # travels what makes a row fail, so that it costs no read of its own.
        spare = np.zeros((self.slots, 2), dtype=np.int64)
        self._buffer = self._put(np.concatenate((self.host[self.rows], spare), 1))
        self._region = self._put(self.region[self.rows])
        self.stops: StopStrings | None = None
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def fresh(self) -> Canvas:
        """The canvas as it was before anything was decoded, for a run of its own."""
        return Canvas(*self._made_of)

    def given(self) -> tuple[Int[Tensor, "rows L"], Int[Tensor, " rows"], Int[Tensor, " rows"]]:
        """Tokens of all rows as they are, the first column of each, and the one its region starts at."""
        return self._put(self.host.copy()), self._put(self.padding), self._put(self.start)

    @property
    def spans(self) -> NDArray[np.int64]:
        """Columns of each row from its first to its last mask."""
        return np.asarray(self.end - self.start)

    def active_masks(self) -> NDArray[np.bool_]:
        """(B, L) positions of the unfinished rows' active blocks that may be committed now."""
        low = (self.start + self.block * self.block_length)[self.rows, None]
        column = np.arange(self.length)
        masked = (self.host[self.rows] == self.mask_token_id) & self.region[self.rows]
        return np.asarray(masked & (column >= low) & (column < low + self.block_length))

    def window(self) -> Window:
        """The active block of every unfinished row."""
        rows, block = self.rows, self.block[self.rows]
        columns = (self.start[rows] + block * self.block_length)[:, None] + np.arange(self.block_length)
        inside = columns < self.end[rows, None]
        columns = np.minimum(columns, self.length - 1)
        at = rows[:, None], columns
        inside &= self.region[at]
        masked = inside & (self.host[at] == self.mask_token_id)
        self.active = columns, inside, masked
        each = rows, self.padding[rows], block, self.entry_masks[rows], self.step[rows]
        sent = send(self.device, *each, *self.active, np.flatnonzero(masked))
        return Window(
            rows=sent[0],
            tokens=self._buffer[: len(rows), : self.length],
            first=sent[1],
            region=self._region[: len(rows)],
            columns=sent[5],
            inside=sent[6].bool(),
            masked=sent[7].bool(),
            index=sent[8],
            block=sent[2],
            entry_masks=sent[3],
            step=sent[4],
            uniform=self._uniform(rows),
        )

    def apply(self, window: Window, edit: Edit, broken: Broken | None = None) -> Change:
        """Write an edit, refresh the host's copy, advance blocks, retire rows that are finished or fail.

        Args:
            window: the rows.
            edit: what to write.
            broken: rows for which the denoiser gave no numbers; None for none.

        Raises:
            RuntimeError: the edit writes outside the region to be generated.
        """
        rows = self.rows
        buffer = self._buffer[: len(rows)]
        buffer.scatter_(1, edit.columns.where(edit.write, self.length), edit.tokens)
        reports = [each for each in (broken, edit.broken) if each is not None]
        buffer[:, -1] = 0
        for number, each in enumerate(reports):
            buffer[:, -1] |= each.rows.long() << number
        read = buffer.cpu().numpy()  # the one read of the step
        before, region = self.host[rows], self.region[rows]
        failed = self._failed(rows, read[:, -1], [each.reason for each in reports])
        after = np.where(failed[:, None], before, read[:, : self.length])
        changed = after != before
        if (changed & ~region).any():
            raise RuntimeError("a sampler wrote outside the positions to be generated")
        masked, unset = after == self.mask_token_id, before == self.mask_token_id
        self.host[rows] = after
        self.step[rows] += 1
        filled = self._cut(rows, edit.end, failed) if edit.end is not None else np.zeros_like(changed)
        if self.stop_at_eos:
            filled |= self._stop_at_eos(rows)
        if self.stops is not None:
            filled |= self._stop_at_strings(self.stops, rows, changed & ~unset)
        left = (self.host[rows] == self.mask_token_id) & self.region[rows]
        gained = unset.sum(1) - (self.host[rows] == self.mask_token_id).sum(1)
        stay = left.any(1) & ~failed
        moved, entered = self._settle(stay)
        self._enter_blocks()
        committed, revoked = changed & ~masked & ~filled, changed & masked & ~filled
        return Change(
            rows, committed, committed & ~unset, revoked, filled, gained, rows[~stay & ~failed], moved, rows[failed],
            entered,
        )  # fmt: skip

    @property
    def lengths(self) -> NDArray[np.int64]:
        """(rows,) columns of each row without its padding."""
        return np.asarray(self.length - self.padding)

    def visible(self, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
        """(A, L) columns of some rows that are looked at: neither padding nor cut off."""
        return np.asarray(self.real[rows] & ~self.cut[rows])

    def _failed(self, rows: NDArray[np.int64], codes: NDArray[np.int64], reasons: Sequence[str]) -> NDArray[np.bool_]:
        """Which rows are given up; notes why. Bit n of a code stands for the n-th reason."""
        failed = (codes > 0) | np.isin(rows, list(self.doomed))
        for row, code in zip(rows[failed].tolist(), codes[failed].tolist(), strict=True):
            own = [why for number, why in enumerate(reasons) if code >> number & 1]
            self.errors[row] = own[0] if own else self.doomed[row]
        return np.asarray(failed)

    def _settle(self, left: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Give the slots of finished rows to those that wait, close the gaps that remain; say who moved and entered."""
        free, rows = np.flatnonzero(~left), self.rows.copy()
        if not free.size:
            return np.zeros((0, 2), dtype=np.int64), free
        entering, self._waiting = np.split(self._waiting, [len(free)])
        entered, gaps = np.split(free, [len(entering)])
        rows[entered] = entering
        busy = len(rows) - len(gaps)
        source, target = np.setdiff1d(np.arange(busy, len(rows)), gaps), gaps[gaps < busy]
        rows[target] = rows[source]
        self.rows = rows[:busy]
        self._send(np.concatenate((entered, target)))
        return np.stack((source, target), axis=1), entered

    def _send(self, slots: NDArray[np.int64]) -> None:
        """Bring what the host knows of the rows in some slots to the device."""
        if slots.size:
            at, rows = self._put(slots), self.rows[slots]
            self._buffer[at, : self.length] = self._put(self.host[rows])
            self._region[at] = self._put(self.region[rows])

    def _cut(self, rows: NDArray[np.int64], end: Tensor, failed: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Let rows end before a column, those that failed excepted."""
        # A second read of the device: what was cut off decides which rows and blocks are left.
        beyond = (np.arange(self.length) >= end.cpu().numpy()[:, None]) & self.region[rows] & ~failed[:, None]
        if beyond.any():
            self.region[rows] &= ~beyond
            self.cut[rows] |= beyond
            self.host[rows] = np.where(beyond, self.eos_token_ids[0], self.host[rows])
            self._send(np.flatnonzero(beyond.any(1)))
        return beyond

    def _stop_at_eos(self, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Fill the masks behind each first end-of-text that has no mask before it."""
        region, tokens = self.region[rows], self.host[rows]
        masked = (tokens == self.mask_token_id) & region
        ended = np.isin(tokens, self.eos_token_ids) & region
        first_masked = np.where(masked.any(1), masked.argmax(1), self.length)
        done = ended.any(1) & (ended.argmax(1) < first_masked)
        filled = masked & done[:, None]
        if filled.any():
            tokens[filled] = self.eos_token_ids[0]
            self.host[rows] = tokens
            self._send(np.flatnonzero(filled.any(1)))
        return filled

    def _stop_at_strings(
        self, stops: StopStrings, rows: NDArray[np.int64], rewritten: NDArray[np.bool_]
    ) -> NDArray[np.bool_]:
        """Let rows end after the token that completes a stop string, once no mask is before it."""
        masked, start = (self.host[rows] == self.mask_token_id) & self.region[rows], self.start[rows]
        upto = np.where(masked.any(1), masked.argmax(1), self.length)
        column = np.arange(self.length)
        again = (rewritten & (column < (start + stops.read[rows])[:, None])).any(1)
        stops.read[rows[again]] = 0
        end = np.full(len(rows), self.length)
        for entry in np.flatnonzero(upto - start > stops.read[rows]):
            row, first = rows[entry], start[entry]
            if (count := stops.find(row, self.host[row, first : upto[entry]])) is not None:
                end[entry] = first + count
        # These rows are finished, so the device need not know.
        beyond = (column >= end[:, None]) & self.region[rows]
        self.host[rows] = np.where(beyond, self.eos_token_ids[0], self.host[rows])
        return beyond

    def _enter_blocks(self) -> None:
        """Point every unfinished row at the block of its first mask."""
        rows = self.rows
        masked = (self.host[rows] == self.mask_token_id) & self.region[rows]
        block = (masked.argmax(1) - self.start[rows]) // self.block_length
        new = block != self.block[rows]
        self.block[rows] = block
        self.step[rows[new]] = 0
        self.entry_masks[rows[new]] = self.active_masks()[new].sum(1)

    def _uniform(self, rows: NDArray[np.int64]) -> Callable[[], Tensor]:
        # A loop over rows on purpose: a row's draws must not depend on its batch mates, nor on their spans.
        counts = np.minimum(self.block_length, self.spans[rows])

        def draw() -> Tensor:
            noise = torch.zeros(len(rows), self.block_length, dtype=torch.float32, device=self.device)
            for entry, (row, count) in enumerate(zip(rows, counts, strict=True)):
                generator = self.generators[row]
                noise[entry, :count] = torch.rand(
                    int(count), generator=generator, dtype=noise.dtype, device=self.device
                )
            return noise

        return draw

    def _put(self, array: NDArray[np.generic]) -> Tensor:
        return put(self.device, array)
