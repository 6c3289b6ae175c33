"""Devices and people in a transaction of the SQL store: each method one of `storage.statements`."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from msgspec.structs import asdict

from fedtt.errors import StorageError
from fedtt.sampling import Candidate
from storage import statements as sql
from storage.records import AdminToken, Audit, Device, DeviceState, Participation, Token
from storage.sql_access import SqlAccess

__all__ = ["SqlDevices"]

_EVER = -1e300  #: before any time


class SqlDevices(SqlAccess):
    """The part of `storage.store.Transaction` that is about devices and people."""

    def put_token(self, token: Token) -> None:
        self._put(sql.tokens, token)

    def token(self, sha256: str) -> Token | None:
        return self._one(sql.tokens, sql.tokens.get, sha256=sha256)

    def put_device(self, device: Device) -> None:
        self._put(sql.devices, device)

    def put_admin_token(self, token: AdminToken) -> None:
        self._put(sql.admin_tokens, token)

    def admin_token(self, sha256: str) -> AdminToken | None:
        return self._one(sql.admin_tokens, sql.admin_tokens.get, sha256=sha256)

    def admin_tokens(self) -> list[AdminToken]:
        return self._all(sql.admin_tokens, sql.all_admin_tokens)

    def add_audit(self, entry: Audit) -> None:
        if self._write(sql.audit.add, asdict(entry)).rowcount == 0:
            raise StorageError(f"entry {entry.sequence} of the audit log exists already")

    def last_audit(self) -> Audit | None:
        return self._one(sql.audit, sql.last_audit)

    def audits(self, *, after: int = 0, limit: int = 1000) -> list[Audit]:
        return self._all(sql.audit, sql.audits_after, after=after, limit=limit)

    def device(self, device_id: str) -> Device | None:
        return self._one(sql.devices, sql.devices.get, id=device_id)

    def devices(self, *, after: str = "", limit: int = 1000) -> list[Device]:
        return self._all(sql.devices, sql.devices_after, after=after, limit=limit)

    def active_devices(
        self,
        *,
        seen_since: float,
        min_examples: int,
        runtimes: Collection[str],
        memory_mb: int = 0,
        member_of: tuple[int, int] | None = None,
    ) -> list[str]:
        wanted: dict[str, Any] = _able(seen_since, min_examples, runtimes, memory_mb)
        if member_of is None:
            return list(self._read(sql.active_devices, wanted).scalars())
        task, group = member_of
        return list(self._read(sql.active_members, wanted | {"task": task, "group": group}).scalars())

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
        wanted = _able(seen_since, min_examples, runtimes, memory_mb) | {"task": task_id}
        if group is None:
            found = self._read(sql.candidates, wanted)
        else:
            found = self._read(sql.candidates_of_group, wanted | {"group": group})
        return [Candidate(**row._mapping) for row in found]

    def count_devices(self, *, seen_since: float = 0.0) -> dict[DeviceState, int]:
        found = self._read(sql.count_devices, {"seen_since": seen_since})
        return {row.state: row.devices for row in found}

    def put_participation(self, participation: Participation) -> None:
        self._put(sql.participations, participation)

    def participation(self, task_id: int, device_id: str) -> Participation | None:
        return self._one(sql.participations, sql.participations.get, device_id=device_id, task_id=task_id)

    def forget_participations(self, device_id: str) -> int:
        self.has_wiped = True
        self._write(sql.forget_memberships, {"device": device_id})
        return self._write(sql.forget_participations, {"device": device_id}).rowcount

    def participants(self, task_id: int) -> list[Participation]:
        return self._all(sql.participations, sql.participants, task_id=task_id, seen_since=_EVER)

    def put_members(self, task_id: int, groups: Mapping[str, int]) -> None:
        rows = [{"device_id": d, "task_id": task_id, "group_number": group} for d, group in groups.items()]
        if rows:
            self._write(sql.put_member, rows)

    def group_of(self, task_id: int, device_id: str) -> int | None:
        found: int | None = self._read(sql.group_of, {"task": task_id, "device": device_id}).scalar()
        return found

    def members(self, task_id: int, *, seen_since: float = 0.0) -> dict[str, int]:
        found = self._read(sql.members, {"task": task_id, "seen_since": seen_since})
        return {row.device_id: row.group_number for row in found}


def _able(seen_since: float, min_examples: int, runtimes: Collection[str], memory_mb: int) -> dict[str, Any]:
    return {
        "state": DeviceState.ACTIVE,
        "seen_since": seen_since,
        "min_examples": min_examples,
        "runtimes": list(runtimes),
        "needed_mb": memory_mb,
    }
