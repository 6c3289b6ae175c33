"""What a transaction has read ahead and keeps back while many like things happen together."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeVar

import msgspec
from sqlalchemy import Executable
from sqlalchemy.dialects.postgresql import Insert

from storage.records import Lease, LeaseState
from storage.rows import Rows
from storage.statements import leases, participations, payloads, updates

__all__ = ["Batch", "Written"]

R = TypeVar("R", bound=msgspec.Struct)
First = Callable[[Rows[R], Executable, dict[str, object]], R | None]
#: an update after the lease it names, its payload last
_KEPT_BACK: tuple[Rows[Any], ...] = (leases, participations, updates, payloads)


class Written(NamedTuple):
    """Records that one statement writes; their values are plain."""

    rows: Rows[Any]
    statement: Insert
    records: dict[tuple[object, ...], Any]  #: by their keys: what is written twice is as it was last


class Batch:
    """Records by the statement that reads them, and rows that wait to be written.

    Nobody else writes during a writing transaction and a reading one has one snapshot: what was read stays
    true until the transaction itself changes it.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[int, tuple[object, ...]], Any] = {}
        self._written: dict[int, dict[int, Written]] = {}
        self._moved: dict[str, LeaseState] = {}

    def expect(self, rows: Rows[R], keys: Iterable[tuple[object, ...]], found: Iterable[R]) -> None:
        """All there is of these keys was found."""
        place = id(rows.get)
        self._known |= dict.fromkeys((place, key) for key in keys)
        self._known |= {(place, rows.key_of(record)): record for record in found}

    def recall(
        self, rows: Rows[R], statement: Executable, parameters: dict[str, object], first: First[R]
    ) -> R | None:
        """What this statement finds; asked once unless it could find a row that is kept back."""
        if statement is not rows.get and rows in _KEPT_BACK:
            return first(rows, statement, parameters)
        key = (id(statement), tuple(parameters.values()))
        if key not in self._known:
            self._known[key] = first(rows, statement, parameters)
        record: R | None = self._known[key]
        return record

    def keeps_back(self, rows: Rows[Any]) -> bool:
        return rows in _KEPT_BACK

    def knows(self, rows: Rows[R], record: R) -> bool:
        """Whether there is a row of this record's key."""
        return self._known.get((id(rows.get), rows.key_of(record))) is not None

    def write(self, rows: Rows[R], statement: Insert, record: R) -> None:
        self._known[id(rows.get), rows.key_of(record)] = record
        written = self._written.setdefault(_KEPT_BACK.index(rows), {})
        waiting = written.setdefault(id(statement), Written(rows, statement, {}))
        waiting.records[rows.key_of(record)] = record

    def move(self, lease: Lease) -> None:
        """Write a lease that is there: its state."""
        self._known[id(leases.get), leases.key_of(lease)] = lease
        self._moved[lease.id] = lease.state

    def take_written(self) -> list[Written]:
        """The rows that wait, by the statement that writes them, in an order their keys allow."""
        written, self._written = self._written, {}
        return [statement for _, table in sorted(written.items()) for statement in table.values()]

    def take_moved(self) -> dict[LeaseState, list[str]]:
        """The leases that wait for another state, once those that are new are written."""
        moved, self._moved = self._moved, {}
        return {state: [name for name in moved if moved[name] is state] for state in set(moved.values())}

    def forget(self) -> None:
        """Something else was written: what was read may be so no longer."""
        self._known.clear()
