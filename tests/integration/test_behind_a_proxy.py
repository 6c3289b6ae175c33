"""A server behind nginx, set up as docs/deployment.md says."""

from __future__ import annotations

import asyncio
import hashlib
import re
import shutil
import ssl
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from yarl import URL

from aggregator.limits import Rate, Rates
from fedtt.errors import Unreachable
from tests.support.certificates import authority
from tests.support.postgresql import needs_postgresql
from tests.support.postgresql import server as postgresql
from tests.support.served import LAYOUT, Peer, served, task_text, until

NGINX = shutil.which("nginx", path="/usr/sbin:/usr/bin:/usr/local/bin")
PAGE = Path(__file__).parents[2] / "docs" / "deployment.md"

pytestmark = pytest.mark.skipif(
    NGINX is None, reason="SKIPPED: no nginx on this machine (Debian: apt install nginx-light)"
)


def documented(directory: Path, servers: Sequence[URL], port: int) -> str:
    """The page's own server block, of this certificate and these ports."""
    block = re.search(r"```nginx\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert block is not None
    text = block[1]
    for said, here in {
        "listen 443 ssl": f"listen 127.0.0.1:{port} ssl",
        "fedtt.example.org": "127.0.0.1",
        "/etc/ssl/fedtt/chain.pem": f"{directory}/server-ours.pem",
        "/etc/ssl/fedtt/key.pem": f"{directory}/server-ours-key.pem",
        "127.0.0.1:8440": "servers",
    }.items():
        assert said in text
        text = text.replace(said, here)
    places = "".join(
        f"{kind}_temp_path {directory}/{kind};\n"
        for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    upstream = "".join(f"server {server.authority};\n" for server in servers)
    return (
        f"daemon off; master_process off; pid {directory}/pid; error_log stderr;\n"
        f"events {{}}\nhttp {{\naccess_log off;\n{places}upstream servers {{\n{upstream}}}\n{text}}}\n"
    )


@asynccontextmanager
async def proxy(directory: Path, port: int, *servers: str) -> AsyncIterator[str]:
    """nginx in front of servers, each asked in turn; its URL."""
    settings = directory / "nginx.conf"
    settings.write_text(documented(directory, [URL(server) for server in servers], port))
    process = await asyncio.create_subprocess_exec(str(NGINX), "-c", str(settings), "-p", str(directory))
    try:
        async with asyncio.timeout(10):
            while process.returncode is None:
                try:
                    _, writer = await asyncio.open_connection("127.0.0.1", port)
                except ConnectionError:
                    await asyncio.sleep(0.02)
                else:
                    writer.close()
                    break
        assert process.returncode is None, "nginx did not start: see its words above"
        yield f"https://127.0.0.1:{port}"
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def test_devices_work_through_the_proxy_of_the_page(tmp_path: Path, unused_tcp_port: int) -> None:
    authority(tmp_path, "ours")
    ca = str(tmp_path / "ours.pem")
    async with (
        served(tmp_path, task_text(), forwarded=True) as server,
        proxy(tmp_path, unused_tcp_port, server.url) as url,
    ):
        async with Peer(url, 1) as stranger:
            with pytest.raises(Unreachable, match=r"(?i)certificate verify failed"):
                await stranger.enroll(server.token)
        async with Peer(url, 2, ca=ca) as device:
            await device.enroll(server.token)
            plan = (await device.work()).plan
            version = await device.transport.version(plan.version, 4 * LAYOUT.size)
            assert hashlib.sha256(version.data).hexdigest() == plan.version
            base = (server.bundle / "base.bin").read_bytes()
            for offset in (0, 7):
                pieces = device.transport.bundle_file(plan.bundle, "base.bin", offset)
                assert b"".join([piece async for piece in pieces]) == base[offset:]
            receipt = await device.update()
            assert await server.service.read(lambda tx: tx.update(receipt.lease)) is not None


@needs_postgresql
async def test_devices_work_through_a_balancer_whichever_server_answers(
    tmp_path: Path, unused_tcp_port: int
) -> None:
    authority(tmp_path, "ours")
    ca, database = str(tmp_path / "ours.pem"), postgresql().new_database()
    shared: dict[str, Any] = {"database": database, "blobs": str(tmp_path / "blobs"), "forwarded": True}
    async with (
        served(tmp_path / "a", task_text(cohort=2, count=1), **shared) as first,
        served(tmp_path / "b", **shared) as second,
        proxy(tmp_path, unused_tcp_port, first.url, second.url) as url,
        Peer(url, 1, ca=ca) as one,
        Peer(url, 2, ca=ca) as another,
    ):
        for device in (one, another):
            await device.enroll(first.token)
        receipts = [await device.update() for device in (one, another)]

        async def folded() -> bool:
            return all(
                [(await one.transport.receipt(receipts[0].lease)).version_number == 1 for _ in range(2)]
            )

        await until(folded)
        for server in (first, second):
            (requests,) = server.service.metrics.requests.collect()
            assert sum(sample.value for sample in requests.samples) > 2
    postgresql().drop(database)


async def test_what_a_stranger_says_of_the_address_does_not_get_past_the_proxy(
    tmp_path: Path, unused_tcp_port: int
) -> None:
    authority(tmp_path, "ours")
    rates = Rates(addresses=Rate(per_s=0.1, burst=2))
    trusted = ssl.create_default_context(cafile=tmp_path / "ours.pem")
    lie = {"X-Forwarded-For": "198.51.100.7"}
    async with (
        served(tmp_path, None, rates=rates, forwarded=True) as server,
        proxy(tmp_path, unused_tcp_port, server.url) as url,
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=trusted)) as session,
    ):
        for _ in range(4):  # the proxy saw this machine, whose requests are not counted
            async with session.get(f"{url}/healthz", headers=lie) as response:
                assert response.status == 200
        straight = [(await server.raw("GET", "/healthz", None, lie)).status for _ in range(4)]
        assert straight == [200, 200, 429, 429]


async def test_the_proxy_says_whom_it_stands_for(tmp_path: Path, unused_tcp_port: int) -> None:
    authority(tmp_path, "ours")
    heads: list[bytes] = []

    async def upstream(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heads.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        writer.close()

    trusted = ssl.create_default_context(cafile=tmp_path / "ours.pem")
    async with await asyncio.start_server(upstream, "127.0.0.1", 0) as listener:
        port = listener.sockets[0].getsockname()[1]
        async with (
            proxy(tmp_path, unused_tcp_port, f"http://127.0.0.1:{port}") as url,
            aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=trusted)) as session,
            session.get(f"{url}/v1/x%2Fy?z", headers={"X-Forwarded-For": "198.51.100.7"}),
        ):
            pass
    lines = heads[0].split(b"\r\n")
    assert lines[0] == b"GET /v1/x%2Fy?z HTTP/1.1"
    assert f"Host: 127.0.0.1:{unused_tcp_port}".encode() in lines
    assert b"X-Forwarded-For: 198.51.100.7, 127.0.0.1" in lines
