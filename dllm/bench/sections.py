"""Profile of a step: embedding, layers, projection, selection, cache, and Python for the rest."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch

from dllm.decoding.denoiser import Denoiser
from dllm.decoding.prediction import Prediction
from dllm.models.base import MaskedDiffusionModel

SECTIONS = ("embedding", "layers", "projection", "selection", "cache", "python")
_SERVED = ("update", "parts", "stale", "blend", "attended")


class SectionTimer:
    """Seconds of each section, excluding nested sections."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds = dict.fromkeys(SECTIONS, 0.0)
        self._open = ["python"]
        self._since = self._now()

    def timed(self, section: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, with its time attributed to a section."""

        @wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            self._turn()
            self._open.append(section)
            try:
                return function(*args, **kwargs)
            finally:
                self._turn()
                self._open.pop()

        return wrapper

    def reset(self) -> None:
        """Reset all times."""
        self._turn()
        self.seconds = dict.fromkeys(SECTIONS, 0.0)

    def shares(self) -> dict[str, float]:
        """Share of each section of the total time so far."""
        self._turn()
        total = sum(self.seconds.values())
        return {section: seconds / total for section, seconds in self.seconds.items()}

    def _turn(self) -> None:
        now = self._now()
        self.seconds[self._open[-1]] += now - self._since
        self._since = now

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


@contextmanager
def watching(clock: SectionTimer, backbone: MaskedDiffusionModel, sampler: Any, denoiser: Denoiser) -> Iterator[None]:
    """Profile a run within this context.

    Args:
        clock: the timer.
        backbone: the denoiser.
        sampler: the policy.
        denoiser: of the run.
    """
    with _Patches(clock) as patches:
        patches.put(backbone.get_input_embeddings(), "forward", "embedding")
        for block in backbone.blocks:
            patches.put(block, "forward", "layers")
        patches.put(backbone.final_norm, "forward", "projection")
        patches.put(backbone.get_output_embeddings(), "forward", "projection")
        patches.put(type(sampler), "step", "selection")
        patches.put(Prediction, "__init__", "selection")
        patches.put(Denoiser, "__call__", "python")
        store = getattr(denoiser.cache, "store", None)
        if store is not None:
            patches.put(denoiser.cache, "plan", "cache")
            patches.put(denoiser.cache, "observe", "cache")
            bind = store.bind

            def watched(selection: Any) -> Any:
                served = bind(selection)
                for name in _SERVED:
                    if hasattr(served, name):
                        setattr(served, name, clock.timed("cache", getattr(served, name)))
                return served

            patches.set(store, "bind", clock.timed("cache", watched))
        yield


class _Patches:
    """Temporarily replaced attributes."""

    def __init__(self, clock: SectionTimer) -> None:
        self._clock = clock
        self._undo: list[Callable[[], None]] = []

    def __enter__(self) -> _Patches:
        return self

    def __exit__(self, *_: object) -> None:
        for undo in reversed(self._undo):
            undo()

    def put(self, owner: Any, name: str, section: str) -> None:
        """Attribute the time of a method to a section."""
        self.set(owner, name, self._clock.timed(section, getattr(owner, name)))

    def set(self, owner: Any, name: str, value: Any) -> None:
        """Replace an attribute."""
        if name in vars(owner):
            before = vars(owner)[name]
            self._undo.append(lambda: setattr(owner, name, before))
        else:
            self._undo.append(lambda: delattr(owner, name))
        setattr(owner, name, value)
