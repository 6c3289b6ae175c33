"""The schema refuses impossible rows by itself, whatever program writes them; and migrations make it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from msgspec.structs import replace
from sqlalchemy import Connection, Engine, create_engine, inspect, text

from fedtt.algorithms import FedAvg
from fedtt.errors import StorageError
from fedtt.folds import Mean
from fedtt.server_optimiser import ServerSpec
from storage.engine import sqlite_engine
from storage.migrate import downgrade, newest_schema, schema_of, upgrade
from storage.models import Base
from storage.records import DeviceState, RoundState, UpdateState
from storage.sql import SqlStore
from storage.store import Transaction
from tests.support import ledger

OTHER = "other"
OPEN_FILES = Path("/proc/self/fd")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqlStore]:
    store = SqlStore.open(tmp_path / "ledger.db")
    with store.transaction() as tx:
        ledger.open_round(tx)
        tx.put_lease(ledger.lease())
    yield store
    store.close()


IMPOSSIBLE: dict[str, tuple[str, Callable[[Transaction], object]]] = {
    "a token used more often than allowed": (
        "uses_left_counts",
        lambda tx: tx.put_token(ledger.token(uses_left=-1)),
    ),
    "a token not known by a hash": (
        "sha256_is_sha256",
        lambda tx: tx.put_token(ledger.token(sha256="secret")),
    ),
    "a device named by something else": (
        "id_is_128_bits",
        lambda tx: tx.put_device(ledger.device(id="alice")),
    ),
    "an erased device with a key": (
        "erased_has_no_key",
        lambda tx: tx.put_device(ledger.device(state=DeviceState.ERASED)),
    ),
    "an active device without a key": (
        "erased_has_no_key",
        lambda tx: tx.put_device(ledger.device(public_key=b"")),
    ),
    "a task on a bundle that is not there": (
        "FOREIGN KEY",
        lambda tx: tx.add_task(ledger.task(OTHER, bundle=ledger.sha256(OTHER))),
    ),
    "a version of no task": ("FOREIGN KEY", lambda tx: tx.add_version(ledger.version(0, task_id=2))),
    "a later version without a parent": (
        "later_has_a_parent",
        lambda tx: tx.add_version(ledger.version(1, parents=())),
    ),
    "a parent not known by a hash": (
        "parents_are_sha256",
        lambda tx: tx.add_version(ledger.version(1, parents=("version 0",))),
    ),
    "a task resumed before its first round": (
        "resumed_after_counts",
        lambda tx: tx.add_task(ledger.task(OTHER, resumed_after=-1)),
    ),
    "a first version made by a round": (
        "first_has_no_round",
        lambda tx: tx.add_version(ledger.version(0, branch=OTHER, round_number=1)),
    ),
    "a round on a version that is not there": (
        "FOREIGN KEY",
        lambda tx: tx.put_round(ledger.round_(2, version_number=1, state=RoundState.FOLDING)),
    ),
    "a second open round": ("rounds.task_id, rounds.branch", lambda tx: tx.put_round(ledger.round_(2))),
    "a deadline before the opening": (
        "deadline_follows_opening",
        lambda tx: tx.put_round(ledger.round_(deadline_at=299.0)),
    ),
    "a folded round that has not closed": (
        "ended_has_a_time",
        lambda tx: tx.put_round(ledger.round_(state=RoundState.FOLDED)),
    ),
    "an open round that has closed": (
        "ended_has_a_time",
        lambda tx: tx.put_round(ledger.round_(closed_at=400.0)),
    ),
    "a round abandoned for no reason": (
        "abandoned_has_a_reason",
        lambda tx: tx.put_round(ledger.round_(state=RoundState.ABANDONED, closed_at=400.0)),
    ),
    "a lease of a device that is not there": (
        "FOREIGN KEY",
        lambda tx: tx.put_lease(ledger.lease(OTHER, device_id=ledger.device(OTHER).id)),
    ),
    "a lease in a round that is not there": (
        "FOREIGN KEY",
        lambda tx: tx.put_lease(ledger.lease(OTHER, round_number=2)),
    ),
    "a lease that expires before it is granted": (
        "expiry_follows_grant",
        lambda tx: tx.put_lease(ledger.lease(expires_at=309.0)),
    ),
    "an update without a lease": ("FOREIGN KEY", lambda tx: tx.add_update(ledger.update(OTHER), b"coded")),
    "an accepted update that is part of a version": (
        "one_end",
        lambda tx: tx.add_update(ledger.update(folded_into=0), b"coded"),
    ),
    "an update folded into nothing": (
        "one_end",
        lambda tx: tx.add_update(ledger.update(state=UpdateState.FOLDED), b"coded"),
    ),
    "an update folded into a version that is not there": (
        "FOREIGN KEY",
        lambda tx: tx.add_update(ledger.update(state=UpdateState.FOLDED, folded_into=1), b"coded"),
    ),
    "an update discarded for no reason": (
        "one_end",
        lambda tx: tx.add_update(ledger.update(state=UpdateState.DISCARDED), b"coded"),
    ),
    "a part taken by a device that is not there": (
        "FOREIGN KEY",
        lambda tx: tx.put_participation(ledger.participation(OTHER)),
    ),
    "a part taken in a task that is not there": (
        "FOREIGN KEY",
        lambda tx: tx.put_participation(ledger.participation(task_id=2)),
    ),
    "a part taken without an update": (
        "count_counts",
        lambda tx: tx.put_participation(ledger.participation(count=0)),
    ),
    "a part taken before the first round": (
        "rounds_start_at_one",
        lambda tx: tx.put_participation(ledger.participation(last_round=0)),
    ),
    "an update that came before its lease": (
        "time_goes_forward",
        lambda tx: tx.put_participation(ledger.participation(duration_s=-1.0)),
    ),
    "a part half forgotten": (
        "forgotten_together",
        lambda tx: tx.put_participation(ledger.participation(last_loss=None)),
    ),
    "a member of no group": (
        "groups_start_at_one",
        lambda tx: tx.put_members(1, {ledger.device().id: 0}),
    ),
    "a member that is not there": (
        "FOREIGN KEY",
        lambda tx: tx.put_members(1, {ledger.device(OTHER).id: 1}),
    ),
    "an update whose loss is not a number": (
        "NOT NULL",
        lambda tx: tx.add_update(ledger.update(loss_first=float("nan")), b"coded"),
    ),
}


@pytest.mark.parametrize("what", IMPOSSIBLE)
def test_the_schema_refuses(what: str, store: SqlStore) -> None:
    constraint, write = IMPOSSIBLE[what]
    with store.transaction() as tx, pytest.raises(StorageError, match=re.escape(constraint)):
        write(tx)


def test_a_payload_is_not_empty_and_its_update_is_there_even_in_plain_sql(store: SqlStore) -> None:
    with store.transaction() as tx:
        ledger.upload(tx, OTHER)
    engine = sqlite_engine(Path(store.where), readonly=False, busy_timeout_s=1.0)
    with engine.begin() as connection:
        connection.execute(text("DELETE FROM payloads"))
        for row, refusal in (("(1, x'')", "holds_something"), ("(2, x'00')", "FOREIGN KEY")):
            with pytest.raises(Exception, match=refusal):
                connection.execute(text(f"INSERT INTO payloads VALUES {row}"))  # noqa: S608
    engine.dispose()


def test_a_refused_row_leaves_the_rest_of_its_transaction_alone(store: SqlStore) -> None:
    with store.transaction() as tx:
        tx.put_token(ledger.token())
        with pytest.raises(StorageError):
            tx.put_token(ledger.token(uses_left=-1))
        tx.add_update(ledger.update(), b"coded")
    with store.reading() as tx:
        assert tx.token(ledger.sha256("secret")) == ledger.token()
        assert tx.update(ledger.lease().id) is not None


def test_a_state_outside_its_enum_is_refused_even_in_plain_sql(store: SqlStore) -> None:
    engine = create_engine(f"sqlite:///{store.where}")
    with engine.begin() as connection, pytest.raises(Exception, match="ck_leases_known_state"):
        connection.execute(text("UPDATE leases SET state = 'stolen'"))
    engine.dispose()


def test_every_connection_is_durable_strict_and_private(tmp_path: Path) -> None:
    expected = {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "secure_delete": 1}
    for readonly in (False, True):
        engine = sqlite_engine(tmp_path / "ledger.db", readonly=readonly, busy_timeout_s=1.0)
        with engine.begin() as connection:
            found = {name: connection.exec_driver_sql(f"PRAGMA {name}").scalar_one() for name in expected}
            assert connection.exec_driver_sql("PRAGMA query_only").scalar_one() == readonly
        engine.dispose()
        assert found == expected


@pytest.mark.skipif(not OPEN_FILES.is_dir(), reason="no /proc to count open files in")
def test_a_crowd_of_readers_opens_no_more_files(store: SqlStore) -> None:
    """Files of a closed connection stay open while others hold locks on the same file."""

    def of_the_ledger() -> int:
        files = (file.readlink().name for file in OPEN_FILES.iterdir() if file.is_symlink())
        return sum(name.startswith("ledger.db") for name in files)

    def read() -> None:
        together.wait()
        with store.reading() as tx:
            tx.tasks()

    before, together = of_the_ledger(), threading.Barrier(20)
    with ThreadPoolExecutor(20) as crowd:
        for reading in [crowd.submit(read) for _ in range(20)]:
            reading.result()
    assert of_the_ledger() == before


def test_of_what_is_written_together_no_part_stays_where_a_part_is_refused(store: SqlStore) -> None:
    def upload_two() -> None:
        leases = [ledger.lease(name).id for name in "ab"]
        with store.transaction() as tx, suppress(StorageError), tx.together(leases):
            ledger.upload(tx, "a")
            ledger.upload(tx, "b", loss_first=float("nan"))

    with pytest.raises(StorageError, match="NOT NULL"):
        upload_two()
    with store.reading() as tx:
        assert tx.update(ledger.lease("a").id) is None


# migrations


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
        assert [task.pop("draw_key") for task in newest["tasks"]] == [""]
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


def test_every_column_of_every_table_says_what_it_holds() -> None:
    source = (Path(__file__).parents[3] / "storage" / "models.py").read_text()
    silent = [
        line.strip()
        for line in source.splitlines()
        if re.match(r"    \w+: Mapped\[", line) and "#: " not in line
    ]
    assert silent == []
