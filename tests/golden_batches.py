"""Decodes recorded cases together that share checkpoint, sampler and cache: a row's result ignores its batchmates."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import dllm
from golden_plan import Plan


class Decoded(NamedTuple):
    """What is compared of a decode."""

    sequence: list[int]
    tokens: int
    nfe: int
    guide_nfe: int
    commit_step: list[int]


class Batches:
    """Cases that may be decoded together, and their results once one of them is asked for."""

    def __init__(self) -> None:
        self._members: dict[Any, dict[str, tuple[dict[str, Any], Plan]]] = {}
        self._results: dict[Any, dict[str, Decoded]] = {}

    def add(self, folder: Path, case: dict[str, Any], planned: Plan) -> int:
        """Note a case; return the number of its batch."""
        key = _key(folder, case, planned)
        self._members.setdefault(key, {})[case["id"]] = case, planned
        return list(self._members).index(key)

    @property
    def count(self) -> int:
        """The number of batches."""
        return len(self._members)

    def decode(self, folder: Path, case: dict[str, Any], planned: Plan) -> Decoded | None:
        """The result of a case beside the others of its batch; None if it has none."""
        key = _key(folder, case, planned)
        members = self._members.get(key, {})
        if case["id"] not in members:
            return None
        if key not in self._results:
            self._results[key] = _together(model(folder / case["checkpoint"]), list(members.values()))
        return self._results[key].get(case["id"])


@cache
def model(folder: Path) -> dllm.LanguageModel:
    """A checkpoint on the CPU."""
    return dllm.load(folder, device="cpu")


def alone(folder: Path, case: dict[str, Any], planned: Plan) -> Decoded:
    """Decode one case as the reference did: in a batch of one."""
    lm = model(folder / case["checkpoint"])
    return decoded(dllm.generate(lm, [case["prompt"]], planned.sampler, planned.cache, **planned.options))


def decoded(result: dllm.Generation) -> Decoded:
    """The only row of a result."""
    steps = result.commit_step[0].tolist()
    counts = result.stats.tokens, int(result.nfe[0]), int(result.guide_nfe[0])
    return Decoded(result.sequences[0].tolist(), *counts, steps)


def _key(folder: Path, case: dict[str, Any], planned: Plan) -> Any:
    try:  # a filter or a model within a sampler is like itself alone
        hash(sampler := planned.sampler)
    except TypeError:
        sampler = repr(planned.sampler)
    return folder, case["checkpoint"], sampler, repr(planned.cache), planned.options.get("cfg_scale", 0.0)


def _together(lm: dllm.LanguageModel, members: list[tuple[dict[str, Any], Plan]]) -> dict[str, Decoded]:
    if lm.backbone.pattern is not None:  # its blocks are the engine's, not a request's
        return {}
    sampler, kept, options = members[0][1]
    length = max(len(case["prompt"]) + planned.options["gen_length"] for case, planned in members)
    with dllm.Engine(
        lm, sampler, kept, batch_size=len(members), max_length=length, cfg_scale=options.get("cfg_scale", 0.0)
    ) as engine:
        for case, planned in members:
            engine.add(
                case["prompt"], **{name: value for name, value in planned.options.items() if name != "cfg_scale"}
            )
        answers = [answer for step in engine.steps() for answer in step.answers.values()]
    found = {}
    for answer in answers:
        case = members[answer.index][0]
        if answer.error is None:
            whole = [*case["prompt"], *answer.completion]
            found[case["id"]] = Decoded(whole, answer.tokens, answer.nfe, answer.guide_nfe, answer.commit_step)
    return found
