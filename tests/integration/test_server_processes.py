"""`fedtt serve --processes`: one port, several processes, started again when they die, ended together."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import sys
from pathlib import Path

import aiohttp
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from aggregator import member as members_of_one_command
from aggregator.app import ServerConfig
from aggregator.member import Member
from aggregator.one_process import Settings
from tests.integration.test_server_process import newest, open_task, serve, start
from tests.support.served import Peer, frame_of, task_text, until

pytestmark = pytest.mark.slow

COHORT = 8


def servers(pid: int) -> list[psutil.Process]:
    """The processes that serve, without the one that multiprocessing keeps for itself."""
    return [child for child in psutil.Process(pid).children() if "spawn_main" in command(child)]


def command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:  # a zombie among them
        return ""


def serving(pid: int) -> set[int]:
    """Those of them that devices and people reach."""
    return {child.pid for child in servers(pid) if listens(child)}


def listens(process: psutil.Process) -> bool:
    try:
        return [connection.status for connection in process.net_connections()].count("LISTEN") == 2
    except psutil.Error:  # it dies just now
        return False


def is_gone(process: psutil.Process) -> bool:
    """A zombie, too, where nobody waits for orphans."""
    return command(process) == ""


async def test_a_process_that_is_killed_is_followed_by_another_and_no_update_is_lost(tmp_path: Path) -> None:
    async with serve(tmp_path / "data", "--processes", "2") as server:
        assert len(serving(server.process.pid)) == 2
        await open_task(server, tmp_path / "bundle", task_text(cohort=COHORT))
        async with server.devices(COHORT) as peers:
            work = [await peer.work() for peer in peers]
            first = list(zip(peers, work, strict=True))[: COHORT // 2]
            receipts = [await peer.transport.upload(w.lease, frame_of(w.plan)) for peer, w in first]
            before = serving(server.process.pid)
            os.kill(min(before), signal.SIGKILL)

            async def are_two_again() -> bool:
                found = serving(server.process.pid)
                return len(found) == 2 and found != before

            await until(are_two_again, 90)
        async with server.devices(COHORT) as peers:  # on connections of their own
            for peer, known in zip(peers, receipts, strict=False):
                assert await peer.transport.receipt(known.lease) == known
            for peer, w in list(zip(peers, work, strict=True))[COHORT // 2 :]:
                await peer.transport.upload(w.lease, frame_of(w.plan))
        await newest(server, 1)
        versions = await server.admin.task("lights", "/versions")
        assert [(row["number"], row["updates"]) for row in versions] == [(0, 0), (1, COHORT)]
        members = servers(server.process.pid)
        server.process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(90):
            _, said = await server.process.communicate()
        assert server.process.returncode == 0
        assert all(map(is_gone, members))
        died = rf"\[process 0\] process [12] \(pid {min(before)}\) ended with status -9: starting another\n"
        assert re.search(died, said.decode())
        assert re.search(r"\[process 0\] process [12] is there again \(pid \d+\)\n", said.decode())


async def test_both_processes_take_connections_and_tell_where_people_reach_them(tmp_path: Path) -> None:
    process = await start(tmp_path / "data", "--processes", "2")
    try:
        assert process.stdout is not None
        async with asyncio.timeout(90):
            devices = await process.stdout.readline()
            people = [await process.stdout.readline() for _ in range(2)]
        assert devices.startswith(b"devices   http://127.0.0.1:")
        assert b"(process 2, with metrics of its own)" in people[1]
        url = devices.split()[1].decode()
        for number in range(20):  # the kernel gives each connection to one of them
            async with Peer(url, number + 1) as peer:
                token = (tmp_path / "data" / "enrolment-token").read_text().strip()
                await peer.enroll(token)
        took = [await enrolments(line, tmp_path / "data") for line in (people[0], people[1])]
        assert sum(took) == 20
        assert min(took) > 0
        process.send_signal(signal.SIGINT)
        async with asyncio.timeout(90):
            out, err = await process.communicate()
        assert (process.returncode, err) == (0, b"")
        assert out.endswith(b"stopped; everything acknowledged is on disk\n")
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.communicate()


async def enrolments(line: bytes, data: Path) -> int:
    """How many requests to enrol the process behind this line of people's has answered."""
    url = next(word for word in line.decode().split() if word.startswith("http"))
    token = (data / "admin-token").read_text().strip()
    headers = {"Authorization": f"Bearer {token}"}
    async with aiohttp.ClientSession(headers=headers) as web, web.get(f"{url}/metrics") as answer:
        text = await answer.text()
    return int(
        sum(
            sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == "fedtt_http_requests_total" and sample.labels["route"] == "/v1/enroll"
        )
    )


IMPATIENT = """
from aggregator import member
from fedtt.cli import main
member._AGAIN_S, member._FAILURES = 0.1, 3
raise SystemExit(main())
"""


