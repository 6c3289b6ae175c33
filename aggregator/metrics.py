"""What one server counts about itself, for Prometheus and the dashboard; a registry per server, none global.

Names and units follow Prometheus' conventions. Every label has few values: routes stand as their templates,
never as paths, and no label carries an id of a device, lease or version.
"""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Callable, Mapping

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
)

from fedtt.messages import CheckInAnswer, Code, FailureCode, Judge, Retired, Tell, UpdateState, Wait, Work
from storage.records import VersionState

__all__ = ["PEOPLE", "Metrics", "totals"]

_REQUEST_S = (0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
_COMMIT_S = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 5)
_CHANGES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_FOLD_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
PEOPLE = "(people)"  #: whose share of the queue before the ledger is theirs alone; no task has this name
_UPDATES = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)


class Metrics:
    """Counters since the start of one server, all in `registry`; safe to call from any thread."""

    def __init__(self) -> None:
        # a second series for each counter, which Prometheus does not need
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        route = ("listener", "route")
        self.requests = Counter(
            "fedtt_http_requests_total",
            "Requests answered, by the template of their route (unmatched where there is none).",
            (*route, "method", "status"),
            registry=registry,
        )
        self.request_duration = Histogram(
            "fedtt_http_request_duration_seconds",
            "From a request's headers to the last byte of its answer.",
            (*route, "method"),
            buckets=_REQUEST_S,
            registry=registry,
        )
        self.received = Counter(
            "fedtt_http_received_bytes_total",
            "Bodies of requests, as far as they came.",
            route,
            registry=registry,
        )
        self.sent = Counter(
            "fedtt_http_sent_bytes_total",
            "Bodies of answers that went out whole; one that broke off is not counted.",
            route,
            registry=registry,
        )
        self.refusals = Counter(
            "fedtt_refusals_total", "Requests refused with a typed problem.", ("code",), registry=registry
        )
        self.connections_refused = Counter(
            "fedtt_refused_connections_total",
            "Connections closed at once, by the limit that they met.",
            ("limit",),
            registry=registry,
        )
        self.connections_idle = Counter(
            "fedtt_idle_connections_total",
            "Connections closed because what was awaited was late: a TLS handshake, a whole request, or "
            "that an answer is read.",
            ("awaited",),
            registry=registry,
        )
        self.handshakes_failed = Counter(
            "fedtt_failed_handshakes_total",
            "Connections whose TLS handshake was broken off in time, by either side.",
            registry=registry,
        )
        self.check_ins = Counter(
            "fedtt_check_ins_total", "Check-ins, by what they were answered.", ("answer",), registry=registry
        )
        self.updates = Counter(
            "fedtt_updates_total",
            "Updates brought into each state, once durable.",
            ("state",),
            registry=registry,
        )
        self.given_back = Counter(
            "fedtt_failures_total",
            "Leases that devices gave back, by why they could not or would not.",
            ("code",),
            registry=registry,
        )
        self.queue_length = Gauge(
            "fedtt_writer_queue_length", "Changes that wait for a commit.", registry=registry
        )
        self.queue_refusals = Counter(
            "fedtt_writer_queue_refusals_total",
            "Changes that found no room among those that wait, by task (empty for check-ins and the like).",
            ("task",),
            registry=registry,
        )
        self.commit_duration = Histogram(
            "fedtt_commit_duration_seconds",
            "One transaction with all its changes, until it was on disk.",
            buckets=_COMMIT_S,
            registry=registry,
        )
        self.commit_changes = Histogram(
            "fedtt_commit_changes", "Changes that shared one commit.", buckets=_CHANGES, registry=registry
        )
        self.fold_duration = Histogram(
            "fedtt_fold_duration_seconds",
            "From a claimed round to its published version.",
            buckets=_FOLD_S,
            registry=registry,
        )
        self.fold_failures = Counter(
            "fedtt_fold_failures_total",
            "Sums that could not be made: their rounds wait and are tried again.",
            registry=registry,
        )
        self.fold_updates = Histogram(
            "fedtt_fold_updates", "Updates that made one version.", buckets=_UPDATES, registry=registry
        )
        self.versions_decided = Counter(
            "fedtt_decided_versions_total",
            "Candidates that this server released or held by what they were judged.",
            ("state",),
            registry=registry,
        )
        self._start_at_zero()

    def _start_at_zero(self) -> None:
        """Show the closed sets from the first scrape on, so that a first refusal is a rise from 0."""
        for code in Code:
            self.refusals.labels(code.value)
        for version_state in (VersionState.RELEASED, VersionState.HELD):
            self.versions_decided.labels(version_state.value)
        self._answers = {
            kind: self.check_ins.labels(kind.__name__.lower()) for kind in (Work, Judge, Wait, Retired, Tell)
        }
        for state in UpdateState:
            self.updates.labels(state.value)
        for why in FailureCode:
            self.given_back.labels(why.value)
        for whose in ("", PEOPLE):
            self.queue_refusals.labels(whose)
        for limit in ("total", "addresses"):
            self.connections_refused.labels(limit)
        for awaited in ("handshake", "request", "reading"):
            self.connections_idle.labels(awaited)

    def watch_queue(self, length: Callable[[], int]) -> None:
        self.queue_length.set_function(length)

    def no_room(self, task: str) -> None:
        self.queue_refusals.labels(task).inc()

    def refused(self, code: Code) -> None:
        self.refusals.labels(code.value).inc()

    def connection_refused(self, limit: str) -> None:
        self.connections_refused.labels(limit).inc()

    def connection_idle(self, awaited: str) -> None:
        self.connections_idle.labels(awaited).inc()

    def checked_in(self, answer: CheckInAnswer) -> None:
        self._answers[type(answer)].inc()

    def gave_back(self, why: FailureCode) -> None:
        self.given_back.labels(why.value).inc()

    def committed(self, changes: int, seconds: float, moved: Mapping[UpdateState, int]) -> None:
        """One transaction is durable; `moved` says how many updates it has brought into which states."""
        self.commit_duration.observe(seconds)
        self.commit_changes.observe(changes)
        for state, count in moved.items():
            self.updates.labels(state.value).inc(count)

    def folded(self, updates: int, seconds: float) -> None:
        self.fold_duration.observe(seconds)
        self.fold_updates.observe(updates)


def totals(counter: Counter, label: str) -> dict[str, int]:
    """A counter summed over all labels but one."""
    found: Tally[str] = Tally()
    for metric in counter.collect():
        for sample in metric.samples:
            if sample.name.endswith("_total"):
                found[sample.labels[label]] += int(sample.value)
    return dict(found)
