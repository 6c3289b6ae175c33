"""What goes wrong with a database file is one line: what, where, what to do; nothing accepted is lost."""

from __future__ import annotations

import os
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from fedtt.errors import StorageError, UnavailableError
from storage.sql import SqlStore
from tests.support import ledger
from tests.support.postgresql import empty_store, needs_postgresql, server

NOBODY = 65534


@pytest.fixture
def ordinary_user_directory() -> Iterator[Path]:
    """A directory of one's own, as a user whom file permissions stop (root is not one)."""
    directory = Path(tempfile.mkdtemp(prefix="fedtt-"))
    was = os.geteuid()
    if was == 0:
        os.chown(directory, NOBODY, -1)
        os.seteuid(NOBODY)
    try:
        yield directory
    finally:
        os.seteuid(was)
        directory.chmod(0o700)
        shutil.rmtree(directory)


def _complaint(database: str | Path) -> str:
    with pytest.raises(StorageError) as caught:
        SqlStore.open(database, busy_timeout_s=0.1)
    message = str(caught.value)
    assert "\n" not in message
    return message


def _uploaded(path: Path) -> None:
    """A ledger at this path with one acknowledged update."""
    with closing(SqlStore.open(path)) as store, store.transaction() as tx:
        ledger.open_round(tx)
        ledger.upload(tx)


def _still_holds_the_update(path: Path) -> bool:
    with closing(SqlStore.open(path)) as store, store.reading() as tx:
        return tx.update(ledger.lease().id) is not None


def test_a_path_and_a_url_name_the_same_database(tmp_path: Path) -> None:
    _uploaded(tmp_path / "ledger.db")
    with closing(SqlStore.open(f"sqlite:///{tmp_path}/ledger.db")) as store, store.reading() as tx:
        assert tx.update(ledger.lease().id) is not None


@pytest.mark.parametrize(
    ("database", "complaint"),
    [
        (
            "postgresql://me:secret@host/db",
            r"postgresql://me:\*\*\*@host/db.* names no PostgreSQL database: write postgresql\+psycopg://",
        ),
        ("postgresql+psycopg://host", "names no PostgreSQL database"),
        (
            "mysql://me:secret@host/db",
            r"mysql://me:\*\*\*@host/db.* name sqlite:///FILE or postgresql\+psycopg://",
        ),
        ("sqlite:///ledger.db?mode=ro", "cannot be used"),
        ("sqlite:///:memory:", "is no file: name one"),
        ("sqlite://", "is no file: name one"),
        ("", "is no file: name one"),
        ("://", "is no URL: write sqlite:///ledger.db"),
    ],
)
def test_what_names_no_sqlite_file_is_refused(database: str, complaint: str) -> None:
    with pytest.raises(StorageError, match=complaint):
        SqlStore.open(database)


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    path = tmp_path / "missing" / "ledger.db"
    assert _complaint(path) == f"{path}: directory {path.parent} does not exist: create it"


def test_a_directory_in_place_of_the_file_is_named(tmp_path: Path) -> None:
    assert _complaint(tmp_path) == f"{tmp_path}: this is a directory: name a file in it"


def test_a_read_only_directory_is_named(ordinary_user_directory: Path) -> None:
    ordinary_user_directory.chmod(0o500)
    path = ordinary_user_directory / "ledger.db"
    wanted = f"directory {path.parent} is read-only: give this user write access to it, or choose another"
    assert _complaint(path) == f"{path}: {wanted}"


def test_a_read_only_database_is_named_and_unharmed(ordinary_user_directory: Path) -> None:
    path = ordinary_user_directory / "ledger.db"
    _uploaded(path)
    path.chmod(0o400)
    assert "may not be written: give this user write access" in _complaint(path)
    path.chmod(0o600)
    assert _still_holds_the_update(path)


def test_the_file_is_for_its_owner_alone(tmp_path: Path) -> None:
    _uploaded(tmp_path / "ledger.db")
    assert (tmp_path / "ledger.db").stat().st_mode & 0o777 == 0o600


def test_a_file_that_is_no_database_is_named_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    path.write_bytes(b"not a database, though long enough to be one" * 100)
    before = path.read_bytes()
    assert _complaint(path) == f"{path}: the file is not a SQLite database: name another one, or move it away"
    assert path.read_bytes() == before


