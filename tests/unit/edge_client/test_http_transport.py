"""HttpTransport over real sockets: the aggregator's own routes, and servers that misbehave."""

from __future__ import annotations

import asyncio
import hashlib
import math
import re
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
import pytest
from aiohttp import web

from aggregator.app import device_app
from aggregator.service import Service
from edge_client.home import Home
from edge_client.http_transport import HttpTransport
from edge_client.identity import Identity
from fedtt.errors import ConfigError, ForeignWork, Refused, Unreachable, WireError
from fedtt.manifest import MANIFEST
from fedtt.messages import (
    DIFFERENCE_MEDIA_TYPE,
    MEDIA_TYPE,
    MESSAGE_LIMIT_BYTES,
    CheckIn,
    Code,
    Enroll,
    Failure,
    FailureCode,
    Problem,
    Retired,
    Wait,
    Work,
    encode,
)
from fedtt.seams import VersionBody
from tests.support.clock import VirtualClock
from tests.support.device_world import SPEC
from tests.support.edge import write_small_bundle
from tests.support.in_process import TOKEN, listening, memory_service

CHECK_IN = CheckIn(client="test", runtimes=("onnxruntime",), examples=5)
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Real:
    """A transport, enrolled at the aggregator's routes."""

    def __init__(
        self, transport: HttpTransport, identity: Identity, service: Service, clock: VirtualClock
    ) -> None:
        self.transport, self.identity, self.service, self.clock = transport, identity, service, clock


def at_real_server(
    tmp_path: Path,
    test: Callable[[Real], Awaitable[None]],
    *,
    device_clock: VirtualClock | None = None,
    remember: Callable[[float], None] = lambda _: None,
) -> None:
    async def run() -> None:
        clock = VirtualClock()
        write_small_bundle(tmp_path / "bundle", 200_000)
        home = Home(tmp_path / "home")
        home.create()
        identity = Identity.open(home)
        async with (
            memory_service(tmp_path / "blobs", SPEC, tmp_path / "bundle", clock) as service,
            listening(device_app(service)) as url,
        ):
            transport = HttpTransport(url, identity, device_clock or clock, on_clock_offset=remember)
            try:
                enrolled = await transport.enroll(
                    Enroll(public_key=identity.public_key, token=TOKEN, client="test")
                )
                assert enrolled.device == identity.device
                await test(Real(transport, identity, service, clock))
            finally:
                await transport.close()

    asyncio.run(run())


def at_server(tmp_path: Path, handler: Handler, test: Callable[[HttpTransport], Awaitable[None]]) -> None:
    """Whatever is asked, `handler` answers."""

    async def run() -> None:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", handler)
        home = Home(tmp_path / "home")
        home.create()
        async with listening(app) as url:
            transport = HttpTransport(url, Identity.open(home), VirtualClock(), timeout_s=0.5)
            try:
                await test(transport)
            finally:
                await transport.close()

    asyncio.run(run())


def problem(
    code: Code, *, status: int, now: float | None = None, headers: dict[str, str] | None = None
) -> web.Response:
    body = encode(Problem(code=code, detail="no", now=now))
    return web.Response(status=status, body=body, content_type=MEDIA_TYPE, headers=headers)


def test_every_call_reaches_the_aggregator(tmp_path: Path) -> None:
    async def test(real: Real) -> None:
        transport = real.transport
        work = await transport.check_in(CHECK_IN)
        assert isinstance(work, Work)
        version = await transport.version(work.plan.version, 10**6)
        assert hashlib.sha256(version.data).hexdigest() == work.plan.version
        with pytest.raises(Refused) as caught:
            await transport.upload(work.lease, b"not a frame")
        assert caught.value.problem.code is Code.MALFORMED
        with pytest.raises(Refused) as caught:
            await transport.receipt(work.lease)
        assert caught.value.problem.code is Code.UNKNOWN_LEASE
        await transport.fail(work.lease, Failure(code=FailureCode.CONDITIONS))
        assert isinstance(await transport.check_in(CHECK_IN), Wait)
        await transport.leave(erase=False)
        assert isinstance(await transport.check_in(CHECK_IN), Retired)
        await transport.leave(erase=True)
        with pytest.raises(Refused) as caught:
            await transport.check_in(CHECK_IN)
        assert caught.value.problem.code is Code.UNKNOWN_DEVICE

    at_real_server(tmp_path, test)


