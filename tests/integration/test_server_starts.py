"""A server that cannot start says why in one line with exit status 2; one whose disk fails loses nothing."""

from __future__ import annotations

import asyncio
import socket
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from aggregator.app import ServerConfig, serving
from aggregator.data_directory import server_directory
from fedtt.cli import main
from fedtt.errors import Refused
from fedtt.messages import Code, UpdateState
from storage.sql import SqlStore
from tests.support.disks import fill, mounted, remount
from tests.support.served import Served, frame_of, served, task_text, until

FREE = ("--port", "0", "--admin-port", "0")


def refuses_to_start(capsys: pytest.CaptureFixture[str], data: Path | str, *options: str) -> str:
    """Start `fedtt serve`, see it end with status 2, and return the one line it says."""
    assert main(["serve", "--data", str(data), *FREE, *options]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("fedtt: error: ")
    assert said.err.count("\n") == 1
    return said.err


def starts(data: Path) -> bool:
    async def run() -> bool:
        async with serving(ServerConfig(data=data, port=0, admin_port=0)) as listening:
            return bool(listening.url)

    return asyncio.run(run())


@pytest.mark.parametrize("option", ["--port", "--admin-port"])
def test_a_taken_port_is_named_and_the_directory_stays_usable(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        said = refuses_to_start(capsys, tmp_path, option, str(port))
    assert f"127.0.0.1: {option} = {port} is not allowed: a free one" in said
    assert "stop the program that uses it, or choose another" in said
    assert starts(tmp_path)


def test_an_address_of_another_machine_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = refuses_to_start(capsys, tmp_path, "--admin-host", "192.0.2.1")
    assert "--admin-host = '192.0.2.1' is not allowed: an address of this machine" in said


@pytest.mark.parametrize("port", ["-1", "65536", "http", "+1"])
def test_a_port_that_is_none_is_refused_with_the_usage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], port: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["serve", "--data", str(tmp_path), "--port", port])
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert f"argument --port: '{port}' is no port: give a number from 0 to 65535" in said.splitlines()[-1]


@pytest.mark.parametrize("name", ["https://fedtt.example.org", "fedtt.example.org/", "", "a b", "host:"])
def test_a_name_of_the_server_that_is_none_is_refused_with_the_usage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["serve", "--data", str(tmp_path), "--authority", name])
    assert caught.value.code == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert f"argument --authority: {name!r} is no name of a server: give HOST or HOST:PORT" in said


def test_a_data_directory_that_is_a_file_or_lies_below_one_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine")
    for data in (tmp_path / "file", tmp_path / "file" / "below"):
        said = refuses_to_start(capsys, data)
        assert f"the data directory {data} cannot be used: " in said
        assert "choose one with --data" in said
    assert (tmp_path / "file").read_text() == "mine"


def test_a_second_server_on_the_same_directory_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with server_directory(tmp_path):
        said = refuses_to_start(capsys, tmp_path)
    assert f"another server runs on {tmp_path}: stop it, or choose another" in said
    assert starts(tmp_path)


def _newer(data: Path) -> None:
    SqlStore.open(data / "fedtt.db").close()
    with closing(sqlite3.connect(data / "fedtt.db")) as database, database:
        database.execute("UPDATE alembic_version SET version_num = '9999'")


def _foreign(data: Path) -> None:
    with closing(sqlite3.connect(data / "fedtt.db")) as database, database:
        database.execute("CREATE TABLE recipes (name)")


def _garbage(data: Path) -> None:
    (data / "fedtt.db").write_bytes(b"no database at all" * 1000)


def _directory(data: Path) -> None:
    (data / "fedtt.db").mkdir()


def _no_token(data: Path) -> None:
    (data / "admin-token").write_text("\n")


SPOILT: dict[str, Callable[[Path], None]] = {
    "fedtt.db: its schema '9999' is newer than this program: use the newer fedtt that made it": _newer,
    "fedtt.db: the database belongs to another program: name another one": _foreign,
    "fedtt.db: the file is not a SQLite database: name another one, or move it away": _garbage,
    "fedtt.db: this is a directory: name a file in it": _directory,
    "admin-token is empty: delete it, and the next start makes a new token": _no_token,
}


@pytest.mark.parametrize("said", SPOILT)
def test_a_directory_that_holds_something_else_is_left_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], said: str
) -> None:
    SPOILT[said](tmp_path)
    assert str(tmp_path / said) in refuses_to_start(capsys, tmp_path)
    assert str(tmp_path / said) in refuses_to_start(capsys, tmp_path)


@pytest.mark.parametrize("url", ["postgresql://host/db", "sqlite://", "nonsense://", "sqlite:///a?b=c"])
def test_a_database_it_cannot_use_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], url: str
) -> None:
    assert "database '" in refuses_to_start(capsys, tmp_path, "--database", url)


def test_any_name_of_a_directory_will_do(tmp_path: Path) -> None:
    data = tmp_path / "a b?c#d%41é" / "below"
    assert starts(data)
    assert (data / "fedtt.db").is_file()
    assert data.stat().st_mode & 0o777 == 0o700
    assert (data / "admin-token").stat().st_mode & 0o777 == 0o600


# disks


def test_a_read_only_data_directory_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with mounted(tmp_path / "disk", "size=4m") as disk:
        assert starts(disk / "data")
        remount(disk, "ro")
        for data in (disk / "data", disk / "new"):
            said = refuses_to_start(capsys, data)
            assert f"the data directory {data} cannot be used: Read-only file system" in said


def test_a_full_disk_at_the_start_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with mounted(tmp_path / "disk", "size=64k") as disk:
        (disk / "filler").write_bytes(bytes(60_000))
        said = refuses_to_start(capsys, disk / "data")
        assert str(disk / "data") in said
        assert "full" in said or "No space left" in said
        (disk / "filler").unlink()


async def _enroll_without_end(server: Served) -> None:
    while True:
        async with server.device():
            pass


async def test_a_disk_that_fills_up_takes_no_update_and_loses_none(tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "size=4m") as disk:
        text = task_text(cohort=2)
        async with served(disk, text) as server, server.device() as a, server.device() as b:
            kept, work = await a.update(), await b.work()
            frame = frame_of(work.plan)
            fill(disk)
            with pytest.raises(Refused) as caught:
                await _enroll_without_end(server)  # the log has some room of its own
            for _ in range(3):
                assert caught.value.problem.code is Code.BUSY
                assert caught.value.retry_after_s in {1, 2, 3}
                with pytest.raises(Refused) as caught:
                    await b.transport.upload(work.lease, frame)
            assert await a.transport.receipt(kept.lease) == kept
            (disk / "filler").unlink()
            await b.transport.upload(work.lease, frame)

            async def folded() -> bool:
                states = [(await p.transport.receipt(x)).state for p, x in ((a, kept.lease), (b, work.lease))]
                return states == [UpdateState.FOLDED] * 2

            await until(folded)
