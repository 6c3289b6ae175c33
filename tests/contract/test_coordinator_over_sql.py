"""The coordinator's state machine over each database: keys and CHECKs agree with every decision it takes."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from hypothesis import HealthCheck, settings

from storage.sql import SqlStore
from storage.store import Store
from tests.property.machine import CoordinatorMachine
from tests.support.postgresql import empty_store, needs_postgresql


def _open_store() -> Store:
    return SqlStore.open(Path(tempfile.mkdtemp(prefix="fedtt-machine-")) / "ledger.db")


def _drop_store(store: Store) -> None:
    assert isinstance(store, SqlStore)
    store.close()
    shutil.rmtree(Path(store.where).parent)


class SqlMachine(CoordinatorMachine):
    make_store = staticmethod(_open_store)
    drop_store = staticmethod(_drop_store)


class PostgresqlMachine(CoordinatorMachine):
    make_store = staticmethod(empty_store)


TestCoordinatorOverSql = SqlMachine.TestCase
TestCoordinatorOverSql.settings = settings(
    max_examples=40, stateful_step_count=30, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
TestCoordinatorOverPostgresql = needs_postgresql(PostgresqlMachine.TestCase)
TestCoordinatorOverPostgresql.settings = settings(TestCoordinatorOverSql.settings, max_examples=20)
