"""A ledger's tables on either database, read by no code of the server's, and what each finds damaged."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any, Protocol

from benchmarks.local_postgresql import LocalPostgresql

__all__ = ["PostgresqlTables", "SqliteTables", "Tables"]


class Tables(Protocol):
    """A database that no server uses just then."""

    def rows(self, query: str) -> list[tuple[Any, ...]]: ...

    def damaged(self) -> int:
        """How much of it the database's own checks refuse; 0 where it is sound."""
        ...


class SqliteTables:
    """One file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def rows(self, query: str) -> list[tuple[Any, ...]]:
        with closing(sqlite3.connect(f"file:{self._path}?mode=rw", uri=True)) as database:
            return database.execute(query).fetchall()

    def damaged(self) -> int:
        broken = self.rows("PRAGMA integrity_check") != [("ok",)]
        return broken + len(self.rows("PRAGMA foreign_key_check"))


#: for each foreign key, the query that counts the rows whose key names nothing
_ORPHANS_OF_EACH = """
SELECT format(
    'SELECT count(*) FROM %s AS child WHERE %s AND NOT EXISTS (SELECT FROM %s AS parent WHERE %s)',
    conrelid::regclass,
    string_agg(format('child.%I IS NOT NULL', own.attname), ' AND '),
    confrelid::regclass,
    string_agg(format('parent.%I = child.%I', named.attname, own.attname), ' AND ')
)
FROM pg_constraint AS key
CROSS JOIN unnest(conkey, confkey) AS pair (own_number, named_number)
JOIN pg_attribute AS own ON own.attrelid = conrelid AND own.attnum = own_number
JOIN pg_attribute AS named ON named.attrelid = confrelid AND named.attnum = named_number
WHERE contype = 'f' GROUP BY key.oid, conrelid, confrelid
"""
_PAGES = """
SELECT count(*) FROM pg_class, verify_heapam(pg_class.oid)
WHERE relkind = 'r' AND relnamespace = 'public'::regnamespace
"""
_INDICES = """
SELECT bt_index_check(oid, heapallindexed => true) FROM pg_class
WHERE relkind = 'i' AND relnamespace = 'public'::regnamespace
"""


class PostgresqlTables:
    """One database of a server."""

    def __init__(self, server: LocalPostgresql, url: str) -> None:
        self._server, self._database = server, url.rpartition("/")[2]

    def rows(self, query: str) -> list[tuple[Any, ...]]:
        return self._server.sql(query, self._database)

    def damaged(self) -> int:
        orphans = (self.rows(query) for (query,) in self.rows(_ORPHANS_OF_EACH))
        return sum(int(count) for ((count,),) in orphans) + self._torn()

    def _torn(self) -> int:
        """Pages and indices that PostgreSQL's own amcheck refuses, where it is installed; the first index."""
        from psycopg import InternalError

        if not self.rows("SELECT 1 FROM pg_available_extensions WHERE name = 'amcheck'"):
            return 0
        self.rows("CREATE EXTENSION IF NOT EXISTS amcheck")
        try:
            ((pages,),) = self.rows(_PAGES)
            self.rows(_INDICES)
        except InternalError:
            return 1
        return int(pages)
