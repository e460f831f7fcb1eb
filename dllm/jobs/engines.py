"""What computes a job: this process, or actors of Ray that hold one model each."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import Any, Protocol, TypeAlias, runtime_checkable

import pyarrow as pa

from dllm.checks import first_line, number
from dllm.jobs.decoder import Decoder, Setting
from dllm.jobs.rows import Row
from dllm.jobs.shard import Result

_INIT_DEATHS = 3  # of actors in a row while they load the model
_CONNECT_SECONDS = 10
Results: TypeAlias = tuple[dict[str, Any], list[Result]]


@runtime_checkable
class JobEngine(Protocol):
    """Decodes shards of rows.

    Attributes:
        shard_rows: rows of a shard.
        max_failures: failed rows after which the job stops; None for no limit.
    """

    shard_rows: int
    max_failures: int | None

    def run(self, setting: Setting, shards: Iterable[list[Row]]) -> Generator[Results, None, None]:
        """Decode, yielding results in any order, each with the identity of the model that made them.

        A row may come more than once: its results are equal.
        """
        ...


@dataclass(frozen=True)
class Local:
    """One process, this one.

    Args:
        shard_rows: rows of an output file: what a kill may lose.
        max_failures: failed rows after which the job stops; None for no limit.

    Raises:
        ValueError: a value out of range.
    """

    shard_rows: int = 256
    max_failures: int | None = None

    def __post_init__(self) -> None:
        _check_shared(self)

    def run(self, setting: Setting, shards: Iterable[list[Row]]) -> Generator[Results, None, None]:
        """Decode all rows in one stream: the next shard begins while the last rows of one are decoded."""
        decoder = Decoder(setting, setting.options.batch_size)
        yield decoder.model, []
        for result in decoder.decode(row for rows in shards for row in rows):
            yield decoder.model, [result]


@dataclass(frozen=True)
class Ray:
    """Actors of Ray Data. An actor that dies is started again, and its shard decoded again.

    Args:
        actors: how many; each holds one model.
        gpus_per_actor: GPUs, also a fraction of one; None for one where Ray has any, else 0.
        cpus_per_actor: CPUs, and threads.
        batch_size: rows that an actor decodes together; None for the command's batch_size.
        address: of a running cluster, HOST:PORT or auto; None for a Ray of this machine alone, for this job.
        shard_rows: rows of an output file: what a kill may lose, of each actor.
        max_failures: failed rows after which the job stops; None for no limit.

    Raises:
        ValueError: a value out of range, or Ray is not installed.
    """

    actors: int = 1
    gpus_per_actor: float | None = None
    cpus_per_actor: int = 1
    batch_size: int | None = None
    address: str | None = None
    shard_rows: int = 256
    max_failures: int | None = None

    def __post_init__(self) -> None:
        _check_shared(self)
        for name in ("actors", "cpus_per_actor"):
            number(name, getattr(self, name), "a whole number of at least 1", low=1, whole=True)
        if self.batch_size is not None:
            number("batch_size", self.batch_size, "a whole number of at least 1, or null", low=1, whole=True)
        if self.gpus_per_actor is not None:
            number("gpus_per_actor", self.gpus_per_actor, "0 or a positive number, or null", low=0, high=1024)
        try:
            import ray.data  # noqa: F401
        except ImportError as error:
            raise ValueError(f"engine=ray needs Ray ({error}); pip install 'dllm-samplers[scale]'") from None

    def run(self, setting: Setting, shards: Iterable[list[Row]]) -> Generator[Results, None, None]:
        """Decode each shard as one block."""
        import ray
        from ray.data import ActorPoolStrategy, DataContext, from_arrow_refs
        from ray.exceptions import RayError, RayTaskError

        with self._session():
            gpus = self._gpus(ray.cluster_resources().get("GPU", 0))
            context: Any = DataContext.get_current()
            context.enable_progress_bars = False
            context.max_consecutive_actor_init_deaths = _INIT_DEATHS
            blocks: Any = [ray.put(_table(rows)) for rows in shards]
            try:
                results = from_arrow_refs(blocks).map_batches(
                    _Actor,
                    fn_constructor_args=(setting, self.batch_size or setting.options.batch_size),
                    batch_size=None,
                    batch_format="pyarrow",
                    compute=ActorPoolStrategy(size=self.actors),
                    num_cpus=self.cpus_per_actor,
                    num_gpus=gpus,
                )
                for batch in results.iter_batches(batch_size=None, batch_format="pyarrow"):
                    yield from _read(batch)
            except RayTaskError as error:  # a fault of a policy, or no memory: its text has the actor's traceback
                raise RuntimeError(str(error)) from None
            except RayError as error:
                raise ValueError(f"Ray cannot go on ({first_line(error)}); the same command continues") from None

    def _gpus(self, there: float) -> float:
        """GPUs of an actor, where Ray has some."""
        gpus = (1 if there else 0) if self.gpus_per_actor is None else self.gpus_per_actor
        if self.address is None and self.actors * gpus > there:
            raise ValueError(
                f"engine.actors={self.actors} with engine.gpus_per_actor={gpus:g} needs {self.actors * gpus:g} GPUs, "
                f"and this machine has {there:g}; lower one of them"
            )
        return gpus

    @contextmanager
    def _session(self) -> Iterator[None]:
        """A connection to Ray: one that is there already, or one of this job."""
        import ray

        for each in logging.getLogger("ray.data").handlers:
            if isinstance(each, logging.StreamHandler):  # the other one writes to the session's folder
                each.setLevel(logging.CRITICAL)
        if ray.is_initialized():
            yield
            return
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # of the C++ parts, which print to stderr
        handlers: dict[int, Any] = {which: signal.getsignal(which) for which in (signal.SIGINT, signal.SIGTERM)}
        own: dict[str, Any] = {}
        if self.address is None:
            cpus = max(os.cpu_count() or 1, self.actors * self.cpus_per_actor)
            own = {"include_dashboard": False, "num_cpus": cpus}
        try:
            _reach(self.address)
            ray.init(self.address or "local", log_to_driver=False, logging_level=logging.ERROR, **own)
        except (OSError, RuntimeError, ValueError) as error:
            given = "null" if self.address is None else repr(self.address)
            problem = f"engine.address={given}: Ray cannot be reached ({first_line(error)})"
            raise ValueError(f"{problem}; start a cluster, or leave it out for one of this machine") from None
        with suppress(ValueError):  # Ray sets its own; only the main thread can handle signals
            for which, handler in handlers.items():
                signal.signal(which, handler)
        try:
            yield
        finally:
            ray.shutdown()


def _reach(address: str | None) -> None:
    """Raise OSError where no one listens at an address: Ray itself would try for minutes."""
    host, _, port = (address or "").rpartition(":")
    if host and port.isdecimal() and "/" not in host:
        with socket.create_connection((host, int(port)), timeout=_CONNECT_SECONDS):
            pass


class _Actor:
    """A decoder as Ray Data wants it: a table of rows in, a table of results out.

    Errors about the job are part of the table: Ray would begin an actor that raises one again, and loses its cause.
    """

    def __init__(self, setting: Setting, batch_size: int) -> None:
        self._refused: str | None = None
        try:
            self._decoder = Decoder(setting, batch_size)
        except (ValueError, OSError) as error:
            self._refused = str(error)

    def __call__(self, batch: pa.Table) -> pa.Table:
        if self._refused is not None:
            return _told(refused=self._refused)
        rows = (Row(**{name: json.loads(text) for name, text in each.items()}) for each in batch.to_pylist())
        try:
            return _told(self._decoder.model, [asdict(each) for each in self._decoder.decode(rows)])
        except (ValueError, OSError) as error:
            return _told(refused=str(error))


def _told(model: Any = None, results: Sequence[Any] = (None,), refused: str | None = None) -> pa.Table:
    """What an actor returns."""
    return pa.table({"told": [json.dumps([model, each, refused]) for each in results]})


def _read(batch: pa.Table) -> Iterator[Results]:
    """What an actor returned.

    Raises:
        ValueError: it refuses the job.
    """
    for text in batch.column("told").to_pylist():
        model, result, refused = json.loads(text)
        if refused is not None:
            raise ValueError(refused)
        yield model, [Result(**result)]


def _table(rows: Sequence[Row]) -> pa.Table:
    """Rows as JSON: prompts are texts and chats, ids texts and numbers."""
    return pa.Table.from_pylist([{name: json.dumps(value) for name, value in asdict(row).items()} for row in rows])


def _check_shared(engine: Any) -> None:
    number("shard_rows", engine.shard_rows, "a whole number from 1 to 1000000", low=1, high=10**6, whole=True)
    if engine.max_failures is not None:
        number("max_failures", engine.max_failures, "a whole number of at least 0, or null", low=0, whole=True)
