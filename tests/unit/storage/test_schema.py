"""The schema refuses impossible rows by itself, whatever program writes them."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
from sqlalchemy import create_engine, text

from fedtt.errors import StorageError
from storage.engine import sqlite_engine
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


def test_every_column_of_every_table_says_what_it_holds() -> None:
    source = (Path(__file__).parents[3] / "storage" / "models.py").read_text()
    silent = [
        line.strip()
        for line in source.splitlines()
        if re.match(r"    \w+: Mapped\[", line) and "#: " not in line
    ]
    assert silent == []
