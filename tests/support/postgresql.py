"""The session's PostgreSQL server, started for the first test that asks; without the packages those skip."""

from __future__ import annotations

import atexit
from functools import cache

import pytest
from sqlalchemy import create_engine, text

from benchmarks.local_postgresql import LocalPostgresql, postgresql_binaries
from storage.models import Base
from storage.sql import SqlStore

__all__ = ["NO_POSTGRESQL", "empty_store", "needs_postgresql", "server"]

NO_POSTGRESQL = (
    "NOT TESTED ON POSTGRESQL: this machine has no initdb (Debian: apt install postgresql), so "
    "no test of the store on PostgreSQL ran"
)
needs_postgresql = pytest.mark.skipif(postgresql_binaries() is None, reason=NO_POSTGRESQL)


@cache
def server() -> LocalPostgresql:
    binaries = postgresql_binaries()
    if binaries is None:
        pytest.skip(NO_POSTGRESQL)
    started = LocalPostgresql(binaries)
    atexit.register(started.close)
    return started


@cache
def _migrated() -> str:
    url = server().new_database()
    SqlStore.open(url).close()
    return url


def empty_store() -> SqlStore:
    """A migrated ledger without rows; one at a time, for it is always the same database."""
    engine = create_engine(_migrated())
    with engine.begin() as connection:
        names = ", ".join(table.name for table in Base.metadata.sorted_tables)
        connection.execute(
            text("SET LOCAL session_replication_role = replica")
        )  # no trigger stops a superuser
        connection.execute(text(f"TRUNCATE {names} RESTART IDENTITY"))
    engine.dispose()
    return SqlStore.open(_migrated())