def test_a_damaged_database_is_named(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    _uploaded(path)
    damaged = bytearray(path.read_bytes())
    damaged[100:4096] = b"\xff" * (4096 - 100)  # the first page, where the schema begins
    path.write_bytes(damaged)
    assert _complaint(path) == f"{path}: the database is damaged: restore it from a backup"


def test_another_programs_database_is_named_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "photos.db"
    with closing(sqlite3.connect(path)) as other:
        other.execute("CREATE TABLE photos (id INTEGER)")
    assert _complaint(path) == f"{path}: the database belongs to another program: name another one"
    with closing(sqlite3.connect(path)) as other:
        assert other.execute("SELECT name FROM sqlite_master").fetchall() == [("photos",)]


def test_a_database_of_a_newer_schema_is_named_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    _uploaded(path)
    with closing(sqlite3.connect(path)) as other, other:
        (known,) = other.execute("SELECT version_num FROM alembic_version").fetchone()
        other.execute("UPDATE alembic_version SET version_num = '9999'")
    wanted = "its schema '9999' is newer than this program: use the newer fedtt that made it"
    assert _complaint(path) == f"{path}: {wanted}"
    with closing(sqlite3.connect(path)) as other, other:
        other.execute("UPDATE alembic_version SET version_num = ?", (known,))
    assert _still_holds_the_update(path)


def test_a_database_that_another_process_locks_is_named(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    _uploaded(path)
    with (
        closing(SqlStore.open(path, busy_timeout_s=0.05)) as store,
        closing(sqlite3.connect(path, isolation_level=None)) as other,
    ):
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StorageError, match="another process keeps it locked"), store.transaction():
            pass
        with store.reading() as tx:  # reading goes on beside a writer
            assert tx.update(ledger.lease().id) is not None
        other.execute("ROLLBACK")
        with store.transaction() as tx:
            assert tx.update(ledger.lease().id) is not None


def _fill_up(store: SqlStore) -> None:
    """Let the database grow by no page more, as on a full disk."""
    with store.transaction() as tx:
        pages = tx._connection.exec_driver_sql("PRAGMA page_count").scalar_one()
        tx._connection.exec_driver_sql(f"PRAGMA max_page_count = {pages}")


def test_a_full_disk_undoes_the_transaction_and_keeps_what_was_acknowledged(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    _uploaded(path)
    with closing(SqlStore.open(path)) as store:
        _fill_up(store)
        with pytest.raises(StorageError, match="the disk is full") as caught, store.transaction() as tx:
            ledger.upload(tx, "too much", payload=bytes(100_000))
        assert "\n" not in str(caught.value)
        with store.reading() as tx:
            assert tx.lease(ledger.lease("too much").id) is None
            assert tx.update(ledger.lease().id) is not None
    assert _still_holds_the_update(path)


def test_a_transaction_that_met_a_full_disk_cannot_commit_even_where_the_error_is_swallowed(
    tmp_path: Path,
) -> None:
    path = tmp_path / "ledger.db"
    _uploaded(path)

    def swallow(store: SqlStore) -> None:
        with store.transaction() as tx:
            tx.put_token(ledger.token())
            with pytest.raises(StorageError, match="the disk is full"):
                ledger.upload(tx, "too much", payload=bytes(100_000))
            with pytest.raises(StorageError, match="the disk is full"):
                tx.put_device(ledger.device("carol"))

    with closing(SqlStore.open(path)) as store:
        _fill_up(store)
        with pytest.raises(StorageError, match="the disk is full"):
            swallow(store)
        with store.reading() as tx:
            assert tx.token(ledger.sha256("secret")) is None
            assert tx.device(ledger.device("carol").id) is None
        with store.transaction() as tx:  # the connection is sound again
            tx.put_device(ledger.device("alice", examples=8))


@pytest.mark.parametrize(
    "statement",
    [
        """UPDATE tasks SET spec = '{"name":"intents","weighting":"examples"}'""",
        "UPDATE tasks SET spec = replace(spec, '\"quorum\":2', '\"quorum\":11')",  # of a cohort of 10
        "UPDATE tasks SET state = 'dreaming'",
    ],
)
def test_a_row_that_only_another_release_can_read_is_named(statement: str, tmp_path: Path) -> None:
    _uploaded(tmp_path / "ledger.db")
    with closing(sqlite3.connect(tmp_path / "ledger.db")) as connection, connection:
        connection.execute("PRAGMA ignore_check_constraints = ON")
        connection.execute(statement)
    with closing(SqlStore.open(tmp_path / "ledger.db")) as store, store.reading() as tx:
        with pytest.raises(StorageError, match=r"^a row of tasks cannot be read \(.*\): run one release"):
            tx.task("intents")
        assert tx.device(ledger.device().id) == ledger.device()


def test_a_postgresql_that_does_not_answer_is_named_without_its_password() -> None:
    with pytest.raises(UnavailableError) as caught:
        SqlStore.open("postgresql+psycopg://me:secret@127.0.0.1:1/db")
    message = str(caught.value)
    assert "postgresql+psycopg://me:***@127.0.0.1:1/db: the server cannot be reached" in message
    assert "\n" not in message


@needs_postgresql
def test_a_database_of_postgresql_that_is_not_there_is_named() -> None:
    with pytest.raises(StorageError, match="see that user, password and database are right"):
        SqlStore.open(server().url("nowhere"))


@needs_postgresql
def test_another_programs_postgresql_is_named_and_left_alone() -> None:
    url = server().new_database()
    name = url.rpartition("/")[2]
    server().sql("CREATE TABLE photos (id INTEGER)", name)
    with pytest.raises(StorageError, match="the database belongs to another program: name another one"):
        SqlStore.open(url)
    assert server().sql("SELECT tablename FROM pg_tables WHERE schemaname = 'public'", name) == [("photos",)]
    server().drop(url)


@needs_postgresql
def test_a_server_whose_connection_is_ended_goes_on_with_the_next_transaction() -> None:
    with closing(empty_store()) as store:
        with store.transaction() as tx:
            ledger.open_round(tx)
        server().sql(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'fedtt'"
        )
        with store.reading() as tx:
            assert tx.device(ledger.device().id) == ledger.device()
        with store.transaction() as tx:
            ledger.upload(tx)
