"""HttpTransport over real sockets: the aggregator's own routes, and answers that are not the protocol's."""

from __future__ import annotations

import asyncio
import hashlib
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


@pytest.mark.parametrize(
    "server",
    [
        *("", "example.org", "ftp://x", "http://", "https://x/?a=1", "http://user@host", "http://x:99999"),
        *("http://[x", "http://x:abc", "http://a..b", "http://.", f"http://{'a' * 64}.b", "http://a\0b"),
        *("http://a b", "http://\u2025a", "http://\ud800"),
    ],
)
def test_an_address_that_is_none_is_a_clear_error(tmp_path: Path, server: str) -> None:
    with pytest.raises(ConfigError, match="an address like https"):
        HttpTransport(server, Identity.open(Home(tmp_path)), VirtualClock())


@pytest.mark.parametrize("server", ["http://[::1]:9", "http://localhost.:9", "http://b\u00fccher.invalid:9"])
def test_any_host_that_can_be_looked_up_is_asked(tmp_path: Path, server: str) -> None:
    async def run() -> None:
        transport = HttpTransport(server, Identity.open(Home(tmp_path)), VirtualClock())
        with pytest.raises(Unreachable, match="did not answer"):
            await transport.check_in(CHECK_IN)
        await transport.close()

    asyncio.run(run())