def test_bundle_files_come_whole_or_from_an_offset(tmp_path: Path) -> None:
    async def test(real: Real) -> None:
        work = await real.transport.check_in(CHECK_IN)
        assert isinstance(work, Work)

        async def read(name: str, offset: int) -> bytes:
            pieces = real.transport.bundle_file(work.plan.bundle, name, offset)
            return b"".join([piece async for piece in pieces])

        base = (tmp_path / "bundle" / "base.bin").read_bytes()
        assert await read("base.bin", 0) == base
        assert await read("base.bin", 150_000) == base[150_000:]
        manifest = await read(MANIFEST, 0)
        assert hashlib.sha256(manifest).hexdigest() == work.plan.bundle
        assert real.transport.traffic.bundle_bytes == 200_000 + 50_000 + len(manifest)
        with pytest.raises(Refused, match="not_found"):
            await read("none.bin", 0)

    at_real_server(tmp_path, test)


def test_bytes_of_bodies_are_counted_both_ways(tmp_path: Path) -> None:
    async def test(real: Real) -> None:
        sent, received = real.transport.traffic.sent_bytes, real.transport.traffic.received_bytes
        answer = await real.transport.check_in(CHECK_IN)
        assert real.transport.traffic.sent_bytes - sent == len(encode(CHECK_IN))
        assert real.transport.traffic.received_bytes - received == len(encode(answer))

    at_real_server(tmp_path, test)


def test_a_wrong_clock_is_mended_by_the_servers_and_remembered(tmp_path: Path) -> None:
    offsets: list[float] = []
    slow = VirtualClock(start=1_000_000.0 - 5000)

    async def test(real: Real) -> None:
        assert isinstance(await real.transport.check_in(CHECK_IN), Work)
        assert offsets == [5000.0]
        await real.transport.check_in(CHECK_IN)
        assert len(offsets) == 1, "the second request was right at once"

    at_real_server(tmp_path, test, device_clock=slow, remember=offsets.append)


@pytest.mark.parametrize("wrong_s", [-7 * 86400.0, 7 * 86400.0])
def test_a_clock_that_is_a_week_wrong_serves_also_after_a_restart_and_after_it_was_set(
    wrong_s: float, tmp_path: Path
) -> None:
    offsets: list[float] = []

    async def test(real: Real) -> None:
        assert isinstance(await real.transport.check_in(CHECK_IN), Work)
        assert offsets == [-wrong_s]
        url = str(real.transport._base)
        real.clock._now += 1
        for clock_off_s in (wrong_s, 0.0):  # as it was, then set right
            device_clock = VirtualClock(start=real.clock.now() + clock_off_s)
            again = HttpTransport(url, real.identity, device_clock, clock_offset_s=-wrong_s)
            try:
                assert isinstance(await again.check_in(CHECK_IN), Work)
            finally:
                await again.close()
            real.clock._now += 1

    at_real_server(
        tmp_path, test, device_clock=VirtualClock(start=1_000_000.0 + wrong_s), remember=offsets.append
    )


@pytest.mark.parametrize("now", [math.nan, math.inf, -1.0, 1e11])
def test_a_time_that_is_none_moves_no_clock(now: float, tmp_path: Path) -> None:
    async def handler(_: web.Request) -> web.Response:
        return problem(Code.CLOCK_SKEW, status=401, now=now)

    async def test(transport: HttpTransport) -> None:
        with pytest.raises(WireError, match=r"now"):
            await transport.check_in(CHECK_IN)
        assert transport._offset_s == 0.0

    at_server(tmp_path, handler, test)


@pytest.mark.parametrize("offset_s", [math.nan, math.inf, -math.inf, 1e300])
def test_an_offset_that_is_none_is_mended_by_the_server(offset_s: float, tmp_path: Path) -> None:
    offsets: list[float] = []

    async def test(real: Real) -> None:
        real.transport._offset_s = offset_s
        real.clock._now += 1
        assert isinstance(await real.transport.check_in(CHECK_IN), Work)
        assert offsets == [0.0]

    at_real_server(tmp_path, test, remember=offsets.append)


def test_a_clock_the_server_will_not_have_either_way_is_a_refusal(tmp_path: Path) -> None:
    asked: list[str] = []

    async def handler(request: web.Request) -> web.Response:
        asked.append(request.path)
        return problem(Code.CLOCK_SKEW, status=401, now=5.0)

    async def test(transport: HttpTransport) -> None:
        with pytest.raises(Refused, match="clock_skew"):
            await transport.check_in(CHECK_IN)
        assert len(asked) == 2

    at_server(tmp_path, handler, test)


