"""Times settings in turns: a step of each, and behind it the forward pass it needed."""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import islice
from statistics import median, quantiles
from typing import Any, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dllm.backbones import MaskedDiffusionModel
from dllm.backbones.transformer import FeatureStore
from dllm.bench import today
from dllm.bench.models import causal_model
from dllm.bench.sections import Clock, watching
from dllm.generation import Clock as Memory
from dllm.graphs import Forward
from dllm.loading import LanguageModel
from dllm.plan import Options, Plan

REFERENCES = {"straightforward": today.straightforward, "dual": today.dual}
_WARM_UP, _LOOKED_INTO = 3, 10  # steps
_COPIED = 2**28  # bytes
Setting: TypeAlias = tuple[Any, Any]


@dataclass(frozen=True)
class Call:
    """The shape of one call of the backbone.

    Attributes:
        sequences: A.
        columns: C, computed in each.
        selected: places that are projected to the vocabulary.
        reuses: keys and values of other columns are attended to.
    """

    sequences: int
    columns: int
    selected: int
    reuses: bool


@dataclass(frozen=True)
class Timing:
    """One denoising step.

    Attributes:
        seconds: of the whole step: the plan, the forward, the choice, the edit.
        bare: of the backbone alone, called as often and for as many columns and projected positions, while all
            columns are attended to; None where nobody asked.
        columns: computed, over all rows.
        committed: tokens, over all rows.
        refreshed: whether some row was computed anew.
        store_bytes: of the keys and values kept.
    """

    seconds: float
    bare: float | None
    columns: int
    committed: int
    refreshed: bool = False
    store_bytes: int = 0


@dataclass(frozen=True)
class Cost:
    """What the steps of one setting cost.

    Attributes:
        steps: how many a repeat had, which is the forwards of a row.
        columns: mean columns computed per step and row.
        step: median seconds.
        tokens_per_second: committed over the sum of the steps; the median of the repeats.
        to_bare: median of step over bare, of the steps that reuse something; of all where none does. None without bare.
        spread: of `to_bare`, the difference of its quartiles.
        refresh_to_bare: median of step over bare, of the steps that compute some row anew beside others; None
            without any.
        store_bytes: of the keys and values kept.
        peak: bytes at the peak beyond what there was before, weights and all; None where not measured.
        shares: of the time of a step, by section.
        tokens: what was decoded, where it was decoded to the end.
    """

    steps: int
    columns: float
    step: float
    tokens_per_second: float
    to_bare: float | None
    spread: float | None
    refresh_to_bare: float | None
    store_bytes: int
    peak: int | None = None
    shares: Mapping[str, float] | None = None
    tokens: Sequence[Sequence[int]] | None = None


