"""Answers that nobody reads, and those that are read slowly: on real sockets, with and without TLS."""

from __future__ import annotations

import asyncio
import fcntl
import socket
import ssl
import struct
import termios
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from yarl import URL

from aggregator.metrics import totals
from aggregator.unreadable import Protocol
from fedtt.manifest import MANIFEST, bundle_digest
from tests.integration.test_tls import shake_hands
from tests.support.certificates import authority
from tests.support.served import Served, served, task_text, until

pytestmark = pytest.mark.asyncio(loop_scope="module")

BODY_S = 2.0
FILE_BYTES = 600_000
ANSWER_BYTES = 1000  #: more than any answer to ASKED
ASKED = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
LATER = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)
RESET = (ConnectionResetError, BrokenPipeError, ssl.SSLEOFError)
KINDS: dict[str, dict[str, Any]] = {
    "files": {},
    "objects": {"blobs": "memory:///"},
    "files over TLS": {},
}


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=KINDS)
async def place(request: Any, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Served]:
    directory, config = tmp_path_factory.mktemp("server"), KINDS[request.param]
    if "TLS" in request.param:
        authority(directory, "ours")
        config = {
            "ca": directory / "ours.pem",
            "tls_cert": directory / "server-ours.pem",
            "tls_key": directory / "server-ours-key.pem",
        }
    bounds: dict[str, Any] = {"body_s": BODY_S, "idle_s": 20.0, "base_bytes": FILE_BYTES}
    async with served(directory, task_text(), **bounds, **config) as server:
        yield server


class Slow:
    """A client with little room, that reads when it is told to."""

    def __init__(self, ours: socket.socket) -> None:
        self._ours, self.taken, self.is_reset = ours, b"", False

    def send(self, data: bytes) -> bool:
        """Whether there was room for all of it."""
        try:
            return self._ours.send(data) == len(data)
        except LATER:
            return False
        except RESET:  # a machine so slow that it was cut off before it had sent all
            self.is_reset = True
            return False

    async def read(self, most: int) -> bool:
        """Take so much, if there is any; whether there may be more. Raises ConnectionError when cut off."""
        try:
            data = self._ours.recv(most)
        except LATER:
            return True
        self.taken += data
        return bool(data)


@asynccontextmanager
async def connected(url: URL, ca: Path | None) -> AsyncIterator[socket.socket]:
    with socket.socket() as ours:
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
        ours.connect((str(url.host), url.port))
        ours.setblocking(False)
        if ca is None:
            yield ours
        else:
            context = ssl.create_default_context(cafile=ca)
            with context.wrap_socket(
                ours,
                server_hostname=url.host,
                do_handshake_on_connect=False,
                suppress_ragged_eofs=False,  # the end of a connection that was reset is none
            ) as over:
                await shake_hands(over)
                yield over


async def cut_off(slow: Slow) -> bool:
    """Read what had come; whether the connection is then reset: closed, this could be taken for all."""
    async with asyncio.timeout(5):
        try:
            while await slow.read(1 << 16):
                await asyncio.sleep(0.01)
        except RESET:
            return True
    return slow.is_reset


def awaited(server: Served) -> dict[str, int]:
    return totals(server.service.metrics.connections_idle, "awaited")


