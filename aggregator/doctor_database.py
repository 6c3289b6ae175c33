"""What `fedtt doctor` looks at in a ledger: that it answers, is durable, and has this program's schema."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Connection

from aggregator.findings import Finding
from storage.backend import errors_in_words, is_shared, open_backend
from storage.engine import database_path
from storage.migrate import schema_of
from storage.postgresql import CONNECTIONS

__all__ = ["look_at_database"]

_OLDEST_POSTGRESQL = 13
_CLOCK_S = 2.0  #: that the clocks of two machines may differ
_TRIGGERS = {
    "sqlite": {"audit_no_update", "audit_no_delete"},
    "postgresql": {"audit_append_only", "audit_no_truncate"},
}


def look_at_database(database: str | Path) -> Iterator[Finding]:
    """Raises StorageError, or what the database's driver raises, where it cannot be looked at."""
    if is_shared(database):
        yield from _postgresql(str(database))
    else:
        yield from _sqlite(database_path(database))


def _sqlite(path: Path) -> Iterator[Finding]:
    if not path.is_file():
        yield Finding(
            name="database", ok=False, said=f"{path} does not exist", fix="start `fedtt serve` once"
        )
        return
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=5.0)) as file:
        (mode,) = file.execute("PRAGMA journal_mode").fetchone()
        (sound,) = file.execute("PRAGMA quick_check(1)").fetchone()
    said, fix = f"{path} is sound, journal mode wal", ""
    if mode != "wal":
        said = f"{path} has journal mode {mode}, not wal"
        fix = "keep it on a local disk and start `fedtt serve`, which sets it"
    elif sound != "ok":
        said, fix = f"{path} is damaged: {sound}", "restore it from a backup"
    yield Finding(name="database", ok=not fix, said=said, fix=fix)
    with _opened(path) as (connection, _):
        yield from _schema(connection, "SELECT name FROM sqlite_master WHERE type = 'trigger'", "sqlite")


@contextmanager
def _opened(database: str | Path) -> Iterator[tuple[Connection, str]]:
    """As a server's readers connect, which hold nobody up; and where that is, for people."""
    backend = open_backend(database, busy_timeout_s=5.0)
    try:
        with errors_in_words(backend), backend.reader.connect() as connection:
            yield connection, backend.where
    finally:
        backend.writer.dispose()
        backend.reader.dispose()


def _postgresql(database: str) -> Iterator[Finding]:
    with _opened(database) as (connection, where):
        yield _version(connection, where)
        yield _isolation(connection)
        yield _connections(connection)
        yield _durability(connection)
        yield _clocks(connection)
        enabled = (
            "SELECT tgname FROM pg_trigger WHERE tgrelid = to_regclass('audit') "
            "AND NOT tgisinternal AND tgenabled IN ('O', 'A')"
        )
        yield from _schema(connection, enabled, "postgresql")


def _asked(connection: Connection, statement: str) -> Any:
    return connection.exec_driver_sql(statement).scalar()


def _version(connection: Connection, where: str) -> Finding:
    number = int(_asked(connection, "SHOW server_version_num"))
    said = f"{where} answers, PostgreSQL {_asked(connection, 'SHOW server_version')}"
    old = number < 10_000 * _OLDEST_POSTGRESQL
    fix = f"upgrade the server to PostgreSQL {_OLDEST_POSTGRESQL} or newer" if old else ""
    return Finding(name="database", ok=not fix, said=said, fix=fix)


def _isolation(connection: Connection) -> Finding:
    """A writer takes its turn first and must see what the one before it wrote."""
    level = _asked(connection, "SHOW default_transaction_isolation")
    fix = "" if level == "read committed" else "let nothing but fedtt set default_transaction_isolation"
    return Finding(name="isolation", ok=not fix, said=f"writing transactions are {level}", fix=fix)


def _connections(connection: Connection) -> Finding:
    most, reserved = (
        int(_asked(connection, f"SHOW {name}"))
        for name in ("max_connections", "superuser_reserved_connections")
    )
    others = (
        "SELECT count(*) FROM pg_stat_activity "
        "WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"
    )
    used = int(_asked(connection, others))
    own = "SELECT nullif(datconnlimit, -1) FROM pg_database WHERE datname = current_database()"
    limit = min(most - reserved, int(_asked(connection, own) or most))
    said = f"{used} of {limit} connections are in use, a server holds up to {CONNECTIONS}"
    fix = "" if limit - used >= CONNECTIONS else "raise max_connections and restart PostgreSQL"
    return Finding(name="connections", ok=not fix, said=said, fix=fix)


def _durability(connection: Connection) -> Finding:
    wanted = ("fsync", "full_page_writes", "synchronous_commit")
    off = [name for name in wanted if _asked(connection, f"SHOW {name}") == "off"]
    if off:
        said = f"{', '.join(off)} off: what was acknowledged can be lost with the power"
        fix = "; ".join(f"ALTER SYSTEM SET {name} = on" for name in off) + "; SELECT pg_reload_conf()"
        return Finding(name="durability", ok=False, said=said, fix=fix)
    return Finding(name="durability", ok=True, said=f"{', '.join(wanted)} are on")


def _clocks(connection: Connection) -> Finding:
    before = time.time()
    theirs = float(_asked(connection, "SELECT extract(epoch FROM clock_timestamp())"))
    after = time.time()
    off_s = max(before - theirs, theirs - after, 0.0)  # wherever in between it was asked
    said = f"this machine's clock and the database's differ by {off_s:.1f} s"
    fix = "" if off_s <= _CLOCK_S else "run chrony or timesyncd on both"
    return Finding(name="clocks", ok=not fix, said=said, fix=fix)


def _schema(connection: Connection, triggers: str, kind: str) -> Iterator[Finding]:
    found = schema_of(connection)
    if found.current is None:
        yield Finding(name="schema", ok=False, said="there are no tables yet", fix="start `fedtt serve` once")
        return
    said = f"schema {found.current} is this program's"
    fix = ""
    if found.behind is None:
        said, fix = (
            f"schema {found.current} is unknown to this program",
            "install the newer fedtt that made it",
        )
    elif found.behind:
        said = f"schema {found.current} is {found.behind} migrations behind {found.head}"
        fix = "back it up, then start `fedtt serve`, which migrates it"
    yield Finding(name="schema", ok=not fix, said=said, fix=fix)
    missing = _TRIGGERS[kind] - set(connection.exec_driver_sql(triggers).scalars())
    fix = (
        "" if not missing else "run `fedtt audit verify --head HASH`, and restore the triggers from a backup"
    )
    said = (
        f"the log is not guarded: {', '.join(sorted(missing))} missing or off"
        if missing
        else "the log is guarded"
    )
    if found.behind == 0:
        yield Finding(name="audit", ok=not fix, said=said, fix=fix)
