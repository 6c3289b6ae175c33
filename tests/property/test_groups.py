"""Devices that come and go in any order, a server that crashes: groups always find together again."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from aggregator.promised import promised
from fedtt.messages import Problem, Receipt, UpdateState, Work
from storage.records import MAIN, LeaseState, RoundState, TaskState
from storage.sql import SqlStore
from storage.store import Store
from tests.support.groups import GroupedServer, grouped_task

DEVICES = 7
END = {RoundState.FOLDED, RoundState.ABANDONED}

device = st.integers(0, DEVICES - 1)
steps = st.one_of(
    st.tuples(st.just("work"), device, st.sampled_from([0.1, -0.3, 0.0])),
    st.tuples(st.just("work"), device, st.sampled_from([0.1, -0.3, 0.0])),
    st.tuples(st.just("take"), device),
    st.tuples(st.just("send"), device, st.sampled_from([0.2, 3e38])),
    st.tuples(st.just("everyone")),
    st.tuples(st.just("everyone")),
    st.tuples(st.just("wait"), st.sampled_from([1.0, 30.0, 120.0])),
    st.tuples(st.just("tick"), st.booleans()),
    st.tuples(st.just("restart")),
    st.tuples(st.just("leave"), device, st.booleans()),
    st.tuples(st.just("enrol"), device),
    st.tuples(st.just("pause")),
    st.tuples(st.just("resume")),
)
methods = st.fixed_dictionaries(
    {
        "groups": st.integers(2, 3),
        "warmup_rounds": st.integers(1, 2),
        "regroup_every": st.integers(0, 2),
        "max_frequency": st.integers(1, 3),
        "bytes_weight": st.sampled_from([0.0, 0.5]),
    }
)


class Played:
    """A grouped task under a list of steps, with what must hold after each."""

    def __init__(self, method: dict[str, Any], quorum: int, store: Store | None = None) -> None:
        self.server = GroupedServer(
            grouped_task({"cohort": 5, "buffer": 4, "quorum": quorum, "count": 5}, method), store, DEVICES
        )
        self.work: dict[int, Work] = {}
        self.receipts: dict[str, tuple[str, Receipt]] = {}

    def play(self, step: tuple[Any, ...]) -> None:
        getattr(self, f"_{step[0]}")(*step[1:])

    def _work(self, i: int, value: float) -> None:
        self._take(i)
        self._send(i, value)
        self.server.tick()

    def _everyone(self) -> None:
        for i in range(DEVICES):
            self._take(i)
        self.server.now += 3.0
        for i in range(DEVICES):
            self._send(i, 0.1 * (i - 2))
        self.server.tick()

    def _wait(self, seconds: float) -> None:
        self.server.now += seconds

    def _tick(self, crash: bool) -> None:
        self.server.tick(crash_before_publish=crash)

    def _restart(self) -> None:
        self.server.restart()

    def _leave(self, i: int, erase: bool) -> None:
        name = self.server.devices[i]
        self.server.write(lambda tx: self.server.coordinator.leave(tx, name, erase=erase))

    def _enrol(self, i: int) -> None:
        self.server.enroll(i)

    def _pause(self) -> None:
        self._set(TaskState.PAUSED)

    def _resume(self) -> None:
        self._set(TaskState.ACTIVE)

    def _set(self, state: TaskState) -> None:
        lifecycle = self.server.coordinator.lifecycle
        self.server.write(lambda tx: lifecycle.set_active(tx, self.server.now, "groups", state, "operator"))

    def _take(self, i: int) -> None:
        answer = self.server.check_in(self.server.devices[i])
        if isinstance(answer, Work):
            self.work[i] = answer

    def _send(self, i: int, value: float) -> None:
        work = self.work.pop(i, None)
        if work is None:
            return
        name = self.server.devices[i]
        answer = self.server.upload(name, work, value, (i, DEVICES - i) if i % 3 else None)
        if isinstance(answer, Receipt):
            self.receipts[work.lease] = (name, answer)
        else:
            assert isinstance(answer, Problem)

    def check(self) -> None:
        task = self.server.task()
        with self.server.store.reading() as tx:
            versions = tx.versions(task.id)
            numbers: dict[str, list[int]] = {}
            for version in versions:
                numbers.setdefault(version.branch, []).append(version.number)
            assert all(found == list(range(len(found))) for found in numbers.values())  # none is skipped
            self._check_receipts(tx, task.id)
            self._check_rounds(tx, task.id)
            newest = promised(tx.latest_version(task.id, MAIN), "a version")
            for group in task.groups:
                began = promised(tx.version(task.id, group.branch, group.version_number), "a version")
                assert group.ended <= group.frequency
                if task.state is not TaskState.FINISHED:
                    assert began.sha256 == newest.sha256  # all began where the main branch stands
            if task.groups and task.state is TaskState.ACTIVE:
                last = promised(tx.latest_round(task.id, MAIN), "a round")
                assert last.state is RoundState.FOLDING or not all(group.waits for group in task.groups)

    def _check_receipts(self, tx: Any, task_id: int) -> None:
        folded: Counter[tuple[str, int]] = Counter()
        for lease, (name, known) in self.receipts.items():
            now = self.server.coordinator.receipt(tx, name, lease)
            assert isinstance(now, Receipt)
            if known.state is not UpdateState.ACCEPTED:
                assert (now.state, now.version_number) == (known.state, known.version_number)
            self.receipts[lease] = (name, now)
            if now.state is UpdateState.FOLDED:
                assert now.version_number is not None
                folded[tx.update(lease).branch, now.version_number] += 1
        for version in tx.versions(task_id):
            is_sum = version.branch == MAIN and "groups_folded" in version.report
            if not is_sum:
                assert folded[version.branch, version.number] == version.updates

    def _check_rounds(self, tx: Any, task_id: int) -> None:
        rounds = tx.rounds(task_id)
        assert len({r.number for r in rounds}) == len(rounds)
        busy = [r.branch for r in rounds if r.state not in END]
        assert len(set(busy)) == len(busy)  # at most one of a branch
        for round_ in rounds:
            leases = tx.count_leases(task_id, round_.branch, round_.number)
            seated = sum(n for state, n in leases.items() if state is not LeaseState.FAILED)
            assert seated <= 5
            if round_.state in END:
                assert tx.count_updates(task_id, round_.branch, round_.number, UpdateState.ACCEPTED) == 0

    def finish(self) -> None:
        """Whatever has happened: once devices come again, every group holds its rounds and the task ends."""
        self.work.clear()
        for i in range(DEVICES):
            self.server.enroll(i)
        for _ in range(150):
            if self.server.task().state is TaskState.FINISHED:
                break
            self._set(TaskState.ACTIVE)
            self.play(("everyone",))
            self.server.now += 40.0
            self.server.tick()
            self.check()
        task = self.server.task()
        assert task.state is TaskState.FINISHED
        main = self.server.versions()
        assert [version.number for version in main] == list(range(6))
        self.server.now += 200.0
        self.server.tick()
        self.check()
        assert all(receipt.state is not UpdateState.ACCEPTED for _, receipt in self.receipts.values())
        for before, after in itertools.pairwise(main):
            assert after.parents[0] == before.sha256


def played(method: dict[str, Any], quorum: int, steps: list[tuple[Any, ...]], store: Store | None) -> None:
    world = Played(method, quorum, store)
    for step in steps:
        world.play(step)
        world.check()
    world.finish()


PLAIN = {"groups": 2, "warmup_rounds": 1, "regroup_every": 1, "max_frequency": 3, "bytes_weight": 0.0}


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(methods, st.integers(1, 2), st.lists(steps, max_size=40))
@example(PLAIN, 1, [("everyone",), ("tick", True), ("restart",), ("everyone",), ("leave", 0, True)])
@example(PLAIN, 2, [("everyone",), ("wait", 120.0), ("tick", False), ("wait", 120.0), ("tick", False)])
@example(
    PLAIN, 1, [("everyone",), *[("leave", i, True) for i in range(DEVICES)], ("wait", 120.0), ("tick", False)]
)
def test_groups_synchronise_no_version_is_skipped_and_every_update_ends_once(
    method: dict[str, Any], quorum: int, steps: list[tuple[Any, ...]]
) -> None:
    played(method, quorum, steps, None)


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(methods, st.integers(1, 2), st.lists(steps, max_size=15))
def test_so_they_do_on_disk(method: dict[str, Any], quorum: int, steps: list[tuple[Any, ...]]) -> None:
    with TemporaryDirectory() as directory:
        store = SqlStore.open(Path(directory) / "ledger.db")
        try:
            played(method, quorum, steps, store)
        finally:
            store.close()
