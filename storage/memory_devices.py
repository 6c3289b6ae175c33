"""The in-memory store's transactions: how they are undone, and what they know of devices and people."""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from heapq import heappush
from types import TracebackType
from typing import Any, Self, TypeVar

import msgspec

from fedtt.errors import StorageError
from fedtt.sampling import Candidate
from storage.memory_tables import Tables
from storage.records import (
    AdminToken,
    Audit,
    Device,
    DeviceState,
    Participation,
    Token,
    UpdateState,
)

__all__ = ["DeviceTransaction"]

K = TypeVar("K")
V = TypeVar("V")
_ABSENT: Any = object()  #: stands for no value in a log of reversals


class DeviceTransaction:
    """The transaction of whoever has the lock, as far as it is about devices and people."""

    __slots__ = ("_expired", "_lock", "_readonly", "_t", "_undo_log", "moved")

    def __init__(self, lock: threading.Lock, tables: Tables, *, readonly: bool = False) -> None:
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

    def _drop(self, table: dict[K, V], key: K) -> None:
        self._undo_log.append((table, key, table.pop(key)))

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
