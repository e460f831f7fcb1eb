"""A sweep: its finished runs by model and task, and its failed runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from dllm.reports.frontier import front
from dllm.samplers.base import KINDS


@dataclass(frozen=True)
class MeasuredRun:
    """One finished run.

    Attributes:
        folder: of its files.
        place: the same, relative to the sweep's folder.
        label: display name of the setting.
        model: its name.
        task: its name.
        settings: of the sampler, the cache, the generation, the task and the model, and where it ran, flat:
            sampler.name, cache.name, options.gen_length, asked.limit, loading.dtype, session.device.
        metrics: from results.json.
        quality_name: the score that measures quality.
        quality: that score; None if not measured.
        interval: 95% confidence interval of the score; None without one.
        kind: of the policy (`dllm.samplers.base.KINDS`).
    """

    folder: Path
    place: str
    label: str
    model: str
    task: str
    settings: dict[str, Any]
    metrics: dict[str, Any]
    quality_name: str
    quality: float | None
    interval: tuple[float, float] | None
    kind: str

    @property
    def sampler(self) -> str:
        """The sampler's name."""
        return str(self.settings["sampler.name"])

    @property
    def cache(self) -> str:
        """The cache's name."""
        return str(self.settings["cache.name"])

    @property
    def reference(self) -> bool:
        """Whether it is the oracle's: a reference that knows the result, not a method."""
        return self.sampler == "oracle"

    @property
    def trace(self) -> Path | None:
        """Its trace; None without one."""
        path = self.folder / "trace.safetensors"
        return path if path.is_file() else None

    def number(self, *path: str) -> float | None:
        """A metric by its path in results.json; None if not measured."""
        value: Any = self.metrics
        for name in path:
            value = value.get(name) if isinstance(value, Mapping) else None
        return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None


@dataclass(frozen=True)
class Group:
    """The runs of one model on one task, sorted by quality.

    Attributes:
        model: its name.
        task: its name.
        runs: all of them.
    """

    model: str
    task: str
    runs: tuple[MeasuredRun, ...]

    @property
    def title(self) -> str:
        """Model and task."""
        return f"{self.model}, {self.task}"

    @cached_property
    def kinds(self) -> list[str]:
        """The kinds of its policies."""
        return ordered({run.kind for run in self.runs})

    @cached_property
    def judged_by(self) -> list[str]:
        """The names of its runs' scores: only runs with the same one are compared."""
        return sorted({run.quality_name for run in self.runs})

    @cached_property
    def nfe_front(self) -> list[MeasuredRun]:
        """The Pareto front of quality and NFE, by increasing NFE."""
        return self._front("nfe", 1)

    @cached_property
    def speed_front(self) -> list[MeasuredRun]:
        """The Pareto front of quality and tokens per second, by decreasing speed."""
        return self._front("tokens_per_second", -1)

    def measured(self, cost: str) -> list[tuple[MeasuredRun, float, float]]:
        """Runs with both this metric and quality, with their values."""
        found = ((run, run.number(cost), run.quality) for run in self.runs)
        return [(run, value, quality) for run, value, quality in found if value is not None and quality is not None]

    def _front(self, cost: str, sign: int) -> list[MeasuredRun]:
        found = []
        for name in self.judged_by:
            methods = [each for each in self.measured(cost) if not each[0].reference and each[0].quality_name == name]
            found += [methods[index][0] for index in front([(sign * value, quality) for _, value, quality in methods])]
        return found


def ordered(kinds: Iterable[str]) -> list[str]:
    """Kinds of policies in the order of `KINDS`, further ones last."""
    return sorted(kinds, key=lambda kind: (KINDS.index(kind) if kind in KINDS else len(KINDS), kind))


@dataclass(frozen=True)
class Failure:
    """A failed run.

    Attributes:
        label: display name of the setting.
        message: the error.
    """

    label: str
    message: str


@dataclass(frozen=True)
class Sweep:
    """All runs below one folder.

    Attributes:
        name: of the folder.
        groups: finished runs, by model and task.
        failures: failed runs.
    """

    name: str
    groups: tuple[Group, ...]
    failures: tuple[Failure, ...]