async def test_where_none_stays_up_the_command_ends_with_status_1_and_each_line_says_whose_it_is(
    tmp_path: Path,
) -> None:
    data = tmp_path / "data"
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", IMPATIENT, "serve", "--data", str(data), "--port", "0", "--admin-port", "0"),
        *("--processes", "2", "--log-json", "--json"),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        async with asyncio.timeout(90):
            listening = json.loads(await process.stdout.readline())
        (data / "blobs").rename(tmp_path / "away")
        (data / "blobs").write_text("so that no process can start")
        for url in (listening["admin_url"], *listening["other_admin_urls"]):
            assert await status_of_a_blob(url, data) == 503
        for pid in serving(process.pid):
            os.kill(pid, signal.SIGKILL)
        async with asyncio.timeout(90):
            _, err = await process.communicate()
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.communicate()
    assert process.returncode == 1
    lines = [json.loads(line) for line in err.decode().splitlines()]
    assert [line["process"] for line in lines if "/blobs/" in line["message"]] == [1, 2]
    assert sum("ended with status -9" in line["message"] for line in lines) == 2
    assert sum("did not start" in line["message"] for line in lines) >= 4  # 2·(3 - 1)
    assert (lines[-1]["process"], lines[-1]["level"]) == (0, "critical")
    assert "no process serves" in lines[-1]["message"]


async def status_of_a_blob(admin_url: str, data: Path) -> int:
    token = (data / "admin-token").read_text().strip()
    headers = {"Authorization": f"Bearer {token}"}
    async with (
        aiohttp.ClientSession(headers=headers) as web,
        web.put(f"{admin_url}/v1/admin/blobs/{'0' * 64}", data=b"x") as answer,
    ):
        return answer.status


async def test_processes_that_cannot_start_end_with_status_2_and_one_line(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        process = await start(tmp_path / "data", "--processes", "2", "--port", str(taken.getsockname()[1]))
        async with asyncio.timeout(90):
            out, err = await process.communicate()
    assert (process.returncode, out, err.count(b"\n")) == (2, b"", 1)
    assert b"is not allowed: a free one: stop the program that uses it" in err


async def test_peoples_ports_have_to_fit(tmp_path: Path) -> None:
    process = await start(tmp_path / "data", "--processes", "3", "--admin-port", "65534")
    async with asyncio.timeout(90):
        out, err = await process.communicate()
    assert (process.returncode, out, err.count(b"\n")) == (2, b"", 1)
    assert err == b"fedtt: error: --admin-port = 65534 is not allowed: at most 65533 with 3 processes\n"


async def test_a_port_is_joined_where_that_is_asked_for_and_all_end_with_who_started_them(
    tmp_path: Path,
) -> None:
    async with serve(tmp_path / "one", "--reuse-port") as server:
        port = server.url.rpartition(":")[2]
        process = await start(tmp_path / "other", "--processes", "2", "--port", port)
        async with asyncio.timeout(90):
            out, err = await process.communicate()
        assert (process.returncode, out, err.count(b"\n")) == (2, b"", 1)
        assert b"is not allowed: a free one: stop the program that uses it" in err
        async with serve(tmp_path / "one", "--processes", "2", "--port", port, "--reuse-port") as beside:
            assert beside.url == server.url
            members = servers(beside.process.pid)
            assert len(members) == 2
            await beside.kill()

            async def are_gone() -> bool:
                return all(map(is_gone, members))

            await until(are_gone, 60)


async def test_peoples_ports_do_not_run_over_the_devices(tmp_path: Path) -> None:
    process = await start(tmp_path, "--processes", "4", "--port", "23452", "--admin-port", "23450")
    async with asyncio.timeout(90):
        out, err = await process.communicate()
    assert (process.returncode, out, err.count(b"\n")) == (2, b"", 1)
    assert b"--admin-port = 23450 is not allowed: one with 4 free ports" in err


async def test_one_that_hangs_is_killed_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(members_of_one_command, "_END_S", 1.0)
    config = ServerConfig(data=tmp_path / "data", port=0, admin_port=0, reuse_port=True)
    member = Member(Settings(config=config, process=1))
    await member.start()
    assert member._process is not None
    assert member._process.pid is not None
    os.kill(member._process.pid, signal.SIGSTOP)
    assert not await member.end()
    assert member._process.exitcode == -signal.SIGKILL


async def test_one_that_is_told_to_stop_while_it_starts_says_nothing(tmp_path: Path) -> None:
    process = await start(tmp_path / "data", "--processes", "2")
    async with asyncio.timeout(90):
        while not servers(process.pid):
            await asyncio.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        _, err = await process.communicate()
    assert (process.returncode, err) == (0, b"")
