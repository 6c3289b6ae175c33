"""`fedtt task`, `version` and `device` against a real server: tables, JSON, errors of one line."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import pytest_asyncio

from fedtt.cli import main
from fedtt.errors import Refused
from fedtt.manifest import MANIFEST
from fedtt.messages import Code
from fedtt.version_config import CONFIG, FACTORS
from tests.support.edge import write_small_bundle
from tests.support.served import Peer, Served, refused, served, task_text, until

TASK_FILE = task_text(cohort=2, count=2)


class Terminal:
    """Runs `fedtt` commands against one server, and shows what they print."""

    def __init__(self, server: Served, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.server, self._data, self._capsys = server, data, capsys

    async def run(self, *arguments: str, server: str = "", token_file: str = "") -> tuple[int, str, str]:
        """Status, stdout and stderr."""
        where = ("--server", server or self.server.listening.admin_url)
        token = ("--token-file", token_file or str(self._data / "admin-token"))
        status = await asyncio.to_thread(main, [*arguments, *where, *token])
        said = self._capsys.readouterr()
        return status, said.out, said.err

    async def shown(self, *arguments: str) -> list[str]:
        """The words of each line of a command's table, its heading first."""
        status, out, err = await self.run(*arguments)
        assert (status, err) == (0, "")
        return [" ".join(line.split()) for line in out.splitlines()]

    async def json(self, *arguments: str) -> list[dict[str, Any]]:
        status, out, err = await self.run(*arguments, "--json")
        assert (status, err) == (0, "")
        return [json.loads(line) for line in out.splitlines()]

    async def refused(self, *arguments: str, **where: str) -> str:
        """The one line a command ends with that cannot do what it is asked."""
        status, out, err = await self.run(*arguments, **where)
        assert (status, out) == (2, "")
        assert err.startswith("fedtt: error: ")
        assert err.count("\n") == 1
        return err.removeprefix("fedtt: error: ")


@pytest_asyncio.fixture
async def terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Terminal]:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("FEDTT_ADMIN_TOKEN", raising=False)
    (tmp_path / "task.toml").write_text(TASK_FILE)
    async with served(tmp_path) as server:
        yield Terminal(server, tmp_path / "data", capsys)


@pytest.fixture
def create(tmp_path: Path) -> tuple[str, ...]:
    return ("task", "create", str(tmp_path / "task.toml"), "--bundle", str(tmp_path / "bundle"))


async def test_the_life_of_a_task_as_tables(
    terminal: Terminal, create: tuple[str, ...], tmp_path: Path
) -> None:
    heading = "name state version of round updates in round loss reason"
    assert await terminal.shown("task", "list") == ["(none)"]
    assert await terminal.shown(*create) == [heading, "lights active 0 2 0 0 - -"]
    async with terminal.server.device() as a, terminal.server.device() as b:
        await a.update()
        assert await terminal.shown("task", "list") == [heading, "lights active 0 2 1 1 - -"]
        paused = await terminal.shown("task", "pause", "lights")
        assert paused == [heading, "lights paused 0 2 1 1 - by an operator"]
        assert (await terminal.shown("task", "resume", "lights"))[1] == "lights active 0 2 1 1 - -"
        await b.update()

        async def folded() -> bool:
            return bool((await terminal.server.admin.task("lights"))["version"])

        await until(folded)
        shown = await terminal.shown("task", "show", "lights")
        assert shown[1] == "lights active 1 2 2 0 0.5000 -"
        assert shown[2] == "[task] seed = 0, min_examples = 1, priority = 0"
        assert shown[3].startswith("[rounds] count = 2, cohort = 2, quorum = 1, deadline_s = 3600.0, ")
        settings = [line.split()[0] for line in shown if line.startswith("[")]
        sections = ("task", "rounds", "training", "method", "fold", "server", "sampling", "codec")
        assert settings == [f"[{section}]" for section in sections]
        last = 2 + len(sections)
        assert 'quantise = "fp32"' in shown[last - 1]
        del shown[2:last]
        assert shown[2] == "number branch version number state opened closed reason"
        rounds = [line.split()[:4] for line in shown[3:]]
        assert rounds == [["2", "main", "1", "open"], ["1", "main", "0", "folded"]]
        versions = await terminal.shown("version", "list", "lights")
        assert (
            versions[0] == "number branch state updates examples loss first loss last sha256 created reason"
        )
        assert versions[1].startswith("0 main released 0 0 - - ")
        assert versions[2].startswith("1 main released 2 10 1.0000 0.5000 ")
        devices = await terminal.shown("device", "list")
        assert devices[0] == "id state client examples enrolled seen"
        names = sorted(peer.identity.device for peer in (a, b))
        assert [line.split()[:4] for line in devices[1:]] == [[n[:16], "active", "test", "5"] for n in names]
    out = tmp_path / "result"
    assert await terminal.shown("version", "download", "lights", "--out", str(out)) == [
        f"version 1 of lights is in {out}"
    ]
    assert {path.name for path in out.iterdir()} == {CONFIG, FACTORS, "bundle"}
    for path in terminal.server.bundle.iterdir():
        assert (out / "bundle" / path.name).read_bytes() == path.read_bytes()
    assert (await terminal.shown("task", "stop", "lights"))[1].endswith("by an operator")


