"""The decode loop: rows enter and leave, the sampler calls the denoiser and returns an edit, the canvas applies it.

This is the only decode loop. It does not depend on any sampler, cache or option of either.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from numbers import Integral
from threading import Lock, RLock
from typing import Any

import numpy as np
import torch

from dllm.cache.base import Cache
from dllm.checks import number
from dllm.decoding import compatibility
from dllm.decoding.canvas import Canvas
from dllm.decoding.denoiser import Denoiser
from dllm.decoding.drift import Meter
from dllm.decoding.foresight import Foresight, Taken, foreseeable
from dllm.decoding.gate import Gate
from dllm.decoding.graphs import Watch
from dllm.decoding.memory import Memory
from dllm.decoding.options import make_request, parse_options, seeds
from dllm.decoding.prediction import Sampling
from dllm.decoding.prompts import Mask, encode_one
from dllm.decoding.recorder import Recorder
from dllm.decoding.rehearsal import EngineRehearsal
from dllm.decoding.request import Request
from dllm.decoding.setup import Setup
from dllm.decoding.step import Event, Step
from dllm.decoding.window import Change
from dllm.models import leading
from dllm.models.base import own_precision
from dllm.models.loading import LanguageModel
from dllm.resolve import resolve
from dllm.samplers.base import Sampler

# A sampler counts as stuck after this many consecutive steps that leave a request unchanged, or this many steps or
# forwards per position to generate.
_IDLE, _BUDGET = 8, 16


class Engine:
    """Decodes requests with continuous batching, `batch_size` of them at once.

    The result of a request depends only on the request: not on its arrival time, nor on the other rows of the batch.
    Several threads may add and abort; steps are serialized.

    Keys and values of the cache take a fixed number of slots of `max_length` columns (see
    `dllm.cache.store.KeyValues`); memory does not grow with the number of requests.

    Args:
        lm: a loaded model.
        sampler: the unmasking policy: a name of conf/sampler or an object; None for that of the model's card, else
            vanilla.
        cache: the cache: a name of conf/cache or an object.
        batch_size: rows decoded at once; a finished row is replaced by a waiting request.
        max_length: maximum length of a request, prompt and generated region; None for the context of the model, or for
            as much of it as leaves a fifth of the free memory (`dllm.decoding.memory.Memory.fitting_length`).
        cfg_scale: classifier-free guidance against the masked prompt (LLaDA's convention: 0 is off); it computes
            every row twice and counts as one forward.
        cuda_graphs: replay small forwards from CUDA graphs, which avoids the launch overhead of their kernels;
            None: if there is a CUDA device.
        block_length: positions of a block of attention, of models that are causal over blocks of any length; None for
            the model's own.

    Attributes:
        waits: whether a step always waits for the one before it to be read (`dllm.decoding.foresight`).

    Raises:
        ValueError: an unknown name, a value out of range, or an incompatible sampler and cache.
    """

    def __init__(
        self,
        lm: LanguageModel,
        sampler: str | Sampler | None = None,
        cache: str | Cache = "none",
        *,
        batch_size: int = 8,
        max_length: int | None = None,
        cfg_scale: float = 0.0,
        cuda_graphs: bool | None = None,
        block_length: int | None = None,
    ) -> None:
        check_model(lm)
        number("batch_size", batch_size, "a whole number of at least 1", low=1, whole=True)
        context = lm.backbone.max_length
        if max_length is not None:
            use = f"a whole number from 1 to the model's context of {context}, or null for all of it"
            number("max_length", max_length, use, low=1, high=context, whole=True)
        self.lm, self.batch_size = lm, batch_size
        self.sampler: Sampler = resolve("sampler", lm.sampler if sampler is None else sampler, Sampler)
        self.cache: Cache = resolve("cache", cache, Cache)
        self.cfg_scale, self.cuda_graphs = cfg_scale, cuda_graphs
        compatibility.check(self.sampler, self.cache, cfg_scale, lm.backbone, cuda_graphs)
        if block_length is not None:
            number("block_length", block_length, "a whole number of at least 1, or null", low=1, whole=True)
            if lm.backbone.pattern is None:
                raise ValueError(f"block_length={block_length} has no effect on a bidirectional model; give it to add")
        self.pattern = lm.backbone.pattern_of(block_length)
        if cuda_graphs and lm.device.type != "cuda":
            raise ValueError(f"cuda_graphs=true needs a CUDA device, and the model is on {lm.device}; use null")
        backbone = lm.backbone
        spare = lm.spare.pop() if lm.spare else None
        self._memory = spare if spare is not None and spare.fits else Memory(backbone)
        measured = self.cache.measure_every, self.cache.refresh_above
        self._meter = Meter(batch_size, *measured, backbone.mask_token_id, backbone.all_heads)
        setup = Setup(
            slots=batch_size,
            length=max_length or context,
            mask_token_id=backbone.mask_token_id,
            logits_shift=backbone.logits_shift,
            kv_shape=backbone.kv_shape,
            pattern=self.pattern,
            hidden_size=backbone.embedding_size,
            dtype=backbone.dtype,
            device=lm.device,
            tokenizer=lm.tokenizer,
            vocab_size=backbone.logits_size,
            fingerprint=backbone.fingerprint,
            rehearsal=lambda other: EngineRehearsal(self, other),
            tensor=self._memory.tensor,
            query_heads=backbone.query_heads,
            all_heads=backbone.all_heads,
            cache=self.cache,
            cfg_scale=cfg_scale,
            sampling=lambda: Sampling(
                eos_token_ids=backbone.eos_token_ids, tempered_confidence=backbone.tempered_confidence
            ),
            replays=self._memory.replays(cuda_graphs),
            kept=self._memory.kept,
            weights=Watch(backbone),
            own_block_length=backbone.own_block_length,
        )
        self.max_length = setup.length if max_length is not None else self._memory.fitting_length(self.cache, setup)
        self._setup = replace(setup, length=self.max_length)
        self._canvas = Canvas(batch_size, self.max_length, backbone.mask_token_id, lm.device, self.pattern)
        self._recorder, self._gate = Recorder(self._canvas, lm.tokenizer), Gate(self._canvas)
        with torch.inference_mode():
            with torch.device("cpu"):  # tables are made there and then moved, whatever the user's default device
                self._state = self.sampler.start(self._setup)
            cache_run, forward = self.cache.start(self._setup), self._memory.forward(cuda_graphs)
            self.denoiser = Denoiser(forward, self._canvas, cache_run, cfg_scale, self._meter, self._gate)
        self._next: Taken | None = None
        self._foresight: Foresight | None = None
        if foreseeable(self.sampler, self.cache, cfg_scale, backbone, self.pattern):
            self._foresight = Foresight(self._canvas, self.denoiser, self._gate, self.sampler, self._state)
        self.waits = False
        self._stepping, self._lock = RLock(), Lock()
        self._waiting: deque[tuple[int, Request]] = deque()
        self._entering: list[Request] = []
        self._ids = np.zeros(batch_size, dtype=np.int64)  # the request of each row
        self._leaving: set[int] = set()  # rows with a finished request
        self._aborted: set[int] = set()
        self._idle, self._steps = np.zeros((2, batch_size), dtype=np.int64)
        self._count, self._closed = 0, False
        self.uncounted_seconds = 0.0
        options = {"sampler": self.sampler, "cache": self.cache, "batch_size": batch_size, "cfg_scale": cfg_scale}
        options |= {"max_length": self.max_length, "cuda_graphs": cuda_graphs, "block_length": block_length}
        self._tell = leading.teller(backbone.number, "engine", options)

    def add(
        self,
        prompt: Any,
        *,
        attention_mask: Mask | None = None,
        infill: bool = False,
        max_forwards: int | None = None,
        **options: Any,
    ) -> int:
        """Queue a request.

        Args:
            prompt: a text, chat messages or token ids; with `infill`, its masks are filled.
            attention_mask: of token ids: 1 at tokens, 0 at padding on either side.
            infill: fill the masks in the prompt, like `dllm.infill`, instead of generating after it.
            max_forwards: denoiser forwards after which an unfinished request fails; None for no limit.
            **options: fields of `dllm.Options` except `batch_size`, `cfg_scale` and `cuda_graphs`, set in the engine.

        Returns:
            The number of the request: 0, 1, 2, ...

        Raises:
            ValueError: an unknown option, a value out of range, or a prompt that does not fit.
        """
        for name in ("batch_size", "cfg_scale", "cuda_graphs"):
            if name in options:
                raise ValueError(f"{name} is an option of the engine, not of a request; give it to Engine")
        if max_forwards is not None:
            number("max_forwards", max_forwards, "a whole number of at least 1, or null", low=1, whole=True)
        own = parse_options(options)
        ids = encode_one(prompt, self.lm.tokenizer, attention_mask)
        (seed,) = seeds(own.seed, 1)
        request = make_request(self.lm, ids, own, seed, infill, "prompt", self.pattern, self.max_length)
        return self.submit(replace(request, max_forwards=max_forwards))

    def submit(self, request: Request) -> int:
        """Queue an existing request.

        Raises:
            ValueError: it is longer than `max_length`, the sampler rejects it, or the engine is closed.
        """
        if len(request.tokens) > self.max_length:
            raise ValueError(
                f"prompt and generated region have {len(request.tokens)} tokens, and max_length={self.max_length}; "
                "shorten one of them, or make an engine with a larger max_length"
            )
        self.check(request)
        with self._lock:
            if self._closed:
                raise ValueError("the engine is closed; create a new one")
            self._tell("submit", replace(request, tokenizer=None), request.tokenizer is not None)
            self._waiting.append((self._count, request))
            self._count += 1
            return self._count - 1

    def check(self, request: Request) -> None:
        """Reject (ValueError) what the sampler cannot decode, and a model that was resized, cast or moved."""
        backbone, made = self.lm.backbone, self._setup
        for what, now, before in (
            ("[MASK] id", backbone.mask_token_id, made.mask_token_id),
            ("precision", backbone.dtype, made.dtype),
            ("device", self.lm.device, made.device),
        ):
            if now != before:
                raise ValueError(f"the model has another {what} than when this engine was made; make a new engine")
        if request.open_ended and self.sampler.opening(request) is None:
            raise ValueError("gen_length=auto needs a sampler that finds the length (daedal); use it, or give a number")
        if request.constraint is not None and (at_once := sorted(compatibility.AT_ONCE & self.sampler.needs)):
            raise ValueError(
                f"response_format is not compatible with {compatibility.NEEDS[at_once[0]][0]}, which decides several "
                "tokens at once; use another sampler"
            )
        with torch.device("cpu"):
            self.sampler.check(self._state, request)

    def abort(self, id: int) -> None:  # named like `Event.id`
        """Abort a waiting or running request; no effect on a finished one.

        Raises:
            ValueError: there was no such request.
        """
        with self._lock:
            if not (isinstance(id, Integral) and 0 <= id < self._count):
                raise ValueError(f"id={id!r} is not a request of this engine; give a number that `add` returned")
            self._tell("abort", id)
            left = [(number, request) for number, request in self._waiting if number != id]
            if len(left) == len(self._waiting):
                self._aborted |= {id} & set(self._ids[self._canvas.rows].tolist())
            self._waiting = deque(left)

    @property
    def busy(self) -> bool:
        """Whether there is anything left to decode."""
        with self._lock:
            rows = self._canvas.rows.tolist()
            running = (row for row in rows if row not in self._leaving and self._ids[row] not in self._aborted)
            return bool(self._waiting) or bool(self._entering) or any(True for _ in running)

    @property
    def upcoming(self) -> list[Request]:
        """The requests that are about to enter, followed by the waiting ones."""
        with self._lock:
            return [*self._entering, *(request for _, request in self._waiting)]

    def step(self) -> Sequence[Event]:
        """Take one denoising step.

        Returns:
            An event for each active request, in no particular order; a `Step`, or empty if there are none.

        Raises:
            RuntimeError: a sampler broke its contract: it wrote outside the generated region, or makes no progress.
        """
        with self._stepping, torch.inference_mode(), own_precision(self.lm.device):
            started, uncounted = time.perf_counter(), self._uncounted()
            self._exchange()
            if not self._canvas.rows.size:
                return ()
            taken, self._next = self._next or self._take(), None
            broken = self.denoiser.broken(taken.account)
            self._canvas.write(taken.edit, broken)
            following = None if self.waits or self._foresight is None else self._foresight(taken)
            change = self._canvas.read(taken.edit, broken)
            self.denoiser.cache.observe(change)
            self._next = following if following is not None and self._canvas.goes_on(change) else None
            self._check_progress(change)
            return self._record(change, taken, started, uncounted)

    def _take(self) -> Taken:
        """What the policy does next."""
        window = self._gate.seen(self._canvas.window())
        account = self.denoiser.bind(window)
        edit = self.sampler.step(window, self.denoiser, self._state)
        if self._gate.holds:
            edit = self._gate.permit(window, edit, account.shown(window, edit))
        return Taken(window, edit, account)

    def steps(self) -> Iterator[Step]:
        """Take steps until nothing is left."""
        while self.busy:
            if isinstance(step := self.step(), Step):
                yield step

    @property
    def measuring_seconds(self) -> float:
        """Wall time of measuring the cache's approximation error so far."""
        return self._meter.seconds

    def _uncounted(self) -> float:
        """Wall time so far that does not count as decoding."""
        return self.uncounted_seconds + (self._meter.seconds if self._meter.above is None else 0.0)

    def close(self) -> None:
        """Release device memory and graphs to the next engine of the model; no more steps are possible."""
        with self._stepping, self._lock:
            if not self._closed:
                self._tell("close")
                self.lm.spare[:] = [self._memory]
            self._closed, self._next = True, None
            self._waiting.clear()
            self._canvas.rows = self._canvas.rows[:0]

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _exchange(self) -> None:
        """Replace finished and aborted rows by waiting requests."""
        with self._lock:
            self._tell("step")
            rows = self._canvas.rows.tolist()
            leaving = self._leaving | {row for row in rows if int(self._ids[row]) in self._aborted}
            room = self.batch_size - len(rows) + len(leaving)
            entering = [self._waiting.popleft() for _ in range(min(room, len(self._waiting)))]
            if not leaving and not entering:
                return
            self._next = None
            self._entering = [request for _, request in entering]
            exchange = self._canvas.exchange(
                leaving,
                self._entering,
                [self.sampler.reach(request) for request in self._entering],
                [self._opening(request) for request in self._entering],
            )
            self._leaving, self._aborted = set(), set()
            self._ids[exchange.rows] = [name for name, _ in entering]
        if entering:
            self._memory.refresh()
        self._idle[exchange.rows] = self._steps[exchange.rows] = 0
        self._recorder.enter(exchange.rows)
        self._gate.exchange(exchange.rows)
        self._meter.enter(exchange.rows)
        self.denoiser.cache.exchange(exchange)
        for row, (_, request) in zip(exchange.rows.tolist(), entering, strict=True):
            try:
                with torch.device("cpu"):
                    self.sampler.enter(self._state, row, request)
            except ValueError as error:
                self._canvas.doomed[row] = str(error)
        self._entering = []

    def _opening(self, request: Request) -> int | None:
        """Positions that a row begins with: enough for an answer of its format."""
        opening = self.sampler.opening(request)
        return opening if opening is None or request.constraint is None else max(opening, request.constraint.shortest)

    def _check_progress(self, change: Change) -> None:
        """Raise an error if the sampler does not terminate."""
        rows = change.rows
        self._idle[rows] = np.where(change.idle, self._idle[rows] + 1, 0)
        self._steps[rows] += 1
        spent = np.maximum(self._steps, self._recorder.nfe)[rows] > _BUDGET * (self._canvas.spans[rows] + 1)
        stuck = (self._idle[rows] >= _IDLE) | (spent & ~change.ended)
        if stuck.any():
            number = self._ids[rows[stuck][0]]
            raise RuntimeError(f"{self.sampler!r} makes no progress in request {number}: it must finish it")

    def _over_limit(self, change: Change) -> Change:
        """Fail requests that reached their `max_forwards`."""
        over = []
        for row in set(change.rows.tolist()) - {*change.finished.tolist(), *change.failed.tolist()}:
            request = self._canvas.requests[row]
            if (
                request is not None
                and request.max_forwards is not None
                and self._recorder.nfe[row] >= request.max_forwards
            ):
                left = int((self._canvas.host[row] == self._canvas.mask_token_id).sum())
                self._canvas.errors[row] = f"max_forwards={request.max_forwards} is reached with {left} tokens missing"
                over.append(row)
        if not over:
            return change
        return replace(change, failed=np.concatenate((change.failed, np.array(sorted(over), dtype=np.int64))))

    def _record(self, change: Change, taken: Taken, started: float, uncounted: float) -> Step:
        canvas, edit, account, rows = self._canvas, taken.edit, taken.account, change.rows
        self._recorder.count(change, edit, account)
        change = self._over_limit(change)
        # The device was synchronized, so no work of the step is pending.
        uncounted = self._uncounted() - uncounted
        seconds = time.perf_counter() - started - uncounted
        self._recorder.charge(rows, seconds, edit.guide_seconds)
        ended: list[int] = [*change.finished.tolist(), *change.failed.tolist()]
        self._leaving = set(ended)
        constraint_seconds, constraint_refusals = self._gate.take()
        return Step(
            ids=self._ids[rows],
            tokens=canvas.host[rows],
            padding=canvas.padding[rows],
            ends=canvas.ends[rows],
            mask_token_id=canvas.mask_token_id,
            change=change,
            edit=edit,
            forwards=account.forwards,
            nfe=self._recorder.nfe[rows],
            computed=account.computed,
            refreshes=account.refreshes,
            drift=self._meter.take(change.failed, self._ids),
            answers={int(self._ids[row]): self._recorder.answer(row, int(self._ids[row])) for row in ended},
            slots=self.batch_size,
            seconds=seconds,
            uncounted_seconds=uncounted,
            last=account.shown(taken.window, edit),
            looked=account.looked,
            constraint_seconds=constraint_seconds,
            constraint_refusals=constraint_refusals,
            tokenizer=self.lm.tokenizer,
        )


def check_model(lm: Any) -> None:
    """Reject (ValueError) a name where a loaded model is expected."""
    if not isinstance(lm, LanguageModel):
        raise ValueError(f"lm={lm!r} is not a loaded model; give dllm.load({str(lm)!r})")
