"""Runs the requests of an evaluation with one setting, records each answer when finished, and times baselines."""

from __future__ import annotations

import platform
import re
import shutil
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import count, islice
from pathlib import Path
from secrets import token_hex
from typing import Any, TypedDict

import numpy as np

from dllm.api import prepare
from dllm.cache import NoCache
from dllm.cache.base import Cache
from dllm.checks import Notice
from dllm.decoding import request as decoding
from dllm.decoding.engine import Engine
from dllm.decoding.options import eos_ids, parse_options
from dllm.evaluation.journal import Journal
from dllm.evaluation.likelihood import Estimate, is_greedy, loglikelihood
from dllm.evaluation.records import Query, Record, follow
from dllm.evaluation.trace import Frames, Trace
from dllm.files import disturbed
from dllm.identity import Stamp, check_weights
from dllm.models.loading import LanguageModel
from dllm.samplers import Vanilla
from dllm.samplers.base import Sampler
from dllm.stored import folder_there, misfit, there


class Baseline(TypedDict):
    """Cost of requests decoded one token per step."""

    ids: list[str]
    tokens: int
    seconds: float
    nfe: int


# One token per step, without (as in papers) and with stopping at end-of-text.
BASELINES = {"naive": False, "eos_aware": True}
_FRAMES = "frames"  # folder
# Types of the journal's entries, by kind; "film" is the trace of one answer.
_SHAPES = {"record": Record, "film": str, "baseline": Baseline, "likelihood": tuple[float, bool], "session": str}
_WARM_UP = 2  # untimed steps


@dataclass(frozen=True)
class Setting:
    """The evaluated setting.

    Attributes:
        lm: a loaded model.
        sampler: the policy.
        cache: the cache.
        options: fields of `dllm.Options` except the seed, which is per request.
        estimate: estimator of log-likelihoods.
    """

    lm: LanguageModel
    sampler: Sampler
    cache: Cache
    options: Mapping[str, Any]
    estimate: Estimate = Estimate()  # noqa: RUF009  # frozen


class RefusedError(ValueError):
    """A sampler, a cache and options that do not go together, or cannot answer a request."""


@contextmanager
def refusals() -> Iterator[None]:
    """Tell errors of what is asked for from those of files."""
    try:
        yield
    except ValueError as error:
        raise RefusedError(str(error)) from error


