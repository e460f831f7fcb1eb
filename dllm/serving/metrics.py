"""Statistics of a server, for Prometheus."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from dllm.decoding.drift import summarise
from dllm.decoding.step import Step
from dllm.serving.ticket import Ticket

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
OUTCOMES = ("finished", "failed", "cancelled", "refused", "timeout")


class Metrics:
    """Counts what a server does.

    Args:
        slots: rows of an engine.

    Attributes:
        content_type: of `text`.
    """

    content_type = CONTENT_TYPE_LATEST

    def __init__(self, slots: int) -> None:
        self._registry = registry = CollectorRegistry()
        self._recent: deque[float] = deque(maxlen=64)
        self._queue = Gauge("dllm_queue_length", "Requests that wait for a slot.", registry=registry)
        Gauge("dllm_slots", "Rows that are decoded at once.", registry=registry).set(slots)
        self._busy = Gauge("dllm_slots_busy", "Rows that are decoded now, over all engines.", registry=registry)
        self._steps = Counter("dllm_steps", "Denoising steps.", registry=registry)
        self._slot_steps = Counter("dllm_slot_steps", "Rows of all steps.", registry=registry)
        self._busy_steps = Counter("dllm_busy_slot_steps", "Rows of all steps that had a request.", registry=registry)
        self._tokens = Counter("dllm_tokens", "Generated tokens up to the end of each text.", registry=registry)
        self._forwards = Counter("dllm_forwards", "Denoiser forwards, over all requests (NFE).", registry=registry)
        self._requests = Counter("dllm_requests", "Requests by what became of them.", ["outcome"], registry=registry)
        for outcome in OUTCOMES:
            self._requests.labels(outcome)
        self._first_commit = Histogram(
            "dllm_time_to_first_commit_seconds", "From arrival to the first committed token.",
            buckets=_SECONDS, registry=registry,
        )  # fmt: skip
        self._first_text = Histogram(
            "dllm_time_to_first_text_seconds", "From arrival to the first text that is final from the left.",
            buckets=_SECONDS, registry=registry,
        )  # fmt: skip
        self._whole = Histogram(
            "dllm_request_seconds", "From arrival to the complete answer.", buckets=_SECONDS, registry=registry
        )
        self._error = Gauge(
            "dllm_cache_error", "Relative error of cached keys and values where last measured.", registry=registry
        )

    @property
    def mean_seconds(self) -> float:
        """Mean time of the latest finished requests."""
        return sum(self._recent) / len(self._recent) if self._recent else 1.0

    def watch(self, waiting: Callable[[], int], busy: Callable[[], int]) -> None:
        """Read the length of the queue and the rows in use from functions."""
        self._queue.set_function(waiting)
        self._busy.set_function(busy)

    def step(self, step: Step) -> None:
        """Count a step."""
        self._steps.inc()
        self._slot_steps.inc(step.slots)
        self._busy_steps.inc(len(step))
        self._forwards.inc(int(step.forwards.sum()))
        if (drift := summarise(list(step.drift), 0.0)) is not None:
            self._error.set(drift.kv_error)

    def end(self, ticket: Ticket) -> None:
        """Count a request that has ended."""
        outcome = ticket.outcome
        self._requests.labels(outcome).inc()
        if ticket.committed is not None:
            self._first_commit.observe(ticket.committed - ticket.accepted)
        if ticket.job.text and ticket.written is not None:
            self._first_text.observe(ticket.written - ticket.accepted)
        if outcome == "finished" and ticket.ended is not None:
            self._tokens.inc(ticket.generated)
            self._whole.observe(ticket.ended - ticket.accepted)
            self._recent.append(ticket.ended - ticket.accepted)

    def refuse(self) -> None:
        """Count a request that did not reach the queue."""
        self._requests.labels("refused").inc()

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self._registry)
