"""How a transaction of the SQL store reads and writes: one by one, or many like things together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import msgspec
from msgspec.structs import asdict
from sqlalchemy import Connection, CursorResult, Executable
from sqlalchemy.dialects.postgresql import Insert
from sqlalchemy.exc import IntegrityError, SQLAlchemyError

from fedtt.errors import StorageError
from storage import statements as sql
from storage.backend import Backend
from storage.batch import Batch
from storage.records import UpdateState
from storage.rows import Rows

__all__ = ["SqlAccess"]

R = TypeVar("R", bound=msgspec.Struct)


class SqlAccess:
    """One transaction on one connection, whatever the records are."""

    def __init__(self, connection: Connection, backend: Backend, *, readonly: bool) -> None:
        self._connection, self._backend, self._readonly = connection, backend, readonly
        self._newest_update: int | None = None  #: its sequence, once it was asked for
        self._batch: Batch | None = None
        self._broken: StorageError | None = None
        self.moved: Counter[UpdateState] = Counter()
        self.has_settled = False  #: whether there may be payloads to wipe
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

    def _insert(self, rows: Rows[Any], statement: Insert, records: Collection[Any]) -> None:
        with self._refusals_in_words():
            if statement is rows.put:
                if self._backend.put_all(self._connection, rows, records):
                    return
            elif self._backend.append(self._connection, rows, records):
                return  # none of these keys is there: that was looked at, and nobody else writes
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

    def _named(self, batch: Batch, rows: Rows[R], statement: Executable, names: Collection[str]) -> list[R]:
        found = self._all(rows, statement, names=names) if names else []
        batch.expect(rows, [(name,) for name in names], found)
        return found

    def _write_behind(self) -> None:
        """Write what the batch has kept back, one statement for all rows of a table."""
        if self._batch is not None:
            try:
                for rows, statement, records in self._batch.take_written():
                    self._insert(rows, statement, records.values())
            except StorageError as refusal:
                self._broken = refusal  # of what belongs together a part may be written
                raise
            for state, names in self._batch.take_moved().items():
                self._execute(sql.move_leases, {"moved_to": state, "names": names})

    def _put(self, rows: Rows[R], record: R, **more: object) -> None:
        if self._batch is not None and self._batch.keeps_back(rows):
            self._refuse_if_reading()
            self._batch.write(rows, rows.put, record)
        else:
            self._write(rows.put, asdict(record) | more)

    def _one(self, rows: Rows[R], statement: Executable, **parameters: object) -> R | None:
        if self._batch is None:
            return self._first(rows, statement, parameters)
        return self._batch.recall(rows, statement, parameters, self._first)

    def _first(self, rows: Rows[R], statement: Executable, parameters: dict[str, object]) -> R | None:
        return next(iter(rows.of(self._read(statement, parameters))), None)

    def _all(self, rows: Rows[R], statement: Executable, **parameters: object) -> list[R]:
        return rows.of(self._read(statement, parameters))
