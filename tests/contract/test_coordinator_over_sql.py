"""The coordinator's state machine over each database: keys and CHECKs agree with every decision it takes."""

from __future__ import annotations

import shutil
import tempfile
from contextlib import closing
from pathlib import Path

from hypothesis import HealthCheck, settings

from aggregator.coordinator import Coordinator
from aggregator.releases import Releases
from fedtt.messages import CheckIn, Work
from fedtt.task import RoundSpec, TaskSpec
from storage.records import MAIN
from storage.sql import SqlStore
from storage.store import Store
from tests.property.machine import CoordinatorMachine
from tests.support import ledger
from tests.support.postgresql import empty_store, needs_postgresql
from tests.support.tiny import add_task


def _open_store() -> Store:
    return SqlStore.open(Path(tempfile.mkdtemp(prefix="fedtt-machine-")) / "ledger.db")


def _drop_store(store: Store) -> None:
    assert isinstance(store, SqlStore)
    store.close()
    shutil.rmtree(Path(store.where).parent)


def test_a_clock_that_is_set_back_by_more_than_a_deadline_stops_no_round(tmp_path: Path) -> None:
    with closing(SqlStore.open(tmp_path / "ledger.db")) as store:
        coordinator = Coordinator(Releases())
        spec = TaskSpec(name="t", rounds=RoundSpec(count=1, cohort=2, deadline_s=60.0))
        with store.transaction() as tx:
            task = add_task(tx, spec, 1000.0)
            tx.put_device(ledger.device())
            coordinator.lifecycle.ensure_round(tx, 1000.0, task)
        with store.transaction() as tx:
            message = CheckIn(client="", runtimes=("onnxruntime",), examples=1)
            work = coordinator.check_in(tx, 900.0, ledger.device().id, message)
            round_ = tx.latest_round(task.id, MAIN)
    assert isinstance(work, Work)
    assert round_ is not None
    assert (round_.deadline_at, work.round_ends_in_s) == (1060.0, 160.0)  # 1000 + 60 - 900


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
