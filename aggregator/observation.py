"""What can be seen of a server: its metrics for Prometheus, its population, what it did since it started."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator

from msgspec import Struct
from prometheus_client import generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric

from aggregator.answers import ActivityRow, Population, Seen
from aggregator.grouping import waiting_updates
from aggregator.metrics import totals
from aggregator.service import Service
from storage.records import MAIN, DeviceState, RoundState, TaskState
from storage.store import Transaction

__all__ = ["METRICS_TYPE", "activity", "metrics_text", "population"]

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SEEN_WITHIN_S = (3600, 86400)


class _Ledger(Struct, frozen=True):
    """Gauges that were read from the store for one scrape."""

    families: tuple[Metric, ...]

    def collect(self) -> tuple[Metric, ...]:
        return self.families


async def metrics_text(service: Service) -> bytes:
    """Counters since the start, and what the ledger holds now, in Prometheus' text format."""
    now = service.clock.now()
    ledger = await service.read(lambda tx: _Ledger((*_of_tasks(tx), *_of_devices(tx, now))))
    return await asyncio.to_thread(
        lambda: generate_latest(service.metrics.registry) + generate_latest(ledger)
    )


def _of_tasks(tx: Transaction) -> Iterator[Metric]:
    tasks = GaugeMetricFamily("fedtt_tasks", "Tasks in each state.", labels=["state"])
    version = GaugeMetricFamily("fedtt_task_version", "Number of a task's newest version.", labels=["task"])
    rounds = GaugeMetricFamily("fedtt_rounds", "Rounds of a task in each state.", labels=["task", "state"])
    waiting = GaugeMetricFamily(
        "fedtt_round_updates", "Updates that wait in a task's newest rounds to be folded.", labels=["task"]
    )
    known = tx.tasks()
    states = Counter(task.state for task in known)
    for state in TaskState:
        tasks.add_metric([state.value], states[state])
    for task in known:
        name = task.spec.name
        newest = tx.latest_version(task.id, MAIN)
        version.add_metric([name], newest.number if newest else 0)
        waiting.add_metric([name], waiting_updates(tx, task))
        counts = tx.count_rounds(task.id)
        for round_state in RoundState:
            rounds.add_metric([name, round_state.value], counts.get(round_state, 0))
    yield from (tasks, version, rounds, waiting)


def _of_devices(tx: Transaction, now: float) -> Iterator[Metric]:
    devices = GaugeMetricFamily("fedtt_devices", "Devices in each state.", labels=["state"])
    seen = GaugeMetricFamily("fedtt_devices_seen", "Active devices seen lately.", labels=["within_s"])
    counts = tx.count_devices()
    for state in DeviceState:
        devices.add_metric([state.value], counts.get(state, 0))
    for within_s, count in _seen(tx, now):
        seen.add_metric([str(within_s)], count)
    yield from (devices, seen)


def _seen(tx: Transaction, now: float) -> Iterator[tuple[int, int]]:
    """(seconds, active devices seen within them)."""
    for within_s in _SEEN_WITHIN_S:
        yield within_s, tx.count_devices(seen_since=now - within_s).get(DeviceState.ACTIVE, 0)


async def population(service: Service) -> Population:
    """How many devices are in each state, and how many of the active ones were seen lately."""
    now = service.clock.now()

    def look(tx: Transaction) -> Population:
        counts = tx.count_devices()
        return Population(
            devices={state: counts.get(state, 0) for state in DeviceState},
            seen=[Seen(within_s=within_s, devices=count) for within_s, count in _seen(tx, now)],
        )

    return await service.read(look)


def activity(service: Service) -> ActivityRow:
    """What this process has done since it started; the ledger outlives it, these counts do not."""
    metrics = service.metrics
    return ActivityRow(
        now=service.clock.now(),
        since=service.started_at,
        requests=totals(metrics.requests, "listener"),
        received_bytes=totals(metrics.received, "listener"),
        sent_bytes=totals(metrics.sent, "listener"),
        updates=totals(metrics.updates, "state"),
        check_ins=totals(metrics.check_ins, "answer"),
        refusals=totals(metrics.refusals, "code"),
    )