class Runner:
    """Answers requests with a setting, and resumes an interrupted run.

    Times of different processes are never compared: baselines are timed by the process that answers the requests.

    Args:
        setting: sampler, cache and options.
        journal: records every answer.
        baselines: number of first batches that are also decoded one token per step, in alternation.
        traced: number of first answers whose steps are recorded.
        progress: called with the number of finished and of all requests so far.
        read: stamps of the files that sampler and cache read.
        asked: called before the first request is answered.
    """

    def __init__(
        self,
        setting: Setting,
        journal: Journal,
        baselines: int = 0,
        traced: int = 0,
        progress: Callable[[int, int], object] = lambda done, total: None,
        read: Sequence[Stamp] = (),
        asked: Callable[[], object] = lambda: None,
    ) -> None:
        self.setting, self.journal, self.baselines, self.traced = setting, journal, baselines, traced
        self._progress, self._asked, self._session, self._read = progress, 0, "", read
        self._check_asked = asked
        self._ids: list[str] = []
        self._traced: frozenset[str] = frozenset()
        self._traces = None if journal.path is None else journal.path.parent / _FRAMES
        try:
            if self._traces is not None:
                folder_there(self._traces)
            for kind, name in journal.keys:
                if wrong := self._misfit(kind, name, journal.get(kind, name)):
                    raise journal.damage(kind, name, wrong)
        except ValueError:
            journal.close()
            raise

    @property
    def lm(self) -> LanguageModel:
        """The model."""
        return self.setting.lm

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """End-of-text ids."""
        return eos_ids(self.setting.options.get("eos_token_id"), self.lm)

    @property
    def answers(self) -> int:
        """How many answers and likelihoods there are, with those of earlier sessions."""
        return len(self.journal.of("record")) + len(self.journal.of("likelihood"))

    def answer(self, requests: Sequence[Query], **options: Any) -> list[Record]:
        """Answer requests; those in the journal are not decoded again.

        Args:
            requests: with ids that are unique in the run.
            **options: fields of `dllm.Options` that override the setting's.

        Raises:
            ValueError: an id that occurs twice.
        """
        counts = Counter(request.id for request in requests)
        if repeated := [name for name, count in counts.items() if count > 1]:
            raise ValueError(f"id {repeated[0]!r} occurs twice among the problems; make ids unique")
        room = max(0, self.traced - len(self._ids))
        self._traced |= frozenset(request.id for request in requests[:room])
        first = not self._ids
        self._ask(len(requests))
        self._ids += [request.id for request in requests]
        options = {**self.setting.options, **options}
        size = parse_options(options).batch_size
        # The first batches of a run are decoded separately, like those of the baselines.
        shared = min(self.baselines * size, len(requests)) if first else 0
        for start in range(0, shared, size):
            batch = requests[start : start + size]
            if left := self._left(batch):
                self._begin_session(left[:1], options)
                for name, stop in BASELINES.items():
                    self._baseline(name, left, {**options, "stop_at_eos": stop})
            self._decode(batch, options)
        self._decode(requests[shared:], options)
        return [self._noted(request.id) for request in requests]

    def score(self, name: str, prefix: Sequence[int], target: Sequence[int], greedy: bool) -> tuple[float, bool]:
        """Log-likelihood of a target after a prefix, in nats, and whether greedy decoding gives it.

        Args:
            name: unique within the run.
            prefix: token ids.
            target: token ids.
            greedy: check greedy decoding; otherwise False is returned.
        """
        self._ask(1)
        if (noted := self.journal.get("likelihood", name)) is None:
            lm, estimate = self.lm, self._estimate()
            value = loglikelihood(lm, prefix, target, estimate)
            noted = [value, greedy and is_greedy(lm, prefix, target, estimate.cfg_scale, estimate.block_length)]
            self._note("likelihood", name, noted)
            self._tell()
        return noted[0], noted[1]

    def _estimate(self) -> Estimate:
        """The setting's estimate; where attention is causal over blocks, in the blocks that are decoded."""
        estimate, wanted = self.setting.estimate, self.setting.options.get("block_length")
        if estimate.block_length is None and isinstance(wanted, int) and self.lm.backbone.pattern is not None:
            return replace(estimate, block_length=wanted)
        return estimate

    def records(self) -> list[Record]:
        """All answers, in the order of the requests."""
        return [self._noted(name) for name in self._ids]

    def baseline(self, name: str) -> list[Baseline]:
        """Cost of a baseline per session, on the requests answered by the same session."""
        made, session = {}, ""
        for kind, key in self.journal.keys:
            session = key if kind == "session" else session
            made[kind, key] = session
        found: dict[str, Any] = {}
        for key, row in self.journal.of("baseline").items():
            session = made["baseline", key]
            if key.split()[0] == name and all(made.get(("record", each)) == session for each in row["ids"]):
                total = found.get(session)
                found[session] = row if total is None else {field: total[field] + row[field] for field in row}
        return list(found.values())

    def frames(self, records: Sequence[Record]) -> list[Frames]:
        """The recorded steps of some answers.

        Raises:
            OSError: another program removed some.
        """
        if self._traces is None:
            return []
        found, files = list[Frames](), self.journal.of("film")
        for record in (each for each in records if each.id in files):
            frames, file = self._load_trace(record), self._traces / files[record.id]
            if frames is not None:
                found.append(frames)
            elif not file.exists():
                raise disturbed(str(file), file, "; run the command again, which records these steps again")
            else:  # as after a change of the journal by hand
                told = f"{file} is damaged, or has the steps of another answer to {record.id!r}; they are left out"
                warnings.warn(told, Notice, stacklevel=1)
        return found

    def close(self, remove: bool = False) -> None:
        """Release the run; with `remove`, delete the files of an unfinished run."""
        self.journal.close()
        if remove and self.journal.path is not None:
            self.tidy(self.journal.path)

    @staticmethod
    def tidy(journal: Path) -> None:
        """Remove the files of an unfinished run: its journal and recorded steps."""
        shutil.rmtree(journal.parent / _FRAMES, ignore_errors=True)
        journal.unlink(missing_ok=True)

    def _decode(self, requests: Sequence[Query], options: Mapping[str, Any]) -> None:
        """Answer the requests without an answer."""
        left = self._left(requests)
        again = [request for request in requests if request.id in self._traced and self._lost_trace(request)]
        self._trace_again(again, options)
        if not left:
            return
        self._begin_session(left[:1], options)
        made = self._prepare(left, self.setting.sampler, self.setting.cache, options)
        for record, frames in follow(*made, left, self._traced):
            if frames is not None:
                self._keep(record, frames)
            self._note("record", record.id, asdict(record))
            self._tell()

    def _left(self, requests: Sequence[Query]) -> list[Query]:
        """The requests without an answer."""
        return [request for request in requests if self.journal.get("record", request.id) is None]

    def _baseline(self, name: str, requests: Sequence[Query], options: Mapping[str, Any]) -> None:
        if options.get("gen_length") == "auto":  # one token per step needs a length
            room = self.lm.backbone.max_length - max(len(request.prompt) for request in requests)
            options = {**options, "gen_length": min(room, max(request.length for request in requests))}
        made = self._prepare(requests, Vanilla(), NoCache(), options)
        for record in [record for record, _ in follow(*made, requests, frozenset())]:
            row = Baseline(ids=[record.id], tokens=record.tokens, seconds=record.seconds, nfe=record.nfe)
            self._note("baseline", f"{name} {self._session} {record.id}", row)

    def _prepare(
        self, requests: Sequence[Query], sampler: Any, cache: Any, options: Mapping[str, Any]
    ) -> tuple[list[decoding.Request], Engine]:
        """The requests, and an engine with these queued."""
        with refusals():
            seeded = parse_options({**options, "seed": [request.seed for request in requests]})
            return prepare(self.lm, [request.prompt for request in requests], sampler, cache, seeded)

    def _begin_session(self, requests: Sequence[Query], options: Mapping[str, Any]) -> None:
        """Warm up: the first forwards of a process, and loading by a policy, are not timed.

        Entries of the journal up to the next session were timed in this one.
        """
        if not self._session:
            _, engine = self._prepare(requests, self.setting.sampler, self.setting.cache, options)
            deque(islice(engine.steps(), _WARM_UP), maxlen=0)
            self._session = token_hex(4)
            self.journal.add("session", self._session, platform.node())

    def _keep(self, record: Record, frames: Frames) -> None:
        if self._traces is None:
            return
        noted = self.journal.get("film", record.id)  # after an interruption between trace and record
        taken = set(self.journal.of("film").values())
        free = (f"{number}.safetensors" for number in count())
        name = noted or next(each for each in free if each not in taken)
        self._save_trace(name, record, frames)
        if noted is None:
            self.journal.add("film", record.id, name)

    def _save_trace(self, name: str, record: Record, frames: Frames) -> None:
        assert self._traces is not None
        trace = Trace(
            ids=(record.id,),
            tokens=np.array([record.completion]),
            commit_step=np.array([record.commit_step]),
            confidence=np.array([record.confidence], dtype=np.float32),
            frames=(frames,),
            words={},
            mask_token_id=self.lm.backbone.mask_token_id,
            eos_token_ids=self.eos_token_ids,
        )
        trace.save(self._traces / name)

    def _load_trace(self, record: Record) -> Frames | None:
        """The recorded steps of an answer; None if the file is missing or damaged."""
        assert self._traces is not None
        file = self._traces / self.journal.get("film", record.id)
        there(file)
        try:
            trace = Trace.load(file)
            (frames,) = trace.frames
        except ValueError:
            return None
        tokens = [frames.canvas, frames.predicted, frames.drafted, frames.prompt]
        known = all(self._are_tokens(values.ravel().tolist()) for values in tokens)
        same = (trace.tokens.tolist(), trace.commit_step.tolist()) == ([record.completion], [record.commit_step])
        fits = same and frames.id == record.id and frames.canvas.shape[1] == len(record.completion)
        return frames if known and fits else None

    def _trace_again(self, requests: Sequence[Query], options: Mapping[str, Any]) -> None:
        """Record the steps of answers again; the answers are unchanged."""
        if requests:
            made = self._prepare(requests, self.setting.sampler, self.setting.cache, options)
            for record, frames in follow(*made, requests, self._traced):
                assert frames is not None
                self._keep(self._noted(record.id), frames)

    def _lost_trace(self, request: Query) -> bool:
        """Whether an answer exists whose recorded steps are missing or unreadable."""
        trace, record = (self.journal.get(kind, request.id) for kind in ("film", "record"))
        return (
            self._traces is not None
            and record is not None
            and (trace is None or self._load_trace(Record(**record)) is None)
        )

    def _are_tokens(self, ids: Sequence[int]) -> bool:
        return not ids or 0 <= min(ids) <= max(ids) < self.lm.backbone.logits_size

    def _misfit(self, kind: str, name: str, value: Any) -> str | None:
        """What is invalid in an entry of the journal."""
        if kind not in _SHAPES:
            return f"{kind!r} is not a kind of entry"
        if wrong := misfit(value, _SHAPES[kind], "value"):
            return wrong
        if kind == "film" and not re.fullmatch(r"\d+\.safetensors", value):
            return f"{value!r} is not a file of steps"
        if kind == "baseline" and not (min(value["seconds"], value["nfe"], value["tokens"]) > 0 and len(value["ids"])):
            return "a baseline without cost"
        if kind == "record":
            record = Record(**value)
            if record.id != name:
                return f"it is about {record.id!r}"
            if not self._are_tokens(record.completion):
                return "completion holds ids that are not tokens"
            return record.misfit()
        return None

    def _ask(self, count: int) -> None:
        if not self._asked:
            self._check_asked()
        self._asked += count

    def _note(self, kind: str, name: str, value: Any) -> None:
        """Record a result, after verifying that the model's files are unchanged."""
        check_weights(self.lm, self._read)
        self.journal.add(kind, name, value)

    def _noted(self, name: str) -> Record:
        return Record(**self.journal.get("record", name))

    def _tell(self) -> None:
        self._progress(self.answers, self._asked)
