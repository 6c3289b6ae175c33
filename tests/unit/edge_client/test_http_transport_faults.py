"""HttpTransport over real sockets, at servers and proxies that misbehave."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from aiohttp import web

from edge_client.home import Home
from edge_client.http_transport import HttpTransport
from edge_client.identity import Identity
from fedtt.errors import Unreachable, WireError
from fedtt.messages import (
    MEDIA_TYPE,
    Receipt,
    UpdateState,
    encode,
)
from tests.support.clock import VirtualClock
from tests.unit.edge_client.test_http_transport import (
    CHECK_IN,
    at_server,
)


@pytest.mark.parametrize("offset", [5, 100_000, 200_000])
def test_behind_a_proxy_that_ignores_the_range_a_download_still_goes_on(tmp_path: Path, offset: int) -> None:
    whole = bytes(range(200)) * 1000

    async def handler(_: web.Request) -> web.Response:
        return web.Response(body=whole)

    async def test(transport: HttpTransport) -> None:
        pieces = [piece async for piece in transport.bundle_file("0" * 64, "base.bin", offset)]
        assert b"".join(pieces) == whole[offset:]
        assert b"" not in pieces
        assert transport.traffic.bundle_bytes == 200_000, "what is skipped was still paid for"

    at_server(tmp_path, handler, test)


def test_another_part_than_was_asked_for_is_noticed(tmp_path: Path) -> None:
    async def handler(_: web.Request) -> web.Response:
        headers = {"Content-Range": "bytes 4-9/10"}
        return web.Response(status=206, body=b"456789", headers=headers)

    async def test(transport: HttpTransport) -> None:
        with pytest.raises(WireError, match=r"asked for base\.bin from byte 5, another part"):
            await anext(transport.bundle_file("0" * 64, "base.bin", 5))

    at_server(tmp_path, handler, test)


@pytest.mark.parametrize("status", [502, 503, 504])
def test_a_gateway_without_its_server_is_unreachable(tmp_path: Path, status: int) -> None:
    async def handler(_: web.Request) -> web.Response:
        return web.Response(status=status, text="bad gateway")

    async def test(transport: HttpTransport) -> None:
        with pytest.raises(Unreachable, match="a gateway without its server"):
            await transport.check_in(CHECK_IN)

    at_server(tmp_path, handler, test)


def test_a_server_that_does_not_answer_in_time_is_unreachable(tmp_path: Path) -> None:
    async def handler(_: web.Request) -> web.Response:
        await asyncio.sleep(5)
        return web.Response()

    async def test(transport: HttpTransport) -> None:
        with pytest.raises(Unreachable, match="did not answer"):
            await transport.check_in(CHECK_IN)

    at_server(tmp_path, handler, test)


def test_bodies_that_trickle_for_ever_come_to_an_end(tmp_path: Path) -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "application/octet-stream"})
        await response.prepare(request)
        while True:
            await response.write(b"x")
            await asyncio.sleep(0.02)

    async def test(transport: HttpTransport) -> None:
        with pytest.raises(Unreachable, match="did not answer"):
            await transport.version("0" * 64, 10**6)
        came = bytearray()

        async def download() -> None:
            async for piece in transport.bundle_file("0" * 64, "base.bin", 0):
                came.extend(piece)

        with pytest.raises(Unreachable, match=r"base\.bin trickles, \d+ bytes in"):
            await download()
        assert came  # and may be gone on from

    at_server(tmp_path, handler, test)


@pytest.mark.parametrize("trickling", ["headers", "refusal"])
def test_what_comes_before_a_file_may_not_trickle_either(trickling: str, tmp_path: Path) -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        body = f"HTTP/1.1 404 Not Found\r\nContent-Type: {MEDIA_TYPE}\r\nContent-Length: 9999\r\n\r\n"
        request.transport.write(b"HTTP/1.1 200 OK\r\nX: " if trickling == "headers" else body.encode())
        for _ in range(100):
            request.transport.write(b"x")
            await asyncio.sleep(0.02)
        return web.Response()

    async def test(transport: HttpTransport) -> None:
        async with asyncio.timeout(1.5):
            with pytest.raises(Unreachable, match="did not answer"):
                await anext(transport.bundle_file("0" * 64, "base.bin", 0))

    at_server(tmp_path, handler, test)


def test_an_answer_that_breaks_off_is_unreachable(tmp_path: Path) -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Length": "1000", "Content-Type": MEDIA_TYPE})
        await response.prepare(request)
        await response.write(b"half")
        assert request.transport is not None
        request.transport.abort()
        return response

    async def test(transport: HttpTransport) -> None:
        with pytest.raises(Unreachable):
            await transport.check_in(CHECK_IN)

    at_server(tmp_path, handler, test)


def test_no_server_at_all_is_unreachable(tmp_path: Path) -> None:
    async def run() -> None:
        transport = HttpTransport("http://127.0.0.1:9", Identity.open(Home(tmp_path)), VirtualClock())
        with pytest.raises(Unreachable, match=r"http://127.0.0.1:9 did not answer \(Connection refused\)"):
            await transport.check_in(CHECK_IN)
        await transport.close()

    asyncio.run(run())


@pytest.mark.parametrize("size", [900_000, 4_000_000])
def test_a_frame_of_any_size_is_sent_again_where_a_kept_connection_was_closed(
    tmp_path: Path, size: int
) -> None:
    frame = bytes(range(250)) * (size // 250)
    asked: list[str] = []
    arrived: list[bytes] = []

    async def handler(request: web.Request) -> web.Response:
        asked.append(request.method)
        if asked == ["GET", "PUT"]:
            assert request.transport is not None
            request.transport.abort()
            return web.Response()
        arrived.append(await request.content.read())
        receipt = Receipt(lease="1" * 32, digest="0" * 64, state=UpdateState.ACCEPTED)
        return web.Response(body=encode(receipt), content_type=MEDIA_TYPE)

    async def test(transport: HttpTransport) -> None:
        await transport.receipt("1" * 32)
        await transport.upload("1" * 32, frame)
        assert asked == ["GET", "PUT", "PUT"]
        assert arrived == [b"", frame]

    at_server(tmp_path, handler, test)
