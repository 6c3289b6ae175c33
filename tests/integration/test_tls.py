"""Both listeners over TLS with certificates of a self-made authority."""

from __future__ import annotations

import asyncio
import gc
import socket
import ssl
from asyncio.sslproto import SSLProtocol
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import Counter
from yarl import URL

from aggregator.admin_client import AdminClient
from aggregator.app import ServerConfig, serving
from aggregator.connections import ConnectionLimits
from aggregator.metrics import totals
from aggregator.tls import HELD_BYTES, server_tls
from edge_client.http_transport import HttpTransport
from edge_client.identity import Identity
from fedtt.errors import ConfigError, Unreachable
from fedtt.messages import Enroll, Wait
from fedtt.seams import SystemClock
from tests.support.certificates import authority
from tests.support.served import CHECK_IN, Peer, until


def with_tls(directory: Path, **settings: Any) -> ServerConfig:
    """By the authority called ours, on free ports."""
    return ServerConfig(
        data=directory / "data",
        port=0,
        admin_port=0,
        tls_cert=directory / "server-ours.pem",
        tls_key=directory / "server-ours-key.pem",
        **settings,
    )


async def test_devices_and_people_speak_tls_with_the_authority_they_trust_and_no_other(
    tmp_path: Path,
) -> None:
    for name in ("ours", "another"):
        authority(tmp_path, name)
    config = with_tls(tmp_path)
    async with serving(config) as listening:
        assert listening.url.startswith("https://127.0.0.1:")
        ours, another = tmp_path / "ours.pem", tmp_path / "another.pem"
        async with AdminClient(listening.admin_url, listening.admin_token, ca=ours) as admin:
            assert await admin.rows("/tasks") == []
        async with Peer(listening.url, 1) as peer:
            identity = peer.identity
            with pytest.raises(Unreachable, match=r"(?i)certificate verify failed"):
                await peer.enroll(listening.enrolment_token)
        failed = listening.service.metrics.handshakes_failed
        await until(lambda: _counted(failed, 1))
        assert await _checked_in(listening.url, identity, str(ours), listening.enrolment_token)
        with pytest.raises(Unreachable, match=r"(?i)certificate verify failed"):
            await _checked_in(listening.url, identity, str(another), listening.enrolment_token)
        await until(lambda: _counted(failed, 2))
        with pytest.raises(Unreachable):
            async with AdminClient(listening.admin_url, listening.admin_token, ca=another) as admin:
                await admin.rows("/tasks")
        plain = "http" + listening.url.removeprefix("https")
        with pytest.raises(Unreachable):
            await _checked_in(plain, identity, "", listening.enrolment_token)
        await until(lambda: _counted(failed, 4))  # people's, and what was no TLS
        idle = listening.service.metrics.connections_idle
        assert totals(idle, "awaited") == {"handshake": 0, "request": 0, "reading": 0}


async def test_a_connection_holds_little_before_and_after_its_handshake(tmp_path: Path) -> None:
    authority(tmp_path, "ours")
    async with serving(with_tls(tmp_path)) as listening:
        url, trusted = URL(listening.url), ssl.create_default_context(cafile=tmp_path / "ours.pem")
        before = _over_tls()
        _, silent = await asyncio.open_connection(url.host, url.port)
        _, spoken = await asyncio.open_connection(url.host, url.port, ssl=trusted)
        try:
            made = await until(lambda: _made_since(before, 3))  # the client's own with them
            assert [len(connection._ssl_buffer) for connection in made] == [HELD_BYTES] * 3
        finally:
            for writer in (silent, spoken):
                writer.close()


def _over_tls() -> list[Any]:
    """What there is of them in this process."""
    return [each for each in gc.get_objects() if type(each) is SSLProtocol]


async def _made_since(before: list[Any], count: int) -> list[Any] | None:
    old = set(map(id, before))  # which stay taken while these are held
    made = [each for each in _over_tls() if id(each) not in old]
    return made if len(made) == count else None


async def test_a_connection_that_never_shakes_hands_is_closed_and_counted(tmp_path: Path) -> None:
    authority(tmp_path, "ours")
    config = with_tls(tmp_path, idle_s=0.2)
    async with serving(config) as listening:
        idle = listening.service.metrics.connections_idle
        for number, address in enumerate((listening.url, listening.admin_url), 1):
            url = URL(address)
            for begun in (b"", b"\x16\x03\x01\x02\x00\x01"):  # nothing, or the beginning of a ClientHello
                reader, writer = await asyncio.open_connection(url.host, url.port)
                writer.write(begun)
                async with asyncio.timeout(5):
                    assert await reader.read() == b""
                writer.close()
            assert totals(idle, "awaited") == {"handshake": 2 * number, "request": 0, "reading": 0}


