"""Migrations: to the models' schema and back, with every row."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from msgspec.structs import replace
from sqlalchemy import Connection, Engine, create_engine, inspect, text

from fedtt.algorithms import FedAvg
from fedtt.folds import Mean
from fedtt.server_optimiser import ServerSpec
from storage.engine import sqlite_engine
from storage.migrate import downgrade, newest_schema, schema_of, upgrade
from storage.models import Base
from storage.records import UpdateState
from storage.sql import SqlStore
from tests.support import ledger
from tests.unit.storage.test_schema import OTHER


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    engine = sqlite_engine(tmp_path / "ledger.db", readonly=False, busy_timeout_s=1.0)
    yield engine
    engine.dispose()


def _definitions(connection: Connection) -> dict[str, set[str]]:
    """Table or index -> the parts of its CREATE statement, in no order; models know no triggers."""
    rows = connection.execute(
        text("SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL AND type <> 'trigger'")
    )
    parts = {name: set(_parts(sql)) for name, sql in rows}
    parts.pop("alembic_version", None)
    return parts


def _parts(statement: str) -> Iterator[str]:
    """What stands between the commas and brackets of the outermost level."""
    depth, part = 0, ""
    for sign in statement:
        depth += (sign == "(") - (sign == ")")
        ends = (sign == "(" and depth == 1) or (sign == "," and depth == 1) or (sign == ")" and depth == 0)
        if ends:
            yield " ".join(part.split())
        part = "" if ends else part + sign
    yield " ".join(part.split())


def test_the_migrated_schema_is_the_models_schema(engine: Engine, tmp_path: Path) -> None:
    plain = create_engine(f"sqlite:///{tmp_path / 'plain.db'}")
    with engine.begin() as migrated, plain.begin() as made:
        upgrade(migrated, tmp_path)
        Base.metadata.create_all(made)
        differences = compare_metadata(
            MigrationContext.configure(migrated, opts={"compare_type": True}), Base.metadata
        )
        assert differences == []
        assert _definitions(migrated) == _definitions(made)  # CHECKs too, which Alembic does not compare
    plain.dispose()


def test_migrations_go_down_to_nothing_and_up_again(engine: Engine, tmp_path: Path) -> None:
    with engine.begin() as connection:
        upgrade(connection, tmp_path)
        first = _definitions(connection)
        downgrade(connection, "base")
        assert inspect(connection).get_table_names() == ["alembic_version"]
        upgrade(connection, tmp_path)
        assert _definitions(connection) == first


def _rows(connection: Connection) -> dict[str, list[dict[str, object]]]:
    """All rows of all tables, but for settings, which are written anew."""
    tables = (name for name in inspect(connection).get_table_names() if name != "alembic_version")
    return {
        name: [
            {column: value for column, value in row._mapping.items() if column != "spec"}
            for row in connection.execute(text(f"SELECT * FROM {name}"))  # noqa: S608
        ]
        for name in tables
    }


def test_the_newest_migration_by_name_is_alembics_head_and_is_told_from_older_ones(tmp_path: Path) -> None:
    with closing(SqlStore.open(tmp_path / "ledger.db")):
        engine = sqlite_engine(tmp_path / "ledger.db", readonly=False, busy_timeout_s=1)
    with engine.begin() as connection:
        assert schema_of(connection).head == newest_schema() == schema_of(connection).current
        downgrade(connection, "0001")
        upgrade(connection, "ledger")
        assert schema_of(connection).current == newest_schema()
    engine.dispose()


def test_an_up_to_date_ledger_is_opened_without_alembic(tmp_path: Path) -> None:
    with closing(SqlStore.open(tmp_path / "ledger.db")):
        pass
    program = (
        "import sys; from pathlib import Path; from storage.sql import SqlStore; "
        f"SqlStore.open(Path({str(tmp_path / 'ledger.db')!r})).close(); print('alembic' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_rows_survive_every_migration_up_and_down(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    with closing(SqlStore.open(path)) as store, store.transaction() as tx:
        ledger.open_round(tx)
        waiting, settled = ledger.upload(tx), ledger.upload(tx, OTHER)
        tx.settle([settled.lease_id], UpdateState.DISCARDED, reason="test")
    engine = sqlite_engine(path, readonly=False, busy_timeout_s=1.0)
    with engine.begin() as connection:
        newest = _rows(connection)
        newest["payloads"].pop()  # of what is settled
        downgrade(connection, "0001")
        oldest = _rows(connection)
        assert [row.pop("payload") for row in oldest["updates"]] == [b"payload of lease", b""]
        kept = {
            table: [{name: row[name] for name in row.keys() & set(old[0])} for row in newest[table]]
            for table, old in oldest.items()
            if old
        }
        assert kept == {table: rows for table, rows in oldest.items() if rows}
        assert {"rank", "memory_mb", "server_state", "report"}.isdisjoint(
            name for rows in oldest.values() for row in rows for name in row
        )
        upgrade(connection, path)
        migrated = _rows(connection)
        (key,) = [task.pop("draw_key") for task in migrated["tasks"]]
        assert re.fullmatch("[0-9a-f]{32}", str(key))  # a secret that is made anew
        assert key not in {task.pop("draw_key") for task in newest["tasks"]}
        assert migrated == newest
    engine.dispose()
    with closing(SqlStore.open(path)) as store, store.reading() as tx:
        assert tx.tasks() == [ledger.task(id=1, draw_key=key)]
        assert tx.versions(1) == [ledger.version(0)]
        assert tx.device(ledger.device().id) == ledger.device()
        assert list(tx.updates(1, "main", 1, UpdateState.ACCEPTED)) == [waiting]
        assert tx.payloads([waiting]) == [b"payload of lease"]


def test_what_newer_schemas_added_is_dropped_by_going_back_and_the_rest_stays(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    with closing(SqlStore.open(path)) as store, store.transaction() as tx:
        ledger.open_round(tx)
        tx.add_version(ledger.version(1, server_state=ledger.sha256("state"), report={"share": 0.5}))
        tx.put_participation(ledger.participation())
        tx.put_members(1, {ledger.device().id: 1})
        tx.put_device(ledger.device("alice", memory_mb=512))
    engine = sqlite_engine(path, readonly=False, busy_timeout_s=1.0)
    with engine.begin() as connection:
        downgrade(connection, "0001")
        assert {"participations", "memberships"}.isdisjoint(inspect(connection).get_table_names())
        upgrade(connection, path)
    engine.dispose()
    with closing(SqlStore.open(path)) as store, store.reading() as tx:
        assert tx.versions(1) == [ledger.version(0), ledger.version(1)]
        assert tx.device(ledger.device().id) == ledger.device()
        assert tx.participation(1, ledger.device().id) is None


OLD_SPEC = (
    '{"name":"intents","rounds":{"count":3,"cohort":10,"quorum":2},"seed":0,"training":{"local_steps":4},'
    '"method":{"name":"fedavg","server_learning_rate":0.5,"weighting":"uniform","max_examples":7},"codec":{}}'
)


def test_an_old_task_keeps_its_weights_and_its_rate_and_gets_them_back_when_going_down(
    tmp_path: Path,
) -> None:
    path = tmp_path / "ledger.db"
    with closing(SqlStore.open(path)) as store, store.transaction() as tx:
        ledger.open_round(tx)
        spec = replace(
            ledger.task().spec,
            fold=Mean(weighting="uniform", max_examples=7),
            server=ServerSpec(learning_rate=0.5),
        )
        tx.put_task(ledger.task(id=1, spec=spec))
    engine = sqlite_engine(path, readonly=False, busy_timeout_s=1.0)
    with engine.begin() as connection:
        downgrade(connection, "0001")
        method = json.loads(connection.execute(text("SELECT spec FROM tasks")).scalar_one())["method"]
        weights = {"weighting": "uniform", "max_examples": 7}
        assert method == {"name": "fedtt", "server_learning_rate": 0.5} | weights
        connection.execute(text("UPDATE tasks SET spec = :spec"), {"spec": OLD_SPEC})
        upgrade(connection, path)
    engine.dispose()
    with closing(SqlStore.open(path)) as store, store.reading() as tx:
        (task,) = tx.tasks()
    assert task.spec.fold == Mean(weighting="uniform", max_examples=7)
    assert (task.spec.server, task.spec.method) == (ServerSpec(learning_rate=0.5), FedAvg())
    assert (task.spec.training.local_steps, task.spec.rounds.quorum) == (4, 2)


def test_a_migration_that_fails_changes_nothing(engine: Engine, tmp_path: Path) -> None:
    def migrate_and_fail() -> None:
        with engine.begin() as connection:
            upgrade(connection, tmp_path)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        migrate_and_fail()
    with engine.begin() as connection:
        assert inspect(connection).get_table_names() == []
