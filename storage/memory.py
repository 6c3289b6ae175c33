"""The in-memory twin of the SQL store: the same contract, nothing durable. For tests and emulated fleets."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from heapq import heappop, heappush, nlargest
from typing import Any

import msgspec
from msgspec.structs import replace

from fedtt.errors import StorageError
from storage.memory_devices import DeviceTransaction
from storage.memory_tables import RoundKey, Tables, round_key
from storage.records import (
    Bundle,
    DeviceState,
    Evaluation,
    Lease,
    LeaseState,
    Round,
    RoundState,
    Task,
    Update,
    UpdateState,
    Version,
)

__all__ = ["MemoryStore"]


class MemoryStore:
    """Dictionaries behind one lock; a failed transaction is undone from its log of reversals.

    keep_rounds: of each branch, how many ended rounds keep their leases and updates; what is older goes at
    the next `maintain`, and a device that asks after it hears that it is unknown. None keeps everything.
    """

    is_shared = False

    def __init__(self, *, keep_rounds: int | None = None) -> None:
        self._lock = threading.Lock()
        self._tables = Tables()
        self._keep_rounds = keep_rounds
        self._transaction = _MemoryTransaction(self._lock, self._tables)
        self._reading = _MemoryTransaction(self._lock, self._tables, readonly=True)

    def transaction(self) -> AbstractContextManager[_MemoryTransaction]:
        return self._transaction

    def reading(self) -> AbstractContextManager[_MemoryTransaction]:
        return self._reading

    def wipe(self) -> bool:
        return False  # payloads go as their updates are settled

    def maintain(self) -> bool:
        if self._keep_rounds is not None:
            with self._lock:
                self._tables.forget_rounds(self._keep_rounds)
        return True

    def close(self) -> None:
        pass


class _MemoryTransaction(DeviceTransaction):
    """A whole transaction: an emulated fleet opens many for each device."""

    __slots__ = ()

    def put_bundle(self, bundle: Bundle) -> None:
        self._put(self._t.bundles, bundle.sha256, bundle)

    def bundle(self, sha256: str) -> Bundle | None:
        return self._t.bundles.get(sha256)

    def add_task(self, task: Task) -> Task:
        if self.task(task.spec.name):
            raise StorageError(f"a task named {task.spec.name!r} exists already")
        task = msgspec.structs.replace(task, id=len(self._t.tasks) + 1)
        self._put(self._t.tasks, task.id, task)
        return task

    def put_task(self, task: Task) -> None:
        self._put(self._t.tasks, task.id, task)

    def task(self, name: str) -> Task | None:
        return next((t for t in self._t.tasks.values() if t.spec.name == name), None)

    def task_by_id(self, task_id: int) -> Task | None:
        return self._t.tasks.get(task_id)

    def tasks(self) -> list[Task]:
        return list(self._t.tasks.values())

    def add_version(self, version: Version) -> None:
        key = (version.task_id, version.branch, version.number)
        if key in self._t.versions:
            raise StorageError(f"version {version.number} of branch {version.branch!r} exists already")
        self._put(self._t.versions, key, version)
        self._put(self._t.version_names, version.sha256, None)
        latest = self.latest_version(version.task_id, version.branch)
        if latest is None or latest.number < version.number:
            self._put(self._t.latest_versions, (version.task_id, version.branch), version)

    def put_version(self, version: Version) -> None:
        self._put(self._t.versions, (version.task_id, version.branch, version.number), version)
        latest = self.latest_version(version.task_id, version.branch)
        if latest is not None and latest.number == version.number:
            self._put(self._t.latest_versions, (version.task_id, version.branch), version)

    def latest_version(self, task_id: int, branch: str) -> Version | None:
        return self._t.latest_versions.get((task_id, branch))

    def version(self, task_id: int, branch: str, number: int) -> Version | None:
        return self._t.versions.get((task_id, branch, number))

    def versions(self, task_id: int) -> list[Version]:
        return [v for key, v in sorted(self._t.versions.items()) if key[0] == task_id]

    def has_version(self, sha256: str) -> bool:
        return sha256 in self._t.version_names

    def put_evaluation(self, evaluation: Evaluation) -> None:
        key = (evaluation.task_id, evaluation.branch, evaluation.version_number)
        asked = self._t.evaluations_of.setdefault(key, {})
        if asked.get(evaluation.device_id, evaluation.lease_id) != evaluation.lease_id:
            raise StorageError(f"device {evaluation.device_id} was asked about version {key[2]} before")
        self._put(asked, evaluation.device_id, evaluation.lease_id)
        self._put(self._t.evaluations, evaluation.lease_id, evaluation)

    def evaluation(self, lease_id: str) -> Evaluation | None:
        return self._t.evaluations.get(lease_id)

    def evaluations(self, task_id: int, branch: str, version_number: int) -> list[Evaluation]:
        asked = self._t.evaluations_of.get((task_id, branch, version_number), {})
        return [self._t.evaluations[lease] for _, lease in sorted(asked.items())]

    def forget_evaluations(self, device_id: str) -> None:
        for lease, evaluation in list(self._t.evaluations.items()):
            if evaluation.device_id == device_id:
                self._put(self._t.evaluations, lease, replace(evaluation, verdict=None))

    def put_round(self, round_: Round) -> None:
        self._put(self._t.rounds, (round_.task_id, round_.branch, round_.number), round_)
        latest = self.latest_round(round_.task_id, round_.branch)
        if latest is None or latest.number <= round_.number:
            self._put(self._t.latest_rounds, (round_.task_id, round_.branch), round_)

    def latest_round(self, task_id: int, branch: str) -> Round | None:
        return self._t.latest_rounds.get((task_id, branch))

    def round(self, task_id: int, branch: str, number: int) -> Round | None:
        return self._t.rounds.get((task_id, branch, number))

    def rounds(self, task_id: int, *, limit: int = 1000) -> list[Round]:
        rows = (row for key, row in self._t.rounds.items() if key[0] == task_id)
        return nlargest(limit, rows, key=lambda row: (row.number, row.branch))

    def count_rounds(self, task_id: int) -> dict[RoundState, int]:
        return Counter(r.state for r in self._t.rounds.values() if r.task_id == task_id)

    def together(
        self, leases: Collection[str], devices: Collection[str] = ()
    ) -> AbstractContextManager[None]:
        return nullcontext()  # all is at hand as it is

    def put_lease(self, lease: Lease) -> None:
        key, before = round_key(lease), self._t.leases.get(lease.id)
        self._put(self._t.leases, lease.id, lease)
        if before is None:
            self._put(self._t.leases_in.setdefault(key, {}), lease.device_id, lease.id)
            self._put(self._t.leases_by.setdefault(lease.device_id, {}), lease.id, None)
        else:
            self._count(self._t.lease_counts, round_key(before), before.state, -1)
        self._count(self._t.lease_counts, key, lease.state, 1)
        if lease.state is LeaseState.ACTIVE:
            heappush(self._t.expiries, (lease.expires_at, lease.id))

    def lease(self, lease_id: str) -> Lease | None:
        return self._t.leases.get(lease_id)

    def lease_of(self, device_id: str, task_id: int, branch: str, round_number: int) -> Lease | None:
        newest = self._t.leases_in.get((task_id, branch, round_number), {}).get(device_id)
        return None if newest is None else self._t.leases[newest]

    def leases_of(self, device_id: str, state: LeaseState) -> list[Lease]:
        mine = (self._t.leases[name] for name in self._t.leases_by.get(device_id, ()))
        return [lease for lease in mine if lease.state is state]

    def count_leases(self, task_id: int, branch: str, round_number: int) -> dict[LeaseState, int]:
        counts = self._t.lease_counts.get((task_id, branch, round_number), {})
        return {state: count for state, count in counts.items() if count}

    def expire_leases(self, now: float) -> int:
        due, expired = self._t.expiries, 0
        while due and due[0][0] <= now:
            entry = heappop(due)
            self._expired.append(entry)
            lease = self._t.leases.get(entry[1])
            if lease is not None and lease.state is LeaseState.ACTIVE and lease.expires_at <= now:
                self.put_lease(msgspec.structs.replace(lease, state=LeaseState.EXPIRED))
                expired += 1
        return expired

    def add_update(self, update: Update, payload: bytes) -> Update:
        if not payload:
            raise StorageError(f"the update under lease {update.lease_id} has no payload")
        if update.lease_id in self._t.updates:
            raise StorageError(f"lease {update.lease_id} has an update already")
        sequence = 1 + self._t.sequence.get("newest", 0)
        self._put(self._t.sequence, "newest", sequence)
        update, key = msgspec.structs.replace(update, sequence=sequence), round_key(update)
        self._put(self._t.updates, update.lease_id, update)
        self._put(self._t.payloads, update.lease_id, payload)
        self._put(self._t.updates_in.setdefault(key, {}), update.lease_id, None)
        self._count(self._t.update_counts, key, update.state, 1)
        self._moved(update.state, 1)
        return update

    def update(self, lease_id: str) -> Update | None:
        return self._t.updates.get(lease_id)

    def count_updates(self, task_id: int, branch: str, round_number: int, state: UpdateState) -> int:
        return self._t.update_counts.get((task_id, branch, round_number), {}).get(state, 0)

    def updates(self, task_id: int, branch: str, round_number: int, state: UpdateState) -> Iterator[Update]:
        for lease_id in list(self._t.updates_in.get((task_id, branch, round_number), ())):
            if (row := self._t.updates[lease_id]).state is state:
                yield row

    def payloads(self, updates: Sequence[Update]) -> list[bytes]:
        held = self._t.payloads
        if missing := next((update for update in updates if update.lease_id not in held), None):
            raise StorageError(f"update {missing.sequence} holds no payload")
        return [held[update.lease_id] for update in updates]

    def updates_of(self, device_id: str, state: UpdateState) -> list[Update]:
        return [u for u in self._t.updates.values() if u.device_id == device_id and u.state is state]

    def settle(
        self,
        updates: Iterable[str],
        state: UpdateState,
        *,
        reason: str = "",
        folded_into: int | None = None,
    ) -> int:
        changes: dict[str, Any] = {"state": state, "reason": reason, "folded_into": folded_into}
        moved: Counter[RoundKey] = Counter()
        for lease_id in updates:
            row = self._t.updates.get(lease_id)
            if row is None or row.state is not UpdateState.ACCEPTED:
                continue
            settled = msgspec.structs.replace(row, **changes)
            self._drop(self._t.payloads, lease_id)
            owner = self._t.devices.get(row.device_id)
            is_erased = owner is not None and owner.state is DeviceState.ERASED
            self._put(self._t.updates, lease_id, _forgotten(settled) if is_erased else settled)
            moved[round_key(row)] += 1
        for key, count in moved.items():
            self._count(self._t.update_counts, key, UpdateState.ACCEPTED, -count)
            self._count(self._t.update_counts, key, state, count)
        self._moved(state, moved.total())
        return moved.total()

    def _moved(self, state: UpdateState, count: int) -> None:
        self.moved[state] = self.moved.get(state, 0) + count

    def forget_settled(self, device_id: str) -> int:
        rows = [u for u in self._t.updates.values() if u.device_id == device_id]
        settled = [u for u in rows if u.state is not UpdateState.ACCEPTED]
        for row in settled:
            self._put(self._t.updates, row.lease_id, _forgotten(row))
        return len(settled)


def _forgotten(update: Update) -> Update:
    return msgspec.structs.replace(update, examples=0, loss_first=0.0, loss_last=0.0)