class Bench:
    """A model, and prompts to decode.

    Args:
        lm: the model; prompts are random.
        canvas: columns.
        generated: how many of them are generated, at the end.
        batch: rows.
        block_length: columns decoded at a time; None for all.
        cuda_graphs: as in `dllm.Options`.
        plain: what the loops of today run on; None for the model's own backbone.

    Raises:
        ValueError: the canvas is longer than the model's context.
    """

    def __init__(
        self,
        lm: LanguageModel,
        canvas: int,
        generated: int,
        batch: int,
        block_length: int | None,
        cuda_graphs: bool | None = None,
        plain: MaskedDiffusionModel | None = None,
    ) -> None:
        self.plain = plain or lm.backbone
        self._forward, self._known = Forward(lm.backbone, cuda_graphs), set[Call]()
        self._given: dict[tuple[int, int], Given] = {}
        self.lm, self.canvas, self.batch, self.generated = lm, canvas, batch, generated
        self.options = Options(
            gen_length=generated, block_length=block_length, batch_size=batch, stop_at_eos=False, seed=0,
            cuda_graphs=cuda_graphs,
        )  # fmt: skip
        if canvas > lm.backbone.max_length:
            raise ValueError(
                f"canvas={canvas} is longer than the model's context of {lm.backbone.max_length}; use less"
            )
        special = {lm.backbone.mask_token_id, *lm.backbone.eos_token_ids}
        words = torch.tensor([token for token in range(lm.backbone.config.vocab_size) if token not in special])
        generator = torch.Generator().manual_seed(0)
        self.prompts = words[torch.randint(len(words), (batch, canvas - generated), generator=generator)].tolist()

    def run(
        self,
        settings: Mapping[str, Setting],
        steps: int | None,
        repeats: int = 1,
        references: Mapping[str, int] | None = None,
        progress: Callable[[], object] = lambda: None,
    ) -> dict[str, Cost]:
        """Time settings, in turns, after a few steps of each to warm up.

        Args:
            settings: a sampler and a cache each.
            steps: of each repeat; None for all it takes.
            repeats: how often each decodes its canvas.
            references: loops of today (`REFERENCES`) to time as well, with the tokens they commit per step.
            progress: called after each step.
        """
        references = references or {}
        timings: dict[str, list[list[Timing]]] = {label: [] for label in (*settings, *references)}
        ends: dict[str, list[list[int]]] = {}
        for count in (_WARM_UP, *[steps] * repeats):
            running = {label: self._decoding(label, ends, *setting) for label, setting in settings.items()}
            running |= {label: self._today(label, ends, commits) for label, commits in references.items()}
            for each in timings.values():
                each.append([])
            done = 0
            while running and (count is None or done < count):
                for label, iterator in list(running.items()):
                    timing = next(iterator, None)
                    if timing is None:
                        del running[label]
                    else:
                        timings[label][-1].append(timing)
                    progress()
                done += 1
        return {label: self._cost(each[1:], ends.get(label)) for label, each in timings.items()}

    @torch.inference_mode()
    def peak(self, sampler: Any, cache: Any) -> int:
        """Bytes at the peak of the first steps beyond what there was before, weights and all.

        To be asked before anything is timed: a process that gave memory back counts what it takes again.
        """
        for measured in (False, True):  # at first, code is read in as well
            before, memory = _resident(self.lm.device), Memory(self.lm.device)
            plan = Plan(self.lm, self.prompts, sampler, cache, self.options, infill=False)
            for _ in islice(plan.steps(), _LOOKED_INTO if measured else _WARM_UP):
                pass
            del plan
        return memory.peak_memory() - before

    @torch.inference_mode()
    def shares(self, sampler: Any, cache: Any) -> dict[str, float] | None:
        """What the sections of a step take of its time; None where a canvas is done too soon to say.

        Forwards are launched kernel by kernel for that, since in a CUDA graph nobody can look.
        """
        launched = replace(self.options, cuda_graphs=False)
        steps = Plan(self.lm, self.prompts, sampler, cache, launched, infill=False).steps()
        for _, step in islice(steps, _WARM_UP):
            denoiser = step.denoiser
        clock = Clock(self.lm.device)
        with watching(clock, self.lm.backbone, sampler, denoiser):
            clock.reset()
            looked = sum(1 for _ in islice(steps, _LOOKED_INTO))
        return clock.shares() if looked else None

    def memory_floor(self, weights: int) -> float:
        """Seconds that reading so many bytes takes at the bandwidth with which the device copies."""
        source = torch.ones(_COPIED, dtype=torch.uint8, device=self.lm.device)
        target = torch.empty_like(source)

        def copy() -> float:
            started = self._now()
            target.copy_(source)
            return self._now() - started

        copy()
        return weights / (2 * _COPIED / median(copy() for _ in range(9)))

    def causal(self, repeats: int) -> float:
        """Tokens per second, over all rows, of a causal model of the same shape, with `generate` and its KV cache."""
        model = causal_model(self.lm.backbone)
        prompts = torch.tensor(self.prompts, device=self.lm.device)

        def decode(count: int) -> float:
            started = self._now()
            model.generate(  # type: ignore[operator]  # of a mixin that PreTrainedModel does not declare
                prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=count, do_sample=False, use_cache=True,
                pad_token_id=0,
            )  # fmt: skip
            return self._now() - started

        decode(2)
        return self.batch * self.generated / median(decode(self.generated) for _ in range(repeats))

    @torch.inference_mode()
    def _decoding(self, label: str, ends: dict[str, list[list[int]]], sampler: Any, cache: Any) -> Iterator[Timing]:
        plan = Plan(self.lm, self.prompts, sampler, cache, self.options, infill=False)
        steps, columns, refreshes = plan.steps(), 0, 0
        while True:
            with _watching() as calls:
                started = self._now()
                found = next(steps, None)
                seconds = self._now() - started
            if found is None:
                ends[label] = plan.recorders[-1].canvas.host.tolist()
                return
            step, denoiser = found[1], found[1].denoiser
            computed, columns = int(denoiser.computed.sum()) - columns, int(denoiser.computed.sum())
            refreshed, refreshes = int(denoiser.refreshes.sum()) > refreshes, int(denoiser.refreshes.sum())
            shapes = [_partial(call, computed) if features else call for call, features in calls]
            bare = sum(self._bare(call) for call in shapes)
            kept = getattr(getattr(denoiser.cache, "store", None), "nbytes", 0)
            yield Timing(seconds, bare, computed, int(step.change.committed.sum()), refreshed, kept)

    @torch.inference_mode()
    def _today(self, label: str, ends: dict[str, list[list[int]]], commits: int) -> Iterator[Timing]:
        backbone, block = self.plain, self.options.block_length or self.generated
        rows = [[*prompt, *[backbone.mask_token_id] * self.generated] for prompt in self.prompts]
        tokens = torch.tensor(rows, device=self.lm.device)
        steps, columns = REFERENCES[label](backbone, tokens, self.generated, block, commits), 0
        masks = self.batch * self.generated
        while True:
            started = self._now()
            found = next(steps, None)
            seconds = self._now() - started
            if found is None:
                ends[label] = tokens.tolist()
                return
            tokens, before = found, masks
            masks = int((found == backbone.mask_token_id).sum())
            yield Timing(seconds, None, columns, before - masks)

    def _bare(self, call: Call) -> float:
        """Seconds of the backbone alone, on made-up tokens."""
        backbone, device = self.lm.backbone, self.lm.device
        tokens = torch.zeros((call.sequences, call.columns), dtype=torch.long, device=device)
        positions = torch.arange(call.columns, device=device).expand_as(tokens)
        store = None
        if call.reuses:
            shape = call.sequences, call.columns
            store = self._given[shape] = self._given.get(shape) or Given(backbone, *shape, self.canvas)
        select = torch.arange(call.selected, device=device) % tokens.numel()
        if self._forward.graphs and call not in self._known:  # captured before it is timed, as the steps are
            self._known.add(call)
            for _ in range(_WARM_UP + 2):
                self._forward(tokens, None, positions, store, select)
        started = self._now()
        self._forward(tokens, None, positions, store, select)
        return self._now() - started

    def _cost(self, repeats: Sequence[Sequence[Timing]], tokens: Sequence[Sequence[int]] | None) -> Cost:
        timings = [each for repeat in repeats for each in repeat]
        reusing = [each for each in timings if not each.refreshed] or timings
        ratios = [each.seconds / each.bare for each in reusing if each.bare]
        refreshing = [each.seconds / each.bare for each in timings if each.refreshed and each.bare]
        quartiles = quantiles(ratios, n=4) if len(ratios) > 1 else [*ratios * 3]
        return Cost(
            steps=len(repeats[0]),
            columns=sum(each.columns for each in timings) / len(timings) / self.batch,
            step=median(each.seconds for each in timings),
            tokens_per_second=median(
                sum(each.committed for each in repeat) / sum(each.seconds for each in repeat) for repeat in repeats
            ),
            to_bare=median(ratios) if ratios else None,
            spread=quartiles[2] - quartiles[0] if ratios else None,
            refresh_to_bare=median(refreshing) if refreshing and len(reusing) < len(timings) else None,
            store_bytes=timings[0].store_bytes,
            tokens=tokens,
        )

    def _now(self) -> float:
        if self.lm.device.type == "cuda":
            torch.cuda.synchronize(self.lm.device)
        return time.perf_counter()


