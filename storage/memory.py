"""The in-memory twin of the SQL store: the same contract, nothing durable. For tests and emulated fleets."""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from heapq import heapify, heappop, heappush, nlargest
from types import TracebackType
from typing import Any, Self, TypeVar

import msgspec
from msgspec.structs import replace

from fedtt.errors import StorageError
from fedtt.sampling import Candidate
from storage.records import (
    AdminToken,
    Audit,
    Bundle,
    Device,
    DeviceState,
    Evaluation,
    Lease,
    LeaseState,
    Participation,
    Round,
    RoundState,
    Task,
    Token,
    Update,
    UpdateState,
    Version,
)

__all__ = ["MemoryStore"]

K = TypeVar("K")
V = TypeVar("V")
RoundKey = tuple[int, str, int]
BranchKey = tuple[int, str]
_ABSENT: Any = object()  #: stands for no value in a log of reversals


class MemoryStore:
    """Dictionaries behind one lock; a failed transaction is undone from its log of reversals.

    keep_rounds: of each branch, how many ended rounds keep their leases and updates; what is older goes at
    the next `maintain`, and a device that asks after it hears that it is unknown. None keeps everything.
    """

    is_shared = False

    def __init__(self, *, keep_rounds: int | None = None) -> None:
        self._lock = threading.Lock()
        self._tables = _Tables()
        self._keep_rounds = keep_rounds
        self._transaction = _MemoryTransaction(self._lock, self._tables)
        self._reading = _MemoryTransaction(self._lock, self._tables, readonly=True)

    def transaction(self) -> AbstractContextManager[_MemoryTransaction]:
        return self._transaction

    def reading(self) -> AbstractContextManager[_MemoryTransaction]:
        return self._reading

    def maintain(self) -> bool:
        if self._keep_rounds is not None:
            with self._lock:
                self._tables.forget_rounds(self._keep_rounds)
        return True

    def close(self) -> None:
        pass


class _Tables:
    """Rows by their keys, and what is asked of them often counted as they change."""

    def __init__(self) -> None:
        self.tokens: dict[str, Token] = {}
        self.devices: dict[str, Device] = {}
        self.admin_tokens: dict[str, AdminToken] = {}
        self.audit: dict[int, Audit] = {}  #: by sequence, in order
        self.participations: dict[str, dict[int, Participation]] = {}  #: device -> task -> its part in it
        self.groups: dict[str, dict[int, int]] = {}  #: device -> task -> its group
        self.bundles: dict[str, Bundle] = {}
        self.tasks: dict[int, Task] = {}
        self.versions: dict[RoundKey, Version] = {}
        self.version_names: dict[str, None] = {}
        self.latest_versions: dict[BranchKey, Version] = {}
        self.evaluations: dict[str, Evaluation] = {}
        self.evaluations_of: dict[RoundKey, dict[str, str]] = {}  #: version -> device -> lease
        self.rounds: dict[RoundKey, Round] = {}
        self.latest_rounds: dict[BranchKey, Round] = {}
        self.leases: dict[str, Lease] = {}
        self.leases_in: dict[RoundKey, dict[str, str]] = {}  #: round -> device -> its newest lease
        self.leases_by: dict[str, dict[str, None]] = {}  #: device -> its leases, in order
        self.lease_counts: dict[RoundKey, dict[LeaseState, int]] = {}
        self.expiries: list[tuple[float, str]] = []  #: heap; an entry may be out of date
        self.updates: dict[str, Update] = {}
        self.updates_in: dict[RoundKey, dict[str, None]] = {}  #: round -> lease ids, in ledger order
        self.update_counts: dict[RoundKey, dict[UpdateState, int]] = {}
        self.sequence: dict[str, int] = {}  #: of the newest update
        self.oldest_kept: dict[BranchKey, int] = {}  #: the first round whose leases and updates are there

    def forget_rounds(self, keep: int) -> None:
        for branch, newest in self.latest_rounds.items():
            first = self.oldest_kept.get(branch, 1)
            for number in range(first, newest.number - keep):
                self._forget_round((*branch, number))
            self.oldest_kept[branch] = max(first, newest.number - keep)

    def _forget_round(self, key: RoundKey) -> None:
        for name in self.updates_in.pop(key, ()):
            del self.updates[name]
        for device, newest in self.leases_in.pop(key, {}).items():
            mine = self.leases_by[device]
            for name in [name for name in mine if name == newest or _round_key(self.leases[name]) == key]:
                del mine[name], self.leases[name]
            if not mine:
                del self.leases_by[device]
        self.lease_counts.pop(key, None)
        self.update_counts.pop(key, None)
        self.expiries = [entry for entry in self.expiries if self._may_expire(entry[1])]
        heapify(self.expiries)

    def _may_expire(self, name: str) -> bool:
        lease = self.leases.get(name)
        return lease is not None and lease.state is LeaseState.ACTIVE


