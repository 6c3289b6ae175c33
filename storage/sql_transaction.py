"""One transaction of the SQL store: records in, records out, each method one of `storage.statements`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import msgspec
from msgspec.structs import asdict, astuple, replace
from sqlalchemy import Connection, CursorResult, Executable
from sqlalchemy.dialects.postgresql import Insert
from sqlalchemy.exc import IntegrityError, SQLAlchemyError

from fedtt.errors import StorageError
from fedtt.sampling import Candidate
from storage import statements as sql
from storage.backend import Backend
from storage.batch import Batch
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

__all__ = ["SqlTransaction"]

R = TypeVar("R", bound=msgspec.Struct)

_EVER = -1e300  #: before any time
_PAGE = 64  #: updates held in memory at once while they are iterated, at most 50 KB each


class SqlTransaction:
    """Reads and writes on one connection; keeps `storage.store.Transaction`."""

    def __init__(self, connection: Connection, backend: Backend, *, readonly: bool) -> None:
        self._connection, self._backend, self._readonly = connection, backend, readonly
        self._newest_update: int | None = None  #: its sequence, once it was asked for
        self._batch: Batch | None = None
        self._broken: StorageError | None = None
        self.moved: Counter[UpdateState] = Counter()
        self.has_wiped = False  #: whether bytes went that the log still holds

    def refuse_if_broken(self) -> None:
        """Raise what broke the transaction: the database takes no more of it, as SQLite on a full disk."""
        if self._broken:
            raise self._broken

    def _read(self, statement: Executable, parameters: Any = None) -> CursorResult[Any]:
        self._write_behind()
        return self._execute(statement, parameters)

    def _execute(self, statement: Executable, parameters: Any) -> CursorResult[Any]:
        with self._refusals_in_words():
            return self._connection.execute(statement, parameters)

    def _insert(self, rows: sql.Rows[Any], statement: Insert, records: list[Any]) -> None:
        with self._refusals_in_words():
            if (
                statement is rows.add
            ):  # none of these keys is there: that was looked at, and nobody else writes
                fields = rows.record.__struct_fields__
                if self._backend.append(self._connection, rows.table, fields, map(astuple, records)):
                    return
            text, values = rows.text_of(statement, self._connection.dialect)
            self._connection.exec_driver_sql(text, [values(record) for record in records])

    @contextmanager
    def _refusals_in_words(self) -> Iterator[None]:
        self.refuse_if_broken()
        try:
            yield
        except SQLAlchemyError as error:
            refusal = self._backend.in_words(error)
            if not (self._backend.undoes_refused_alone and isinstance(error, IntegrityError)):
                self._broken = refusal
            raise refusal from error

    def _write(self, statement: Executable, parameters: Any) -> CursorResult[Any]:
        self._refuse_if_reading()
        self._write_behind()
        if self._batch is not None:
            self._batch.forget()
        return self._execute(statement, parameters)

    def _refuse_if_reading(self) -> None:
        if self._readonly:
            raise StorageError("a reading transaction wrote; this is a bug in the caller")

    @contextmanager
    def together(self, leases: Collection[str], devices: Collection[str] = ()) -> Iterator[None]:
        self._batch = Batch()
        try:
            self._read_ahead(self._batch, leases, devices)
            yield
            self._write_behind()
        finally:
            self._batch = None

    def _read_ahead(self, batch: Batch, leases: Collection[str], devices: Collection[str]) -> None:
        found = self._named(batch, sql.leases, sql.leases_named, leases)
        self._named(batch, sql.updates, sql.updates_named, leases)
        owners = {lease.device_id for lease in found} | set(devices)
        self._named(batch, sql.devices, sql.devices_named, owners)
        if not self._readonly:
            parts = self._all(sql.participations, sql.participations_of, names=owners)
            batch.expect(sql.participations, [(lease.device_id, lease.task_id) for lease in found], parts)

    def _named(
        self, batch: Batch, rows: sql.Rows[R], statement: Executable, names: Collection[str]
    ) -> list[R]:
        found = self._all(rows, statement, names=names) if names else []
        batch.expect(rows, [(name,) for name in names], found)
        return found

    def _write_behind(self) -> None:
        """Write what the batch has kept back, one statement for all rows of a table."""
        if self._batch is not None:
            for written in self._batch.take_written():
                self._insert(*written)
            for state, names in self._batch.take_moved().items():
                self._execute(sql.move_leases, {"moved_to": state, "names": names})

    def _put(self, rows: sql.Rows[R], record: R, **more: object) -> None:
        if self._batch is not None and self._batch.keeps_back(rows):
            self._refuse_if_reading()
            self._batch.write(rows, rows.put, record)
        else:
            self._write(rows.put, asdict(record) | more)

    def _one(self, rows: sql.Rows[R], statement: Executable, **parameters: object) -> R | None:
        if self._batch is None:
            return self._first(rows, statement, parameters)
        return self._batch.recall(rows, statement, parameters, self._first)

    def _first(self, rows: sql.Rows[R], statement: Executable, parameters: dict[str, object]) -> R | None:
        return next(iter(rows.of(self._read(statement, parameters))), None)

    def _all(self, rows: sql.Rows[R], statement: Executable, **parameters: object) -> list[R]:
        return rows.of(self._read(statement, parameters))

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

    def put_bundle(self, bundle: Bundle) -> None:
        self._put(sql.bundles, bundle)

    def bundle(self, sha256: str) -> Bundle | None:
        return self._one(sql.bundles, sql.bundles.get, sha256=sha256)

    def add_task(self, task: Task) -> Task:
        task = replace(task, id=self._read(sql.newest_task).scalar_one() + 1)
        if self._write(sql.tasks.add, asdict(task) | {"name": task.spec.name}).rowcount == 0:
            raise StorageError(f"a task named {task.spec.name!r} exists already")
        return task

    def put_task(self, task: Task) -> None:
        self._put(sql.tasks, task, name=task.spec.name)

    def task(self, name: str) -> Task | None:
        return self._one(sql.tasks, sql.task_by_name, name=name)

    def task_by_id(self, task_id: int) -> Task | None:
        return self._one(sql.tasks, sql.tasks.get, id=task_id)

    def tasks(self) -> list[Task]:
        return self._all(sql.tasks, sql.all_tasks)

    def add_version(self, version: Version) -> None:
        if self._write(sql.versions.add, asdict(version)).rowcount == 0:
            raise StorageError(f"version {version.number} of branch {version.branch!r} exists already")

    def put_version(self, version: Version) -> None:
        self._put(sql.versions, version)

    def latest_version(self, task_id: int, branch: str) -> Version | None:
        return self._one(sql.versions, sql.latest_version, task_id=task_id, branch=branch)

    def version(self, task_id: int, branch: str, number: int) -> Version | None:
        return self._one(sql.versions, sql.versions.get, task_id=task_id, branch=branch, number=number)

    def versions(self, task_id: int) -> list[Version]:
        return self._all(sql.versions, sql.versions_of, task_id=task_id)

    def has_version(self, sha256: str) -> bool:
        return self._read(sql.version_named, {"sha256": sha256}).first() is not None

    def put_round(self, round_: Round) -> None:
        self._put(sql.rounds, round_)

    def latest_round(self, task_id: int, branch: str) -> Round | None:
        return self._one(sql.rounds, sql.latest_round, task_id=task_id, branch=branch)

    def round(self, task_id: int, branch: str, number: int) -> Round | None:
        return self._one(sql.rounds, sql.rounds.get, task_id=task_id, branch=branch, number=number)

    def rounds(self, task_id: int, *, limit: int = 1000) -> list[Round]:
        return self._all(sql.rounds, sql.newest_rounds, task_id=task_id, limit=limit)

    def count_rounds(self, task_id: int) -> dict[RoundState, int]:
        return {row.state: row.rounds for row in self._read(sql.count_rounds, {"task_id": task_id})}

    def put_evaluation(self, evaluation: Evaluation) -> None:
        self._put(sql.evaluations, evaluation)

    def evaluation(self, lease_id: str) -> Evaluation | None:
        return self._one(sql.evaluations, sql.evaluations.get, lease_id=lease_id)

    def evaluations(self, task_id: int, branch: str, version_number: int) -> list[Evaluation]:
        place = {"task_id": task_id, "branch": branch, "version_number": version_number}
        return self._all(sql.evaluations, sql.evaluations_of, **place)

    def forget_evaluations(self, device_id: str) -> None:
        self.has_wiped = True
        self._write(sql.forget_evaluations, {"device": device_id})

    def put_lease(self, lease: Lease) -> None:
        if self._batch is not None and self._batch.knows(sql.leases, lease):
            self._refuse_if_reading()
            self._batch.move(lease)
        else:
            self._put(sql.leases, lease)

    def lease(self, lease_id: str) -> Lease | None:
        return self._one(sql.leases, sql.leases.get, id=lease_id)

    def lease_of(self, device_id: str, task_id: int, branch: str, round_number: int) -> Lease | None:
        place = {"task_id": task_id, "branch": branch, "round_number": round_number}
        return self._one(sql.leases, sql.lease_of, device_id=device_id, **place)

    def leases_of(self, device_id: str, state: LeaseState) -> list[Lease]:
        return self._all(sql.leases, sql.leases_of, device_id=device_id, state=state)

    def count_leases(self, task_id: int, branch: str, round_number: int) -> dict[LeaseState, int]:
        place = {"task_id": task_id, "branch": branch, "round_number": round_number}
        return {row.state: row.leases for row in self._read(sql.count_leases, place)}

    def expire_leases(self, now: float) -> int:
        return self._write(sql.expire_leases, {"now": now}).rowcount

    def add_update(self, update: Update) -> Update:
        update = replace(update, sequence=self._next_update())
        if self._batch is not None and not self._readonly and self.update(update.lease_id) is None:
            self._batch.write(sql.updates, sql.updates.add, update)
        elif self._write(sql.updates.add, asdict(update)).rowcount == 0:
            raise StorageError(f"lease {update.lease_id} has an update already")
        self._newest_update = update.sequence
        self.moved[update.state] += 1
        return update

    def _next_update(self) -> int:
        """The sequence after the newest: nobody else writes meanwhile, so the ledger has no gaps."""
        if self._newest_update is None:
            self._newest_update = int(self._read(sql.newest_update).scalar_one())
        return self._newest_update + 1

    def update(self, lease_id: str) -> Update | None:
        return self._one(sql.updates, sql.updates.get, lease_id=lease_id)

    def count_updates(self, task_id: int, branch: str, round_number: int, state: UpdateState) -> int:
        place = {"task_id": task_id, "branch": branch, "round_number": round_number, "state": state}
        return int(self._read(sql.count_updates, place).scalar_one())

    def updates(self, task_id: int, branch: str, round_number: int, state: UpdateState) -> Iterator[Update]:
        place = {"task_id": task_id, "branch": branch, "round_number": round_number, "state": state}
        page: list[Update] = []
        while True:
            after = page[-1].sequence if page else 0
            page = self._all(sql.updates, sql.page_of_updates, after=after, limit=_PAGE, **place)
            yield from page
            if len(page) < _PAGE:
                return

    def updates_of(self, device_id: str, state: UpdateState) -> list[Update]:
        return self._all(sql.updates, sql.updates_of, device_id=device_id, state=state)

    def settle(
        self,
        updates: Iterable[str],
        state: UpdateState,
        *,
        reason: str = "",
        folded_into: int | None = None,
    ) -> int:
        end = {"state": state, "reason": reason, "folded_into": folded_into}
        rows = [{"lease": lease_id, **end} for lease_id in updates]
        self.has_wiped |= bool(rows)
        moved = self._write(sql.settle, rows).rowcount if rows else 0
        self.moved[state] += moved
        return moved

    def forget_settled(self, device_id: str) -> int:
        self.has_wiped = True
        return self._write(sql.forget_settled, {"device": device_id}).rowcount


def _able(seen_since: float, min_examples: int, runtimes: Collection[str], memory_mb: int) -> dict[str, Any]:
    return {
        "state": DeviceState.ACTIVE,
        "seen_since": seen_since,
        "min_examples": min_examples,
        "runtimes": list(runtimes),
        "needed_mb": memory_mb,
    }
