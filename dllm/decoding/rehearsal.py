"""Decoding requests in advance, for samplers that reproduce the result of another."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Int
from torch import Tensor

from dllm.decoding.request import Request
from dllm.models import leading

if TYPE_CHECKING:
    from dllm.decoding.engine import Engine


class EngineRehearsal:
    """Decodes the requests of an engine with another sampler, without counting its cost.

    Args:
        engine: whose requests are decoded.
        sampler: the other sampler.
    """

    def __init__(self, engine: Engine, sampler: Any) -> None:
        self._owner, self._results = engine, WeakKeyDictionary[Request, tuple[Int[Tensor, " n"], str | None]]()
        with leading.untold():
            self._engine = type(engine)(
                engine.lm, sampler, engine.cache, batch_size=engine.batch_size, max_length=engine.max_length,
                cfg_scale=engine.cfg_scale, cuda_graphs=engine.cuda_graphs,
                block_length=None if engine.pattern is None else engine.pattern.length,
            )  # fmt: skip

    def check(self, request: Request) -> None:
        """Reject what the other sampler rejects (ValueError)."""
        self._engine.check(request)

    def __call__(self, request: Request) -> Int[Tensor, " n"]:
        """The whole result; the next requests are decoded in the same batch.

        Raises:
            ValueError: the request fails, with the reason.
        """
        if request not in self._results:
            started = time.perf_counter()
            others = [each for each in self._owner.upcoming if each is not request and each not in self._results]
            self._decode([request, *others][: self._engine.batch_size])
            self._owner.uncounted_seconds += time.perf_counter() - started
        tokens, error = self._results.pop(request)
        if error is not None:
            raise ValueError(error)
        return tokens

    def _decode(self, requests: list[Request]) -> None:
        # The result to reproduce does not depend on stop strings or limits.
        of = {self._engine.submit(replace(each, stops=(), max_forwards=None)): each for each in requests}
        for step in self._engine.steps():
            for event in step:
                if event.answer is not None:
                    tokens = torch.from_numpy(step.tokens[event.entry, step.padding[event.entry] :])
                    self._results[of[event.id]] = tokens.to(self._engine.lm.device), event.answer.error
