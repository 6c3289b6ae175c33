"""`fedtt doctor` finds what is wrong with a deployment and says what to do."""

from __future__ import annotations

import sqlite3
import stat
from contextlib import closing
from pathlib import Path

import pytest

from aggregator import doctor
from aggregator.doctor import Finding, examine
from aggregator.token_files import secret_file
from export.signing import create_key, delegate, read_key
from fedtt.cli import main
from storage.sql import SqlStore
from tests.integration.test_tls import authority


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A sound data directory."""
    directory = tmp_path / "data"
    directory.mkdir(mode=0o700)
    SqlStore.open(directory / "fedtt.db").close()
    secret_file(directory / "admin-token")
    return directory


def found(data: Path, **files: Path | str | None) -> dict[str, Finding]:
    return {finding.name: finding for finding in examine(data, **files)}  # type: ignore[arg-type]


def test_a_sound_deployment_is_found_sound(data: Path, tmp_path: Path) -> None:
    authority(tmp_path, "ours")
    create_key(tmp_path / "release.key")
    delegate(read_key(tmp_path / "release.key"), tmp_path / "server.key", 365)
    seen = found(data, server_key=tmp_path / "server.key")
    assert {name for name in ("data", "database", "tls", "server key") if not seen[name].ok} == set()
    assert "journal mode wal" in seen["database"].said
    assert seen["server key"].said.endswith("is good for 365 days")
    assert set(seen) == {"data", "disk", "database", "clock", "files", "tls", "server key"}


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


def test_the_command_ends_with_status_1_where_something_is_to_be_fixed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", "--data", str(tmp_path / "none")]) == 1
    said = capsys.readouterr().out
    assert f"FAIL data       {tmp_path / 'none'} does not exist" in said
    assert "→ start `fedtt serve` once" in said
