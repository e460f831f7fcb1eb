"""The trace of a call of `dllm.generate`, step by step: a callback.

recording = Recording(lm)
dllm.generate(lm, prompts, "threshold", callback=recording)
recording.trace()               # a table in a notebook; .save(path) for `dllm show`
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from dllm.decoding.result import padded
from dllm.decoding.step import Answer, Event, Step
from dllm.evaluation.records import Notes, Query
from dllm.evaluation.trace import Frames, Trace, words_of
from dllm.models.loading import LanguageModel


class Recording:
    """Collects the steps of every answer that is finished; those of failed requests are left out.

    Given to another call, it begins anew.

    Args:
        lm: the model that decodes.
    """

    def __init__(self, lm: LanguageModel) -> None:
        self._lm = lm
        self._nfe: dict[int, int] = {}
        self._notes: dict[int, Notes] = {}
        self._ends: dict[int, tuple[int, ...]] = {}
        self._done: dict[int, tuple[Answer, list[float | None], Frames]] = {}

    def __call__(self, step: Step) -> None:
        """Record a step."""
        before = step.nfe - step.forwards
        if any(self._nfe.get(event.id, 0) != before[event.entry] for event in step):  # of another call
            self._nfe, self._notes, self._ends, self._done = {}, {}, {}, {}
        self._nfe |= {event.id: int(step.nfe[event.entry]) for event in step}
        sure = np.where(step.tokens == step.predicted, step.confidence, np.nan)
        for event in step:
            note, own = self._notes.setdefault(event.id, Notes()), slice(int(step.padding[event.entry]), None)
            note.confidence(step, event.entry, own, sure)
            note.trace(step, event.entry, own, 0)
            if event.answer is not None:
                self._finish(event, event.answer, step)

    def trace(self) -> Trace:
        """The trace of what is finished, in the order of the prompts.

        Raises:
            ValueError: nothing is.
        """
        if not self._done:
            raise ValueError("nothing is recorded; give this object as callback= to dllm.generate first")
        numbers = sorted(self._done)
        answers, confidence, frames = zip(*(self._done[number] for number in numbers), strict=True)
        ends = self._ends[numbers[0]]
        lengths = tuple(len(answer.completion) for answer in answers)
        mask = self._lm.backbone.mask_token_id
        return Trace(
            ids=tuple(map(str, numbers)),
            tokens=padded([answer.completion for answer in answers], ends[0]),
            commit_step=padded([answer.commit_step for answer in answers], -1),
            confidence=padded(confidence, np.nan, np.float32),
            frames=frames,
            words=words_of(self._lm.tokenizer, [answer.completion for answer in answers], frames, mask),
            mask_token_id=mask,
            eos_token_ids=ends,
            lengths=lengths if len(set(lengths)) > 1 else (),
        )

    def _finish(self, event: Event, answer: Answer, step: Step) -> None:
        note = self._notes.pop(event.id)
        prompt = answer.canvas - len(answer.completion)
        row = step.tokens[event.entry, int(step.padding[event.entry]) :]
        frames = note.frames(Query(str(event.id), row[:prompt].tolist()))
        if answer.error is not None or frames is None:
            return
        cut = {name: getattr(frames, name)[:, prompt:] for name in ("canvas", "predicted", "confidence", "drafted")}
        self._ends[event.id] = step.vocabulary(event.entry).eos_token_ids
        self._done[event.id] = answer, note.confidences(len(answer.completion)), replace(frames, **cut)
