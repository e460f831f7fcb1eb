"""Prefix reuse: requests that begin alike share the keys and values of their first blocks.

Where attention is causal over blocks, keys and values of a finished block depend on the tokens up to its end alone. So
those of finished blocks are kept, each under a hash of all tokens up to its end, and a request that begins with the
same blocks takes them instead of computing them: exact reuse, of prompts and of earlier answers in them. Weights that
were changed since, such as by an adapter, empty the pool. Where it is full, the blocks that were not used for the
longest time leave it, later blocks of a text before earlier ones.

Pages are found by their hashes, as in vLLM's prefix caching, and are copied to the row, which attends to contiguous
memory; a copy reads and writes a block once, where computing it reads all weights.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from hashlib import sha256
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from dllm.cache.selection import Flags
from dllm.checks import number
from dllm.decoding.canvas import Canvas
from dllm.decoding.setup import Setup


def check_shared(shared: int | None) -> None:
    """Reject a number of tokens that is out of range (ValueError)."""
    if shared is not None:
        number("shared", shared, "a whole number of at least 0, or null", low=0, whole=True)


class SharedBlocks:
    """Finished blocks of earlier requests of an engine.

    Bytes: 2 * layers * H * D * columns * (bytes per number).

    Args:
        setup: of an engine whose model is causal over blocks.
        stored: keys and values of the rows, (layers, slots, H, L, D) each.
        columns: kept at most.

    Attributes:
        length: positions of a block.
    """

    def __init__(self, setup: Setup, stored: Sequence[Tensor], columns: int) -> None:
        assert setup.pattern is not None
        layers, heads, size = setup.kv_shape
        shape = layers, 1, heads, columns, size
        self._stored, self.length = stored, setup.pattern.length
        try:
            self._kept = setup.tensor("shared keys", shape), setup.tensor("shared values", shape)
        except RuntimeError as error:
            taken = 2 * setup.dtype.itemsize * math.prod(shape)
            raise ValueError(
                f"shared={columns} takes {taken / 2**30:,.0f} GiB, which cannot be allocated; use less"
            ) from error
        self._most = columns // self.length
        self._weights, self._begun = setup.weights, dict[int, Any]()
        self._of = self._weights()
        # Pages by hash, from the one that leaves first to the one that leaves last.
        self._pages: OrderedDict[bytes, int] = OrderedDict()

    def take(self, canvas: Canvas, row: int, slot: int) -> int:
        """Copy the blocks that a row has in common with earlier requests into its slot, and return their columns."""
        first = int(canvas.padding[row])
        given = canvas.host[row, first : canvas.start[row]]
        self._begun[row] = self._current()
        found: list[bytes] = []
        for name in self._names(given):
            if name not in self._pages:
                break
            found.append(name)
        for count, name in enumerate(found):
            self._copy(self._pages[name], slot, first + count * self.length, save=False)
        self._use(found)
        return len(found) * self.length

    def keep(self, canvas: Canvas, row: int, slot: int, exact: Flags) -> None:
        """Keep the blocks of a row that are exact, the (L,) columns given, from its first on."""
        first = int(canvas.padding[row])
        if self._current() != self._begun[row]:
            return
        own = exact[first:]
        finished = len(own) if own.all() else int(own.argmin())
        names = [*self._names(canvas.host[row, first : first + finished])][: self._most]
        for count, name in enumerate(names):
            if name not in self._pages:
                full = len(self._pages) == self._most
                page = self._pages.popitem(last=False)[1] if full else len(self._pages)
                self._pages[name] = page
                self._copy(page, slot, first + count * self.length, save=True)
            self._use(names[: count + 1])

    def _current(self) -> Any:
        """The state of the weights, of which all pages are."""
        now = self._weights()
        if now != self._of:
            self._pages.clear()
            self._of = now
        return now

    def _names(self, tokens: NDArray[np.int64]) -> Iterator[bytes]:
        """The hash of each whole block and all before it."""
        name = b""
        for end in range(self.length, len(tokens) + 1, self.length):
            name = sha256(name + tokens[end - self.length : end].tobytes()).digest()
            yield name

    def _use(self, names: list[bytes]) -> None:
        # From the last to the first, so that a block never leaves before those that follow it.
        for name in reversed(names):
            self._pages.move_to_end(name)

    def _copy(self, page: int, slot: int, column: int, save: bool) -> None:
        of_row, of_page = (slice(start, start + self.length) for start in (column, page * self.length))
        for stored, kept in zip(self._stored, self._kept, strict=True):
            row, shared = stored[:, slot, :, of_row], kept[:, 0, :, of_page]
            if save:
                shared.copy_(row)
            else:
                row.copy_(shared)
