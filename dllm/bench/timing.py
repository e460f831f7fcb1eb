"""Times settings in alternation: a step of each, followed by its bare forward pass."""

from __future__ import annotations

import ctypes
import gc
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from statistics import median
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import nn

from dllm.api import prepare
from dllm.bench import reference
from dllm.bench.bare import Bare, Call, in_part, listening
from dllm.bench.cost import Cost, Timing, cost_of
from dllm.bench.models import causal_model
from dllm.bench.sections import SectionTimer, watching
from dllm.decoding.engine import Engine
from dllm.decoding.options import Options
from dllm.decoding.request import Request
from dllm.decoding.result import Clock, now
from dllm.models import MaskedDiffusionModel
from dllm.models.experts import MixtureOfExperts
from dllm.models.loading import LanguageModel

REFERENCES = {"straightforward": reference.straightforward, "dual": reference.dual}
_WARM_UP, _PROFILED = 3, 10  # steps
_COPIED, _MULTIPLIED = 2**28, 2**13  # bytes; rows and columns
Setting: TypeAlias = tuple[Any, Any]


class Bench:
    """A model, and prompts to decode.

    Args:
        lm: the model; prompts are random.
        canvas: positions, prompt and generated.
        generated: positions to generate, at the end.
        batch: rows.
        block_length: positions decoded at a time; None for all.
        cuda_graphs: as in `dllm.Options`.
        plain: backbone for the reference implementations; None for that of the model.

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
        if lm.backbone.uniform:
            raise ValueError(
                f"model={lm.name} encodes finished text apart, so its steps have no bare forward to compare with; use "
                "dllm evaluate, which reports tokens per second"
            )
        self.plain = plain or lm.backbone
        self.bare = Bare(lm.backbone, canvas, cuda_graphs)
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
        words = torch.tensor([token for token in range(lm.backbone.logits_size) if token not in special])
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
        """Time settings in alternation, after a few steps of each, or a whole decode with CUDA graphs, to warm up.

        Args:
            settings: pairs of sampler and cache.
            steps: per repetition; None to decode to the end.
            repeats: repetitions of each setting.
            references: reference implementations (`REFERENCES`) to time as well, with their tokens per step.
            progress: called after each step.
        """
        references = references or {}
        timings: dict[str, list[list[Timing]]] = {label: [] for label in (*settings, *references)}
        ends: dict[str, list[list[int]]] = {}
        engines = {label: self._engine(*each) for label, each in settings.items()}
        # Where forwards are captured, a whole decode, so that every shape has come.
        for count in (steps if self.bare.forward.graphs else _WARM_UP, *[steps] * repeats):
            running = {label: self._decoding(label, ends, *each) for label, each in engines.items()}
            running |= {label: self._reference(label, ends, commits) for label, commits in references.items()}
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
            for iterator in running.values():
                iterator.close()
        costs = {label: cost_of(each[1:], ends.get(label)) for label, each in timings.items()}
        if self.bare.forward.graphs:
            whole = [{label: self._whole(*each) for label, each in engines.items()} for _ in range(repeats)]
            for label in engines:
                costs[label] = replace(costs[label], whole=median(each[label] for each in whole))
        return costs

    @torch.inference_mode()
    def peak(self, sampler: Any, cache: Any) -> int:
        """Peak memory of the first steps in bytes, beyond that before the run (weights etc.).

        Call it before timing: later, memory that the process had freed would count again.
        """
        for measured in (False, True):  # the first run also loads code
            before, memory = _resident(self.lm.device), Clock(self.lm.device)
            _, engine = prepare(self.lm, self.prompts, sampler, cache, self.options)
            for _ in islice(engine.steps(), _PROFILED if measured else _WARM_UP):
                pass
            del engine
        return memory.peak_memory() - before

    @torch.inference_mode()
    def shares(self, sampler: Any, cache: Any) -> dict[str, float] | None:
        """Share of each section of the time of a step; None if the canvas has too few steps.

        Forwards are launched kernel by kernel, since a CUDA graph cannot be profiled by section.
        """
        launched = replace(self.options, cuda_graphs=False)
        _, engine = prepare(self.lm, self.prompts, sampler, cache, launched)
        engine.waits = True
        steps = engine.steps()
        deque(islice(steps, _WARM_UP), maxlen=0)
        clock = SectionTimer(self.lm.device)
        with watching(clock, self.lm.backbone, engine.sampler, engine.denoiser):
            clock.reset()
            looked = sum(1 for _ in islice(steps, _PROFILED))
        return clock.shares() if looked else None

    def memory_floor(self, weights: int) -> float:
        """Seconds to read this many bytes at the copy bandwidth of the device."""
        source = torch.ones(_COPIED, dtype=torch.uint8, device=self.lm.device)
        target = torch.empty_like(source)

        def copy() -> float:
            started = now(self.lm.device)
            target.copy_(source)
            return now(self.lm.device) - started

        copy()
        return weights / (2 * _COPIED / median(copy() for _ in range(9)))

    def arithmetic_floor(self, columns: int) -> float:
        """Seconds to multiply so many columns by their weights in every layer, at the rate of a large product."""
        count = sum(_multiplied(block) for block in self.lm.backbone.blocks)
        x = torch.randn((_MULTIPLIED, _MULTIPLIED), dtype=self.lm.backbone.dtype, device=self.lm.device)

        def product() -> float:
            started = now(self.lm.device)
            x @ x
            return now(self.lm.device) - started

        product()
        return 2 * count * columns / (2 * _MULTIPLIED**3 / median(product() for _ in range(9)))

    def causal(self, repeats: int) -> float:
        """Tokens per second, over all rows, of a causal model of the same shape with `generate` and a KV cache."""
        model = causal_model(self.lm.backbone)
        prompts = torch.tensor(self.prompts, device=self.lm.device)

        def decode(count: int) -> float:
            started = now(self.lm.device)
            model.generate(  # type: ignore[operator]  # of a mixin that PreTrainedModel does not declare
                prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=count, do_sample=False, use_cache=True,
                pad_token_id=0,
            )  # fmt: skip
            return now(self.lm.device) - started

        decode(2)
        return self.batch * self.generated / median(decode(self.generated) for _ in range(repeats))

    def _engine(self, sampler: Any, cache: Any) -> tuple[list[Request], Engine]:
        """Requests, and an engine for all repetitions of them, to which the captured graphs belong."""
        if getattr(cache, "shared", 0) is None:  # or repetitions would begin with what the first one computed
            cache = replace(cache, shared=0)
        requests, engine = prepare(self.lm, self.prompts, sampler, cache, self.options)
        for number in range(self.batch):
            engine.abort(number)
        engine.waits = True
        return requests, engine

    def _whole(self, requests: Sequence[Request], engine: Engine) -> float:
        """Tokens per second of a decode as users run it: steps need not wait for each other."""
        for request in requests:
            engine.submit(request)
        engine.waits, started = False, now(self.lm.device)
        gained = sum(int(step.change.gained.sum()) for step in engine.steps())
        seconds, engine.waits = now(self.lm.device) - started, True
        return gained / seconds

    @torch.inference_mode()
    def _decoding(
        self, label: str, ends: dict[str, list[list[int]]], requests: Sequence[Request], engine: Engine
    ) -> Generator[Timing, None, None]:
        ids = [engine.submit(request) for request in requests]
        try:
            yield from self._timed(label, ends, ids[0], engine)
        finally:
            for number in ids:
                engine.abort(number)

    def _timed(
        self, label: str, ends: dict[str, list[list[int]]], first: int, engine: Engine
    ) -> Generator[Timing, None, None]:
        end = np.full((self.batch, self.canvas), self.lm.backbone.mask_token_id)
        steps = engine.steps()
        while True:
            with listening() as calls:
                started = now(self.lm.device)
                found = next(steps, None)
                seconds = now(self.lm.device) - started
            if found is None:
                ends[label] = end.tolist()
                return
            end[found.ids - first] = found.tokens
            computed, refreshed = int(found.computed.sum()), bool(found.refreshes.any())
            shapes = [in_part(each.call, computed) if each.in_part else each.call for each in calls]
            launched = any(each.launched for each in calls)
            bare = sum(self._bare(call) for call in shapes)
            kept = getattr(getattr(engine.denoiser.cache, "store", None), "nbytes", 0)
            rows = len(found.ids)
            yield Timing(seconds, bare, rows, computed, int(found.change.gained.sum()), refreshed, kept, launched)

    @torch.inference_mode()
    def _reference(self, label: str, ends: dict[str, list[list[int]]], commits: int) -> Generator[Timing, None, None]:
        backbone, chosen = self.plain, self.options.block_length
        block = chosen if isinstance(chosen, int) else self.generated
        rows = [[*prompt, *[backbone.mask_token_id] * self.generated] for prompt in self.prompts]
        tokens = torch.tensor(rows, device=self.lm.device)
        steps = REFERENCES[label](backbone, tokens, self.generated, block, commits)
        masks = self.batch * self.generated
        while True:
            started = now(self.lm.device)
            found = next(steps, None)
            seconds = now(self.lm.device) - started
            if found is None:
                ends[label] = tokens.tolist()
                return
            tokens, before = found, masks
            masks = int((found == backbone.mask_token_id).sum())
            yield Timing(seconds, None, self.batch, 0, before - masks)

    def _bare(self, call: Call) -> float:
        """Seconds of the backbone alone."""
        run = self.bare.prepare(call)
        started = now(self.lm.device)
        run()
        return now(self.lm.device) - started


def _resident(device: torch.device) -> int:
    """Bytes in use; on a CPU those of the process, after releasing free memory."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.memory_allocated(device)
    with suppress(OSError, AttributeError):  # glibc only
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    return Clock(device).peak_memory()


def _multiplied(block: nn.Module) -> float:
    """Weights of a layer that a column is multiplied by: of experts, those that are chosen for it."""
    found = float(sum(each.numel() for each in block.parameters()))
    for part in block.modules():
        if isinstance(part, MixtureOfExperts):
            router: Any = part.gate
            experts = sum(each.numel() for each in part.experts.parameters())
            found -= experts * (1 - router.chosen / len(part.experts))
    return found
