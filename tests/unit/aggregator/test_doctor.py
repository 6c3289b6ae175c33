"""`fedtt doctor` finds what is wrong with a deployment and says what to do."""

from __future__ import annotations

import ctypes
import sqlite3
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from sqlalchemy import create_engine

from aggregator import doctor
from aggregator.doctor import examine
from aggregator.findings import Finding
from aggregator.token_files import secret_file
from export.signing import create_key, delegate, read_key
from fedtt.cli import main
from storage.migrate import downgrade, newest_schema
from storage.sql import SqlStore
from tests.support.certificates import authority
from tests.support.postgresql import needs_postgresql, server


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A sound data directory."""
    directory = tmp_path / "data"
    directory.mkdir(mode=0o700)
    SqlStore.open(directory / "fedtt.db").close()
    secret_file(directory / "admin-token")
    return directory


@pytest.fixture
def other_disk(tmp_path: Path) -> Iterator[Path]:
    """A directory on a file system other than the tests'."""
    memory = Path("/dev/shm")  # noqa: S108  # it is one of its own on Linux
    if not memory.is_dir() or memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("this machine has no second file system to write to")
    with TemporaryDirectory(dir=memory) as directory:
        yield Path(directory)


def found(data: Path, **files: Path | str | None) -> dict[str, Finding]:
    return {finding.name: finding for finding in examine(data, **files)}  # type: ignore[arg-type]


def test_a_sound_deployment_is_found_sound(data: Path, tmp_path: Path) -> None:
    authority(tmp_path, "ours")
    create_key(tmp_path / "release.key")
    delegate(read_key(tmp_path / "release.key"), tmp_path / "server.key", 365)
    seen = found(data, server_key=tmp_path / "server.key")
    sound = ("data", "database", "schema", "audit", "blobs", "tls", "server key")
    assert {name for name in sound if not seen[name].ok} == set()
    assert "journal mode wal" in seen["database"].said
    assert seen["server key"].said.endswith("is good for 365 days")
    assert set(seen) == {*sound, "disk", "clock", "files"}
    assert seen["blobs"].said.endswith("a blob was written, read and deleted")
    assert not [path for path in (data / "blobs").rglob("*") if path.is_file()]


def test_each_fault_is_named_with_its_remedy(data: Path, tmp_path: Path) -> None:
    authority(tmp_path, "ours")
    create_key(tmp_path / "release.key")
    delegate(read_key(tmp_path / "release.key"), tmp_path / "server.key", 3)
    cert, key = tmp_path / "server-ours.pem", tmp_path / "server-ours-key.pem"
    seen = found(data, tls_cert=cert, tls_key=key, server_key=tmp_path / "server.key")
    assert (seen["tls"].ok, seen["tls"].fix) == (False, "renew it and restart")  # it is good for a day
    assert "is good for 3 days" in seen["server key"].said
    assert "fedtt key delegate" in seen["server key"].fix
    assert not found(data, tls_cert=cert)["tls"].ok
    (data / "admin-token").chmod(0o644)
    assert "chmod 600" in found(data)["data"].fix
    data.chmod(data.stat().st_mode | stat.S_IROTH | stat.S_IXOTH)
    assert "chmod 700" in found(data)["data"].fix
    assert "does not exist" in found(tmp_path / "none")["data"].said


def test_a_database_in_another_mode_damaged_or_unreachable_is_found(data: Path) -> None:
    path = data / "fedtt.db"
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA journal_mode = DELETE")
    assert "journal mode delete, not wal" in found(data)["database"].said
    path.write_bytes(b"nothing like a database" * 100)
    assert "not a database" in found(data)["database"].said
    gone = found(data, database="postgresql+psycopg://nobody@127.0.0.1:1/none")["database"]
    assert not gone.ok


