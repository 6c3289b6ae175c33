"""What docs/operations.md says of backups: taken while a server writes, restored to a ledger that goes on."""

from __future__ import annotations

import sqlite3
import subprocess
from contextlib import closing
from pathlib import Path

from benchmarks.local_postgresql import postgresql_binaries
from storage.sql import SqlStore
from storage.store import Store
from tests.support import ledger
from tests.support.postgresql import needs_postgresql, server


def has(store: Store, name: str) -> bool:
    with store.reading() as tx:
        return tx.update(ledger.lease(name).id) is not None


def append(store: Store, name: str) -> None:
    with store.transaction() as tx:
        ledger.upload(tx, name)


def goes_on_from_before(store: Store) -> None:
    assert has(store, "before")
    assert not has(store, "after")
    append(store, "later")
    assert has(store, "later")


def test_a_backup_of_sqlite_is_restored_to_the_state_it_was_taken_in(tmp_path: Path) -> None:
    with closing(SqlStore.open(tmp_path / "ledger.db")) as store:
        with store.transaction() as tx:
            ledger.open_round(tx)
        append(store, "before")
        with (  # what sqlite3's .backup does
            closing(sqlite3.connect(tmp_path / "ledger.db")) as source,
            closing(sqlite3.connect(tmp_path / "backup.db")) as backup,
        ):
            source.backup(backup)
        append(store, "after")
    with closing(SqlStore.open(tmp_path / "backup.db")) as restored:
        goes_on_from_before(restored)


@needs_postgresql
def test_a_dump_of_postgresql_is_restored_to_the_state_it_was_taken_in(tmp_path: Path) -> None:
    url, dump = server().new_database(), tmp_path / "fedtt.dump"
    plain = url.replace("+psycopg", "")
    binaries = postgresql_binaries()
    assert binaries is not None
    with closing(SqlStore.open(url)) as store:
        with store.transaction() as tx:
            ledger.open_round(tx)
        append(store, "before")
        taken = [str(binaries / "pg_dump"), "--format", "custom", "--file", str(dump), plain]
        subprocess.run(taken, check=True)
        append(store, "after")
    restored = [str(binaries / "pg_restore"), "--clean", "--if-exists", "--dbname", plain, str(dump)]
    subprocess.run(restored, check=True)
    with closing(SqlStore.open(url)) as store:
        goes_on_from_before(store)
    server().drop(url)
