"""The audit of a ledger finds each kind of wrong that is planted in one, on both databases."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from benchmarks.faults.devices import Notes
from benchmarks.faults.ledger import NOTHING_WRONG, audit
from benchmarks.faults.tables import PostgresqlTables, SqliteTables, Tables
from fedtt.wire import encode_theta
from storage.blobs import FileBlobs, save
from storage.records import UpdateState
from storage.sql import SqlStore
from tests.support import ledger
from tests.support.postgresql import needs_postgresql, server

DEVICES = ("alice", "bob", "carol")
PLACES = {ledger.device(name).id: place for place, name in enumerate(DEVICES)}
Plant = Callable[[str], None]  #: runs statements that no schema stops


def make(store: SqlStore, data: Path) -> Notes:
    """A ledger whose version 1 is of alice and bob, while carol came too late."""
    blobs, notes = FileBlobs(data / "blobs"), Notes()
    first, second = (
        save(blobs, encode_theta(np.array(theta, np.float32))) for theta in ([0, 0, 0], [0.5, 0.5, 0])
    )
    with store.transaction() as tx:
        for name in DEVICES:
            tx.put_device(ledger.device(name))
        tx.put_bundle(ledger.bundle())
        tx.add_task(ledger.task())
        tx.add_version(ledger.version(0, sha256=first))
        tx.put_round(ledger.round_(1))
        tx.add_version(ledger.version(1, sha256=second, updates=2))
        for name in DEVICES:
            update = ledger.upload(tx, name, device_id=ledger.device(name).id)
            notes.acknowledged[update.lease_id] = update.digest
        alice, bob, carol = notes.acknowledged
        tx.settle([alice, bob], UpdateState.FOLDED, folded_into=1)
        tx.settle([carol], UpdateState.DISCARDED, reason="late")
    assert not store.wipe()
    return notes


def on_sqlite(data: Path) -> tuple[Notes, Tables, Plant]:
    path = data / "fedtt.db"
    with closing(SqlStore.open(path)) as store:
        notes = make(store, data)

    def plant(statements: str) -> None:
        with closing(sqlite3.connect(path)) as database:
            database.executescript(f"PRAGMA ignore_check_constraints = ON; {statements}")

    return notes, SqliteTables(path), plant


def on_postgresql(data: Path) -> tuple[Notes, Tables, Plant]:
    url = server().new_database()
    with closing(SqlStore.open(url)) as store:
        notes = make(store, data)

    def plant(statements: str) -> None:
        unguarded = (
            "SET session_replication_role = replica; ALTER TABLE updates DROP CONSTRAINT ck_updates_one_end"
        )
        server().sql(f"{unguarded}; {statements}", url.rpartition("/")[2])

    return notes, PostgresqlTables(server(), url), plant


either = pytest.mark.parametrize("place", [on_sqlite, pytest.param(on_postgresql, marks=needs_postgresql)])
Place = Callable[[Path], tuple[Notes, Tables, Plant]]


def wrong(data: Path, notes: Notes, tables: Tables) -> dict[str, int]:
    figures = audit(data, notes, PLACES, tables=tables).figures()
    return {name: int(figures[name]) for name in NOTHING_WRONG if figures[name]}


@either
def test_a_sound_ledger_is_found_sound(place: Place, tmp_path: Path) -> None:
    notes, tables, _ = place(tmp_path)
    figures = audit(tmp_path, notes, PLACES, tables=tables).figures()
    sound = {"acknowledged": 3, "folded": 2, "discarded": 1, "versions": 1}
    assert figures == dict.fromkeys(NOTHING_WRONG, 0) | sound


@either
@pytest.mark.parametrize(
    ("statements", "found"),
    [
        (
            "UPDATE updates SET digest = (SELECT digest FROM updates WHERE sequence = 1) WHERE sequence = 2",
            {"lost": 1},
        ),
        ("INSERT INTO payloads VALUES (3, 'left')", {"misheld": 1}),
        (
            "UPDATE updates SET state = 'accepted', reason = '' WHERE sequence = 3",
            {"misheld": 1, "unsettled": 1},
        ),
        (  # a step of 1/2 is then one of 3/2 devices
            "UPDATE versions SET updates = 3 WHERE number = 1",
            {"miscounted": 1, "folded_otherwise": 2},
        ),
        (
            "UPDATE updates SET device_id = (SELECT device_id FROM updates WHERE sequence = 1) "
            "WHERE sequence = 2",
            {"folded_otherwise": 2},
        ),
        ("UPDATE leases SET round_number = 9 WHERE sequence = 1", {"damaged": 1}),
    ],
)
def test_what_is_wrong_is_named(place: Place, statements: str, found: dict[str, int], tmp_path: Path) -> None:
    notes, tables, plant = place(tmp_path)
    plant(statements)
    assert wrong(tmp_path, notes, tables) == found


@either
def test_what_was_discarded_without_a_reason_is_named(place: Place, tmp_path: Path) -> None:
    notes, tables, plant = place(tmp_path)
    plant("UPDATE updates SET reason = '' WHERE sequence = 3")
    assert wrong(tmp_path, notes, tables)["unreasoned"] == 1  # SQLite's own check refuses the row, too


@either
def test_a_blob_that_does_not_match_its_name_is_damage(place: Place, tmp_path: Path) -> None:
    notes, tables, _ = place(tmp_path)
    ((sha256,),) = tables.rows("SELECT sha256 FROM versions WHERE number = 1")
    (tmp_path / "blobs" / sha256[:2] / sha256).write_bytes(bytes(12))
    assert wrong(tmp_path, notes, tables) == {"damaged": 1}


@needs_postgresql
def test_an_index_that_misses_rows_is_damage_on_postgresql(tmp_path: Path) -> None:
    notes, tables, plant = on_postgresql(tmp_path)
    if not tables.rows("SELECT 1 FROM pg_available_extensions WHERE name = 'amcheck'"):
        pytest.skip("PostgreSQL's amcheck is not installed: apt install postgresql-contrib")
    plant(
        "UPDATE pg_index SET indisready = false WHERE indexrelid = 'ix_devices_seen_at'::regclass; "
        "UPDATE devices SET seen_at = 1; "
        "UPDATE pg_index SET indisready = true WHERE indexrelid = 'ix_devices_seen_at'::regclass"
    )
    assert wrong(tmp_path, notes, tables) == {"damaged": 1}