class Given:
    """Keys and values of a whole canvas, made up beforehand: a store that costs nothing.

    Args:
        backbone: whose.
        sequences: A.
        columns: C, computed in each.
        canvas: columns attended to.
    """

    def __init__(self, backbone: MaskedDiffusionModel, sequences: int, columns: int, canvas: int) -> None:
        _, heads, size = backbone.kv_shape
        shape = sequences, heads, canvas, size
        self.keys = torch.zeros(shape, dtype=backbone.dtype, device=backbone.device)
        self.values = torch.zeros_like(self.keys)
        self.memory: Hashable = shape
        self.index = torch.zeros((sequences, columns), dtype=torch.long, device=backbone.device)

    def through(self, index: Int[Tensor, "A C"]) -> Given:
        """The same: nothing is written."""
        return self

    def update(
        self, layer: int, keys: Float[Tensor, "B H C D"], values: Float[Tensor, "B H C D"]
    ) -> tuple[Float[Tensor, "B H S D"], Float[Tensor, "B H S D"]]:
        """Return what was made up."""
        return self.keys, self.values


def _partial(call: Call, computed: int) -> Call:
    """A call whose layers compute some of the columns only, as if they computed that many and no others."""
    return replace(call, columns=-(-computed // call.sequences), reuses=True)


def _resident(device: torch.device) -> int:
    """Bytes in use now; on a CPU of the process, after giving back what is free."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.memory_allocated(device)
    with suppress(OSError, AttributeError):  # glibc alone can do so
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    return Memory(device).peak_memory()


@contextmanager
def _watching() -> Iterator[list[tuple[Call, bool]]]:
    """Note the forwards, launched or replayed, and whether their layers compute some columns only."""
    calls: list[tuple[Call, bool]] = []
    inner = Forward.__call__

    def noting(self: Forward, tokens: Tensor, mask: Any, positions: Tensor, store: Any, select: Tensor) -> Tensor:
        call = Call(tokens.shape[0], tokens.shape[1], len(select), store is not None)
        calls.append((call, isinstance(store, FeatureStore)))
        return inner(self, tokens, mask, positions, store, select)

    Forward.__call__ = noting  # type: ignore[method-assign]
    try:
        yield calls
    finally:
        Forward.__call__ = inner  # type: ignore[method-assign]
