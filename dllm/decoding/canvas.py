"""The canvas being decoded: samplers see it as a Window and change it by an Edit.

Tokens live on the device. A copy on the host is updated once per step, and control flow (blocks,
finished rows, end-of-text) is computed there with NumPy, for all rows at once: one device
synchronization per step, whatever the number of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dllm.decoding.ending import StopStrings
from dllm.decoding.nonfinite import Broken
from dllm.decoding.recent import Recent
from dllm.decoding.request import Request
from dllm.decoding.transfer import HostCopy, put, send
from dllm.decoding.window import Change, Draws, Edit, Exchange, Window
from dllm.models.attention import BlockCausal

_PACE = 1.5  # a row may commit so many times as many tokens as in its last step
_BITS = 24  # of a length that is read back with the tokens


def _unforeseen(times: int | None = None) -> Tensor:
    raise Draws


class Canvas:
    """Rows being decoded, each in a slot, left-padded to one length.

    A row has a number from entering to leaving, by which samplers and caches index their state. The busy slots are
    always the first ones: a row that enters takes the slot of one that leaves, and if none enters, the last row moves
    to the freed slot.

    Args:
        slots: rows decoded at a time.
        length: columns L.
        mask_token_id: id of [MASK].
        device: where the tokens live.
        pattern: attention pattern of the backbone; None for full attention.

    Attributes:
        rows: number of the row in each busy slot.
        requests: request of each row; None where a number is free.
        errors: reasons of failed rows.
        doomed: rows that fail in their next step, with the reason.
        ends: (slots, E) end-of-text ids of each row, the fill token first; -1 where a row has fewer.
        low: first column of each row's active block.
        high: the column after it, which may lie past the end.
        end: the column after the last position to generate; with what a row may still gain, `full`.
        active: columns, inside and masked of the latest window.
        index: flat indices of `masked` of the latest window that was not foreseen, on the device.
    """

    def __init__(
        self, slots: int, length: int, mask_token_id: int, device: torch.device, pattern: BlockCausal | None = None
    ) -> None:
        self.slots, self.length, self.mask_token_id, self.device = slots, length, mask_token_id, device
        self.pattern = pattern
        self.rows: NDArray[np.int64] = np.zeros(0, dtype=np.int64)
        self.requests: list[Request | None] = [None] * slots
        self.generators: list[torch.Generator | None] = [None] * slots
        self.errors: dict[int, str] = {}
        self.doomed: dict[int, str] = {}
        self._stops: dict[int, StopStrings] = {}
        self.host: NDArray[np.int64] = np.full((slots, length), mask_token_id, dtype=np.int64)
        # Columns that are not padding, that an early end of the row discarded, and that are generated.
        self.real, self.cut, self.region = np.zeros((3, slots, length), dtype=bool)
        self.padding, self.origin, self.start, self.end, self.block_length = np.zeros((5, slots), dtype=np.int64)
        self.block, self.step, self.entry_masks = np.zeros((3, slots), dtype=np.int64)
        self.full: NDArray[np.int64] = np.zeros(slots, dtype=np.int64)
        self.pace: NDArray[np.int64] = np.zeros(slots, dtype=np.int64)  # tokens of the last step
        self.low, self.high, self.reach = np.zeros((3, slots), dtype=np.int64)  # reach 0: blocks of fixed length
        self.ends: NDArray[np.int64] = np.full((slots, 1), -1)
        self.until: NDArray[np.int64] = np.full(slots, length)  # columns from there on are hidden in the next step
        # One spare column absorbs masked-out writes, so that an edit is a single scatter; others carry what else is
        # read of each row (`until`, and flags), so that it needs no synchronization of its own.
        self._buffer = torch.zeros((slots, length + 3), dtype=torch.long, device=device)
        self._region = torch.zeros((slots, length), dtype=torch.bool, device=device)
        self._recent: Recent[list[Tensor]] = Recent()
        self._copy = HostCopy(self._buffer)

    def exchange(
        self,
        leaving: Collection[int],
        entering: Sequence[Request],
        reach: Sequence[int | None] | None = None,
        opening: Sequence[int | None] | None = None,
    ) -> Exchange:
        """Remove rows and add others.

        Args:
            leaving: numbers of rows.
            entering: new requests, at most as many as there are free rows.
            reach: of each, positions of a block before its end is chosen (`Edit.block_length`); None for blocks of the
                request's length.
            opening: of each, positions to generate that are there at first (`Edit.grown`); None for all.
        """
        stay = ~np.isin(self.rows, list(leaving))
        for row in self.rows[~stay].tolist():
            self.requests[row] = self.generators[row] = None
            for notes in (self.errors, self.doomed, self._stops):
                notes.pop(row, None)
        numbers = [row for row in range(self.slots) if self.requests[row] is None][: len(entering)]
        every = [None] * len(entering)
        for row, request, far, first in zip(numbers, entering, reach or every, opening or every, strict=True):
            self._lay_out(row, request)
            self.reach[row] = far or 0
            if first is not None:
                self._close(row, first)
        entered, gaps = np.split(np.flatnonzero(~stay), [len(numbers)])
        added = np.arange(len(self.rows), len(self.rows) + len(numbers) - len(entered))
        entered = np.concatenate((entered, added))
        rows = np.concatenate((self.rows, np.zeros_like(added)))
        rows[entered] = numbers
        busy = len(rows) - len(gaps)
        source, target = np.setdiff1d(np.arange(busy, len(rows)), gaps), gaps[gaps < busy]
        rows[target] = rows[source]
        self.rows = rows[:busy]
        self._send(np.concatenate((entered, target)))
        new = np.asarray(numbers, dtype=np.int64)
        self._enter_blocks(new, self._masked(new))
        return Exchange(new, entered, np.stack((source, target), axis=1))

    def _lay_out(self, row: int, request: Request) -> None:
        padding = self.padding[row] = self.length - len(request.tokens)
        self.requests[row] = request
        self.generators[row] = torch.Generator(self.device).manual_seed(request.seed)
        if request.stops and request.tokenizer is not None:
            self._stops[row] = StopStrings(request.tokenizer, request.stops, request.eos_token_ids)
        self.host[row], self.host[row, padding:] = request.eos_token_ids[0], request.tokens
        self.real[row], self.cut[row] = np.arange(self.length) >= padding, False
        self.until[row] = self.length
        self.region[row] = (self.host[row] == self.mask_token_id) & self.real[row]
        self.start[row], self.end[row] = padding + request.start, padding + request.end
        self.pace[row] = 0
        self.full[row], self.origin[row] = padding + request.end, padding + request.origin
        self.block_length[row], self.block[row], self.low[row], self.high[row] = request.block_length, -1, 0, 0
        more = len(request.eos_token_ids) - self.ends.shape[1]
        self.ends = np.pad(self.ends, ((0, 0), (0, max(more, 0))), constant_values=-1)
        self.ends[row] = -1
        self.ends[row, : len(request.eos_token_ids)] = request.eos_token_ids

    def _close(self, row: int, opening: int) -> None:
        """Leave a row its first positions to generate; the others hold end-of-text until it grows."""
        self.end[row] = min(self.start[row] + opening, self.full[row])
        later = slice(self.end[row], self.full[row])
        self.region[row, later], self.cut[row, later], self.host[row, later] = False, True, self.ends[row, 0]

    @property
    def spans(self) -> NDArray[np.int64]:
        """Columns of each row from its first to its last position to generate."""
        return np.asarray(self.end - self.start)

    def window(self) -> Window:
        """The active block of every row."""
        rows, length = self.rows, (self.high - self.low)[self.rows]
        offset = np.arange(min(int(length.max()), self.length))  # a block may reach beyond the canvas
        columns = self.low[rows, None] + offset
        inside = (columns < np.minimum(self.end, self.until)[rows, None]) & (offset < length[:, None])
        columns = np.minimum(columns, self.length - 1)
        place = rows[:, None], columns
        inside &= self.region[place]
        masked = inside & (self.host[place] == self.mask_token_id)
        self.active = columns, inside, masked
        stop = self._stopping(rows)
        each = self.padding, self.start, self.spans, self.block, self.entry_masks
        still = rows, *[values[rows] for values in each], length, self.ends[rows], stop, columns, inside
        # What changes within a block, and what does not.
        step, self.index, masked = send(self.device, self.step[rows], np.flatnonzero(masked), masked)
        (own, first, start, span, block, entry_masks, width, ends, stop_at_eos, at, within) = self._recent(
            still,
            lambda: [
                each.bool() if array.dtype == bool else each
                for each, array in zip(send(self.device, *still), still, strict=True)
            ],
        )
        return Window(
            rows=own,
            tokens=self._buffer[: len(rows), : self.length],
            first=first,
            region=self._region[: len(rows)],
            start=start,
            span=span,
            columns=at,
            inside=within,
            masked=masked.bool(),
            block=block,
            entry_masks=entry_masks,
            step=step,
            block_length=width,
            ends=ends,
            stop_at_eos=stop_at_eos,
            uniform=self._uniform(rows, columns.shape[1]),
        )

    def foreseen(self, window: Window) -> Window:
        """The window of the next step, after an edit that is written and not read, if every row stays in its block.

        What is masked, the device knows; on the host it is what was masked before.
        """
        masked = window.inside & (window.tokens.gather(1, window.columns) == self.mask_token_id)
        return replace(window, masked=masked, step=window.step + 1, uniform=_unforeseen)

    @property
    def foreseeable(self) -> bool:
        """Whether every row is likely to stay in its block in this step, and draws nothing."""
        rows, masked = self.rows, self.active[2].sum(1)
        drawn = any(request.sampling.temperature > 0 for request in self._requests(rows))
        narrowed = self.reach[rows].any() or (self.until[rows] < self.length).any()
        return not (drawn or narrowed) and bool((masked > _PACE * self.pace[rows] + 1).all())

    def goes_on(self, change: Change) -> bool:
        """Whether the window that was foreseen is that of the next step, given what the edit before it did.

        It then is what the host knows of it, too.
        """
        surprising = change.revoked.any() or change.edited.any() or change.filled.any()
        if change.finished.size or change.failed.size or surprising or (self.step[change.rows] == 0).any():
            return False
        columns, inside, _ = self.active
        self.active = columns, inside, inside & (self.host[self.rows[:, None], columns] == self.mask_token_id)
        return True

    def write(self, edit: Edit, broken: Broken | None = None) -> None:
        """Write an edit on the device, without waiting for it.

        Args:
            edit: what to write, in the rows of the latest window.
            broken: rows whose logits are not finite; None for none.
        """
        rows = self.rows
        buffer = self._buffer[: len(rows)]
        buffer.scatter_(1, edit.columns.where(edit.write, self.length), edit.tokens)
        reports = [each for each in (broken, edit.broken) if each is not None]
        buffer[:, -2] = self.length if edit.until is None else edit.until
        buffer[:, -1] = 0
        for number, each in enumerate(reports):
            buffer[:, -1] |= each.rows.long() << number
        fields = (0, edit.finished), (1, edit.held), (2, edit.block_length), (2 + _BITS, edit.grown)
        for bit, wanted in fields:
            if wanted is not None:
                buffer[:, -1] |= wanted.long() << bit + len(reports)
        self._copy.begin(buffer)

    def read(self, edit: Edit, broken: Broken | None = None) -> Change:
        """Read what an edit wrote, update the host's copy, advance blocks, determine which rows are finished or failed.

        Args:
            edit: what was written.
            broken: as for `write`.

        Raises:
            RuntimeError: the edit writes outside the generated region, or finishes a row that has masks.
        """
        rows, reports = self.rows, [each for each in (broken, edit.broken) if each is not None]
        read = self._copy.end()  # the only synchronization of the step
        flags, codes = np.divmod(read[:, -1], 1 << len(reports))
        finished, held = flags & 1 > 0, flags & 2 > 0
        self._end_blocks(rows, flags >> 2 & (1 << _BITS) - 1)
        grown = self._grow(rows, flags >> 2 + _BITS)
        before, region = self.host[rows], self.region[rows]
        failed = self._failed(rows, codes, [each.reason for each in reports])
        after = np.where(failed[:, None], before, read[:, : self.length])
        changed = after != before
        if (changed & ~region).any():
            raise RuntimeError("a sampler wrote outside the generated region")
        masked, unset = after == self.mask_token_id, before == self.mask_token_id
        self.host[rows], self.until[rows] = after, read[:, -2]
        self.step[rows] += 1
        filled = self._cut(rows, edit.end, failed) if edit.end is not None else np.zeros_like(changed)
        left = self._masked(rows)
        settled = self._settled(rows, left, held, edit.final)
        stopped = self._stop_at_eos(rows, left, settled)
        stopped |= self._stop_at_strings(rows, changed & ~unset, settled)
        if stopped.any():
            filled |= stopped
            left = self._masked(rows)
        done = ~left.any(1)
        if edit.finished is not None:
            if (left.any(1) & finished & ~failed).any():
                raise RuntimeError("a sampler finished a row that has masks")
            done &= finished | stopped.any(1)
        done &= ~failed & (~held | stopped.any(1))
        rest = self._rest(rows) & done[:, None]
        on = ~done & ~failed
        self._enter_blocks(rows[on], left[on], held[on])
        gained = unset.sum(1) - (self.host[rows] == self.mask_token_id).sum(1) + rest.sum(1)
        committed, revoked = changed & ~masked & ~filled, changed & masked & ~filled
        self.pace[rows] = committed.sum(1)
        filled |= rest
        ends = rows[done], rows[failed]
        return Change(rows, committed, committed & ~unset, revoked, filled, gained, *ends, grown, held, settled)

    def visible(self, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
        """(A, L) columns of some rows that are attended to: neither padding nor discarded nor hidden."""
        return np.asarray(self.real[rows] & ~self.cut[rows] & (np.arange(self.length) < self.until[rows, None]))

    def horizon(self, rows: NDArray[np.int64], column: NDArray[np.int64]) -> NDArray[np.int64]:
        """(A,) the column from which on nothing is attended to by a column of each row."""
        if self.pattern is None:
            return np.full(len(rows), self.length)
        first = self.padding[rows] if self.pattern.from_start else self.origin[rows]
        return np.asarray(np.minimum(first + self.pattern.end(column - first), self.length))

    def _failed(self, rows: NDArray[np.int64], codes: NDArray[np.int64], reasons: Sequence[str]) -> NDArray[np.bool_]:
        """Which rows fail; records the reason. Bit n of a code stands for the n-th reason."""
        failed = codes > 0
        if self.doomed:
            failed |= np.isin(rows, list(self.doomed))
        for row, code in zip(rows[failed].tolist(), codes[failed].tolist(), strict=True):
            own = [why for number, why in enumerate(reasons) if code >> number & 1]
            self.errors[row] = own[0] if own else self.doomed[row]
        return np.asarray(failed)

    def _stopping(self, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
        """(B,) rows that are finished by an end-of-text."""
        return np.array([request.stop_at_eos for request in self._requests(rows)], dtype=bool)

    def _requests(self, rows: NDArray[np.int64]) -> list[Request]:
        return [request for row in rows.tolist() if (request := self.requests[row]) is not None]

    def _send(self, slots: NDArray[np.int64]) -> None:
        """Copy the host's state of the rows in some slots to the device."""
        if slots.size:
            at, rows = self._put(slots), self.rows[slots]
            self._buffer[at, : self.length] = self._put(self.host[rows])
            self._region[at] = self._put(self.region[rows])

    def _cut(self, rows: NDArray[np.int64], end: Tensor, failed: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """End rows before a column, except failed ones."""
        # Another synchronization: the cut decides which rows and blocks are left.
        beyond = (np.arange(self.length) >= end.cpu().numpy()[:, None]) & self.region[rows] & ~failed[:, None]
        if beyond.any():
            self.region[rows] &= ~beyond
            self.cut[rows] |= beyond
            self._fill(rows, beyond)
            self._send(np.flatnonzero(beyond.any(1)))
        return beyond

    def _end_blocks(self, rows: NDArray[np.int64], length: NDArray[np.int64]) -> None:
        """Shorten the active blocks of rows with a reach; 0 leaves a block as it is."""
        chosen = (length > 0) & (self.reach[rows] > 0)
        rows, length = rows[chosen], length[chosen]
        self.high[rows] = np.minimum(self.high[rows], self.low[rows] + length)
        self.entry_masks[rows] = np.minimum(self.entry_masks[rows], length)

    def _grow(self, rows: NDArray[np.int64], count: NDArray[np.int64]) -> NDArray[np.int64]:
        """Add positions at the end of rows, as far as their request allows; return how many."""
        end = self.end[rows]
        grown = np.asarray(np.minimum(count, self.full[rows] - end))
        if grown.any():
            self.high[rows] += np.where(self.high[rows] >= end, grown, 0)
            self.end[rows] += grown
            column = np.arange(self.length)
            opened = (column >= end[:, None]) & (column < self.end[rows, None])
            self.region[rows] |= opened
            self.cut[rows] &= ~opened
            self.host[rows] = np.where(opened, self.mask_token_id, self.host[rows])
            at = np.flatnonzero(grown)
            self._region[self._put(at)] = self._put(self.region[rows[at]])
        return grown

    def _rest(self, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
        """(B, L) positions that rows have not gained."""
        column = np.arange(self.length)
        return np.asarray((column >= self.end[rows, None]) & (column < self.full[rows, None]))

    def _masked(self, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
        """(B, L) positions to generate that are masked."""
        return np.asarray((self.host[rows] == self.mask_token_id) & self.region[rows])

    def _settled(
        self, rows: NDArray[np.int64], masked: NDArray[np.bool_], held: NDArray[np.bool_], final: bool
    ) -> NDArray[np.int64]:
        """(B,) the column before which tokens stay: the first mask, or the start of a block that may change."""
        whole = np.where(self.end[rows] < self.full[rows], self.end[rows], self.length)
        first = np.where(masked.any(1), masked.argmax(1), whole)
        if not final:
            origin, length = self.origin[rows], self.block_length[rows]
            start = np.where(self.reach[rows] > 0, first, origin + (first - origin) // length * length)
            active = (first >= self.low[rows]) & (first < self.high[rows])
            first = np.where(masked.any(1), np.where(active, self.low[rows], start), first)
        return np.where(held, np.minimum(first, self.low[rows]), first)

    def _stop_at_eos(
        self, rows: NDArray[np.int64], masked: NDArray[np.bool_], settled: NDArray[np.int64]
    ) -> NDArray[np.bool_]:
        """Fill the masks after each first end-of-text among settled tokens, in rows with `stop_at_eos`."""
        stop = self._stopping(rows)
        if not stop.any():
            return np.zeros_like(masked)
        ended = (self.host[rows, :, None] == self.ends[rows, None]).any(-1) & self.region[rows]
        done = stop & ended.any(1) & (ended.argmax(1) < settled)
        filled = masked & done[:, None]
        if filled.any():
            self._fill(rows, filled)
            self._send(np.flatnonzero(filled.any(1)))
        return filled

    def _stop_at_strings(
        self, rows: NDArray[np.int64], rewritten: NDArray[np.bool_], settled: NDArray[np.int64]
    ) -> NDArray[np.bool_]:
        """End rows after the settled token that completes a stop string."""
        if not self._stops:
            return np.zeros_like(rewritten)
        end = np.full(len(rows), self.length)
        for entry, row in enumerate(rows.tolist()):
            if (stops := self._stops.get(row)) is None:
                continue
            start, tokens = self.start[row], self.host[row]
            upto = settled[entry]
            if rewritten[entry, start : start + stops.read].any():
                stops.read = 0
            try:
                count = stops.find(tokens[start:upto]) if upto - start > stops.read else None
            except ValueError as error:
                self.doomed[row] = str(error)
                continue
            if count is not None:
                end[entry] = start + count
        # These rows are finished, so the device needs no update.
        beyond = (np.arange(self.length) >= end[:, None]) & self.region[rows]
        self._fill(rows, beyond)
        return beyond

    def _fill(self, rows: NDArray[np.int64], where: NDArray[np.bool_]) -> None:
        """Write end-of-text."""
        self.host[rows] = np.where(where, self.ends[rows, :1], self.host[rows])

    def _enter_blocks(
        self, rows: NDArray[np.int64], masked: NDArray[np.bool_], held: NDArray[np.bool_] | None = None
    ) -> None:
        """Set the active block to that of the first mask; rows without masks and those that are held keep theirs."""
        first, length, reach = masked.argmax(1), self.block_length[rows], self.reach[rows]
        block = (first - self.origin[rows]) // length
        outside = (first < self.low[rows]) | (first >= self.high[rows])
        block = np.where(reach > 0, self.block[rows] + outside, block)
        new = (block != self.block[rows]) & masked.any(1)
        if held is not None:
            new &= ~held | (first < self.low[rows])
        if not new.any():
            return
        rows, masked, first, length, reach = rows[new], masked[new], first[new], length[new], reach[new]
        self.block[rows], self.step[rows] = block[new], 0
        start = np.where(reach > 0, first, self.origin[rows] + self.block[rows] * length)
        far = np.minimum(np.minimum(first + reach, self.horizon(rows, first)), self.end[rows])
        self.low[rows], self.high[rows] = start, np.where(reach > 0, far, start + length)
        column = np.arange(self.length)
        within = (column >= start[:, None]) & (column < self.high[rows, None])
        self.entry_masks[rows] = (masked & within).sum(1)

    def _uniform(self, rows: NDArray[np.int64], width: int) -> Callable[..., Tensor]:
        # A loop over rows on purpose: a row's draws must not depend on the other rows of the batch.
        fixed = np.minimum(self.block_length, self.end - self.origin)
        counts = np.where(self.reach > 0, self.high - self.low, fixed)[rows].tolist()
        sources = [self.generators[row] for row in rows.tolist()]
        useful = (self.end - self.origin)[rows].tolist()

        def draw(times: int | None = None) -> Tensor:
            most = min(times or 1, max(useful, default=1))
            noise = torch.zeros(most, len(rows), width, dtype=torch.float32, device=self.device)
            for entry, (source, count, positions) in enumerate(zip(sources, counts, useful, strict=True)):
                own = min(most, positions), count
                noise[: own[0], entry, :count] = torch.rand(
                    own, generator=source, dtype=noise.dtype, device=self.device
                )
            return noise[0] if times is None else noise

        return draw

    def _put(self, array: NDArray[np.generic]) -> Tensor:
        return put(self.device, array)