def test_work_of_another_release_is_told_apart_from_what_is_no_answer(tmp_path: Path) -> None:
    async def handler(_: web.Request) -> web.Response:
        answer = {"type": "work", "lease": "0f" * 16, "plan": {"codec": {"quantise": "int1"}}}
        return web.Response(body=msgspec.msgpack.encode(answer), content_type=MEDIA_TYPE)

    async def test(transport: HttpTransport) -> None:
        with pytest.raises(ForeignWork) as caught:
            await transport.check_in(CHECK_IN)
        assert caught.value.lease == "0f" * 16

    at_server(tmp_path, handler, test)


def test_a_busy_server_says_when_to_come_back(tmp_path: Path) -> None:
    async def handler(_: web.Request) -> web.Response:
        return problem(Code.BUSY, status=503, headers={"Retry-After": "17"})

    async def test(transport: HttpTransport) -> None:
        with pytest.raises(Refused) as caught:
            await transport.check_in(CHECK_IN)
        assert (caught.value.problem.code, caught.value.retry_after_s) == (Code.BUSY, 17.0)

    at_server(tmp_path, handler, test)


@pytest.mark.parametrize(
    "answer",
    [
        {"text": "<html>log in to the hotel's network", "content_type": "text/html"},
        {"body": b"\x80", "content_type": MEDIA_TYPE},
        {"body": b"\xff", "content_type": MEDIA_TYPE},
        {"body": bytes(MESSAGE_LIMIT_BYTES + 1), "content_type": MEDIA_TYPE},
        {"status": 404, "text": "not found"},
        {"status": 302, "headers": {"Location": "http://127.0.0.1:1/"}},
        {"status": 400, "body": b"\x80", "content_type": MEDIA_TYPE},
        {"body": b"\x80", "content_type": MEDIA_TYPE, "headers": {"Content-Encoding": "gzip"}},
    ],
)
def test_an_answer_that_is_not_the_protocols_is_a_wire_error(
    tmp_path: Path, answer: dict[str, object]
) -> None:
    async def handler(_: web.Request) -> web.Response:
        return web.Response(**answer)  # type: ignore[arg-type]

    async def test(transport: HttpTransport) -> None:
        with pytest.raises(WireError):
            await transport.check_in(CHECK_IN)

    at_server(tmp_path, handler, test)


def test_a_version_longer_than_the_layout_is_not_read_to_its_end(tmp_path: Path) -> None:
    sent = [0]

    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        for _ in range(10_000):
            await response.write(bytes(100_000))
            sent[0] += 100_000
        return response

    async def test(transport: HttpTransport) -> None:
        with pytest.raises(WireError, match="more than 1000 bytes"):
            await transport.version("0" * 64, 1000)

    at_server(tmp_path, handler, test)
    assert sent[0] < 100_000_000


@pytest.mark.parametrize("content_type", ["text/html", MEDIA_TYPE, DIFFERENCE_MEDIA_TYPE])
def test_what_is_neither_a_version_nor_a_difference_that_was_asked_for_is_a_wire_error(
    tmp_path: Path, content_type: str
) -> None:
    async def handler(_: web.Request) -> web.Response:
        return web.Response(body=bytes(100), content_type=content_type)

    async def test(transport: HttpTransport) -> None:
        with pytest.raises(WireError, match=f"status 200 and {re.escape(content_type)}"):
            await transport.version("0" * 64, 1000)

    at_server(tmp_path, handler, test)


def test_what_is_held_stands_in_the_query_and_outside_the_signature(tmp_path: Path) -> None:
    asked: list[str] = []

    async def handler(request: web.Request) -> web.Response:
        asked.extend([request.rel_url.raw_path_qs, request.headers["Signature-Input"]])
        return web.Response(body=b"diff", content_type=DIFFERENCE_MEDIA_TYPE)

    async def test(transport: HttpTransport) -> None:
        body = await transport.version("0" * 64, 1000, "1" * 64)
        assert body == VersionBody(data=b"diff", difference=True)
        assert asked[0] == f"/v1/versions/{'0' * 64}?from={'1' * 64}"
        assert '("@method" "@authority" "@path" "content-digest")' in asked[1]

    at_server(tmp_path, handler, test)


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


@pytest.mark.parametrize(
    "server",
    ["", "example.org", "ftp://x", "http://", "https://x/?a=1", "http://user@host", "http://x:99999"],
)
def test_an_address_that_is_none_is_a_clear_error(tmp_path: Path, server: str) -> None:
    with pytest.raises(ConfigError, match="an address like https"):
        HttpTransport(server, Identity.open(Home(tmp_path)), VirtualClock())
