"""The SQL store: the Store protocol on SQLite or PostgreSQL, durable to the last acknowledged commit."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from sqlalchemy import Connection

from fedtt.errors import UnavailableError
from storage.backend import Backend, errors_in_words, open_backend
from storage.migrate import upgrade
from storage.sql_transaction import SqlTransaction

__all__ = ["SqlStore", "change_schema"]

_ATTEMPTS = 6
_APART_S = 0.5
_WIPED_TOGETHER = 128  #: payloads in one transaction: other commits wait for so many
_LOOK_AGAIN_S = 60.0


def change_schema(backend: Backend, change: Callable[[Connection], None]) -> None:
    """Change the tables with traffic on, in one transaction.

    On PostgreSQL a change and a reader may wait for one another; one of the two is given up, and tries again.
    """
    for left in reversed(range(_ATTEMPTS)):
        try:
            with errors_in_words(backend), backend.writer.begin() as connection:
                change(connection)
        except UnavailableError:
            if not left:
                raise
            time.sleep(_APART_S)
        else:
            return


class SqlStore:
    """A ledger in a database: one writing connection, several that read beside it."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._log_due = self._wipe_due = True  # a process before this one may have ended without
        self._wiped_to, self._looked_at = 0, time.monotonic()

    @classmethod
    def open(cls, database: str | Path, *, busy_timeout_s: float = 10.0, alone: bool = True) -> Self:
        """Open or create the database and migrate it to this program's schema; raises StorageError.

        database: a path, or a URL like sqlite:///ledger.db or postgresql+psycopg://fedtt@localhost/fedtt.
        busy_timeout_s: how long a transaction waits for another process before it is given up.
        alone: no other process uses it; False on SQLite for several servers on one machine.
        """
        store = cls(open_backend(database, busy_timeout_s=busy_timeout_s, alone=alone))
        try:
            change_schema(store._backend, lambda connection: upgrade(connection, store.where))
            with errors_in_words(store._backend):
                store._backend.open_readers()
        except BaseException:
            store.close()
            raise
        return store

    @property
    def where(self) -> str:
        """Which database, for people."""
        return self._backend.where

    @property
    def is_shared(self) -> bool:
        """Whether other processes may use the same ledger at the same time."""
        return self._backend.is_shared

    @contextmanager
    def transaction(self) -> Iterator[SqlTransaction]:
        with errors_in_words(self._backend), self._backend.begin() as connection:
            tx = SqlTransaction(connection, self._backend, readonly=False)
            yield tx
            tx.refuse_if_broken()
            if tx.has_settled:
                self._wipe_from_start()
            self._log_due |= tx.has_wiped

    @contextmanager
    def reading(self) -> Iterator[SqlTransaction]:
        with errors_in_words(self._backend), self._backend.reader.begin() as connection:
            yield SqlTransaction(connection, self._backend, readonly=True)

    def wipe(self) -> bool:
        if self.is_shared and time.monotonic() >= self._looked_at + _LOOK_AGAIN_S:
            self._wipe_from_start()  # a server may have died before it has wiped what it settled
        if self._wipe_due:
            with self.transaction() as tx:
                gone = tx.wipe(after=self._wiped_to, limit=_WIPED_TOGETHER)
            self._wipe_due = len(gone) == _WIPED_TOGETHER
            self._wiped_to = max(gone, default=0)
        return self._wipe_due

    def _wipe_from_start(self) -> None:
        self._wipe_due, self._wiped_to, self._looked_at = True, 0, time.monotonic()

    def maintain(self) -> bool:
        """Have what was wiped leave the write-ahead log too, so that no old payload stays in it."""
        if self._log_due and not self._wipe_due:
            with errors_in_words(self._backend):
                self._log_due = not self._backend.empty_log()
        return not (self._log_due or self._wipe_due)

    def close(self) -> None:
        self._backend.reader.dispose()
        self._backend.writer.dispose()
