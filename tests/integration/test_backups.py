"""What docs/operations.md says of backups: taken while a server writes, restored to one that goes on."""

from __future__ import annotations

import hashlib
import shutil
import sqlite3
import subprocess
from contextlib import closing
from pathlib import Path

import pytest

from benchmarks.local_postgresql import postgresql_binaries
from fedtt.errors import Refused
from storage.records import UpdateState
from storage.sql import SqlStore
from storage.store import Store
from tests.support import ledger, postgresql
from tests.support.postgresql import needs_postgresql
from tests.support.served import LAYOUT, Peer, served, task_text, until


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


async def test_a_server_goes_on_from_a_backup_taken_while_another_ran(tmp_path: Path) -> None:
    data, kept = tmp_path / "data", tmp_path / "restored" / "data"
    kept.mkdir(parents=True)
    async with served(tmp_path, task_text(cohort=2)) as server, server.device() as known:
        before = await known.update()
        with (
            closing(sqlite3.connect(data / "fedtt.db")) as source,
            closing(sqlite3.connect(kept / "fedtt.db")) as backup,
        ):
            source.backup(backup)
        shutil.copytree(data / "blobs", kept / "blobs")
        for token in data.glob("*-token"):
            shutil.copy(token, kept)
        async with server.device() as late:
            after = await late.update()
    async with served(kept.parent, None) as server:
        async with Peer(server.url, 1) as known, Peer(server.url, 2) as late:
            assert (await known.transport.receipt(before.lease)).digest == before.digest
            with pytest.raises(Refused, match="not enrolled here"):
                await late.transport.receipt(after.lease)
            await late.enroll(server.token)
            work = await late.work()
            version = await late.transport.version(work.plan.version, 4 * LAYOUT.size)
            assert hashlib.sha256(version.data).hexdigest() == work.plan.version
            await late.update()

        async def folded() -> bool:
            receipt = await server.service.read(lambda tx: tx.update(before.lease))
            return receipt is not None and receipt.state is UpdateState.FOLDED

        await until(folded)


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
    url, dump = postgresql.server().new_database(), tmp_path / "fedtt.dump"
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
    postgresql.server().drop(url)
