"""Profile of a step: embedding, layers, projection, selection, cache, and Python for the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any
from unittest.mock import patch

import torch

from dllm.decoding.denoiser import Denoiser
from dllm.decoding.prediction import Prediction
from dllm.decoding.result import now
from dllm.models.base import MaskedDiffusionModel

SECTIONS = ("embedding", "layers", "projection", "selection", "cache", "python")
_SERVED = ("update", "parts", "stale", "blend", "attended")


class SectionTimer:
    """Seconds of each section, excluding nested sections."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds = dict.fromkeys(SECTIONS, 0.0)
        self._open = ["python"]
        self._since = now(device)

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
        before, self._since = self._since, now(self.device)
        self.seconds[self._open[-1]] += self._since - before


@contextmanager
def watching(clock: SectionTimer, backbone: MaskedDiffusionModel, sampler: Any, denoiser: Denoiser) -> Iterator[None]:
    """Profile a run within this context.

    Args:
        clock: the timer.
        backbone: the denoiser.
        sampler: the policy.
        denoiser: of the run.
    """
    store = getattr(denoiser.cache, "store", None)
    methods = [
        (backbone.get_input_embeddings(), "forward", "embedding"),
        *((block, "forward", "layers") for block in backbone.blocks),
        (backbone.final_norm, "forward", "projection"),
        (backbone.get_output_embeddings(), "forward", "projection"),
        (type(sampler), "step", "selection"),
        (Prediction, "__init__", "selection"),
        (Denoiser, "__call__", "python"),
        *((denoiser.cache, name, "cache") for name in ("plan", "observe") if store is not None),
    ]
    with ExitStack() as patches:
        for owner, name, section in methods:
            patches.enter_context(patch.object(owner, name, clock.timed(section, getattr(owner, name))))
        if store is not None:
            bind = store.bind

            def watched(selection: Any) -> Any:
                served = bind(selection)
                for name in _SERVED:
                    if hasattr(served, name):
                        setattr(served, name, clock.timed("cache", getattr(served, name)))
                return served

            patches.enter_context(patch.object(store, "bind", clock.timed("cache", watched)))
        yield
