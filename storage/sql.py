"""The SQL store: the Store protocol on SQLite, durable to the last acknowledged commit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from sqlalchemy import Engine

from storage.engine import database_path, errors_in_words, prepare_file, sqlite_engine
from storage.migrate import upgrade
from storage.sql_transaction import SqlTransaction

__all__ = ["SqlStore"]

_READERS_MS = 200  #: that emptying the log waits for readers; writing waits with it


class SqlStore:
    """A ledger in one SQLite file: one writing connection, several that read beside it."""

    def __init__(self, path: Path, writer: Engine, reader: Engine) -> None:
        self.path, self._writer, self._reader = path, writer, reader
        self._wipe_due = True  # a process before this one may have ended without

    @classmethod
    def open(cls, database: str | Path, *, busy_timeout_s: float = 10.0) -> Self:
        """Open or create the database and migrate it to this program's schema; raises StorageError.

        database: a path or a URL like sqlite:///ledger.db.
        busy_timeout_s: how long a transaction waits for another process before it is given up.
        """
        path = database_path(database)
        prepare_file(path)
        writer, reader = (
            sqlite_engine(path, readonly=readonly, busy_timeout_s=busy_timeout_s)
            for readonly in (False, True)
        )
        try:
            with errors_in_words(path), writer.begin() as connection:
                upgrade(connection, path)
        except BaseException:
            writer.dispose()
            raise
        return cls(path, writer, reader)

    @contextmanager
    def transaction(self) -> Iterator[SqlTransaction]:
        with errors_in_words(self.path), self._writer.begin() as connection:
            tx = SqlTransaction(connection, self.path, readonly=False)
            yield tx
            tx.refuse_if_broken()
            self._wipe_due |= tx.has_wiped

    @contextmanager
    def reading(self) -> Iterator[SqlTransaction]:
        with errors_in_words(self.path), self._reader.begin() as connection:
            yield SqlTransaction(connection, self.path, readonly=True)

    def maintain(self) -> bool:
        """Move the write-ahead log into the database and empty it, so that no old payload stays in it."""
        if self._wipe_due:
            self._wipe_due = not self._empty_log()
        return not self._wipe_due

    def _empty_log(self) -> bool:
        connection = self._writer.raw_connection()
        try:
            with errors_in_words(self.path):
                cursor = connection.cursor()
                patience: int = cursor.execute("PRAGMA busy_timeout").fetchone()[0]
                cursor.execute(f"PRAGMA busy_timeout = {_READERS_MS}")
                try:
                    busy: int = cursor.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]
                finally:
                    cursor.execute(f"PRAGMA busy_timeout = {patience}")
                return not busy
        finally:
            connection.close()

    def close(self) -> None:
        self._reader.dispose()
        self._writer.dispose()