def test_too_few_files_and_too_little_disk_are_found(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_FILES", 10**12)
    monkeypatch.setattr(doctor, "_FREE_BYTES", 1 << 60)
    seen = found(data)
    assert "LimitNOFILE=" in seen["files"].fix or "any number" in seen["files"].said
    assert "free at least" in seen["disk"].fix


def test_a_clock_that_the_kernel_calls_unsynchronised_is_found(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "adjtimex"):
        pytest.skip("SKIPPED: this system does not say whether its clock is synchronised")
    state = libc.adjtimex(ctypes.create_string_buffer(256))  # whatever it is here, call it the error
    monkeypatch.setattr(doctor, "_TIME_ERROR", state)
    seen = found(data)["clock"]
    assert (seen.ok, seen.said, seen.fix) == (
        False,
        "the clock is not synchronised",
        "run chrony or timesyncd",
    )
    monkeypatch.setattr(doctor, "_TIME_ERROR", state + 1)
    assert found(data)["clock"].ok


def test_each_disk_is_looked_at_once(
    data: Path, other_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def disks(**files: Path | str) -> dict[str, Path]:
        seen = found(data, **files).values()
        return {f.name: Path(f.said.partition(":")[0]) for f in seen if "disk" in f.name}

    assert disks() == disks(blobs=str(tmp_path / "blobs")) == disks(blobs="memory:///") == {"disk": data}
    assert disks(blobs=str(other_disk / "blobs")) == {"disk": data, "blobs disk": other_disk}
    with_both = disks(blobs=f"file://{other_disk}", database=f"sqlite:///{other_disk / 'fedtt.db'}")
    assert with_both == {"disk": data, "ledger disk": other_disk}  # on which the blobs lie, too
    monkeypatch.setattr(doctor, "_FREE_BYTES", 1 << 60)
    assert "free at least" in found(data, blobs=str(other_disk))["blobs disk"].fix


def test_the_command_ends_with_status_1_where_something_is_to_be_fixed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", "--data", str(tmp_path / "none")]) == 1
    said = capsys.readouterr().out
    assert f"FAIL data        {tmp_path / 'none'} does not exist" in said
    assert "→ start `fedtt serve` once" in said


def test_a_schema_that_is_behind_or_unknown_and_a_log_without_guard_are_found(data: Path) -> None:
    path = data / "fedtt.db"
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("DROP TRIGGER audit_no_update")
    assert "audit_no_update missing" in found(data)["audit"].said
    engine = create_engine(f"sqlite:///{path}")
    with engine.begin() as migrating:
        downgrade(migrating, "0005")
    engine.dispose()
    seen = found(data)["schema"]
    newest = newest_schema()
    assert f"0005 is {int(newest) - 5} migrations behind {newest}" in seen.said
    assert seen.fix == "back it up, then start `fedtt serve`, which migrates it"
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    assert "unknown to this program" in found(data)["schema"].said
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("DELETE FROM alembic_version")
    assert "no tables yet" in found(data)["schema"].said


def test_blobs_that_cannot_be_written_are_found(data: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    seen = found(data, blobs=str(tmp_path / "file" / "blobs"))["blobs"]
    assert not seen.ok
    assert str(tmp_path / "file") in seen.said


def test_a_certificate_that_is_not_valid_yet_is_found(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority(tmp_path, "ours")
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() - 10 * 86400)
    seen = found(data, tls_cert=tmp_path / "server-ours.pem", tls_key=tmp_path / "server-ours-key.pem")["tls"]
    assert (seen.ok, "is not valid yet" in seen.said) == (False, True)


@needs_postgresql
def test_postgresql_is_looked_at_from_its_version_to_its_guards(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = server().new_database()
    name = url.rpartition("/")[2]
    assert "no tables yet" in found(data, database=url)["schema"].said
    SqlStore.open(url).close()

    def look() -> dict[str, Finding]:
        return found(data, database=url)

    server().sql(f"ALTER DATABASE {name} SET default_transaction_isolation = 'serializable'")
    seen = look()
    assert {
        key
        for key in ("database", "isolation", "connections", "clocks", "schema", "audit")
        if not seen[key].ok
    } == set()
    assert "PostgreSQL 1" in seen["database"].said
    assert (
        seen["isolation"].said == "writing transactions are read committed"
    )  # whatever the server's default
    assert "fsync off" in seen["durability"].said  # as it is for tests
    assert seen["durability"].fix == "ALTER SYSTEM SET fsync = on; SELECT pg_reload_conf()"
    server().sql("ALTER SYSTEM SET fsync = on")
    server().sql("SELECT pg_reload_conf()")
    try:
        assert _until(lambda: look()["durability"].ok)
    finally:
        server().sql("ALTER SYSTEM RESET fsync")
        server().sql("SELECT pg_reload_conf()")
    server().sql(f"ALTER DATABASE {name} CONNECTION LIMIT 4")
    server().sql("ALTER TABLE audit DISABLE TRIGGER audit_no_truncate", name)
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + 60)
    seen = look()
    assert "of 4 connections are in use" in seen["connections"].said
    assert seen["connections"].fix == "raise max_connections and restart PostgreSQL"
    assert "audit_no_truncate missing or off" in seen["audit"].said
    assert "differ by 60.0 s" in seen["clocks"].said


def _until(true: Callable[[], bool]) -> bool:
    """PostgreSQL reads its configuration again a moment after it was told to."""
    for _ in range(50):
        if true():
            return True
        time.sleep(0.1)
    return False