async def test_the_same_as_json_one_object_a_line(
    terminal: Terminal, create: tuple[str, ...], tmp_path: Path
) -> None:
    assert await terminal.json("task", "list") == []
    (created,) = await terminal.json(*create)
    assert (created["name"], created["state"], created["version"]) == ("lights", "active", 0)
    (shown,) = await terminal.json("task", "show", "lights")
    assert shown["spec"]["rounds"]["cohort"] == 2
    assert shown["rounds"] == []
    (version,) = await terminal.json("version", "list", "lights")
    assert (version["number"], version["parents"], version["updates"]) == (0, [], 0)
    async with terminal.server.device() as peer:
        (device,) = await terminal.json("device", "list")
        assert (device["id"], device["state"]) == (peer.identity.device, "active")
    arguments = (
        "version",
        "download",
        "lights",
        "--number",
        "0",
        "--no-bundle",
        "--out",
        str(tmp_path / "v0"),
    )
    assert await terminal.json(*arguments) == [{"task": "lights", "version": 0, "path": str(tmp_path / "v0")}]
    assert {path.name for path in (tmp_path / "v0").iterdir()} == {CONFIG, FACTORS}
    (stopped,) = await terminal.json("task", "stop", "lights")
    assert stopped["state"] == "stopped"


async def test_a_token_enrols_as_many_devices_as_it_was_made_for_and_is_kept_as_a_hash(
    terminal: Terminal, tmp_path: Path
) -> None:
    (made,) = await terminal.json("token", "create", "--uses", "1", "--expires-s", "3600")
    assert made["uses"] == 1
    assert 3500 < made["expires_at"] - terminal.server.service.clock.now() <= 3600
    async with Peer(terminal.server.url, 1) as first, Peer(terminal.server.url, 2) as second:
        await first.enroll(made["token"])
        with pytest.raises(Refused, match="bad_token"):
            await second.enroll(made["token"])
        (unlimited,) = await terminal.shown("token", "create")
        await second.enroll(unlimited)
    stored = b"".join(path.read_bytes() for path in (tmp_path / "data").glob("fedtt.db*"))
    assert hashlib.sha256(made["token"].encode()).hexdigest().encode() in stored
    assert made["token"].encode() not in stored


async def test_a_token_that_was_revoked_enrols_nobody_and_leaves_those_that_it_has(
    terminal: Terminal,
) -> None:
    (made,) = await terminal.json("token", "create")
    (other,) = await terminal.json("token", "create")
    async with Peer(terminal.server.url, 1) as first, Peer(terminal.server.url, 2) as second:
        await first.enroll(made["token"])
        (revoked,) = await terminal.json("token", "revoke", made["token"])
        assert revoked == {"sha256": hashlib.sha256(made["token"].encode()).hexdigest()}
        with pytest.raises(Refused, match="bad_token"):
            await second.enroll(made["token"])
        await first.enroll(made["token"])  # whom it has enrolled needs none
        await second.enroll(other["token"])
    standing, *log = await terminal.json("audit", "list")
    assert (standing["action"], standing["actor"]) == ("token.create", "program")
    assert [(row["action"], row["subject"]) for row in log] == [
        ("token.create", made["sha256"]),
        ("token.create", other["sha256"]),
        ("token.revoke", made["sha256"]),
    ]
    await terminal.json("token", "revoke", log[1]["subject"])
    assert "there is no enrolment token" in await terminal.refused("token", "revoke", "guessed")


