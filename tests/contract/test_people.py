"""What every store promises of people's tokens and the audit log."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import ClassVar

import psycopg
import pytest
from msgspec.structs import replace

from fedtt.errors import StorageError
from storage import audit
from storage.memory import MemoryStore
from storage.records import Role
from storage.sql import SqlStore
from storage.store import Store
from tests.support import ledger
from tests.support.postgresql import empty_store, needs_postgresql


class PeopleContract:
    """Tests of `storage.store.Store`; a subclass makes the store."""

    @pytest.fixture
    def store(self, tmp_path: Path) -> Iterator[Store]:
        raise NotImplementedError

    def test_admin_tokens_are_found_by_hash_and_listed_by_name(self, store: Store) -> None:
        bob, alice = ledger.admin_token("bob"), ledger.admin_token("alice", role=Role.VIEWER, expires_at=9.5)
        with store.transaction() as tx:
            tx.put_admin_token(bob)
            tx.put_admin_token(alice)
            tx.put_admin_token(replace(bob, revoked_at=7.25))
        with store.reading() as tx:
            assert tx.admin_token(ledger.sha256("another")) is None
            assert tx.admin_token(alice.sha256) == alice
            assert tx.admin_tokens() == [alice, replace(bob, revoked_at=7.25)]

    def test_the_audit_log_is_appended_to_in_order_and_read_by_pages(self, store: Store) -> None:
        with store.transaction() as tx:
            assert tx.last_audit() is None
            assert audit.fault(audit.entries(tx)) is None
            made = [audit.append(tx, 1.0 + n, "alice", "task.create", f"t{n}", {"n": n}) for n in range(5)]
        with store.reading() as tx:
            assert tx.last_audit() == made[-1]
            assert tx.audits() == made == list(audit.entries(tx))
            assert tx.audits(after=2, limit=2) == made[2:4]
            assert audit.fault(audit.entries(tx), head=made[3].sha256) is None
            assert (
                audit.fault(audit.entries(tx), head="f" * 64)
                == f"no entry has the hash {'f' * 64}: entries were cut off or rewritten"
            )
        assert made[0].previous == audit.GENESIS

    def test_an_entry_of_the_audit_log_is_written_once(self, store: Store) -> None:
        with store.transaction() as tx:
            first = audit.append(tx, 1.0, "alice", "task.create", "t", {})
        with pytest.raises(StorageError, match="exists already"), store.transaction() as tx:
            tx.add_audit(first)
        with store.reading() as tx:
            assert tx.audits() == [first]


class TestMemory(PeopleContract):
    @pytest.fixture
    def store(self, tmp_path: Path) -> Store:
        return MemoryStore()


class TestSql(PeopleContract):
    @pytest.fixture
    def store(self, tmp_path: Path) -> Iterator[Store]:
        with closing(SqlStore.open(tmp_path / "ledger.db")) as store:
            yield store

    def test_the_database_itself_refuses_to_change_an_entry(self, store: Store, tmp_path: Path) -> None:
        with store.transaction() as tx:
            audit.append(tx, 1.0, "alice", "task.create", "t", {})
        with closing(sqlite3.connect(tmp_path / "ledger.db")) as connection:
            for statement in ("UPDATE audit SET actor = 'bob'", "DELETE FROM audit"):
                with pytest.raises(sqlite3.IntegrityError, match="the audit log is append-only"):
                    connection.execute(statement)

    TAMPERED: ClassVar = {
        "UPDATE audit SET actor = 'bob' WHERE sequence = 2": "entry 2 was changed after it was written",
        "UPDATE audit SET detail = '{}' WHERE sequence = 3": "entry 3 was changed after it was written",
        "UPDATE audit SET at = 99 WHERE sequence = 1": "entry 1 was changed after it was written",
        "DELETE FROM audit WHERE sequence = 2": "entry 2 is missing",
        "UPDATE audit SET sequence = sequence - 1 WHERE sequence > 2; ": "entry 2 does not follow entry 1",
        "DELETE FROM audit WHERE sequence = 4": "entries were cut off or rewritten",
    }

    @pytest.mark.parametrize("statement", TAMPERED)
    def test_tampering_past_the_triggers_is_found(self, store: Store, tmp_path: Path, statement: str) -> None:
        with store.transaction() as tx:
            head = [audit.append(tx, 1.0 + n, "alice", "task.pause", "t", {"n": n}) for n in range(4)][-1]
        with closing(sqlite3.connect(tmp_path / "ledger.db", isolation_level=None)) as connection:
            connection.executescript("DROP TRIGGER audit_no_update; DROP TRIGGER audit_no_delete;")
            if "sequence - 1" in statement:
                connection.execute("DELETE FROM audit WHERE sequence = 2")
            connection.executescript(statement)
        with store.reading() as tx:
            assert self.TAMPERED[statement] in str(audit.fault(audit.entries(tx), head.sha256))

    def test_whoever_rewrites_the_whole_chain_changes_its_head(self, store: Store, tmp_path: Path) -> None:
        with store.transaction() as tx:
            head = [audit.append(tx, 1.0 + n, "alice", "task.pause", "t", {}) for n in range(3)][-1]
            rows = tx.audits()
        forged, previous = [], audit.GENESIS
        for row in rows:
            forged.append(replace(row, actor="bob", previous=previous))
            forged[-1] = replace(forged[-1], sha256=audit.digest(forged[-1]))
            previous = forged[-1].sha256
        with closing(SqlStore.open(tmp_path / "forged.db")) as other, other.transaction() as tx:
            for row in forged:
                tx.add_audit(row)
            assert audit.fault(audit.entries(tx)) is None
            assert "cut off or rewritten" in str(audit.fault(audit.entries(tx), head.sha256))


@needs_postgresql
class TestPostgresql(PeopleContract):
    @pytest.fixture
    def store(self, tmp_path: Path) -> Iterator[Store]:
        with closing(empty_store()) as store:
            yield store

    @pytest.mark.parametrize(
        "statement", ["UPDATE audit SET actor = 'bob'", "DELETE FROM audit", "TRUNCATE audit"]
    )
    def test_the_database_itself_refuses_to_change_or_empty_the_log(
        self, store: Store, statement: str
    ) -> None:
        assert isinstance(store, SqlStore)
        with store.transaction() as tx:
            entry = audit.append(tx, 1.0, "alice", "task.create", "t", {})
        with (
            psycopg.connect(store.where.replace("+psycopg", "")) as connection,
            pytest.raises(psycopg.Error, match="the audit log is append-only"),
        ):
            connection.execute(statement.encode())
        with store.reading() as tx:
            assert tx.audits() == [entry]
