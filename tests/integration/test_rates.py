"""Floods are refused before they cost anything, and honest devices are served meanwhile."""

from __future__ import annotations

import asyncio
import resource
import time
from pathlib import Path

import pytest

from aggregator.limits import Rate, Rates, raise_file_limit
from fedtt.errors import Refused
from fedtt.messages import Code
from tests.support.served import CHECK_IN, Served, frame_of, refused, served, task_text


async def test_a_device_that_asks_too_often_is_told_when_and_others_are_not_slowed(tmp_path: Path) -> None:
    rates = Rates(key=Rate(per_s=0.5, burst=3))
    async with served(tmp_path, task_text(), rates=rates) as server:
        async with server.device() as flood, server.device() as honest:
            for _ in range(3):
                await flood.transport.check_in(CHECK_IN)
            with pytest.raises(Refused) as caught:
                await flood.transport.check_in(CHECK_IN)
            assert caught.value.problem.code is Code.TOO_MANY
            assert caught.value.retry_after_s == 2
            await honest.work()
            forged = flood.signed("POST", "/v1/check-in", b"x")  # nobody empties another device's bucket
            claimed = forged["Signature-Input"].replace(flood.identity.device, honest.identity.device)
            for _ in range(5):
                answer = await server.raw("POST", "/v1/check-in", b"x", forged | {"Signature-Input": claimed})
                refused(answer, Code.BAD_SIGNATURE)
            await honest.work()
        body = (await server.people("GET", "/activity")).body
        assert b'"too_many":1' in body


async def test_uploads_count_too_also_those_that_are_refused(tmp_path: Path) -> None:
    rates = Rates(key=Rate(per_s=0.1, burst=4))
    async with served(tmp_path, task_text(), rates=rates) as server, server.device() as flood:
        work = await flood.work()
        path, frame = f"/v1/leases/{work.lease}/update", frame_of(work.plan)
        assert (await flood.request("PUT", path, frame)).status == 200
        assert (await flood.request("PUT", path, frame)).status == 200  # the same receipt
        refused(await flood.request("PUT", f"/v1/leases/{'0' * 32}/update", frame), Code.UNKNOWN_LEASE)
        refused(await flood.request("PUT", path, frame), Code.TOO_MANY)


async def test_a_range_of_addresses_is_refused_before_its_body_is_read(tmp_path: Path) -> None:
    rates = Rates(addresses=Rate(per_s=0.1, burst=2))
    async with served(tmp_path, task_text(), rates=rates, forwarded=True) as server:
        here, there = {"X-Forwarded-For": "198.51.100.7"}, {"X-Forwarded-For": "203.0.113.9"}
        for _ in range(2):
            assert (await server.raw("GET", "/healthz", None, here)).status == 200
        reader, writer = await server.connect()
        writer.write(
            b"POST /v1/enroll HTTP/1.1\r\nHost: x\r\nX-Forwarded-For: 198.51.100.99\r\n"
            b"Content-Length: 9999\r\n\r\n"
        )
        async with asyncio.timeout(5):
            head = await reader.readuntil(b"\r\n\r\n")
        writer.close()
        assert head.startswith(b"HTTP/1.1 429 ")
        assert b"Retry-After: 10\r\n" in head or b"Retry-After: 9\r\n" in head
        assert (await server.raw("GET", "/healthz", None, there)).status == 200
        own_line = ((b"X-Forwarded-For", b"127.0.0.1"), (b"X-Forwarded-For", b"198.51.100.8"))
        assert (
            await _status(server, *own_line) == b"429"
        )  # the proxy's is the last, on a line of its own, too
    async with served(tmp_path, None, rates=rates) as server:  # a header of a stranger counts for nothing
        assert [(await server.raw("GET", "/healthz", None, here)).status for _ in range(4)] == [200] * 4


async def test_two_thousand_slow_connections_do_not_starve_an_honest_device(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    if raise_file_limit() < 5000:
        pytest.skip("this machine allows fewer than 5,000 open files")
    try:
        async with served(tmp_path, task_text(), idle_s=30.0) as server, server.device() as honest:
            opened = [await server.connect() for _ in range(2000)]
            stop = asyncio.Event()

            async def drip() -> None:
                """A byte of a header on each of them, again and again."""
                for _, writer in opened:
                    writer.write(b"POST /v1/enroll HTTP/1.1\r\nHost: x\r\nX-Slow: ")
                while not stop.is_set():
                    for _, writer in opened:
                        writer.write(b"x")
                    await asyncio.sleep(0.5)

            slow, took_s = asyncio.create_task(drip()), list[float]()
            for _ in range(30):
                started = time.perf_counter()
                await honest.transport.check_in(CHECK_IN)
                took_s.append(time.perf_counter() - started)
            stop.set()
            await slow
            for _, writer in opened:
                writer.close()
        assert sorted(took_s)[-2] < 1.0, sorted(took_s)[-5:]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


async def test_a_server_that_is_about_to_stop_is_alive_and_not_ready(tmp_path: Path) -> None:
    async with served(tmp_path, task_text()) as server, server.device() as device:
        assert (await server.raw("GET", "/readyz")).body == b'{"ready": true}'
        server.service.draining = True
        refused(await server.raw("GET", "/readyz"), Code.BUSY, "about to stop")
        assert (await server.raw("GET", "/healthz")).status == 200
        await device.work()  # who came before is served to the end


async def _status(server: Served, *fields: tuple[bytes, bytes]) -> bytes:
    reader, writer = await server.connect()
    lines = b"".join(b"%s: %s\r\n" % field for field in fields)
    writer.write(b"GET /healthz HTTP/1.1\r\nHost: x\r\n" + lines + b"\r\n")
    async with asyncio.timeout(5):
        line = await reader.readline()
    writer.close()
    return line.split()[1]