async def test_the_token_beside_the_database_makes_room_for_another_once_it_was_revoked(
    tmp_path: Path,
) -> None:
    async with served(tmp_path, None) as server:
        old = server.token
        sha256 = hashlib.sha256(old.encode()).hexdigest()
        assert (await server.people("POST", f"/tokens/{sha256}/revoke")).status == 200
    async with served(tmp_path, None) as server, Peer(server.url, 1) as peer:
        assert server.token not in {"", old}
        assert (tmp_path / "data" / "enrolment-token").read_text().strip() == server.token
        with pytest.raises(Refused, match="bad_token"):
            await peer.enroll(old)
        await peer.enroll(server.token)
    async with served(tmp_path, None) as again:
        assert again.token == server.token


async def test_no_token_stands_where_people_want_none(tmp_path: Path) -> None:
    kept = tmp_path / "data" / "enrolment-token"
    async with served(tmp_path, None) as server, Peer(server.url, 1) as peer:
        await peer.enroll(server.token)
        standing = server.token
    async with served(tmp_path, None, standing_token=False) as server, Peer(server.url, 2) as peer:
        assert server.token == ""
        assert not kept.exists()
        with pytest.raises(Refused, match="bad_token"):
            await peer.enroll(standing)
        made = msgspec.json.decode((await server.people("POST", "/tokens", b"{}")).body)["token"]
        await peer.enroll(made)
        log = msgspec.json.decode((await server.people("GET", "/audit")).body)
        assert [row["action"] for row in log] == ["token.create", "token.revoke", "token.create"]
        assert {row["actor"] for row in log[:2]} == {"program"}


async def test_a_token_that_nothing_could_use_is_refused(terminal: Terminal) -> None:
    assert "--uses = 0 is not allowed" in await terminal.refused("token", "create", "--uses", "0")
    for never in ("0", "nan", "inf", "-1"):
        said = await terminal.refused("token", "create", f"--expires-s={never}")
        assert "seconds above 0" in said
    for body in (b"", b'{"uses": 0}', b'{"uses": 1.5}', b'{"expires_s": -1}', b'{"use": 1}', b"\xff"):
        refused(await terminal.server.people("POST", "/tokens", body), Code.MALFORMED)


async def test_a_download_that_stopped_goes_on_with_the_files_that_are_missing_or_damaged(
    terminal: Terminal, create: tuple[str, ...], tmp_path: Path
) -> None:
    await terminal.shown(*create)
    bundle, out = tmp_path / "bundle", tmp_path / "result"
    download = ("version", "download", "lights", "--out", str(out))
    await terminal.shown(*download)
    kept, damaged, lost = out / "bundle" / "base.bin", out / "bundle" / "step.onnx", out / "bundle" / MANIFEST
    inode = kept.stat().st_ino
    damaged.write_bytes(bytes(len(damaged.read_bytes())))
    lost.unlink()
    await terminal.shown(*download)
    assert kept.stat().st_ino == inode
    assert {p.name: p.read_bytes() for p in (out / "bundle").iterdir()} == {
        p.name: p.read_bytes() for p in bundle.iterdir()
    }


async def test_what_cannot_be_done_is_said_in_one_line(
    terminal: Terminal, create: tuple[str, ...], tmp_path: Path
) -> None:
    await terminal.shown(*create)
    assert "a task named 'lights' exists already (choose another name)" in await terminal.refused(*create)
    await terminal.shown("task", "stop", "lights")
    said = await terminal.refused("task", "resume", "lights")
    assert said.startswith("task 'lights' is stopped and cannot be resumed (create a task with a new name")
    for name in ("nobody", "a/b", "../devices", "x?y", "", "..", "%2e"):
        assert (await terminal.refused("task", "show", name)).startswith("there is no ")
    out = ("--out", str(tmp_path / "v"))
    assert "there is no version 7 of task 'lights'" in await terminal.refused(
        "version", "download", "lights", "--number", "7", *out
    )
    assert "there is no " in await terminal.refused("version", "download", "lights", "--number", "-1", *out)
    assert not (tmp_path / "v").exists()
    said = await terminal.refused(
        "version", "download", "lights", "--out", str(tmp_path / "task.toml" / "below")
    )
    assert "task.toml/below cannot be written: Not a directory" in said


