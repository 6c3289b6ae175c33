"""`fedtt migrate`: takes a ledger to another schema, forward to this program's or back to an older one's."""

from __future__ import annotations

import argparse
from pathlib import Path

from sqlalchemy import Connection

from fedtt.cli import print_json
from fedtt.errors import ConfigError, StorageError
from storage.backend import open_backend
from storage.engine import database_path
from storage.migrate import Schema, downgrade, revisions, schema_of, upgrade
from storage.postgresql import is_postgresql
from storage.sql import change_schema

__all__ = ["migrate", "run"]

_WAIT_S = 30.0  #: for a server's transaction


def run(args: argparse.Namespace) -> None:
    database: str | Path = args.database or args.data / "fedtt.db"
    before, after = migrate(database, args.to)
    if args.json:
        print_json({"before": before.current, "after": after.current, "head": after.head})
    elif before.current == after.current:
        print(f"schema {after.current}, as before")
    else:
        print(f"schema {after.current}, where it was {before.current}")


def migrate(database: str | Path, to: str | None = None) -> tuple[Schema, Schema]:
    """The schemas before and after; to: a revision, None for this program's.

    In one transaction, which servers of either schema wait out. Raises ConfigError for a revision that is
    none, StorageError where there is no ledger, or it is of a newer program.
    """
    if to is not None and to not in revisions():
        raise ConfigError("--to", to, f"one of {', '.join(revisions())}")
    if not is_postgresql(str(database)) and not database_path(database).is_file():
        raise StorageError(f"{database_path(database)} does not exist: `fedtt serve` makes it")
    backend = open_backend(database, busy_timeout_s=_WAIT_S, alone=False)
    seen: list[Schema] = []

    def change(connection: Connection) -> None:
        before = schema_of(connection)
        if before.current is None:
            raise StorageError(f"{backend.where} holds no ledger: `fedtt serve` makes one")
        if to is not None and before.behind is not None and to < str(before.current):
            downgrade(connection, to)
        else:
            upgrade(connection, backend.where, to or "head")
        seen[:] = before, schema_of(connection)

    try:
        change_schema(backend, change)
    finally:
        backend.reader.dispose()
        backend.writer.dispose()
    return seen[0], seen[1]
