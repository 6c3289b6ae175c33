"""`python -m fedtt serve` as a process of its own: asked to end, killed outright, started again."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import re
import signal
import sqlite3
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, closing
from pathlib import Path

import aiohttp
import numpy as np
import pytest
from safetensors.numpy import load

from aggregator.admin_client import AdminClient
from fedtt.errors import Unreachable
from fedtt.messages import Receipt, UpdateState, Work
from fedtt.version_config import FACTORS
from fedtt.wire import encode_theta
from tests.support.edge import write_small_bundle
from tests.support.served import LAYOUT, Peer, frame_of, task_text, until

pytestmark = pytest.mark.slow

COHORT = 6


class Process:
    """A started server."""

    def __init__(self, process: asyncio.subprocess.Process, said: dict[str, str]) -> None:
        self.process, self.url, self.token = process, said["url"], said["enrolment_token"]
        token = Path(said["admin_token_file"]).read_text().strip()
        self.admin = AdminClient(said["admin_url"], token)

    @asynccontextmanager
    async def devices(self, count: int) -> AsyncIterator[list[Peer]]:
        """Devices 1 to `count`, enrolled now or before."""
        async with AsyncExitStack() as stack:
            peers = [await stack.enter_async_context(Peer(self.url, n + 1)) for n in range(count)]
            for peer in peers:
                await peer.enroll(self.token)
            yield peers

    async def kill(self) -> None:
        self.process.kill()
        await self.process.wait()


async def start(data: Path, *options: str) -> asyncio.subprocess.Process:
    ports = ("--port", "0", "--admin-port", "0")
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "fedtt", "serve", "--data", str(data), *ports, *options),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )


@asynccontextmanager
async def serve(data: Path, *options: str) -> AsyncIterator[Process]:
    """A server process on free ports; whatever becomes of it, it is gone afterwards."""
    process = await start(data, "--json", *options)
    assert process.stdout is not None
    try:
        async with asyncio.timeout(90):
            line = await process.stdout.readline()
        server = Process(process, json.loads(line))
        async with server.admin:
            yield server
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.communicate()


async def open_task(server: Process, bundle: Path, text: str) -> None:
    write_small_bundle(bundle, base_bytes=1000)
    await server.admin.create_task(text, await server.admin.send_bundle(bundle))


async def newest(server: Process, number: int) -> bytes:
    """Wait for a version of the task and return its safetensors."""

    async def found() -> bool:
        task = await server.admin.task("lights")
        return bool(task["version"] >= number)

    await until(found, 20)
    return await server.admin.call("GET", f"/tasks/lights/versions/{number}/{FACTORS}")


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("as_json", [True, False])
async def test_a_server_that_is_asked_to_end_does_so_at_once_and_cleanly(
    tmp_path: Path, how: signal.Signals, as_json: bool
) -> None:
    process = await start(tmp_path, *(["--json"] if as_json else []))
    assert process.stdout is not None
    async with asyncio.timeout(30):
        first = await process.stdout.readline()
        if not as_json:
            printed = await process.stdout.readuntil(b"enrol     fedtt client run")
            assert re.search(rb"\ndashboard http://127\.0\.0\.1:\d+/\n", printed)
        process.send_signal(how)
        out, err = await process.communicate()
    assert process.returncode == 0
    assert err == b""
    if as_json:
        said = json.loads(first)
        assert set(said) >= {"event", "url", "admin_url", "enrolment_token", "admin_token_file"}
        assert said["dashboard_url"] == said["admin_url"] + "/"
        assert out == b""
    else:
        assert first.startswith(b"devices   http://127.0.0.1:")
        assert out.endswith(b"\nstopped; everything acknowledged is on disk\n")


async def test_a_server_that_drains_is_not_ready_and_takes_what_comes_to_the_end(tmp_path: Path) -> None:
    cohort = 12
    async with serve(tmp_path / "data", "--drain-s", "1") as server:
        await open_task(server, tmp_path / "bundle", task_text(cohort=cohort, count=1))
        async with server.devices(cohort) as peers, aiohttp.ClientSession() as web:
            work = [await peer.work() for peer in peers]
            server.process.terminate()

            async def is_not_ready() -> bool:
                async with web.get(f"{server.url}/readyz") as answer:
                    return answer.status == 503

            await until(is_not_ready, 10)
            receipts = await asyncio.gather(
                *(
                    peer.transport.upload(w.lease, frame_of(w.plan))
                    for peer, w in zip(peers, work, strict=True)
                )
            )
        async with asyncio.timeout(30):
            assert await server.process.wait() == 0
    with closing(sqlite3.connect(tmp_path / "data" / "fedtt.db")) as ledger:
        kept = dict(ledger.execute("SELECT lease_id, digest FROM updates").fetchall())
    assert kept == {w.lease: receipt.digest for w, receipt in zip(work, receipts, strict=True)}


async def test_a_server_that_cannot_start_ends_with_status_2_and_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    process = await start(tmp_path / "file")
    out, err = await process.communicate()
    assert (process.returncode, out, err.count(b"\n")) == (2, b"", 1)
    assert err.startswith(b"fedtt: error: the data directory ")


async def test_a_server_killed_in_a_round_goes_on_with_the_same_leases_and_updates(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    deltas = [rng.normal(0, 0.1, LAYOUT.size).astype(np.float32) for _ in range(COHORT)]
    work: list[Work] = []
    receipts: list[Receipt] = []

    async def upload(peers: list[Peer], n: int) -> None:
        frame = frame_of(work[n].plan, deltas[n], examples=n + 1)
        receipts.append(await peers[n].transport.upload(work[n].lease, frame))

    async with serve(tmp_path / "data") as server:
        await open_task(server, tmp_path / "bundle", task_text(cohort=COHORT))
        async with server.devices(COHORT) as peers:
            work += [await peer.work() for peer in peers]
            for n in range(COHORT // 2):
                await upload(peers, n)
            await server.kill()
            with pytest.raises(Unreachable):
                await upload(peers, COHORT // 2)
    async with serve(tmp_path / "data") as server:
        task = await server.admin.task("lights")
        assert (task["round"], task["round_state"], task["updates_in_round"]) == (1, "open", COHORT // 2)
        async with server.devices(COHORT) as peers:
            for n, receipt in enumerate(receipts):
                assert await peers[n].transport.receipt(work[n].lease) == receipt
            assert (await peers[-1].work()).lease == work[-1].lease
            for n in range(COHORT // 2, COHORT):
                await upload(peers, n)
            assert {receipt.state for receipt in receipts} == {UpdateState.ACCEPTED}
            found = await newest(server, 1)
            settled = [await peer.transport.receipt(w.lease) for peer, w in zip(peers, work, strict=True)]
    assert {(r.state, r.version_number) for r in settled} == {(UpdateState.FOLDED, 1)}
    # the ledger's order is that of the uploads: Σ n Δ_n / Σ n over n = 1..6
    total = sum((float(n + 1) * deltas[n].astype(np.float64) for n in range(COHORT)), np.zeros(LAYOUT.size))
    expected = (total / 21.0).astype(np.float32)  # 1 + 2 + 3 + 4 + 5 + 6 = 21
    assert encode_theta(LAYOUT.flatten(load(found))) == encode_theta(expected)


async def test_a_server_killed_under_load_has_every_update_it_acknowledged(tmp_path: Path) -> None:
    cohort, rounds = 12, 3
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(serve(tmp_path / "data"))
        await open_task(server, tmp_path / "bundle", task_text(cohort=cohort, count=rounds))
        for number in range(1, rounds + 1):
            async with server.devices(cohort) as peers:
                work = [await peer.work() for peer in peers]
                frames = [frame_of(w.plan, examples=n + 1) for n, w in enumerate(work)]
                sending = [
                    asyncio.create_task(peer.transport.upload(w.lease, frame))
                    for peer, w, frame in zip(peers, work, frames, strict=True)
                ]
                await asyncio.wait(sending, return_when=asyncio.FIRST_COMPLETED)
                await server.kill()
                answers = await asyncio.gather(*sending, return_exceptions=True)
            server = await stack.enter_async_context(serve(tmp_path / "data"))
            async with server.devices(cohort) as peers:
                for peer, w, frame, answer in zip(peers, work, frames, answers, strict=True):
                    assert isinstance(answer, Receipt | Unreachable)
                    if isinstance(answer, Receipt):
                        known = await peer.transport.receipt(w.lease)
                        assert (known.digest, known.state) in {
                            (answer.digest, UpdateState.ACCEPTED),
                            (answer.digest, UpdateState.FOLDED),
                        }
                    again = await peer.transport.upload(w.lease, frame)  # lost answers are sent again
                    assert again.digest == hashlib.sha256(frame).hexdigest()
            await newest(server, number)
        versions = await server.admin.task("lights", "/versions")
        assert [(row["number"], row["updates"]) for row in versions] == [(0, 0), (1, 12), (2, 12), (3, 12)]
        assert (await server.admin.task("lights"))["state"] == "finished"