async def test_a_task_file_is_refused_before_anything_is_sent(
    terminal: Terminal, create: tuple[str, ...], tmp_path: Path
) -> None:
    file = tmp_path / "task.toml"
    file.write_text(TASK_FILE.replace("cohort = 2", "cohort = 0"))
    assert (await terminal.refused(*create)).startswith(f"{file}: rounds.cohort = 0 is not allowed: ")
    file.write_bytes(b"\xff\xfe")
    assert "a readable task file ('utf-8' codec" in await terminal.refused(*create)
    file.unlink()
    assert "a readable task file ([Errno 2] No such file" in await terminal.refused(*create)
    assert not any((tmp_path / "data" / "blobs").glob("??/*"))


async def test_a_bundle_that_is_none_or_damaged_is_named(
    terminal: Terminal, create: tuple[str, ...], tmp_path: Path
) -> None:
    other = tmp_path / "other"
    arguments = (*create[:-1], str(other))
    assert f"{other / MANIFEST} cannot be read" in await terminal.refused(*arguments)
    write_small_bundle(other, base_bytes=10)
    (other / "base.bin").write_bytes(bytes(10))
    said = f"{other / 'base.bin'} does not match its sha256 in {MANIFEST}: export the bundle again"
    assert said in await terminal.refused(*arguments)
    (other / MANIFEST).write_text('{"format": 99}')
    assert f"{other / MANIFEST} has format 99" in await terminal.refused(*arguments)


async def test_a_token_that_cannot_be_one_is_refused_before_it_is_sent(
    terminal: Terminal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = await terminal.refused("task", "list", token_file=str(tmp_path / "nowhere"))
    assert "--token-file = " in said
    assert "a readable file (No such file or directory), such as admin-token" in said
    for data in (b"", b"two\nlines", b"\xff\x00"):
        (tmp_path / "token").write_bytes(data)
        said = await terminal.refused("task", "list", token_file=str(tmp_path / "token"))
        assert "one line with the token that `fedtt serve` wrote" in said
    (tmp_path / "token").write_text("guessed")
    said = await terminal.refused("task", "list", token_file=str(tmp_path / "token"))
    assert said.startswith("the admin token is missing or wrong (give the token that `fedtt serve` wrote")
    monkeypatch.setenv("FEDTT_ADMIN_TOKEN", "a\nsecret")
    said = await terminal.refused("task", "list")
    assert "FEDTT_ADMIN_TOKEN = '…' is not allowed" in said
    monkeypatch.setenv("FEDTT_ADMIN_TOKEN", terminal.server.listening.admin_token)
    assert (await terminal.run("task", "list", token_file=str(tmp_path / "nowhere")))[0] == 0


@pytest.mark.parametrize(
    "address",
    [
        *("http://127.0.0.1:9", "http://127.0.0.1:99999", "nonsense", "ftp://127.0.0.1", "http://[::"),
        *("/nowhere", "http://a..b"),
    ],
)
async def test_an_address_where_no_server_is_is_named(terminal: Terminal, address: str) -> None:
    said = await terminal.refused("task", "list", server=address)
    assert f"the server at {address}/v1/admin does not answer" in said
    assert "is `fedtt serve` running, and is --server its admin address?" in said


async def test_the_devices_address_is_told_apart_from_the_admin_address(terminal: Terminal) -> None:
    said = await terminal.refused("task", "list", server=terminal.server.url)
    assert said == "the server answered 404 without a reason: is --server its admin address?\n"


async def test_more_devices_than_one_page_are_all_listed(terminal: Terminal) -> None:
    from storage.records import Device, DeviceState
    from storage.store import Transaction

    def put(tx: Transaction) -> None:
        for number in range(1001):
            tx.put_device(
                Device(
                    id=f"{number:032x}",
                    public_key=bytes(32),
                    client="x",
                    runtimes=(),
                    examples=0,
                    enrolled_at=0.0,
                    seen_at=0.0,
                    state=DeviceState.ACTIVE,
                )
            )

    await terminal.server.service.writer.run(put)
    assert [int(row["id"], 16) for row in await terminal.json("device", "list")] == list(range(1001))
