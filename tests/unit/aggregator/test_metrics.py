"""What a server counts: names and units as Prometheus wants them, labels of few values, nothing global."""

from __future__ import annotations

import re
from typing import Any

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from aggregator.metrics import Metrics, totals
from fedtt.messages import Code, UpdateState, Wait

UNITS = ("_seconds", "_bytes")
COUNTED = (
    "_requests",
    "_refusals",
    "_check_ins",
    "_updates",
    "_changes",
    "_length",
    "_versions",
    "_connections",
    "_handshakes",
    "_failures",
)


def families(metrics: Metrics) -> dict[str, Any]:
    """What Prometheus' own parser reads, by name."""
    text = generate_latest(metrics.registry).decode()
    return {family.name: family for family in text_string_to_metric_families(text)}


def samples(metrics: Metrics) -> dict[tuple[str, ...], float]:
    found = (sample for family in families(metrics).values() for sample in family.samples)
    return {(sample.name, *sorted(sample.labels.values())): sample.value for sample in found}


def test_every_name_says_whose_it_is_and_ends_in_its_unit_or_in_what_it_counts() -> None:
    ours = {name: family for name, family in families(Metrics()).items() if not name.startswith("process_")}
    assert len(ours) == 19
    for name, family in ours.items():
        assert re.fullmatch("fedtt(_[a-z]+)+", name)
        assert name.endswith(UNITS + COUNTED), name
        assert family.documentation.endswith(".")
        if family.type == "histogram":
            assert (name.endswith("_duration_seconds")) == ("duration" in name)


def test_memory_and_open_files_of_the_process_are_shown() -> None:
    found = samples(Metrics())
    assert found[("process_resident_memory_bytes",)] > 1_000_000
    assert found[("process_open_fds",)] >= 3


def test_servers_of_one_process_count_apart() -> None:
    one, other = Metrics(), Metrics()
    one.refused(Code.STALE)
    assert totals(one.refusals, "code")["stale"] == 1
    assert totals(other.refusals, "code")["stale"] == 0


@pytest.mark.parametrize("code", Code)
def test_every_refusal_is_shown_before_it_happens_so_that_the_first_is_a_rise(code: Code) -> None:
    metrics = Metrics()
    assert samples(metrics)[("fedtt_refusals_total", code.value)] == 0
    metrics.refused(code)
    assert samples(metrics)[("fedtt_refusals_total", code.value)] == 1


def test_connections_that_are_closed_are_counted_by_why() -> None:
    metrics = Metrics()
    assert totals(metrics.connections_idle, "awaited") == {"handshake": 0, "request": 0, "reading": 0}
    metrics.connection_idle("handshake")
    assert totals(metrics.connections_idle, "awaited") == {"handshake": 1, "request": 0, "reading": 0}


def test_check_ins_are_counted_by_their_answer() -> None:
    metrics = Metrics()
    metrics.checked_in(Wait(retry_after_s=1.0))
    assert totals(metrics.check_ins, "answer") == {"work": 0, "judge": 0, "wait": 1, "retired": 0, "tell": 0}


def test_a_commit_adds_its_time_its_size_and_the_updates_it_moved() -> None:
    metrics = Metrics()
    metrics.committed(3, 0.25, {UpdateState.ACCEPTED: 2})
    metrics.committed(1, 0.5, {UpdateState.FOLDED: 2, UpdateState.DISCARDED: 1})
    found = samples(metrics)
    assert found[("fedtt_commit_duration_seconds_count",)] == 2
    assert found[("fedtt_commit_duration_seconds_sum",)] == 0.75
    assert found[("fedtt_commit_changes_sum",)] == 4
    assert totals(metrics.updates, "state") == {"accepted": 2, "folded": 2, "discarded": 1}


def test_the_length_of_the_queue_is_read_when_it_is_asked_for() -> None:
    metrics, queue = Metrics(), ["change"]
    metrics.watch_queue(lambda: len(queue))
    assert samples(metrics)[("fedtt_writer_queue_length",)] == 1
    queue.append("another")
    assert samples(metrics)[("fedtt_writer_queue_length",)] == 2


def test_totals_sum_over_all_labels_but_one() -> None:
    metrics = Metrics()
    for route, listener, count in (("/a", "devices", 2), ("/b", "devices", 3), ("/a", "admin", 5)):
        metrics.received.labels(listener, route).inc(count)
    assert totals(metrics.received, "listener") == {"devices": 5, "admin": 5}
    assert totals(metrics.received, "route") == {"/a": 7, "/b": 3}
