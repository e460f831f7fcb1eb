"""A run, checked as far as it can be before the first forward, and its ways to be carried out."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NoReturn, TypeAlias

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from dllm import compatibility
from dllm.cache.base import Cache
from dllm.canvas import Canvas
from dllm.checks import choice, is_text, known, number, seed
from dllm.ending import StopStrings, cut
from dllm.engine import decode
from dllm.generation import Clock, Generation, Recorder, assemble
from dllm.loading import LanguageModel
from dllm.prediction import Sampling
from dllm.prompts import entries
from dllm.resolve import resolve
from dllm.samplers.base import Sampler
from dllm.step import Step

Callback: TypeAlias = Callable[[Step], None]
_MOST_ROWS = 1024  # on one canvas, which has so much on the host for every row; more come to the next


@dataclass(frozen=True)
class Options:
    """Everything about a run but its model, prompts, sampler and cache.

    Attributes:
        gen_length: positions G to generate per prompt; unused by `infill`.
        block_length: columns K decoded at a time, left to right; None for all at once. The last
            block is shorter where K does not divide G.
        temperature: 0 is greedy; above, Gumbel-max sampling.
        top_p: nucleus; None for all tokens.
        top_k: tokens considered; None for all.
        tempered_confidence: above temperature 0, take confidence, margin and entropy from the distribution that tokens
            are drawn from, softmax(logits / temperature), instead of softmax(logits); None for what the published
            sampler of the model does: Dream's the former, LLaDA's the latter.
        cfg_scale: classifier-free guidance against the masked prompt (LLaDA's convention:
            0 is off); two forwards' work, counted as one.
        seed: row i draws from seed + i; a sequence gives each row its own; None draws the seed itself.
        stop_at_eos: finish a row once everything up to its first end-of-text is decoded; the text
            up to there is the same either way (where `freedave` draws: of the same distribution).
        eos_token_id: id or ids that end a text; None for the backbone's.
        stop: string or strings that end a text, which then ends before them; a row is finished once everything up to
            one is decoded, and the text is the same as if decoding had gone on. Special tokens are written as the
            tokenizer writes them. None for none.
        eos_suppression: None, "logits" (never predict the token that fills canvases), "confidence"
            (commit what ends a text last) or "both".
        batch_size: rows decoded together; a row that is finished is replaced at once by one that waits.
        cuda_graphs: replay forwards over few columns from CUDA graphs, which spares launching their kernels one
            by one; None does so wherever there is a CUDA device.

    Raises:
        ValueError: a value out of range.
    """

    gen_length: int = 128
    block_length: int | None = 32
    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    tempered_confidence: bool | None = None
    cfg_scale: float = 0.0
    seed: int | Sequence[int] | None = None
    stop_at_eos: bool = True
    eos_token_id: int | Sequence[int] | None = None
    stop: str | Sequence[str] | None = None
    eos_suppression: str | None = None
    batch_size: int = 8
    cuda_graphs: bool | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            object.__setattr__(self, name, _plain(name, value))
        number("gen_length", self.gen_length, "a whole number of at least 1", low=1, whole=True)
        if self.block_length is not None:
            number("block_length", self.block_length, "a whole number of at least 1, or null", low=1, whole=True)
        number("cfg_scale", self.cfg_scale, "0 (off) or a positive number", low=0, high=1e6)
        number("batch_size", self.batch_size, "a whole number of at least 1", low=1, whole=True)
        if self.seed is not None:
            if isinstance(self.seed, (int, float, str)):
                seed("seed", self.seed, use=", or null")
            elif not isinstance(self.seed, (Sequence, np.ndarray)):
                raise ValueError(f"seed={self.seed!r} is of the wrong kind; give a whole number, a list, or null")
            else:
                for each in self.seed:
                    use = "a whole number from 0 to 2**63 - 1, or null"
                    number("seed", each, use, low=0, high=2**63 - 1, whole=True)
        choice("stop_at_eos", self.stop_at_eos, (True, False))
        choice("tempered_confidence", self.tempered_confidence, (True, False, None))
        choice("cuda_graphs", self.cuda_graphs, (True, False, None))
        _stop_strings(self.stop)
        # The rest is checked where it is used; this refuses bad values before a model is there.
        Sampling(self.temperature, self.top_p, self.top_k, self.eos_suppression)


@dataclass(frozen=True)
class Answer:
    """One finished row of `dllm.as_completed`.

    Attributes:
        index: number of its prompt.
        text: decoded completion before end-of-text or a stop string, of infilling the whole; None without a
            tokenizer, and of a row that failed.
        completion: (G,) the generated region, of infilling the whole row; of a row that failed as far as it came,
            [MASK] elsewhere.
        tokens: generated tokens up to and including what ends the text; of infilling the former masks.
        nfe: denoiser forwards.
        guide_nfe: guide forwards, for policies that have one.
        error: why the row failed; None where it did not.
    """

    index: int
    text: str | None
    completion: list[int]
    tokens: int
    nfe: int
    guide_nfe: int
    error: str | None = None


class Plan:
    """What is to be decoded and how.

    Args:
        lm: a loaded model.
        ids: token ids of each prompt, or of each text with masks.
        sampler: a name of conf/sampler or an object.
        cache: a name of conf/cache or an object.
        options: the rest.
        infill: masks stand in `ids` already.

    Raises:
        ValueError: an unknown name, a sampler and cache that do not go together, or a prompt that does not fit the
            model.
    """

    def __init__(
        self,
        lm: LanguageModel,
        ids: list[list[int]],
        sampler: str | Sampler,
        cache: str | Cache,
        options: Options,
        infill: bool,
    ) -> None:
        self.lm, self.options, self.infill = lm, options, infill
        self.sampler: Sampler = resolve("sampler", sampler, Sampler)
        self.cache: Cache = resolve("cache", cache, Cache)
        compatibility.check(self.sampler, self.cache, options.cfg_scale, lm.backbone, options.cuda_graphs)
        if options.cuda_graphs and lm.device.type != "cuda":
            raise ValueError(f"cuda_graphs=true needs a CUDA device, and the model is on {lm.device}; use null")
        self.eos_token_ids = eos_ids(options.eos_token_id, lm)
        self.stops = _stop_strings(options.stop)
        if self.stops and lm.tokenizer is None:
            raise ValueError(f"stop={options.stop!r} needs a tokenizer, and this model has none; use eos_token_id")
        tempered = options.tempered_confidence
        if tempered is not None and options.temperature == 0:
            told = f"tempered_confidence={str(tempered).lower()} has no effect at temperature=0"
            raise ValueError(f"{told}; set temperature, or leave it out")
        self.sampling = Sampling(
            options.temperature, options.top_p, options.top_k, options.eos_suppression, self.eos_token_ids,
            lm.backbone.tempered_confidence if tempered is None else tempered,
        )  # fmt: skip
        mask = lm.backbone.mask_token_id
        for place, row in enumerate(ids):
            self._check(place, row, mask)
        self.sequences = ids if infill else [[*row, *[mask] * options.gen_length] for row in ids]
        self.seeds = _seeds(options.seed, len(ids))
        self.recorders: list[Recorder] = []

    def steps(self, partial: bool = False) -> Iterator[tuple[Recorder, Step]]:
        """Decode everything, `batch_size` rows at a time, each row that is finished making room for the next.

        Args:
            partial: go on without the rows that fail, as `Recorder.canvas.errors` tells.

        Raises:
            ValueError: a row fails, and the rest is of no use without it.
        """
        self.recorders = []
        for start in range(0, len(self.sequences), _MOST_ROWS):
            recorder = Recorder(self._canvas(start, start + _MOST_ROWS))
            self.recorders.append(recorder)
            for step in decode(
                self.lm.backbone, recorder.canvas, self.sampler, self.cache, self.sampling, self.options.cfg_scale,
                self.lm.tokenizer, self.options.cuda_graphs,
            ):  # fmt: skip
                recorder.update(step)
                if step.change.failed.size and not partial:
                    self._refuse()
                yield recorder, step

    def answers(self, callback: Callback | None) -> Iterator[Answer]:
        """Decode everything, row by row as they finish."""
        for recorder, step in self.steps(partial=True):
            if callback is not None:
                callback(step)
            canvas = recorder.canvas
            for row in sorted((*step.change.finished, *step.change.failed)):
                error = canvas.errors.get(row)
                if self.infill:
                    completion = canvas.host[row, canvas.padding[row] :]
                    text, tokens = cut(self.lm.tokenizer, completion)[0], int(canvas.region[row].sum())
                else:
                    completion = canvas.host[row, -self.options.gen_length :]
                    text, tokens = cut(self.lm.tokenizer, completion, self.stops, canvas.eos_token_ids)
                yield Answer(
                    index=(len(self.recorders) - 1) * _MOST_ROWS + int(row),
                    text=text if error is None else None,
                    completion=completion.tolist(),
                    tokens=tokens if error is None else 0,
                    nfe=int(recorder.nfe[row]),
                    guide_nfe=int(recorder.guide_nfe[row]),
                    error=error,
                )

    def run(self, callback: Callback | None, progress: bool) -> Generation:
        """Decode everything and join the results.

        Raises:
            ValueError: every row failed.
        """
        clock = Clock(self.lm.device)
        total = sum(row.count(self.lm.backbone.mask_token_id) for row in self.sequences)
        columns = TextColumn("decoding"), BarColumn(), MofNCompleteColumn(), TextColumn("tokens"), TimeElapsedColumn()
        with Progress(*columns) if progress else nullcontext() as bar:
            if bar:
                bar.add_task("decoding", total=total)
            for _, step in self.steps(partial=True):
                if callback is not None:
                    callback(step)
                if bar:
                    bar.advance(bar.task_ids[0], int(step.change.gained.sum()))
        self.check_answered()
        generated = None if self.infill else self.options.gen_length
        return assemble(self.recorders, generated, self.lm.tokenizer, clock, self.stops)

    def check_answered(self) -> None:
        """Refuse a result without any answer, once everything is decoded.

        Raises:
            ValueError: every row failed.
        """
        if sum(len(recorder.canvas.errors) for recorder in self.recorders) == len(self.sequences):
            self._refuse()

    def _refuse(self) -> NoReturn:
        errors = {
            number * _MOST_ROWS + row: error
            for number, recorder in enumerate(self.recorders)
            for row, error in recorder.canvas.errors.items()
        }
        first = min(errors)
        raise ValueError(f"prompts[{first}] has no answer: {errors[first]}")

    def _canvas(self, start: int, end: int) -> Canvas:
        block = self.options.block_length
        canvas = Canvas(
            self.sequences[start:end],
            self.lm.backbone.mask_token_id,
            self.eos_token_ids,
            block and min(block, self.lm.backbone.max_length),
            self.options.stop_at_eos,
            self.seeds[start:end],
            self.lm.device,
            self.options.batch_size,
        )
        if self.stops and self.lm.tokenizer is not None:
            canvas.stops = StopStrings(self.lm.tokenizer, self.stops, self.eos_token_ids, len(canvas.host))
        return canvas

    def _check(self, place: int, row: list[int], mask: int) -> None:
        vocabulary = self.lm.backbone.config.vocab_size
        wrong = next((token for token in row if not 0 <= token < vocabulary), None)
        if wrong is not None:
            raise ValueError(f"prompts[{place}] has token id {wrong}; this model's ids are 0 to {vocabulary - 1}")
        if not self.infill and mask in row:
            raise ValueError(f"prompts[{place}] contains [MASK]; use infill (infill=true) to fill masks within a text")
        if self.infill and mask not in row:
            raise ValueError(f"prompts[{place}] has no [MASK]; put one ({self._mask_name()}) for each token to fill in")
        room = self.lm.backbone.max_length - (0 if self.infill else self.options.gen_length)
        if len(row) > room:
            beside = "" if self.infill else f" beside gen_length={self.options.gen_length}"
            raise ValueError(
                f"prompts[{place}] has {len(row)} tokens; the model's context of {self.lm.backbone.max_length} leaves "
                f"room for {max(0, room)}{beside}: shorten one of them"
            )

    def _mask_name(self) -> str:
        tokenizer = self.lm.tokenizer
        written = None if tokenizer is None else tokenizer.mask_token
        return f"id {self.lm.backbone.mask_token_id}" if written is None else str(written)


def eos_ids(eos: int | Sequence[int] | None, lm: LanguageModel) -> tuple[int, ...]:
    """The ids that end a text: those given, or the backbone's.

    Raises:
        ValueError: one that the model does not have.
    """
    if eos is None:
        return lm.backbone.eos_token_ids
    eos = _plain("eos_token_id", eos)
    ids = tuple(eos) if isinstance(eos, Sequence) and not isinstance(eos, str) else (eos,)
    most = lm.backbone.config.vocab_size - 1
    for token in ids or (None,):
        use = f"ids from 0 to {most}, or null for the model's own"
        number("eos_token_id", token, use, low=0, high=most, whole=True)
    if (mask := lm.backbone.mask_token_id) in ids:
        raise ValueError(f"eos_token_id={mask} is the id of [MASK], which is never generated; leave it out")
    return tuple(map(int, ids))


def _plain(name: str, value: Any) -> Any:
    """Arrays, tensors and their numbers as Python's own, which go into lists and JSON; the rest as it is."""
    return entries(name, value) if isinstance(value, (np.generic, np.ndarray, Tensor)) else value


def _stop_strings(stop: str | Sequence[str] | None) -> tuple[str, ...]:
    given: Any = () if stop is None else (stop,) if isinstance(stop, str) else stop
    if not isinstance(given, Sequence) or not all(isinstance(each, str) for each in given):
        raise ValueError(f"stop={stop!r} is of the wrong kind; give a string or a list of strings, or null for none")
    if not all(map(is_text, given)):
        raise ValueError(f"stop={stop!r} holds bytes that are no text; give UTF-8")
    if "" in given:
        raise ValueError(f"stop={stop!r} holds an empty string, which would end every text; leave it out")
    return tuple(given)


def _seeds(seed: int | Sequence[int] | None, rows: int) -> Sequence[int]:
    if seed is None:
        seed = random.randrange(2**31)
    if isinstance(seed, int):
        return range(seed, seed + rows)
    if len(seed) != rows:
        raise ValueError(f"seed has {len(seed)} entries for {rows} prompts; give one a prompt, or a single number")
    return [int(each) for each in seed]


def parse_options(options: dict[str, Any]) -> Options:
    """Make options of keyword arguments.

    Raises:
        ValueError: an unknown name, or a value out of range.
    """
    known(options, Options.__dataclass_fields__)
    return Options(**options)
