"""Connections beyond what a listener keeps are closed at once and counted; with room, others are taken."""

from __future__ import annotations

import asyncio
import gc
import socket
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import pytest

from aggregator.connections import ConnectionLimits, Connections
from tests.support.served import Served, served, task_text, until


def test_each_range_of_addresses_has_its_own_limit_within_the_total() -> None:
    refused = Counter[str]()
    limits = ConnectionLimits(total=4, addresses=2)
    connections = Connections(limits, lambda limit: refused.update([limit]))
    assert [connections.admit("a") for _ in range(3)] == [True, True, False]
    assert connections.admit("b")
    assert connections.admit(None)  # of this machine only the total counts
    assert not connections.admit(None)
    connections.ended("a")
    assert connections.admit("a")
    assert refused == {"addresses": 1, "total": 1}
    for name in ("a", "a", "b", None):
        connections.ended(name)
    assert connections.open == 0
    assert not connections._ranges


def test_a_crowd_that_is_refused_does_not_hold_up_who_comes_behind_it() -> None:
    refused = Counter[str]()
    connections = Connections(ConnectionLimits(total=1), lambda limit: refused.update([limit]))
    with socket.create_server(("127.0.0.1", 0)) as bound, ExitStack() as stack:
        bound.setblocking(False)
        (listener,) = connections.listen([bound])
        stack.enter_context(listener)
        for _ in range(20):
            stack.enter_context(socket.create_connection(bound.getsockname()))
        kept, _ = listener.accept()
        with pytest.raises(BlockingIOError):
            listener.accept()  # all of the others in one turn
        assert refused == {"total": 19}
        kept.close()
        assert connections.open == 0


def test_a_connection_that_nobody_closes_counts_no_longer_than_it_lives() -> None:
    connections = Connections(ConnectionLimits(), lambda _: None)
    with socket.create_server(("127.0.0.1", 0)) as bound:
        (listener,) = connections.listen([bound])
        with listener, socket.create_connection(bound.getsockname()):
            kept, _ = listener.accept()
            assert connections.open == 1
            del kept
            gc.collect()
            assert connections.open == 0


def test_a_handshake_is_late_only_where_it_had_its_time_and_did_not_end() -> None:
    idle: list[str] = []
    connections = Connections(
        ConnectionLimits(),
        lambda _: None,
        handshake_s=0.1,
        idle=idle.append,
        failed=lambda: idle.append("not idle"),
    )
    with socket.create_server(("127.0.0.1", 0)) as bound, ExitStack() as stack:
        (listener,) = connections.listen([bound])
        stack.enter_context(listener)

        def accepted() -> socket.socket:
            stack.enter_context(socket.create_connection(bound.getsockname()))
            return listener.accept()[0]

        accepted().close()  # its client has gone, or what it said was no TLS
        assert idle == ["not idle"]
        idle.clear()
        shaken, silent = accepted(), accepted()
        connections.begun(shaken.fileno())
        time.sleep(0.11)
        shaken.close()
        assert idle == []
        silent.close()
        assert idle == ["handshake"]
        silent.close()
        assert idle == ["handshake"]
        assert connections.open == 0


async def is_closed(reader: asyncio.StreamReader) -> bool:
    try:
        async with asyncio.timeout(5):
            return await reader.read(1) == b""
    except ConnectionError:
        return True


async def test_what_comes_beyond_the_limit_is_closed_and_counted_and_others_are_served(
    tmp_path: Path,
) -> None:
    async with served(tmp_path, task_text(), connections=ConnectionLimits(total=3)) as server:
        kept = [await server.connect() for _ in range(3)]
        reader, writer = await server.connect()
        assert await is_closed(reader)
        writer.close()
        kept[0][1].write(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        assert (await kept[0][0].readline()).startswith(b"HTTP/1.1 200 ")
        for _, opened in kept:
            opened.close()
        await until(lambda: served_again(server))
        counted = server.service.metrics.registry.get_sample_value
        assert (counted("fedtt_refused_connections_total", {"limit": "total"}) or 0) >= 1


async def served_again(server: Served) -> bool:
    reader, writer = await server.connect()
    writer.write(b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    try:
        return (await reader.read()).startswith(b"HTTP/1.1 200 ")
    except ConnectionError:
        return False
    finally:
        writer.close()