def _round_key(row: Lease | Update) -> RoundKey:
    return (row.task_id, row.branch, row.round_number)


class _MemoryTransaction:
    """The transaction of whoever has the lock: an emulated fleet opens many for each device."""

    __slots__ = ("_expired", "_lock", "_readonly", "_t", "_undo_log", "moved")

    def __init__(self, lock: threading.Lock, tables: _Tables, *, readonly: bool = False) -> None:
        self._lock, self._t, self._readonly = lock, tables, readonly
        self._undo_log: list[tuple[Any, Any, Any]] = []  #: table, key and what it had
        self._expired: list[tuple[float, str]] = []  #: entries taken from the heap
        self.moved: dict[UpdateState, int] = {}

    def __enter__(self) -> Self:
        self._lock.acquire()
        self.moved = {}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self._undo_log and (kind is not None or self._readonly):
                self._undo()
                if kind is None:
                    raise StorageError("a reading transaction wrote; this is a bug in the caller")
        finally:
            self._undo_log.clear()
            self._expired.clear()
            self._lock.release()

    def _undo(self) -> None:
        for table, key, before in reversed(self._undo_log):
            if before is _ABSENT:
                del table[key]
            else:
                table[key] = before
        for entry in self._expired:
            heappush(self._t.expiries, entry)

    def _put(self, table: dict[K, V], key: K, value: V) -> None:
        self._undo_log.append((table, key, table.get(key, _ABSENT)))
        table[key] = value

    def _count(self, counts: dict[K, dict[V, int]], key: K, state: V, by: int) -> None:
        of_key = counts.setdefault(key, {})
        before = of_key.get(state, 0)
        self._undo_log.append((of_key, state, before))
        of_key[state] = before + by

    def put_token(self, token: Token) -> None:
        self._put(self._t.tokens, token.sha256, token)

    def token(self, sha256: str) -> Token | None:
        return self._t.tokens.get(sha256)

    def put_device(self, device: Device) -> None:
        self._put(self._t.devices, device.id, device)

    def put_admin_token(self, token: AdminToken) -> None:
        self._put(self._t.admin_tokens, token.sha256, token)

    def admin_token(self, sha256: str) -> AdminToken | None:
        return self._t.admin_tokens.get(sha256)

    def admin_tokens(self) -> list[AdminToken]:
        return sorted(self._t.admin_tokens.values(), key=lambda token: token.name)

    def add_audit(self, entry: Audit) -> None:
        if entry.sequence in self._t.audit:
            raise StorageError(f"entry {entry.sequence} of the audit log exists already")
        self._put(self._t.audit, entry.sequence, entry)

    def last_audit(self) -> Audit | None:
        return next(reversed(self._t.audit.values()), None)

    def audits(self, *, after: int = 0, limit: int = 1000) -> list[Audit]:
        return [entry for number, entry in self._t.audit.items() if number > after][:limit]

    def device(self, device_id: str) -> Device | None:
        return self._t.devices.get(device_id)

    def devices(self, *, after: str = "", limit: int = 1000) -> list[Device]:
        ids = sorted(self._t.devices)
        start = bisect_right(ids, after)
        return [self._t.devices[i] for i in ids[start : start + limit]]

    def active_devices(
        self,
        *,
        seen_since: float,
        min_examples: int,
        runtimes: Collection[str],
        memory_mb: int = 0,
        member_of: tuple[int, int] | None = None,
    ) -> list[str]:
        return sorted(d.id for d in self._able(seen_since, min_examples, set(runtimes), memory_mb, member_of))

    def candidates(
        self,
        task_id: int,
        *,
        seen_since: float,
        min_examples: int,
        runtimes: Collection[str],
        memory_mb: int = 0,
        group: int | None = None,
    ) -> list[Candidate]:
        member_of = None if group is None else (task_id, group)
        able = self._able(seen_since, min_examples, set(runtimes), memory_mb, member_of)
        return [_candidate(d, self.participation(task_id, d.id)) for d in sorted(able, key=lambda d: d.id)]

    def _able(
        self,
        seen_since: float,
        min_examples: int,
        runtimes: set[str],
        memory_mb: int,
        member_of: tuple[int, int] | None,
    ) -> Iterator[Device]:
        for d in self._t.devices.values():
            ready = d.state is DeviceState.ACTIVE and d.seen_at >= seen_since
            meant = member_of is None or self.group_of(member_of[0], d.id) == member_of[1]
            enough = d.examples >= min_examples and not 0 < d.memory_mb < memory_mb
            if ready and meant and enough and not runtimes.isdisjoint(d.runtimes):
                yield d

    def count_devices(self, *, seen_since: float = 0.0) -> dict[DeviceState, int]:
        return Counter(d.state for d in self._t.devices.values() if d.seen_at >= seen_since)

    def put_participation(self, participation: Participation) -> None:
        of_device = self._t.participations.setdefault(participation.device_id, {})
        self._put(of_device, participation.task_id, participation)

    def participation(self, task_id: int, device_id: str) -> Participation | None:
        return self._t.participations.get(device_id, {}).get(task_id)

    def forget_participations(self, device_id: str) -> int:
        rows = list(self._t.participations.get(device_id, {}).values())
        for row in rows:
            forgotten = msgspec.structs.replace(row, last_loss=None, duration_s=None, label_counts=None)
            self.put_participation(forgotten)
        if device_id in self._t.groups:
            self._put(self._t.groups, device_id, {})
        return len(rows)

    def participants(self, task_id: int) -> list[Participation]:
        rows = ((name, of_device.get(task_id)) for name, of_device in sorted(self._t.participations.items()))
        return [row for name, row in rows if row and self._t.devices[name].state is DeviceState.ACTIVE]

    def put_members(self, task_id: int, groups: Mapping[str, int]) -> None:
        for device_id, group in groups.items():
            self._put(self._t.groups.setdefault(device_id, {}), task_id, group)

    def group_of(self, task_id: int, device_id: str) -> int | None:
        return self._t.groups.get(device_id, {}).get(task_id)

    def members(self, task_id: int, *, seen_since: float = 0.0) -> dict[str, int]:
        found = {}
        for device_id, groups in sorted(self._t.groups.items()):
            device = self._t.devices[device_id]
            if task_id in groups and device.state is DeviceState.ACTIVE and device.seen_at >= seen_since:
                found[device_id] = groups[task_id]
        return found

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
        key, before = _round_key(lease), self._t.leases.get(lease.id)
        self._put(self._t.leases, lease.id, lease)
        if before is None:
            self._put(self._t.leases_in.setdefault(key, {}), lease.device_id, lease.id)
            self._put(self._t.leases_by.setdefault(lease.device_id, {}), lease.id, None)
        else:
            self._count(self._t.lease_counts, _round_key(before), before.state, -1)
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

    def add_update(self, update: Update) -> Update:
        if update.lease_id in self._t.updates:
            raise StorageError(f"lease {update.lease_id} has an update already")
        sequence = 1 + self._t.sequence.get("newest", 0)
        self._put(self._t.sequence, "newest", sequence)
        update, key = msgspec.structs.replace(update, sequence=sequence), _round_key(update)
        self._put(self._t.updates, update.lease_id, update)
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
            settled = msgspec.structs.replace(row, payload=b"", **changes)
            owner = self._t.devices.get(row.device_id)
            is_erased = owner is not None and owner.state is DeviceState.ERASED
            self._put(self._t.updates, lease_id, _forgotten(settled) if is_erased else settled)
            moved[_round_key(row)] += 1
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


def _candidate(device: Device, part: Participation | None) -> Candidate:
    return Candidate(
        device_id=device.id,
        examples=device.examples,
        memory_mb=device.memory_mb,
        count=part.count if part else 0,
        last_round=part.last_round if part else None,
        last_loss=part.last_loss if part else None,
        duration_s=part.duration_s if part else None,
    )
