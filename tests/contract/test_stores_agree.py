"""Random transactions on the in-memory store and on each database give the same answers and state."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from hypothesis import example, given, settings
from hypothesis import strategies as st

from fedtt.errors import StorageError
from storage.memory import MemoryStore
from storage.records import MAIN, DeviceState, LeaseState, RoundState, TaskState, UpdateState
from storage.sql import SqlStore
from storage.store import Store, Transaction
from tests.support import ledger
from tests.support.postgresql import empty_store, needs_postgresql

Step = Callable[[Transaction], Any]

NAMES = ("a", "b", "c", "d", "e")
DEVICES = ("alice", "bob")
TASKS = ("intents", "replies")
BRANCHES = (MAIN, "group-1")
ROUNDS = (1, 2)


class Change(NamedTuple):
    """One transaction."""

    steps: list[Step]
    fails: bool
    together: bool  #: in a block that reads ahead and keeps back


class Undone(Exception):
    """Ends a transaction in failure."""


def _device_of(name: str) -> str:
    return ledger.device(DEVICES[NAMES.index(name) % 2]).id


def _round_of(name: str) -> int:
    return ROUNDS[NAMES.index(name) // 3]


def _put_device(name: str, state: DeviceState, seen_at: float, examples: int, tx: Transaction) -> None:
    key = b"" if state is DeviceState.ERASED else bytes(32)
    tx.put_device(ledger.device(name, state=state, seen_at=seen_at, examples=examples, public_key=key))


def _put_task(name: str, state: TaskState, tx: Transaction) -> None:
    if found := tx.task(name):
        tx.put_task(ledger.task(name, id=found.id, state=state, reason="test"))


def _add_version(branch: str, number: int, tx: Transaction) -> None:
    tx.add_version(ledger.version(number, branch=branch, round_number=None))


def _put_round(number: int, state: RoundState, deadline_at: float | None, tx: Transaction) -> None:
    closed_at = 999.0 if state in {RoundState.FOLDED, RoundState.ABANDONED} else None
    tx.put_round(
        ledger.round_(number, state=state, deadline_at=deadline_at, closed_at=closed_at, reason="test")
    )


def _put_lease(name: str, state: LeaseState, tx: Transaction) -> None:
    tx.put_lease(ledger.lease(name, state=state, device_id=_device_of(name), round_number=_round_of(name)))


def _upload(name: str, payload: bytes, tx: Transaction) -> Any:
    return ledger.upload(tx, name, payload=payload, device_id=_device_of(name), round_number=_round_of(name))


def _settle(names: Sequence[str], folded: bool, tx: Transaction) -> int:
    leases = [ledger.lease(name).id for name in names]
    if folded:
        return tx.settle(leases, UpdateState.FOLDED, folded_into=0)
    return tx.settle(leases, UpdateState.DISCARDED, reason="test")


def _forget(name: str, tx: Transaction) -> int:
    return tx.forget_settled(ledger.device(name).id)


def _take_part(name: str, task_id: int, count: int, loss: float, tx: Transaction) -> None:
    if tx.task_by_id(task_id):
        tx.put_participation(ledger.participation(name, task_id=task_id, count=count, last_loss=loss))


def _forget_participations(name: str, tx: Transaction) -> int:
    return tx.forget_participations(ledger.device(name).id)


def _join(names: list[str], group: int, tx: Transaction) -> None:
    tx.put_members(1, {ledger.device(name).id: group for name in names})


def _look(name: str, tx: Transaction) -> Any:
    lease = ledger.lease(name).id
    found = [tx.lease(lease), tx.update(lease), tx.device(_device_of(name)), tx.latest_round(1, MAIN)]
    return [*found, tx.participation(1, _device_of(name)), tx.lease_of(_device_of(name), 1, MAIN, 1)]


def _expire(now: float, tx: Transaction) -> int:
    return tx.expire_leases(now)


def _step(change: Callable[..., Any], *arguments: st.SearchStrategy[Any]) -> st.SearchStrategy[Step]:
    return st.builds(partial, st.just(change), *arguments)


names, times = st.sampled_from(NAMES), st.floats(311.0, 1000.0)
steps = st.one_of(
    _step(
        _put_device,
        st.sampled_from(("x", *DEVICES)),
        st.sampled_from(DeviceState),
        times,
        st.integers(0, 2**53),
    ),
    _step(lambda name, tx: tx.add_task(ledger.task(name)), st.sampled_from(TASKS)),
    _step(_put_task, st.sampled_from(TASKS), st.sampled_from(TaskState)),
    _step(_add_version, st.sampled_from(BRANCHES), st.integers(0, 3)),
    # at most round 1 is open: that no two are is the schema's business, not the twin's
    _step(_put_round, st.just(1), st.sampled_from(RoundState), st.none() | times),
    _step(_put_round, st.just(2), st.sampled_from(list(RoundState)[1:]), st.none() | times),
    _step(_put_lease, names, st.sampled_from(LeaseState)),
    _step(_upload, names, st.binary(min_size=1, max_size=5000)),
    _step(_settle, st.lists(names), st.booleans()),
    _step(_forget, st.sampled_from(DEVICES)),
    _step(_take_part, st.sampled_from(DEVICES), st.sampled_from((1, 2)), st.integers(1, 2**53), times),
    _step(_forget_participations, st.sampled_from(("x", *DEVICES))),
    _step(_join, st.lists(st.sampled_from(DEVICES)), st.integers(1, 2)),
    _step(_expire, times),
    _step(_look, names),
)
#: the second lease is kept back after the first update
_TWO_UPLOADS = Change([partial(_upload, "a", b"1"), partial(_upload, "c", b"1")], fails=False, together=True)
transactions = st.lists(
    st.builds(Change, st.lists(steps, max_size=8), st.booleans(), st.booleans()), max_size=8
)


def _start(store: Store) -> None:
    with store.transaction() as tx:
        ledger.open_round(tx, DEVICES)
        tx.put_round(ledger.round_(2, state=RoundState.FOLDING))


def _answers(store: Store, change: Change) -> list[Any]:
    answers: list[Any] = []
    leases = [ledger.lease(name).id for name in NAMES]
    with suppress(Undone), store.transaction() as tx:
        with tx.together(leases) if change.together else nullcontext():
            for step in change.steps:
                try:
                    answers.append(step(tx))
                except StorageError as error:
                    answers.append(str(error))
        answers.append({state: tx.moved.get(state, 0) for state in UpdateState})
        if change.fails:
            raise Undone
    return answers


def _state(store: Store) -> dict[str, Any]:
    with store.reading() as tx:
        leases = [tx.lease(ledger.lease(name).id) for name in NAMES]
        ids = [ledger.device(name).id for name in DEVICES]
        return {
            "devices": tx.devices(),
            "active": tx.active_devices(seen_since=500.0, min_examples=5, runtimes=("torch",)),
            "candidates": [
                tx.candidates(task, seen_since=500.0, min_examples=5, runtimes=("torch",)) for task in (1, 2)
            ],
            "members": [tx.members(task, seen_since=since) for task in (1, 2) for since in (0.0, 500.0)],
            "groups": [tx.group_of(task, i) for task in (1, 2) for i in ids],
            "active members": [
                tx.active_devices(seen_since=500.0, min_examples=5, runtimes=("torch",), member_of=(1, group))
                for group in (1, 2)
            ],
            "candidates of a group": tx.candidates(
                1, seen_since=500.0, min_examples=5, runtimes=("torch",), group=1
            ),
            "participants": [tx.participants(task) for task in (1, 2)],
            "participations": [tx.participation(task, i) for task in (1, 2) for i in ids],
            "devices by state": [dict(tx.count_devices(seen_since=since)) for since in (0.0, 500.0)],
            "rounds by state": dict(tx.count_rounds(1)),
            "tasks": [tx.tasks(), *(tx.task(name) for name in TASKS)],
            "versions": [tx.versions(1), *(tx.latest_version(1, branch) for branch in BRANCHES)],
            "rounds": [tx.rounds(1), tx.latest_round(1, MAIN), *(tx.round(1, MAIN, n) for n in ROUNDS)],
            "leases": [leases, *(dict(tx.count_leases(1, MAIN, n)) for n in ROUNDS)],
            "leases by device": [tx.leases_of(i, state) for i in ids for state in LeaseState],
            "newest": [tx.lease_of(i, 1, MAIN, n) for i in ids for n in ROUNDS],
            "updates": [list(tx.updates(1, MAIN, n, state)) for n in ROUNDS for state in UpdateState],
            "payloads": [tx.payloads(list(tx.updates(1, MAIN, n, UpdateState.ACCEPTED))) for n in ROUNDS],
            "counts": [tx.count_updates(1, MAIN, n, state) for n in ROUNDS for state in UpdateState],
            "by device": [tx.updates_of(i, state) for i in ids for state in UpdateState],
        }


def _agree(memory: MemoryStore, other: SqlStore, transactions: list[Change]) -> None:
    try:
        _start(memory)
        _start(other)
        for change in transactions:
            assert _answers(memory, change) == _answers(other, change)
            assert _state(memory) == _state(other)
    finally:
        other.close()


@settings(max_examples=60, deadline=None)
@given(transactions)
@example([_TWO_UPLOADS])
def test_sqlite_answers_like_the_memory(transactions: list[Change]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        _agree(MemoryStore(), SqlStore.open(Path(directory) / "ledger.db"), transactions)


@needs_postgresql
@settings(max_examples=40, deadline=None)
@given(transactions)
@example([_TWO_UPLOADS])
def test_postgresql_answers_like_the_memory(transactions: list[Change]) -> None:
    _agree(MemoryStore(), empty_store(), transactions)
