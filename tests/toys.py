"""Policies and caches that exist to show what the protocols carry: drafts, revocation, state, column sets."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from dllm.cache.base import Plan, Question
from dllm.cache.store import KeyValues
from dllm.canvas import Change, Edit, Window
from dllm.run import Run
from dllm.samplers.base import Denoise, commit
from dllm.samplers.selection import top


@dataclass(frozen=True)
class Revoking:
    """Commits the three best, then takes back the least sure token of an earlier step of the block."""

    def start(self, run: Run) -> int:
        return run.mask_token_id

    def step(self, window: Window, denoise: Denoise, state: int) -> Edit:
        settled = window.inside & ~window.masked
        prediction = denoise(asked=window.inside)
        best = top(prediction.confidence, 3, window.masked)
        worst = top(-prediction.confidence, 1, settled) & (best.sum(-1) > 1)[:, None] & (window.step < 6)[:, None]
        return Edit(window.columns, prediction.tokens.masked_fill(worst, state), best | worst)


@dataclass(frozen=True)
class Drafting:
    """Commits the best, and where a draft that already holds it agrees, the next best of the draft too."""

    def start(self, run: Run) -> None:
        return None

    def step(self, window: Window, denoise: Denoise, state: None) -> Edit:
        now = denoise()
        first = top(now.confidence, 1, window.masked)
        drafted = window.tokens.scatter(1, window.columns, _written(window, now.tokens, first))
        left = window.masked & ~first
        both = denoise(
            asked=torch.stack((window.masked, left), dim=1), tokens=torch.stack((window.tokens, drafted), dim=1)
        )
        torch.testing.assert_close(both.entropy[:, 0], now.entropy)
        second = top(both.confidence[:, 1], 1, left)
        tokens = torch.where(second, both.tokens[:, 1], now.tokens)
        return Edit(window.columns, tokens, first | second)


def _written(window: Window, tokens: Tensor, where: Tensor) -> Tensor:
    return torch.where(where, tokens, window.tokens.gather(1, window.columns))


@dataclass(frozen=True)
class Remembering:
    """Asks at every other step only, and in between commits what it remembers, without a forward."""

    def start(self, run: Run) -> dict[str, Tensor]:
        shape = run.rows, run.block_length
        return {"tokens": torch.zeros(shape, dtype=torch.long), "score": torch.zeros(shape, dtype=torch.float64)}

    def step(self, window: Window, denoise: Denoise, state: dict[str, Tensor]) -> Edit:
        asking = (window.step % 2 == 0)[:, None] & window.masked
        if asking.any():
            prediction = denoise(asked=asking)
            fresh = asking.any(-1)
            state["tokens"][window.rows[fresh]] = prediction.tokens[fresh]
            state["score"][window.rows[fresh]] = prediction.confidence[fresh].double()
        chosen = top(state["score"][window.rows], 1, window.masked)
        return Edit(window.columns, state["tokens"][window.rows], chosen)


@dataclass(frozen=True)
class Watching:
    """Wraps a sampler and holds it to leaving its inputs alone."""

    inner: Any

    def start(self, run: Run) -> Any:
        return self.inner.start(run)

    def step(self, window: Window, denoise: Denoise, state: Any) -> Edit:
        fields = ("rows", "tokens", "columns", "inside", "masked", "entry_masks", "step")
        before = {name: getattr(window, name).clone() for name in fields}
        edit = self.inner.step(window, denoise, state)
        for name, value in before.items():
            assert torch.equal(getattr(window, name), value), f"{name} was changed"
        return edit


@dataclass(frozen=True)
class Stalling:
    """Never commits."""

    def start(self, run: Run) -> None:
        return None

    def step(self, window: Window, denoise: Denoise, state: None) -> Edit:
        return commit(window, denoise(), torch.zeros_like(window.masked))


@dataclass(frozen=True)
class Rewriting:
    """Commits one position, then writes it again and again."""

    def start(self, run: Run) -> None:
        return None

    def step(self, window: Window, denoise: Denoise, state: None) -> Edit:
        first = torch.zeros_like(window.masked)
        first[:, 0] = True
        return Edit(window.columns, window.step[:, None].expand_as(window.columns) + 1, first)


@dataclass(frozen=True)
class Vandal:
    """Writes into the prompt."""

    def start(self, run: Run) -> None:
        return None

    def step(self, window: Window, denoise: Denoise, state: None) -> Edit:
        return Edit(
            window.columns - window.columns.min(), torch.zeros_like(window.columns), torch.ones_like(window.masked)
        )


@dataclass
class RefreshingRun:
    """Computes the planned columns through a store that holds nothing at first."""

    run: Run
    store: KeyValues
    narrow: bool
    short: bool
    refreshes: int = 0
    seen: list[Change] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.store.keys.fill_(torch.nan)
        self.store.values.fill_(torch.nan)

    def plan(self, question: Question) -> Plan:
        compute = np.ones_like(question.read)
        if self.narrow and (question.canvas.step[question.rows] > 0).all():
            # The block and the column to its left, in which the shifted families read its first prediction.
            compute = question.since(question.low - 1) & ~question.since(question.high)
        else:
            self.refreshes += int(question.first.sum())
            if self.short:
                compute[:, 3:] = False
        return Plan(compute, self.store)

    def observe(self, change: Change) -> None:
        self.seen.append(change)

    def expire(self, rows: Any) -> None:
        pass


@dataclass(frozen=True)
class Refreshing:
    """A cache that computes everything: at every step, `narrow`: at the first of each block, `short`: not quite."""

    refuses: ClassVar[dict[str, str]] = {"guidance": "it is a toy"}
    repeatable: ClassVar[bool] = True
    measure_every: ClassVar[int | None] = None
    refresh_above: ClassVar[float | None] = None

    narrow: bool = False
    short: bool = False

    def start(self, run: Run) -> RefreshingRun:
        return RefreshingRun(run, KeyValues(run), self.narrow, self.short)
