"""The schema moves forward and back while updates come in; from the first release on, steps are additive."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.operations import Operations
from alembic.runtime.migration import MigrationContext
from sqlalchemy import BigInteger, Column, Connection, create_engine, inspect, text

from fedtt.errors import UnavailableError
from storage.backend import open_backend
from storage.migrate import downgrade, upgrade
from storage.models import Base
from storage.records import UpdateState
from storage.sql import SqlStore, change_schema
from tests.support import ledger
from tests.support.postgresql import empty_store, needs_postgresql, server


@contextmanager
def on_sqlite(directory: Path) -> Iterator[SqlStore]:
    with closing(SqlStore.open(directory / "ledger.db")) as store:
        yield store


@contextmanager
def on_postgresql(_: Path) -> Iterator[SqlStore]:
    with closing(empty_store()) as store:
        yield store


class Traffic:
    """A server that appends updates, one a transaction, until it is told to stop."""

    def __init__(self, store: SqlStore) -> None:
        self._store, self._over = store, threading.Event()
        self.acknowledged: list[str] = []
        self.errors: list[Exception] = []
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        for number in itertools.count():
            if self._over.is_set():
                return
            try:
                with self._store.transaction() as tx, tx.together([ledger.lease(number).id]):
                    update = ledger.upload(tx, number)
                self.acknowledged.append(update.lease_id)
                with suppress(UnavailableError), self._store.reading() as tx:
                    assert tx.update(update.lease_id) == update
            except Exception as error:
                self.errors.append(error)
                return

    def wait_for_more(self, count: int = 15) -> None:
        """More than it takes until a driver prepares its statements."""
        wanted = len(self.acknowledged) + count
        for _ in range(600):
            if self.errors or len(self.acknowledged) >= wanted:
                return
            self._over.wait(0.05)
        raise TimeoutError("no update came in half a minute")

    def __enter__(self) -> Traffic:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


def forward(connection: Connection) -> None:
    """What a later release may do: new columns that are empty or have a default, new tables, new indices."""
    op = Operations(MigrationContext.configure(connection))
    op.add_column("updates", Column("later", BigInteger))
    op.add_column("leases", Column("later", BigInteger, nullable=False, server_default="7"))
    op.create_table("laters", Column("id", BigInteger, primary_key=True))
    op.create_index("ix_updates_later", "updates", ["later"])


def back(connection: Connection) -> None:
    op = Operations(MigrationContext.configure(connection))
    op.drop_index("ix_updates_later", "updates")
    op.drop_table("laters")
    op.drop_column("leases", "later")
    op.drop_column("updates", "later")


@pytest.mark.parametrize("place", [on_sqlite, pytest.param(on_postgresql, marks=needs_postgresql)])
def test_updates_come_in_while_the_schema_moves_forward_and_back(place: type, tmp_path: Path) -> None:
    with place(tmp_path) as store:
        newer = open_backend(store.where, busy_timeout_s=10.0)
        with store.transaction() as tx:
            ledger.open_round(tx)
        with Traffic(store) as traffic:
            for step in (forward, back, forward, back):
                traffic.wait_for_more()
                change_schema(newer, step)
            traffic.wait_for_more()
        newer.reader.dispose()
        newer.writer.dispose()
        assert traffic.errors == []
        with store.reading() as tx:
            kept = [update.lease_id for update in tx.updates(1, "main", 1, UpdateState.ACCEPTED)]
        assert kept == traffic.acknowledged


@needs_postgresql
def test_rows_survive_every_migration_of_postgresql_and_its_schema_is_the_models() -> None:
    url = server().new_database()
    with closing(SqlStore.open(url)) as store, store.transaction() as tx:
        ledger.open_round(tx)
        update, settled = ledger.upload(tx), ledger.upload(tx, "settled")
        tx.settle([settled.lease_id], UpdateState.DISCARDED, reason="test")
    engine = create_engine(url)
    with engine.begin() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, Base.metadata) == []
        downgrade(connection, "0001")
        assert "memberships" not in inspect(connection).get_table_names()
        held = connection.execute(text("SELECT payload FROM updates ORDER BY sequence")).scalars()
        assert [bytes(payload) for payload in held] == [b"payload of lease", b""]
        upgrade(connection, url)
    engine.dispose()
    with closing(SqlStore.open(url)) as store, store.reading() as tx:
        assert tx.tasks() == [ledger.task(id=1)]
        assert tx.update(update.lease_id) == update
        assert tx.payloads([update]) == [b"payload of lease"]
    server().drop(url)