async def test_a_handshake_that_is_never_finished_counts_as_a_connection(tmp_path: Path) -> None:
    authority(tmp_path, "ours")
    config = with_tls(tmp_path, connections=ConnectionLimits(total=2))
    async with serving(config) as listening:
        url, ours = URL(listening.url), str(tmp_path / "ours.pem")
        silent = [await asyncio.open_connection(url.host, url.port) for _ in range(2)]
        async with Peer(listening.url, 1, ca=ours) as peer:
            with pytest.raises(Unreachable):
                await peer.enroll(listening.enrolment_token)
            refused = listening.service.metrics.registry.get_sample_value
            assert refused("fedtt_refused_connections_total", {"limit": "total"}) == 1
            for _, writer in silent:
                writer.close()

            async def is_served() -> bool:
                try:
                    await peer.enroll(listening.enrolment_token)
                except Unreachable:
                    return False
                return True

            await until(is_served)


async def test_a_client_that_shakes_hands_and_then_says_nothing_makes_room_when_its_time_is_up(
    tmp_path: Path,
) -> None:
    authority(tmp_path, "ours")
    config = with_tls(tmp_path, idle_s=0.5, connections=ConnectionLimits(total=1))
    async with serving(config) as listening:
        url, context = URL(listening.url), ssl.create_default_context(cafile=tmp_path / "ours.pem")
        raw = socket.create_connection((str(url.host), url.port or 0))
        raw.setblocking(False)
        with context.wrap_socket(raw, server_hostname=url.host, do_handshake_on_connect=False) as ours:
            await shake_hands(ours)

            async def is_served() -> bool:
                async with Peer(listening.url, 1, ca=str(tmp_path / "ours.pem")) as peer:
                    try:
                        await peer.enroll(listening.enrolment_token)
                    except Unreachable:
                        return False
                    return True

            await until(is_served, 15)  # asyncio by itself would wait half a minute for its close
            idle = totals(listening.service.metrics.connections_idle, "awaited")
            assert idle["request"] >= 1
            assert idle["handshake"] == 0


async def shake_hands(ours: ssl.SSLSocket) -> None:
    async with asyncio.timeout(10):
        while True:
            try:
                ours.do_handshake()
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
                await asyncio.sleep(0.01)
            else:
                return


async def _counted(counter: Counter, count: int) -> bool:
    """Whether it has come to this; never beyond."""
    (value,) = [s.value for metric in counter.collect() for s in metric.samples if s.name.endswith("_total")]
    assert value <= count
    return bool(value == count)


async def _checked_in(url: str, identity: Identity, ca: str, token: str) -> bool:
    transport = HttpTransport(url, identity, SystemClock(), ca=ca)
    try:
        await transport.enroll(Enroll(public_key=identity.public_key, token=token, client="x"))
        return isinstance(await transport.check_in(CHECK_IN), Wait)
    finally:
        await transport.close()


def test_files_that_are_no_certificate_are_refused_in_one_line(tmp_path: Path) -> None:
    authority(tmp_path, "ours")
    cert, key = tmp_path / "server-ours.pem", tmp_path / "server-ours-key.pem"
    (tmp_path / "junk").write_text("junk")
    with pytest.raises(ConfigError, match="--tls-key = None is not allowed: both a certificate and its key"):
        server_tls(cert, None)
    with pytest.raises(ConfigError, match="files that exist"):
        server_tls(cert, tmp_path / "none")
    for pair in ((cert, tmp_path / "junk"), (tmp_path / "junk", key), (cert, tmp_path / "ours-key.pem")):
        with pytest.raises(ConfigError, match="a certificate chain in PEM and its key, without a password"):
            server_tls(*pair)
    with pytest.raises(ConfigError, match=r"--ca = .* a file of certificates in PEM"):
        AdminClient("https://x", "t", ca=tmp_path / "junk")
    with pytest.raises(ConfigError, match=r"--ca = .* a file of certificates in PEM"):
        HttpTransport("https://x", Peer("http://x", 1).identity, SystemClock(), ca=str(tmp_path / "none"))
