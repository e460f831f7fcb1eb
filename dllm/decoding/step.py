"""The record of one denoising step, which recorders, displays and traces consume."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, overload

import numpy as np
import torch
from jaxtyping import Bool, Int
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dllm.decoding import html
from dllm.decoding.drift import Measurement
from dllm.decoding.prediction import Prediction
from dllm.decoding.window import Change, Edit


@dataclass(frozen=True)
class Answer:
    """The result and the statistics of one request.

    Attributes:
        index: number of its prompt, or as returned by `Engine.add`.
        text: decoded completion before end-of-text or a stop string, for infilling the whole text; None without a
            tokenizer, and for a failed request.
        completion: (G,) the generated region, for infilling the whole row; for a failed request the tokens so far,
            [MASK] elsewhere.
        tokens: generated tokens up to and including the end of the text; for infilling the former masks.
        nfe: denoiser forwards.
        guide_nfe: guide forwards, for policies with one.
        error: why the request failed; None if it did not.
        commit_step: (G,) the row's forward, counted from 0, after which a position had its final token; -1 where
            an early end of the text filled it, or it is still masked.
        seconds: its share of the wall time: that of each step, divided by the number of rows.
        latency: wall time from its first step to its last.
        guide_seconds: its share of the guide's wall time, part of `seconds`.
        positions: computed positions.
        canvas: positions of prompt and generated region.
        full: positions of the canvas as it was in each forward, summed over the forwards.
        refreshes: forwards in which a cache recomputed every position.
        reused: positions whose keys and values came from earlier requests that begin alike.
    """

    index: int
    text: str | None
    completion: list[int]
    tokens: int
    nfe: int
    guide_nfe: int
    error: str | None
    commit_step: list[int]
    seconds: float
    latency: float
    guide_seconds: float
    positions: int
    canvas: int
    full: int
    refreshes: int
    reused: int = 0


@dataclass(frozen=True)
class Frame:
    """A request after one step, or all B of `dllm.stream`, with a leading dimension.

    Attributes:
        tokens: (L,) prompt and tokens decoded so far; [MASK] elsewhere. Left-padded for several requests.
        provisional: (L,) the tokens this step predicted but did not commit; [MASK] elsewhere.
        committed: (L,) True where this step committed a token.
        revoked: (L,) True where this step masked a token again.
        nfe: forwards so far.
        drift: approximation error of the cache, in measured forwards of this step.
        errors: why a request failed; None if it did not.
        vocabulary: how notebooks show the tokens; None for numbers.
    """

    tokens: Int[Tensor, "*B L"]
    provisional: Int[Tensor, "*B L"]
    committed: Bool[Tensor, "*B L"]
    revoked: Bool[Tensor, "*B L"]
    nfe: Int[Tensor, "*B"]
    drift: tuple[Measurement, ...] = ()
    errors: tuple[str | None, ...] = ()
    vocabulary: html.Vocabulary | None = field(default=None, repr=False, compare=False)

    def _repr_html_(self) -> str:
        return html.frame(self)


@dataclass(frozen=True)
class Event:
    """One step of one request.

    Attributes:
        id: of the request.
        answer: once it is finished; None before.
        step: the whole step.
        entry: index of the request in the step.
    """

    id: int
    answer: Answer | None
    step: Step
    entry: int

    @property
    def frame(self) -> Frame:
        """The request after the step, without padding."""
        step, own = self.step, (self.entry, slice(int(self.step.padding[self.entry]), None))
        return Frame(
            tokens=torch.from_numpy(step.tokens[own]),
            provisional=torch.from_numpy(step.provisional[own]),
            committed=torch.from_numpy(step.change.committed[own]),
            revoked=torch.from_numpy(step.change.revoked[own]),
            nfe=torch.from_numpy(step.nfe)[self.entry],
            drift=tuple(mine for each in step.drift if (mine := each.where(each.ids == self.id)).ids.size),
            errors=(None if self.answer is None else self.answer.error,),
            vocabulary=step.vocabulary(self.entry),
        )


@dataclass(frozen=True, eq=False)
class Step(Sequence[Event]):
    """One denoising step: an event for each of the B active requests, and their shared data.

    Immutable: it does not change as decoding continues.

    Attributes:
        ids: (B,) the requests.
        tokens: (B, L) the canvas after the step, left-padded.
        padding: (B,) number of padding columns.
        ends: (B, E) ids that end a request's text; -1 where it has fewer.
        mask_token_id: id of [MASK].
        change: what was committed, revoked and filled.
        edit: of the sampler.
        forwards: (B,) denoiser forwards in this step.
        nfe: (B,) denoiser forwards so far.
        computed: (B,) columns computed in this step.
        refreshes: (B,) forwards in which a cache recomputed every position.
        drift: approximation error of the cache, in measured forwards of this step.
        answers: of the requests that finished in this step, by id.
        slots: maximum number of rows of the engine.
        seconds: wall time of the step.
        uncounted_seconds: wall time of decoding in advance and of measuring without `refresh_above`; not part of
            `seconds`.
        last: the step's latest prediction and its columns; None without one.
        looked: the entries and columns, (A, L), that each forward computed.
        constraint_seconds: wall time of holding answers to their formats, part of `seconds`.
        constraint_refusals: tokens that were not written for that reason.
        tokenizer: of the model; None without one.
    """

    ids: NDArray[np.int64]
    tokens: NDArray[np.int64]
    padding: NDArray[np.int64]
    ends: NDArray[np.int64]
    mask_token_id: int
    change: Change
    edit: Edit
    forwards: NDArray[np.int64]
    nfe: NDArray[np.int64]
    computed: NDArray[np.int64]
    refreshes: NDArray[np.int64]
    drift: tuple[Measurement, ...]
    answers: dict[int, Answer]
    slots: int
    seconds: float
    uncounted_seconds: float
    last: tuple[Prediction, Tensor] | None
    looked: Sequence[tuple[NDArray[np.int64], NDArray[np.bool_]]]
    constraint_seconds: float = 0.0
    constraint_refusals: int = 0
    tokenizer: PreTrainedTokenizerBase | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @overload
    def __getitem__(self, entry: int) -> Event: ...
    @overload
    def __getitem__(self, entry: slice) -> list[Event]: ...
    def __getitem__(self, entry: int | slice) -> Event | list[Event]:
        if isinstance(entry, slice):
            return [self[each] for each in range(*entry.indices(len(self)))]
        entry = range(len(self))[entry]
        name = int(self.ids[entry])
        return Event(name, self.answers.get(name), self, entry)

    def __iter__(self) -> Iterator[Event]:
        return (self[entry] for entry in range(len(self)))

    @property
    def finished(self) -> int:
        """Number of requests that this step finished."""
        return len(self.change.finished)

    def vocabulary(self, entry: int) -> html.Vocabulary:
        """What the token ids of an entry mean."""
        ends = tuple(int(token) for token in self.ends[entry] if token >= 0)
        return html.Vocabulary(self.tokenizer, self.mask_token_id, ends)

    @cached_property
    def provisional(self) -> NDArray[np.int64]:
        """(B, L) tokens predicted in this step at masked positions; [MASK] elsewhere."""
        return np.where(self.tokens == self.mask_token_id, self.predicted, self.mask_token_id)

    @cached_property
    def predicted(self) -> NDArray[np.int64]:
        """(B, L) tokens of the latest prediction; [MASK] where not requested."""
        return self._spread(lambda prediction: prediction.tokens, self.mask_token_id)

    @cached_property
    def confidence(self) -> NDArray[np.float64]:
        """(B, L) probability of the predicted tokens; NaN where not requested."""
        return self._spread(lambda prediction: prediction.confidence, np.nan)

    @cached_property
    def drafted(self) -> NDArray[np.int64]:
        """(B, L) tokens that the sampler verified as drafts; [MASK] elsewhere."""
        drafted = np.full_like(self.tokens, self.mask_token_id)
        if self.edit.drafted is not None:
            np.put_along_axis(drafted, self.edit.columns.cpu().numpy(), self.edit.drafted.cpu().numpy(), 1)
        return drafted

    @cached_property
    def recomputed(self) -> NDArray[np.bool_]:
        """(B, L) columns computed by some forward of this step; the others were read from the cache."""
        computed = np.zeros(self.tokens.shape, dtype=bool)
        for entries, columns in self.looked:
            np.logical_or.at(computed, entries, columns)
        return computed

    def _spread(self, values: Callable[[Prediction], Tensor], fill: float) -> NDArray[Any]:
        """Values of the latest prediction, scattered to their columns."""
        out = np.full(self.tokens.shape, fill, dtype=type(fill))
        if self.last is not None:
            prediction, columns = self.last
            entry, k = np.nonzero(prediction.asked.cpu().numpy())
            out[entry, columns.cpu().numpy()[entry, k]] = values(prediction).cpu().numpy()[entry, k]
        return out
