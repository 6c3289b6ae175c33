"""What a connection over TLS by certificate files takes of a server's memory, from its handshake on."""

from __future__ import annotations

import asyncio
import ssl
from contextlib import suppress

from benchmarks.faults.server import ServerProcess
from benchmarks.serving.part import Measured, Part
from tests.support.certificates import authority

__all__ = ["connections_over_tls"]

_AT_ONCE = 100  #: handshakes under way
_REQUEST = b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"


async def connections_over_tls(part: Part) -> Measured:
    """Open many, ask something over each, and look at the server while all are open."""
    count = 200 if part.quick else 2000
    authority(part.directory, "ours")
    trusted = ssl.create_default_context(cafile=part.directory / "ours.pem")
    files = ("--tls-cert", part.directory / "server-ours.pem", "--tls-key")
    limits = ("--max-connections-per-range", "none", "--address-rate", "none")
    options = (*map(str, files), str(part.directory / "server-ours-key.pem"), *limits)
    server = ServerProcess(part.directory / "data", options=options)
    gate = asyncio.Semaphore(_AT_ONCE)

    async def opened() -> asyncio.StreamWriter:
        async with gate:
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port, ssl=trusted)
            writer.write(_REQUEST)
            head = await reader.readuntil(b"\r\n\r\n")
        if not head.startswith(b"HTTP/1.1 200"):
            raise RuntimeError(f"the server answered {head[:40]!r}")
        return writer

    async with server.running():
        writer = await opened()  # what the first of them loads is no connection's
        before = server.resident_bytes()
        writers = [writer, *await asyncio.gather(*(opened() for _ in range(count)))]
        after = server.resident_bytes()
        for writer in writers:
            with suppress(OSError):
                writer.transport.abort()
        await server.stop()
    kb = (after - before) / count / 1024
    part.report.line(part="tls", connections=count, kb_a_connection=kb)
    return Measured(
        figures={"tls_kb_a_connection": round(kb, 1)},
        against={"tls_kb_a_connection": f"{count} that have shaken hands and asked for /healthz"},
    )