async def download(server: Served) -> bytes:
    """A signed request for the whole base of the bundle."""
    bundle = bundle_digest((server.bundle / MANIFEST).read_bytes())
    path = f"/v1/bundles/{bundle}/base.bin"
    async with server.device() as device:
        headers = {"Host": URL(server.url).host_port_subcomponent} | device.signed("GET", path)
    lines = [f"GET {path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items()), "", ""]
    return "\r\n".join(lines).encode()


@pytest.mark.parametrize("listener", ["devices", "people"])
async def test_whoever_sends_requests_and_reads_no_answer_is_cut_off_and_held_little_for(
    place: Served, monkeypatch: pytest.MonkeyPatch, listener: str
) -> None:
    listening, before = place.listening, awaited(place)
    url = URL(listening.url if listener == "devices" else listening.admin_url)
    made: list[Any] = []  # looking for it among all objects takes as long as it may live, beside other tests

    def noted(protocol: Protocol, transport: asyncio.BaseTransport) -> None:
        connection_made(protocol, transport)
        made.append(protocol)

    connection_made = Protocol.connection_made
    monkeypatch.setattr(Protocol, "connection_made", noted)
    async with connected(url, place.ca) as ours:
        slow = Slow(ours)

        async def full() -> Any:
            for _ in range(300):  # fast, or it is cut off before all is full
                slow.send(ASKED * 100)
                await asyncio.sleep(0)
            return next((each for each in made if each.writing_paused), None)

        theirs = await until(full)
        for _ in range(100):
            slow.send(ASKED * 1000)
        held: list[list[int]] = []

        async def is_over() -> bool:
            if (transport := theirs.transport) is not None:
                held.append([waiting(transport), len(theirs._messages), *read_and_left(transport)])
            return await _counted(place, before)

        await until(is_over)
        answers, requests, ahead, left = map(max, zip(*held, strict=True))
        assert answers <= 2 * ANSWER_BYTES
        assert requests <= 2
        assert ahead < 100_000
        assert left < 200_000
        assert await cut_off(slow)


async def test_requests_are_read_in_small_pieces_however_they_come(
    place: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces: list[int] = []

    def noted(protocol: Protocol, data: bytes) -> None:
        pieces.append(len(data))
        received(protocol, data)

    received = Protocol.data_received
    monkeypatch.setattr(Protocol, "data_received", noted)
    async with connected(URL(place.listening.url), place.ca) as ours:
        slow, left = Slow(ours), ASKED * 5000

        async def are_read() -> bool:
            nonlocal left
            with suppress(*LATER):
                left = left[ours.send(left) :]
            for _ in range(200):  # over TLS an answer at a time
                await slow.read(1 << 16)
            return sum(pieces) >= 5000 * len(ASKED)

        await until(are_read, within_s=60)
    assert 1000 < max(pieces) < (20_000 if place.ca is None else 50_000)  # what TLS has read ahead is one


def waiting(transport: Any) -> int:
    """Bytes of answers that the kernel has not yet taken; over TLS there are two places for them."""
    count = transport.get_write_buffer_size()
    if transport.get_extra_info("sslcontext") is not None:
        count += transport._ssl_protocol._transport.get_write_buffer_size()
    return int(count)


def read_and_left(transport: Any) -> tuple[int, int]:
    """Bytes that TLS has read ahead; and those that the kernel has taken and the other end has not."""
    ahead = 0 if transport.get_extra_info("sslcontext") is None else transport.get_read_buffer_size()
    connection = transport.get_extra_info("socket")
    (left,) = struct.unpack("i", fcntl.ioctl(connection.fileno(), termios.TIOCOUTQ, bytes(4)))
    return ahead, left


async def _counted(server: Served, before: dict[str, int]) -> bool:
    return awaited(server) == before | {"reading": before["reading"] + 1}


async def test_a_download_that_nobody_takes_is_cut_off(place: Served) -> None:
    asked, before = await download(place), awaited(place)
    async with connected(URL(place.url), place.ca) as ours:
        slow, began = Slow(ours), time.perf_counter()
        assert slow.send(asked)
        await until(lambda: _counted(place, before))
        assert time.perf_counter() - began > BODY_S
        assert await cut_off(slow)
        assert b" 200 OK" in slow.taken
        assert len(slow.taken) < FILE_BYTES


async def test_a_download_that_is_taken_slowly_comes_whole(place: Served) -> None:
    asked, before = await download(place), awaited(place)
    async with connected(URL(place.url), place.ca) as ours:
        slow, began = Slow(ours), time.perf_counter()
        assert slow.send(asked)
        head = b""
        async with asyncio.timeout(60):
            while not head or len(slow.taken) < len(head) + 4 + FILE_BYTES:
                assert await slow.read(2048)
                head = slow.taken.partition(b"\r\n\r\n")[0] if b"\r\n\r\n" in slow.taken else b""
                await asyncio.sleep(0.015)
        assert time.perf_counter() - began > 2 * BODY_S
        base = (place.bundle / "base.bin").read_bytes()
        assert slow.taken[len(head) + 4 :] == base
        assert slow.send(ASKED)  # and the connection goes on
        slow.taken = b""
        async with asyncio.timeout(5):
            while b"200 OK" not in slow.taken:
                assert await slow.read(2048)
                await asyncio.sleep(0.01)
    assert awaited(place) == before
