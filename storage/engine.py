"""SQLite as a ledger needs it: connections that are durable, strict and private, and its errors in words."""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any, cast

from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError
from sqlalchemy.pool import QueuePool

from fedtt.errors import StorageError
from storage.rows import Rows

__all__ = ["SqliteBackend", "database_path", "prepare_file", "sqlite_engine"]

_READERS = 4
_READERS_MS = 200  #: that emptying the log waits for readers; writing waits with it
_LOOK_AGAIN_S = 0.001  #: whether it is this process's turn to write
_OLDEST = (3, 35)  #: the first SQLite with RETURNING

_PRAGMAS = {
    "synchronous": "FULL",  # NORMAL loses acknowledged commits when the power goes
    "foreign_keys": "ON",
    "secure_delete": "ON",  # payloads are private: what is deleted is overwritten with zeros
    "temp_store": "MEMORY",  # for the same reason nothing spills into temporary files
    "wal_autocheckpoint": 4000,  # pages, 16 MB: those that change in each commit are copied less often
}

_CAUSES = {
    sqlite3.SQLITE_BUSY: "another process keeps it locked: stop that process, or try again later",
    sqlite3.SQLITE_FULL: "the disk is full, nothing of this change was kept: free some space and repeat it",
    sqlite3.SQLITE_NOTADB: "the file is not a SQLite database: name another one, or move it away",
    sqlite3.SQLITE_CORRUPT: "the database is damaged: restore it from a backup",
    sqlite3.SQLITE_READONLY: "it may not be written: give this user write access to file and directory",
    sqlite3.SQLITE_IOERR: "the disk failed to read or write: check it, then start again",
}


class SqliteBackend:
    """One file on this machine: one connection of a process writes, several read beside it."""

    undoes_refused_alone = True

    def __init__(self, database: str | Path, *, busy_timeout_s: float, alone: bool = True) -> None:
        """alone: no other process uses it."""
        self.is_shared = not alone
        self.path = database_path(database)
        prepare_file(self.path)
        self.where = str(self.path)
        self.writer, self.reader = (
            sqlite_engine(self.path, readonly=readonly, busy_timeout_s=busy_timeout_s)
            for readonly in (False, True)
        )

    def in_words(self, error: Exception) -> StorageError:
        return _in_words(error, self.path)

    def begin(self) -> AbstractContextManager[Connection]:
        return self.writer.begin()

    def append(self, connection: Connection, rows: Rows[Any], records: Collection[Any]) -> bool:
        return False

    def put_all(self, connection: Connection, rows: Rows[Any], records: Collection[Any]) -> bool:
        return False

    def open_readers(self) -> None:
        with ExitStack() as all_at_once:
            for _ in range(_READERS):
                all_at_once.enter_context(self.reader.connect())

    def empty_log(self) -> bool:
        """Move the write-ahead log into the database and empty it; False where a reader is in the way."""
        with closing(self.writer.raw_connection()) as pooled:
            connection = cast("sqlite3.Connection", pooled.driver_connection)
            with _patient(connection, _READERS_MS):
                (is_busy, *_) = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            return not is_busy


def database_path(database: str | Path) -> Path:
    """The file that a path or a URL like sqlite:///ledger.db names; raises StorageError for other URLs."""
    if isinstance(database, Path) or "://" not in database:
        path = Path(database)
    else:
        path = Path(_from_url(database))
    if path.name in {"", ":memory:"}:
        raise StorageError(f"database {str(database)!r} is no file: name one, for example ledger.db")
    return path


def _from_url(text: str) -> str:
    try:
        url = make_url(text)
    except ArgumentError:
        raise StorageError(f"database {text!r} is no URL: write sqlite:///ledger.db") from None
    if url.get_backend_name() != "sqlite" or url.query:
        shown = url.render_as_string(hide_password=True)
        raise StorageError(
            f"database {shown!r} cannot be used: name sqlite:///FILE or postgresql+psycopg://USER@HOST/NAME"
        )
    return url.database or ""


def prepare_file(path: Path) -> None:
    """Make the file, for its owner alone, or see that it may be written; raises StorageError.

    SQLite would open a read-only file all the same, and leave a read-only log beside it.
    """
    if path.is_file():
        if not _writable(path):
            raise StorageError(f"{path}: {_CAUSES[sqlite3.SQLITE_READONLY]}")
        return
    try:
        path.touch(mode=0o600)
    except OSError:
        raise StorageError(f"{path}: {_why_not_opened(path)}") from None


