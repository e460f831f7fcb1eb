"""Rows with a response format are held to it: what is predicted for them, and what is written to them.

Before a sampler sees a prediction, tokens that cannot stand at a position are excluded from its distribution. Tokens of
one edit that may each stand there can still conflict, so masks are filled in the order of confidence, then tokens are
replaced, and what conflicts with what was written before is refused. (Two tokens could replace each other for ever as
long as the masks beside them are not filled.) Whatever writes tokens passes here. Every step of such a row commits a
token: if all are refused, the most confident prediction is, as the first one always fits.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from dllm.decoding.canvas import Canvas
from dllm.decoding.prediction import Prediction
from dllm.decoding.question import Question
from dllm.decoding.request import Request
from dllm.decoding.transfer import put
from dllm.decoding.window import Edit, Window
from dllm.structure import MASK, Constraint, Tracker


@dataclass(frozen=True)
class _Row:
    """A row that is held to a format.

    Attributes:
        constraint: the language.
        tracker: of its tokens in the canvas.
        first: column of the first token of the answer.
        silent: given tokens of the answer that write nothing.
        mask_token_id: id of [MASK].
    """

    constraint: Constraint
    tracker: Tracker
    first: int
    silent: NDArray[np.bool_]
    mask_token_id: int

    def classes(self, tokens: NDArray[np.int64]) -> NDArray[np.int64]:
        """Of the tokens of a canvas."""
        return self.constraint.read(tokens[self.first :], self.mask_token_id, self.silent)

    def on(self, tokens: NDArray[np.int64]) -> Tracker:
        """The tracker of a canvas that may be a draft."""
        classes = self.classes(tokens)
        return self.tracker if (classes == self.tracker.classes).all() else self.tracker.fork(classes)


@dataclass(frozen=True)
class _Host:
    """What the gate reads of an edit and of the prediction that it was made by, on the host."""

    columns: NDArray[np.int64]
    tokens: NDArray[np.int64]
    write: NDArray[np.bool_]
    end: NDArray[np.int64]
    grown: NDArray[np.int64]
    about: NDArray[np.int64]
    predicted: NDArray[np.int64]
    confidence: NDArray[np.float64]


class Gate:
    """Holds the rows of a canvas to their formats.

    Args:
        canvas: the rows.

    Attributes:
        seconds: wall time spent here since the last `take`.
        refused: tokens that were not written since then.
    """

    def __init__(self, canvas: Canvas) -> None:
        self._canvas, self._rows = canvas, dict[int, _Row]()
        self.seconds, self.refused = 0.0, 0

    @property
    def holds(self) -> bool:
        """Whether any row is held to a format."""
        return bool(self._rows)

    def exchange(self, entered: NDArray[np.int64]) -> None:
        """Begin with the rows that entered, and forget those that left."""
        canvas = self._canvas
        kept = set(canvas.rows.tolist()) - set(entered.tolist())
        self._rows = {row: own for row, own in self._rows.items() if row in kept}
        for row in entered.tolist():
            request = canvas.requests[row]
            if request is not None and request.constraint is not None:
                self._rows[row] = _row(request, request.constraint, int(canvas.padding[row]))

    def take(self) -> tuple[float, int]:
        """Wall time spent here and tokens refused since the last call."""
        taken = self.seconds, self.refused
        self.seconds, self.refused = 0.0, 0
        return taken

    def seen(self, window: Window) -> Window:
        """The window, through which samplers that go ahead in a step of their own pass the gate."""
        if not self._rows:
            return window
        started = time.perf_counter()
        for row, own in self._rows.items():
            own.tracker.read(own.classes(self._canvas.host[row]))
        self.seconds += time.perf_counter() - started
        return replace(window, permit=self._permit_view)

    def exclude(
        self,
        logits: Float[Tensor, "N V"],
        question: Question,
        asked: Bool[Tensor, "*B K"],
        columns: Int[Tensor, "*C K"],
    ) -> Float[Tensor, "N V"]:
        """The logits without tokens that cannot stand where they are predicted."""
        sequence = question.places[0]
        held = np.flatnonzero(np.isin(question.rows[sequence], list(self._rows))) if self._rows else np.zeros(0, int)
        if not held.size:
            return logits
        started = time.perf_counter()
        where = columns if columns.ndim == asked.ndim else columns[:, None]
        column = where.expand(asked.shape).flatten().cpu().numpy()[question.index[held]]  # synchronizes
        sequence = sequence[held]
        trackers = self._trackers(question, np.unique(sequence))
        rows = [self._rows[row] for row in question.rows[sequence].tolist()]
        for constraint in dict.fromkeys(row.constraint for row in rows):
            at = [number for number, row in enumerate(rows) if row.constraint is constraint]
            allowed = [
                trackers[int(sequence[number])].allowed(int(column[number]) - rows[number].first) for number in at
            ]
            logits = _excluded(logits, held[at], np.stack(allowed), constraint)
        self.seconds += time.perf_counter() - started
        return logits

    def _trackers(self, question: Question, sequences: NDArray[np.int64]) -> dict[int, Tracker]:
        """The tracker of each sequence; shadows and the first draft of a row are the canvas."""
        drafts = question.draft[sequences] > 0
        tokens = np.zeros(0)
        if question.attention != "shadow" and drafts.any():
            tokens = question.tokens[put(question.tokens.device, sequences)].cpu().numpy()  # synchronizes
        found = {}
        for place, (sequence, row) in enumerate(
            zip(sequences.tolist(), question.rows[sequences].tolist(), strict=True)
        ):
            own = self._rows[row]
            found[sequence] = own.on(tokens[place]) if tokens.size and drafts[place] else own.tracker
        return found

    def permit(self, window: Window, edit: Edit, last: tuple[Prediction, Tensor] | None) -> Edit:
        """The edit without what would leave the formats of its rows.

        Args:
            window: the rows.
            edit: of the sampler.
            last: the prediction that it was made by, and its columns.
        """
        started = time.perf_counter()
        permitted, refused = self._permitted(window, edit, last)
        self.refused += refused
        self.seconds += time.perf_counter() - started
        return permitted

    def _permit_view(self, window: Window, edit: Edit, prediction: Prediction) -> Edit:
        started = time.perf_counter()
        permitted, _ = self._permitted(window, edit, (prediction, window.columns))
        self.seconds += time.perf_counter() - started
        return permitted

    def _permitted(self, window: Window, edit: Edit, last: tuple[Prediction, Tensor] | None) -> tuple[Edit, int]:
        rows = window.rows.cpu().numpy()
        if not np.isin(rows, list(self._rows)).any():
            return edit, 0
        host, tokens = _on_host(edit, last, self._canvas.length), window.tokens.cpu().numpy()
        write, end, grown = host.write.copy(), host.end.copy(), host.grown.copy()
        extra = np.zeros((len(rows), 2), dtype=np.int64)  # column and token
        refused = 0
        for entry, row in enumerate(rows.tolist()):
            if row in self._rows:
                refused += _settle(self._rows[row], entry, tokens[entry], host, (write, end, grown, extra))
        if (write == host.write).all() and (end == host.end).all() and not extra.any():
            return edit, refused
        permitted = _changed(edit, write, end, extra, self._canvas.mask_token_id)
        return replace(permitted, grown=None if edit.grown is None else put(edit.grown.device, grown)), refused


def _row(request: Request, constraint: Constraint, padding: int) -> _Row:
    start = request.answer_start
    special = np.isin(request.tokens[start:], list(constraint.special))
    tracker = Tracker(constraint.automaton, len(request.tokens) - start)
    return _Row(constraint, tracker, padding + start, special & ~request.region[start:], request.mask_token_id)


def _excluded(
    logits: Float[Tensor, "N V"], at: NDArray[np.int64], allowed: NDArray[np.bool_], constraint: Constraint
) -> Float[Tensor, "N V"]:
    """The logits at some positions, without the tokens of classes that are not allowed there."""
    device = logits.device
    if device not in constraint.on_device:
        constraint.on_device[device] = put(device, constraint.classes)
    # A draft that is no text of the format keeps all tokens: what follows from it is refused.
    kept = put(device, allowed | ~allowed.any(1, keepdims=True))[:, constraint.on_device[device]]
    index = put(device, at)
    own = logits if len(at) == len(logits) else logits[index]
    # Logits that are not finite are reported as such.
    own = own.masked_fill(~(kept | ~own.amax(-1, keepdim=True).isfinite()), -torch.inf)
    return own if len(at) == len(logits) else logits.index_copy(0, index, own)


def _on_host(edit: Edit, last: tuple[Prediction, Tensor] | None, length: int) -> _Host:
    columns, tokens, write = (each.cpu().numpy() for each in (edit.columns, edit.tokens, edit.write))
    count = len(columns)
    end = np.full(count, length) if edit.end is None else edit.end.cpu().numpy()
    grown = np.zeros(count, dtype=np.int64) if edit.grown is None else edit.grown.cpu().numpy()
    if last is None:
        none = np.zeros((count, 0), dtype=np.int64)
        return _Host(columns, tokens, write, end, grown, none, none, none.astype(float))
    prediction, about = last
    known = prediction.tokens.cpu().numpy(), prediction.confidence.cpu().numpy()
    return _Host(columns, tokens, write, end, grown, about.expand(prediction.tokens.shape).cpu().numpy(), *known)


def _settle(
    own: _Row,
    entry: int,
    canvas: NDArray[np.int64],
    host: _Host,
    out: tuple[NDArray[np.bool_], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]],
) -> int:
    """Write to `out` what may be written to one row; returns the number of refused tokens."""
    write, end, grown, extra = out
    tracker = own.on(canvas)
    wanted = np.flatnonzero(host.write[entry])
    place = host.columns[entry, wanted] - own.first
    new = own.constraint.read(host.tokens[entry, wanted], own.mask_token_id, np.zeros(len(wanted), dtype=bool))
    beyond = np.arange(max(int(host.end[entry]) - own.first, 0), len(tracker.classes))
    confidence = np.full(len(canvas) + 1, -np.inf)
    np.maximum.at(confidence, host.about[entry], np.nan_to_num(host.confidence[entry], nan=-1.0))

    def fits(places: NDArray[np.int64], classes: NDArray[np.int64]) -> bool:
        row = tracker.classes.copy()
        row[places] = classes
        row[beyond] = own.constraint.end
        return tracker.fits(row)

    if fits(place, new):
        committed = bool((new != MASK).any()) or bool(beyond.size) or bool(grown[entry])
        refused = 0
    elif grown[entry]:  # what it inserts moves everything after it, so that no part of it can be kept
        write[entry], grown[entry] = False, 0
        committed, refused = False, int((new != MASK).sum())
    else:
        decided = tracker.classes[place] != MASK
        order = np.lexsort((place, -confidence[place + own.first], decided))
        order = order[new[order] != MASK]  # nothing is taken back where something is refused: so that the row goes on
        taken = tracker.accepted(place[order], new[order])
        refused = int((~taken).sum())
        write[entry, wanted] = False
        write[entry, wanted[order[taken]]] = True
        if refused or not fits(place[order], new[order]):
            end[entry] = len(canvas)
        committed = bool(taken.any())
    if not committed:
        extra[entry] = _best(own, tracker, host, entry)
    return refused


def _best(own: _Row, tracker: Tracker, host: _Host, entry: int) -> tuple[int, int]:
    """Column and token of the most confident prediction for a mask that fits; zeros where nothing was predicted."""
    confidence, about = host.confidence[entry], host.about[entry]
    asked = np.flatnonzero((confidence > -np.inf) & (about >= own.first))
    asked = asked[tracker.classes[about[asked] - own.first] == MASK]
    for number in asked[np.lexsort((about[asked], -confidence[asked]))].tolist():
        token = host.predicted[entry, number : number + 1]
        new = own.constraint.read(token, own.mask_token_id, np.zeros(1, dtype=bool))
        if tracker.accepted(about[number : number + 1] - own.first, new)[0]:
            return int(about[number]), int(token[0])
    return 0, 0


def _changed(
    edit: Edit, write: NDArray[np.bool_], end: NDArray[np.int64], extra: NDArray[np.int64], mask_token_id: int
) -> Edit:
    """The edit with other writes and ends, and with one more token in some rows."""
    device, more = edit.columns.device, np.asarray(extra.any(1))
    edit = replace(edit, write=put(device, write), end=None if edit.end is None else put(device, end))
    if not more.any():
        return edit
    column, token, adds = (put(device, each)[:, None] for each in (extra[:, 0], extra[:, 1], more))
    drafted = edit.drafted
    if drafted is not None:
        drafted = torch.cat((drafted, torch.where(adds, mask_token_id, drafted[:, :1])), dim=1)
    return replace(
        edit,
        columns=torch.cat((edit.columns, torch.where(adds, column, edit.columns[:, :1])), dim=1),
        tokens=torch.cat((edit.tokens, token), dim=1),
        write=torch.cat((edit.write, adds), dim=1),
        drafted=drafted,
    )
