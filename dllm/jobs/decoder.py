"""Decoding the rows of a job with one model: what the one process does, and every actor of Ray."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from dllm import identity
from dllm.cache.base import Cache
from dllm.checks import SEEDS, renamed
from dllm.decoding.engine import Engine
from dllm.decoding.options import Options, make_request
from dllm.decoding.prompts import encode_one
from dllm.decoding.request import Request
from dllm.decoding.step import Step
from dllm.evaluation.answer_manifest import identify
from dllm.jobs.rows import Row
from dllm.jobs.shard import Result
from dllm.models.loading import LanguageModel
from dllm.samplers.base import Sampler

_ROUND = 64  # the engine's length is a multiple of this, so that few rows need a longer one


@dataclass(frozen=True)
class Setting:
    """What decodes the rows: it can be sent to other processes.

    Attributes:
        load: loads the model.
        sampler: the policy.
        cache: the cache.
        options: of decoding; `seed` is the base of the rows' seeds.
        chat: send plain text as a user message.
        infill: fill the masks of each prompt.
        check: rejects a model by its identity, before any decoding.
        files: hashes of the files that sampler and cache read, by path; None not to compare them.
    """

    load: Callable[[], LanguageModel]
    sampler: Sampler
    cache: Cache
    options: Options
    chat: bool = False
    infill: bool = False
    check: Callable[[dict[str, Any]], None] | None = None
    files: Mapping[str, str] | None = None


def row_seed(seed: int, id: str | int) -> int:  # named like the column
    """The seed of a row: the first 64 bits of SHA-256 of ``[seed, "id"]`` as JSON, modulo 2^62.

    Args:
        seed: of the job.
        id: of the row; a number is taken as text.
    """
    return int.from_bytes(hashlib.sha256(json.dumps([seed, str(id)]).encode()).digest()[:8]) % SEEDS


class Decoder:
    """A loaded model that decodes rows.

    Args:
        setting: the model, and how to decode.
        batch_size: rows decoded together.

    Attributes:
        model: identity of the model.

    Raises:
        ValueError: the model cannot be loaded or is rejected, or the options do not fit it.
        OSError: a file that the sampler or the cache reads is another one.
    """

    def __init__(self, setting: Setting, batch_size: int) -> None:
        self._setting = setting
        self._read = identity.stamps_read_by(setting.sampler, setting.cache)
        if setting.files is not None:
            identity.check_read(setting.files, setting.sampler, setting.cache)
        self.lm = setting.load()
        self.model = identify(self.lm)
        if setting.check is not None:
            setting.check(self.model)
        self._options = replace(setting.options, batch_size=batch_size)
        given = self._options.block_length if isinstance(self._options.block_length, int) else None
        self._pattern = self.lm.backbone.pattern_of(given)
        self._block_length = None if self._pattern is None else given
        if self.lm.tokenizer is None:
            raise ValueError("this model has no tokenizer, which a job needs; use a checkpoint with one")
        self._refuse_options()

    def decode(self, rows: Iterable[Row]) -> Iterator[Result]:
        """Decode rows, each yielded when it is finished; one that fails has an error.

        Raises:
            OSError: the weights were changed.
            RuntimeError: the sampler broke its contract, or memory is short.
        """
        running: dict[int, Row] = {}
        for row in rows:
            try:
                request = self._request(row)
                if len(request.tokens) > self._engine.max_length:
                    while running:
                        yield from self._step(running)
                    self._open(len(request.tokens))
                running[self._engine.submit(request)] = row
            except ValueError as error:
                yield _failed(row, str(error))
            # As many rows wait as may leave in one step.
            while len(running) >= 2 * self._options.batch_size:
                yield from self._step(running)
        while running:
            yield from self._step(running)

    def _step(self, running: dict[int, Row]) -> Iterator[Result]:
        step = self._engine.step()
        answers = step.answers if isinstance(step, Step) else {}
        if answers:
            identity.check_weights(self.lm, self._read)
        for name, answer in sorted(answers.items()):
            row = running.pop(name)
            if answer.error is not None:
                yield replace(_failed(row, answer.error), nfe=answer.nfe, guide_nfe=answer.guide_nfe)
            else:
                yield Result(row.number, row.id, answer.text, answer.tokens, answer.nfe, answer.guide_nfe)

    def _open(self, length: int) -> None:
        """Make an engine for rows of this length."""
        engine: Engine | None = getattr(self, "_engine", None)
        if engine is not None:
            engine.close()
        self._engine = Engine(
            self.lm, self._setting.sampler, self._setting.cache, batch_size=self._options.batch_size,
            max_length=min(-(-length // _ROUND) * _ROUND, self.lm.backbone.max_length),
            cfg_scale=self._options.cfg_scale, cuda_graphs=self._options.cuda_graphs, block_length=self._block_length,
        )  # fmt: skip

    def _request(self, row: Row) -> Request:
        if row.error is not None:
            raise ValueError(row.error)
        prompt: Any = row.prompt
        if self._setting.chat and isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        assert isinstance(self._options.seed, int)
        return self._made(prompt, row_seed(self._options.seed, row.id), self._setting.infill)

    def _made(self, prompt: Any, seed: int, infill: bool) -> Request:
        ids = encode_one(prompt, self.lm.tokenizer)
        return make_request(self.lm, ids, self._options, seed, infill, "prompt", self._pattern)

    def _refuse_options(self) -> None:
        """Reject options that no row would fit."""
        if self._setting.infill:  # what a sampler refuses depends on the masks
            mask = self.lm.backbone.mask_token_id
            request = make_request(self.lm, [mask], self._options, 0, True, "prompt", self._pattern)
            self._open(len(request.tokens))
        else:
            request = self._made("a", 0, False)
            self._open(len(request.tokens))
            self._engine.check(request)


def _failed(row: Row, error: str) -> Result:
    said = renamed(error, {"dtype": "model.dtype"})
    return Result(row.number, row.id, error=said.encode("utf-8", "replace").decode())