def sqlite_engine(path: Path, *, readonly: bool, busy_timeout_s: float) -> Engine:
    """An engine whose transactions are BEGIN IMMEDIATE on one connection, or read-only on several.

    The driver's own transaction control is off, as SQLAlchemy's SQLite documentation advises: it would
    begin late, and a transaction that reads first could then fail to write.
    """
    if sqlite3.sqlite_version_info < _OLDEST:
        raise StorageError(
            f"SQLite {sqlite3.sqlite_version} is too old: use a Python with SQLite 3.35 or newer"
        )
    engine = create_engine(
        URL.create("sqlite", database=str(path)),
        creator=lambda: _connect(path, readonly=readonly, busy_timeout_s=busy_timeout_s),
        poolclass=QueuePool,
        pool_size=_READERS if readonly else 1,
        max_overflow=0,  # SQLite keeps the file of a connection that is closed open, while others have locks
        pool_timeout=busy_timeout_s,
    )

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        if readonly:
            connection.exec_driver_sql("BEGIN")
        else:
            _take_turn(cast("sqlite3.Connection", connection.connection.driver_connection), busy_timeout_s)

    return engine


def _take_turn(connection: sqlite3.Connection, patience_s: float) -> None:
    """Begin to write as soon as no other process does.

    SQLite itself looks ever less often, after 0.1 s in the end: a busy process begins again in between.
    """
    given_up_at = time.monotonic() + patience_s
    with _patient(connection, 0):
        while True:
            try:
                connection.execute("BEGIN IMMEDIATE")
            except sqlite3.OperationalError as error:
                is_busy = error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_BUSY
                if not is_busy or time.monotonic() >= given_up_at:
                    raise
                time.sleep(_LOOK_AGAIN_S)
            else:
                return


@contextmanager
def _patient(connection: sqlite3.Connection, wait_ms: int) -> Iterator[None]:
    """Let it wait so long for other connections."""
    (before,) = connection.execute("PRAGMA busy_timeout").fetchone()
    connection.execute(f"PRAGMA busy_timeout = {wait_ms}")
    try:
        yield
    finally:
        connection.execute(f"PRAGMA busy_timeout = {before}")


def _connect(path: Path, *, readonly: bool, busy_timeout_s: float) -> sqlite3.Connection:
    connection = sqlite3.connect(
        path, timeout=busy_timeout_s, isolation_level=None, check_same_thread=False, cached_statements=256
    )
    try:
        (mode,) = connection.execute("PRAGMA journal_mode = WAL").fetchone()
        if mode != "wal":
            raise StorageError(f"{path}: no write-ahead log on this file system: put it on a local disk")
        for name, value in _PRAGMAS.items():
            connection.execute(f"PRAGMA {name} = {value}")
        connection.execute(f"PRAGMA query_only = {int(readonly)}")
    except BaseException:
        connection.close()
        raise
    return connection


def _in_words(error: Exception, path: Path) -> StorageError:
    cause = error.orig if isinstance(error, DBAPIError) else error
    said = str(cause).partition("\n")[0]
    code = getattr(cause, "sqlite_errorcode", 0) & 0xFF  # the low byte is the kind, the rest its detail
    if code == sqlite3.SQLITE_CANTOPEN:
        return StorageError(f"{path}: {_why_not_opened(path)}")
    if code == sqlite3.SQLITE_CONSTRAINT:
        return StorageError(f"{path}: the ledger refuses this row: {said}")
    return StorageError(f"{path}: {_CAUSES.get(code, f'the database failed: {said}')}")


def _why_not_opened(path: Path) -> str:
    directory = path.parent
    if not directory.is_dir():
        return f"directory {directory} does not exist: create it"
    if path.is_dir():
        return "this is a directory: name a file in it"
    if not _writable(directory):
        return f"directory {directory} is read-only: give this user write access to it, or choose another"
    return "it cannot be opened: give this user access to the file"


def _writable(path: Path) -> bool:
    return os.access(path, os.W_OK, effective_ids=os.access in os.supports_effective_ids)
