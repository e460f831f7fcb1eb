"""Policies and caches that exist to show what the protocols carry: drafts, revocation, state, column sets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dllm.cache.base import Plan, Question
from dllm.cache.store import KeyValues
from dllm.decoding.request import Request
from dllm.decoding.setup import Setup
from dllm.decoding.window import Change, Edit, Exchange, Window
from dllm.samplers.base import Denoise, Policy, commit
from dllm.samplers.selection import top


@dataclass(frozen=True)
class Revoking(Policy):
    """Commits the best, then takes back the least sure token of an earlier step of the block."""

    count: int = 3

    def start(self, setup: Setup) -> int:
        return setup.mask_token_id

    def step(self, window: Window, denoise: Denoise, state: int) -> Edit:
        settled = window.inside & ~window.masked
        prediction = denoise(asked=window.inside)
        best = top(prediction.confidence, self.count, window.masked)
        worst = top(-prediction.confidence, 1, settled) & (best.sum(-1) > 1)[:, None] & (window.step < 6)[:, None]
        return Edit(window.columns, prediction.tokens.masked_fill(worst, state), best | worst)


@dataclass(frozen=True)
class Leftmost(Policy):
    """Commits from left to right."""

    single_forward = True

    count: int = 1

    def step(self, window: Window, denoise: Denoise, state: None) -> Edit:
        return commit(window, denoise(), window.masked & (window.masked.cumsum(-1) <= self.count))


@dataclass(frozen=True)
class Editing(Policy):
    """Commits from left to right, and now and then rewrites or takes back a token of an earlier block.

    The one to rewrite is the row's second token; the one to take back, if that is wanted, its first; once.
    """

    revoke: bool = True

    def start(self, setup: Setup) -> dict[str, Tensor]:
        return {"done": torch.zeros(setup.slots, dtype=torch.bool), "mask": torch.tensor(setup.mask_token_id)}

    def enter(self, state: dict[str, Tensor], row: int, request: Request) -> None:
        state["done"][row] = False

    def step(self, window: Window, denoise: Denoise, state: dict[str, Tensor]) -> Edit:
        prediction = denoise()
        chosen = window.masked & (window.masked.cumsum(-1) <= 2)
        back = ((window.block == 1) & (window.step == 1) & ~state["done"][window.rows] & (chosen.sum(-1) > 1))[:, None]
        state["done"][window.rows] |= back[:, 0]
        start = window.region.int().argmax(-1, keepdim=True)
        extra = torch.cat((start, start + 1), dim=1)
        old = window.tokens.gather(1, extra)
        new = torch.stack((state["mask"].expand(len(start)), (old[:, 1] + 1) % 7), dim=1)
        return Edit(
            torch.cat((window.columns, extra), dim=1),
            torch.cat((prediction.tokens, new), dim=1),
            torch.cat((chosen, back & torch.tensor([[self.revoke, True]])), dim=1),
        )


@dataclass(frozen=True)
class Drafting(Policy):
    """Commits the best, and where a draft that already holds it agrees, the next best of the draft too.

    `exact` holds a second look at the same canvas to the first.
    """

    exact: bool = True

    def step(self, window: Window, denoise: Denoise, state: None) -> Edit:
        now = denoise()
        first = top(now.confidence, 1, window.masked)
        drafted = window.tokens.scatter(1, window.columns, _written(window, now.tokens, first))
        left = window.masked & ~first
        both = denoise(
            asked=torch.stack((window.masked, left), dim=1), tokens=torch.stack((window.tokens, drafted), dim=1)
        )
        if self.exact:
            torch.testing.assert_close(both.entropy[:, 0], now.entropy)
        second = top(both.confidence[:, 1], 1, left)
        tokens = torch.where(second, both.tokens[:, 1], now.tokens)
        return Edit(window.columns, tokens, first | second)


def _written(window: Window, tokens: Tensor, where: Tensor) -> Tensor:
    return torch.where(where, tokens, window.tokens.gather(1, window.columns))


@dataclass(frozen=True)
class Remembering(Policy):
    """Asks at every other step only, and in between commits what it remembers, without a forward."""

    def start(self, setup: Setup) -> dict[str, Tensor]:
        shape = setup.slots, 64
        return {"tokens": torch.zeros(shape, dtype=torch.long), "score": torch.zeros(shape, dtype=torch.float64)}

    def step(self, window: Window, denoise: Denoise, state: dict[str, Tensor]) -> Edit:
        asking, width = (window.step % 2 == 0)[:, None] & window.masked, window.masked.shape[1]
        if asking.any():
            prediction = denoise(asked=asking)
            fresh = asking.any(-1)
            state["tokens"][window.rows[fresh], :width] = prediction.tokens[fresh]
            state["score"][window.rows[fresh], :width] = prediction.confidence[fresh].double()
        chosen = top(state["score"][window.rows, :width], 1, window.masked)
        return Edit(window.columns, state["tokens"][window.rows, :width], chosen)


@dataclass(frozen=True)
class Watching(Policy):
    """Wraps a sampler and holds it to leaving its inputs alone."""

    inner: Any

    def reach(self, request: Request) -> int | None:
        reach: int | None = self.inner.reach(request)
        return reach

    def opening(self, request: Request) -> int | None:
        opening: int | None = self.inner.opening(request)
        return opening

    def start(self, setup: Setup) -> Any:
        return self.inner.start(setup)

    def check(self, state: Any, request: Request) -> None:
        self.inner.check(state, request)

    def enter(self, state: Any, row: int, request: Request) -> None:
        self.inner.enter(state, row, request)

    def step(self, window: Window, denoise: Denoise, state: Any) -> Edit:
        fields = ("rows", "tokens", "columns", "inside", "masked", "entry_masks", "step")
        before = {name: getattr(window, name).clone() for name in fields}
        edit = self.inner.step(window, denoise, state)
        for name, value in before.items():
            assert torch.equal(getattr(window, name), value), f"{name} was changed"
        return edit


@dataclass(frozen=True)
class Stalling(Policy):
    """Never commits."""

    def step(self, window: Window, denoise: Denoise, state: None) -> Edit:
        return commit(window, denoise(), torch.zeros_like(window.masked))


@dataclass(frozen=True)
class Rewriting(Policy):
    """Commits one position, then writes it again and again."""

    def step(self, window: Window, denoise: Denoise, state: None) -> Edit:
        first = torch.zeros_like(window.masked)
        first[:, 0] = True
        return Edit(window.columns, window.step[:, None].expand_as(window.columns) % 60, first)


@dataclass(frozen=True)
class Vandal(Policy):
    """Writes into the prompt."""

    def step(self, window: Window, denoise: Denoise, state: None) -> Edit:
        return Edit(
            window.columns - window.columns.min(), torch.zeros_like(window.columns), torch.ones_like(window.masked)
        )


@dataclass
class SpyingRun:
    """Notes what the inner cache plans, and has it refreshed for every forward if asked to."""

    inner: Any
    log: list[dict[int, list[int]]]
    expiring: bool

    @property
    def store(self) -> Any:
        return self.inner.store

    def plan(self, question: Question) -> Plan:
        if self.expiring:
            self.inner.expire(question.rows)
        plan: Plan = self.inner.plan(question)
        assert plan.compute is not None
        assert (plan.compute | ~question.read).all(), "a column that is read must be computed"
        first = zip(question.rows, plan.compute, question.first, strict=True)
        self.log.append({int(row): np.flatnonzero(compute).tolist() for row, compute, is_first in first if is_first})
        return plan

    def exchange(self, exchange: Exchange) -> None:
        self.inner.exchange(exchange)

    def observe(self, change: Change) -> None:
        self.inner.observe(change)

    def expire(self, rows: Any) -> None:
        self.inner.expire(rows)


@dataclass(frozen=True)
class Spying:
    """A cache that is watched: `log` has, for each forward, the columns computed of each row."""

    inner: Any
    expiring: bool = False
    log: list[dict[int, list[int]]] = field(default_factory=list)

    @property
    def refuses(self) -> Any:
        return self.inner.refuses

    @property
    def measure_every(self) -> Any:
        return self.inner.measure_every

    @property
    def refresh_above(self) -> Any:
        return self.inner.refresh_above

    def start(self, setup: Setup) -> SpyingRun:
        return SpyingRun(self.inner.start(setup), self.log, self.expiring)


@dataclass
class RefreshingRun:
    """Computes the planned columns through a store that holds nonsense at first."""

    setup: Setup
    store: KeyValues
    narrow: bool
    short: bool
    seen: list[Change] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.store.keys.fill_(1e6)
        self.store.values.fill_(1e6)

    def plan(self, question: Question) -> Plan:
        compute = np.ones_like(question.read)
        if self.narrow and (question.canvas.step[question.rows] > 0).all():
            # The block and the column to its left, in which the shifted families read its first prediction.
            compute = question.since(question.low - 1) & ~question.since(question.high)
        elif self.short:
            compute[:, 3:] = False
        return Plan(compute, self.store)

    def exchange(self, exchange: Exchange) -> None:
        self.store.move(exchange.moved)

    def observe(self, change: Change) -> None:
        self.seen.append(change)

    def expire(self, rows: Any) -> None:
        pass


@dataclass(frozen=True)
class Refreshing:
    """A cache that computes everything: at every step, `narrow`: at the first of each block, `short`: not quite."""

    refuses: ClassVar[dict[str, str]] = {"guidance": "it is a toy"}
    measure_every: ClassVar[int | None] = None
    refresh_above: ClassVar[float | None] = None

    narrow: bool = False
    short: bool = False

    def start(self, setup: Setup) -> RefreshingRun:
        return RefreshingRun(setup, KeyValues(setup), self.narrow, self.short)


@dataclass
class Replaying:
    """Reads the inputs where they were when it was captured, and writes its result to where it was then."""

    run: Callable[[], Tensor]
    result: Tensor

    def replay(self) -> None:
        self.result.copy_(self.run())


class Capturing(TorchDispatchMode):
    """Refuses what cannot be captured: what the host waits for, and copies of its values."""

    WAITS = frozenset(
        "_local_scalar_dense item is_nonzero equal nonzero masked_select _unique2 unique_dim unique_consecutive "
        "bincount lift_fresh".split()
    )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.partition(".")[0]
        chosen = name in ("index", "index_put_", "index_put") and any(
            each is not None and each.dtype == torch.bool for each in args[1]
        )
        if chosen or name in self.WAITS or str(func.__name__) == "repeat_interleave.self_Tensor":
            raise RuntimeError(f"{name} is not permitted when stream is capturing")
        return func(*args, **(kwargs or {}))


@dataclass
class Device:
    """Captures; counts captures and replays."""

    made: list[Replaying] = field(default_factory=list)

    def capture(self, run: Callable[[], Tensor]) -> tuple[Replaying, Tensor]:
        with Capturing():
            result = run()
        self.made.append(Replaying(run, result))
        return self.made[-1], result
