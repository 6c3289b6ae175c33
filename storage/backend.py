"""What the SQL store needs of a kind of database, and which kind an address means."""

from __future__ import annotations

import sqlite3
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import SQLAlchemyError

from fedtt.errors import StorageError
from storage.engine import SqliteBackend
from storage.postgresql import PostgresqlBackend, is_postgresql
from storage.rows import Rows

__all__ = ["Backend", "errors_in_words", "is_shared", "open_backend"]


class Backend(Protocol):
    """A database whose writing transactions happen one after another; each that reads sees one state."""

    where: str  #: for people, without a password
    writer: Engine
    reader: Engine
    is_shared: bool  #: whether other processes may use it at the same time
    undoes_refused_alone: bool  #: of a row that it refuses it undoes that statement alone

    def in_words(self, error: Exception) -> StorageError:
        """What the database raised, as what, where and what to do."""
        ...

    def begin(self) -> AbstractContextManager[Connection]:
        """A writing transaction, which has its turn."""
        ...

    def append(self, connection: Connection, rows: Rows[Any], records: Collection[Any]) -> bool:
        """Add records whose keys are new by what is faster than INSERT; False where nothing is."""
        ...

    def put_all(self, connection: Connection, rows: Rows[Any], records: Collection[Any]) -> bool:
        """Write records of different keys, new or not, at once; False where one by one is as fast."""
        ...

    def open_readers(self) -> None:
        """Take at once what files the readers will need, so that their number never changes."""
        ...

    def empty_log(self) -> bool:
        """Let what was settled leave the logs; False where that has to be tried again."""
        ...


def is_shared(database: str | Path) -> bool:
    """Whether what this path or URL names is always for several processes, also on other machines."""
    return isinstance(database, str) and is_postgresql(database)


def open_backend(database: str | Path, *, busy_timeout_s: float, alone: bool = True) -> Backend:
    """By a path or URL; raises StorageError where it names nothing that can be used.

    alone: no other process uses it; of no meaning for a database that is always shared.
    """
    if is_shared(database):
        return PostgresqlBackend(str(database), busy_timeout_s=busy_timeout_s)
    return SqliteBackend(database, busy_timeout_s=busy_timeout_s, alone=alone)


@contextmanager
def errors_in_words(backend: Backend) -> Iterator[None]:
    """Turn what the database raises into a StorageError that says what, where and what to do."""
    try:
        yield
    except (SQLAlchemyError, sqlite3.Error) as error:
        raise backend.in_words(error) from error
