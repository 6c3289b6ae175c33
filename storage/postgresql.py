"""PostgreSQL as a ledger that several processes share: one order of writing, sessions that end by themselves.

Writing transactions begin by taking one advisory lock, which their commit or the end of their session gives
back: so they happen one after another, as on SQLite, and no decision of the coordinator can rest on what
another process is just changing. Group commit makes up for the waiting. Those that read have one snapshot
and no lock.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from msgspec.structs import astuple
from sqlalchemy import (
    URL,
    BigInteger,
    Connection,
    Double,
    Engine,
    LargeBinary,
    Text,
    create_engine,
    event,
    make_url,
)
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from fedtt.errors import StorageError, UnavailableError
from storage.rows import Rows, plain

__all__ = ["CONNECTIONS", "PostgresqlBackend", "is_postgresql"]

_LEDGER_LOCK = 0x66656474_74000001  #: "fedtt", and the first of its locks
_READERS = 4
CONNECTIONS = _READERS + 1  #: that one server holds at most
_STOPPED_S = 5  #: after which a transaction whose process has stopped is ended, so that others go on
_NETWORK = {
    "connect_timeout": 5,
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 3,
    "tcp_user_timeout": 10_000,
    "application_name": "fedtt",
}
_EXAMPLE = "postgresql+psycopg://fedtt@localhost/fedtt"
_NAMES = {BigInteger: "int8", Double: "float8", LargeBinary: "bytea", Text: "text"}  #: in its own words

#: classes of SQLSTATE after which the same may well succeed later
_PASSING = {
    "08": "the connection broke",
    "25": "the transaction was given up",
    "40": "the transaction was given up",
    "53": "the server is short of room, memory or connections",
    "55": "another process keeps the ledger locked",
    "57": "the server is going down or ended the connection",
}

#: in what a server says that takes no connections now; of others it refuses, libpq gives no SQLSTATE either
_SOON = ("starting up", "shutting down", "recovery", "too many", "remaining connection slots", "terminating")


def is_postgresql(database: str) -> bool:
    return database.partition("://")[0].partition("+")[0] in {"postgresql", "postgres"}


class PostgresqlBackend:
    """One database, which any number of processes may use at a time."""

    is_shared = True
    undoes_refused_alone = False

    def __init__(self, database: str, *, busy_timeout_s: float) -> None:
        url = _checked_url(database)
        self.where = url.render_as_string(hide_password=True)
        self.writer = _engine(url, readonly=False, busy_timeout_s=busy_timeout_s)
        self.reader = _engine(url, readonly=True, busy_timeout_s=busy_timeout_s)

        @event.listens_for(self.writer, "begin")
        def _take_turns(connection: Connection) -> None:
            connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_LEDGER_LOCK})")

    def in_words(self, error: Exception) -> StorageError:
        cause = error.orig if isinstance(error, DBAPIError) else error
        said = str(cause).strip().partition("\n")[0]
        state = getattr(cause, "sqlstate", None) or ""
        if state[:2] == "23":
            return StorageError(f"{self.where}: the ledger refuses this row: {said}")
        refused = not state and "FATAL:" in said and not any(words in said for words in _SOON)
        if refused or state[:2] == "28" or state == "3D000":
            return StorageError(f"{self.where}: {said}: see that user, password and database are right")
        if state == "42501":
            return StorageError(f"{self.where}: {said}: make this user the owner of its database")
        lost = isinstance(error, PoolTimeoutError) or (
            isinstance(error, DBAPIError) and _is_lost(error, state)
        )
        if lost or state[:2] in _PASSING:
            why = _PASSING.get(state[:2], "the server cannot be reached")
            return UnavailableError(f"{self.where}: {why}: {said}")
        return StorageError(f"{self.where}: the database failed: {said}")

    @contextmanager
    def begin(self) -> Iterator[Connection]:
        """On another connection where that of before was lost, which taking the lock is the first to meet."""
        with ExitStack() as stack:
            try:
                connection = stack.enter_context(self.writer.begin())
            except DBAPIError as error:
                if not error.connection_invalidated:
                    raise
                connection = stack.enter_context(self.writer.begin())
            yield connection

    def append(self, connection: Connection, rows: Rows[Any], records: Collection[Any]) -> bool:
        """By COPY in its binary form, which costs both sides less than an INSERT for each row."""
        from psycopg import Error

        driver: Any = connection.connection.driver_connection
        fields, columns = rows.record.__struct_fields__, rows.table.c
        text = f"COPY {rows.table.name} ({', '.join(fields)}) FROM STDIN (FORMAT BINARY)"
        try:
            with driver.cursor() as cursor, cursor.copy(text) as copy:
                copy.set_types([_NAMES[type(plain(columns[field].type))] for field in fields])
                for record in records:
                    copy.write_row(astuple(record))
        except Error as error:
            raise DBAPIError(text, None, error) from error
        return True

    def put_all(self, connection: Connection, rows: Rows[Any], records: Collection[Any]) -> bool:
        """By one statement for all: each costs both sides more than its row."""
        by_column = zip(*map(astuple, records), strict=True)
        values = dict(zip(rows.record.__struct_fields__, map(list, by_column), strict=True))
        connection.execute(rows.put_all, values)
        return True

    def open_readers(self) -> None:
        """They come when they are needed first: the server counts its connections, and may be restarted."""

    def empty_log(self) -> bool:
        """Autovacuum and PostgreSQL's own recycling of its log do this."""
        return True


def _is_lost(error: DBAPIError, state: str) -> bool:
    """Whether the connection is gone, or never came about."""
    return error.connection_invalidated or (not state and type(error.orig).__name__ == "OperationalError")


def _checked_url(database: str) -> URL:
    try:
        url = make_url(database)
    except ArgumentError:
        raise StorageError(f"database {database!r} is no URL: write {_EXAMPLE}") from None
    if url.drivername != "postgresql+psycopg" or not url.database:
        shown = url.render_as_string(hide_password=True)
        raise StorageError(f"database {shown!r} names no PostgreSQL database: write {_EXAMPLE}")
    return url


def _engine(url: URL, *, readonly: bool, busy_timeout_s: float) -> Engine:
    settings = {
        "default_transaction_isolation": r"read\ committed",  # who waited for its turn sees what was written
        "synchronous_commit": "on",  # a commit that is acknowledged is on disk
        "idle_in_transaction_session_timeout": _STOPPED_S * 1000 if not readonly else 60_000,
        "lock_timeout": int(busy_timeout_s * 1000),
        "client_min_messages": "warning",
        "enable_seqscan": "off",  # a plan made while a table was small would read all of it once it is big
        "jit": "off",  # whose compilation takes longer than any statement here
    }
    options = " ".join(f"-c {name}={value}" for name, value in settings.items())
    try:
        engine = create_engine(
            url,
            connect_args=_NETWORK | {"options": options},
            pool_size=_READERS if readonly else 1,
            max_overflow=0,
            pool_timeout=busy_timeout_s,
            pool_pre_ping=readonly,  # after a restart of the server no reader meets its lost connection
        )
    except (ImportError, NoSuchModuleError):
        raise StorageError("PostgreSQL needs a driver: pip install 'fedtt[postgresql]'") from None
    if readonly:

        @event.listens_for(engine, "connect")
        def _one_snapshot(connection: Any, _: object) -> None:
            from psycopg import IsolationLevel

            connection.isolation_level = IsolationLevel.REPEATABLE_READ
            connection.read_only = True

    return engine
