"""The schema moves forward and back while updates come in.

From the first release on, steps are additive; those before it are not, and traffic waits them out.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator, Sized
from contextlib import closing, contextmanager, suppress
from functools import partial
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.operations import Operations
from alembic.runtime.migration import MigrationContext
from sqlalchemy import BigInteger, Column, Connection, create_engine, inspect, text

from fedtt.errors import StorageError, UnavailableError
from storage.backend import open_backend
from storage.migrate import downgrade, newest_schema, upgrade
from storage.models import Base
from storage.records import Update, UpdateState
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

    def __init__(self, store: SqlStore, *, waits_out: type[StorageError] = UnavailableError) -> None:
        """waits_out: what reading may meet, and writing where it is all that a database may say."""
        self._store, self._over = store, threading.Event()
        self._waits_out, self._is_patient = waits_out, waits_out is StorageError
        self.acknowledged: list[str] = []
        self.refused: list[StorageError] = []
        self.errors: list[Exception] = []
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        numbers = itertools.count()
        number = next(numbers)
        while not self._over.is_set():
            try:
                update = self._append(number)
                if update is None:
                    self._over.wait(0.01)
                    continue
                self.acknowledged.append(update.lease_id)
                number = next(numbers)
                with suppress(self._waits_out), self._store.reading() as tx:
                    assert tx.update(update.lease_id) == update
            except Exception as error:
                self.errors.append(error)
                return

    def _append(self, number: int) -> Update | None:
        """The update once it is durable; None where it is to be tried again."""
        try:
            with self._store.transaction() as tx, tx.together([ledger.lease(number).id]):
                known = tx.update(ledger.lease(number).id)
                assert tx.task_by_id(1) is not None  # as every upload does
                return known or ledger.upload(tx, number)
        except StorageError as error:
            if not self._is_patient:
                raise
            self.refused.append(error)
            return None

    def wait_for_more(self, count: int = 15) -> None:
        """More than it takes until a driver prepares its statements."""
        self._wait_for(self.acknowledged, count)

    def wait_for_refusals(self, count: int = 15) -> None:
        self._wait_for(self.refused, count)

    def _wait_for(self, told: Sized, more: int) -> None:
        wanted = len(told) + more
        for _ in range(600):
            if self.errors or len(told) >= wanted:
                return
            self._over.wait(0.05)
        raise TimeoutError("nothing came in half a minute")

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


@contextmanager
def on_postgresql_alone(_: Path) -> Iterator[SqlStore]:
    """On a database of its own, whose schema no other test needs."""
    url = server().new_database()
    with closing(SqlStore.open(url)) as store:
        yield store
    server().drop(url)


@pytest.mark.parametrize("place", [on_sqlite, pytest.param(on_postgresql_alone, marks=needs_postgresql)])
def test_updates_wait_out_an_older_schema_and_none_is_lost(place: type, tmp_path: Path) -> None:
    with place(tmp_path) as store:
        other = open_backend(store.where, busy_timeout_s=10.0)
        with store.transaction() as tx:
            ledger.open_round(tx)
        with Traffic(store, waits_out=StorageError) as traffic:
            for revision in (f"{int(newest_schema()) - 1:04}", "0005", "0001"):
                traffic.wait_for_more()
                change_schema(other, partial(downgrade, revision=revision))
                traffic.wait_for_refusals()
                change_schema(other, partial(upgrade, where=store.where))
            traffic.wait_for_more()
        other.reader.dispose()
        other.writer.dispose()
        assert traffic.errors == []
        with store.reading() as tx:
            kept = list(tx.updates(1, "main", 1, UpdateState.ACCEPTED))
            payloads = tx.payloads(kept)
        assert [update.lease_id for update in kept] == traffic.acknowledged
        assert payloads == [f"payload of {number}".encode() for number in range(len(kept))]


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
        (task,) = tx.tasks()
        assert task == ledger.task(id=1, draw_key=task.draw_key)  # which is made anew
        assert tx.update(update.lease_id) == update
        assert tx.payloads([update]) == [b"payload of lease"]
    server().drop(url)
