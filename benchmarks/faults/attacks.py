"""Bombs, deep nesting, header floods, endless bodies and 2,000 slow connections, while honest devices go on.

Attackers repeat themselves as fast as they are answered, up to 20 times a second each. Their bodies are those
of enrolments signed by a key of their own, so they are read as far as any body is. Each attack has one answer
that it must get, and what it costs is bounded: the time that honest devices wait for a receipt, and the
memory of the server. Slow connections that the server closed are opened again.
"""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import resource
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import NamedTuple

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from benchmarks.faults.devices import Habits, devices
from benchmarks.faults.kill import places
from benchmarks.faults.ledger import NOTHING_WRONG, audit
from benchmarks.faults.row import Outcome, Setting
from benchmarks.faults.server import ServerProcess, task_text
from edge_client.identity import Identity

__all__ = ["attacked", "run"]

_NUMBERS = 1000
_POST = b"POST /v1/enroll HTTP/1.1\r\nHost: x\r\n"
_ANSWER_S = 40.0  #: longer than a body may take that the server does not wait for
_ATTACKER = Identity(Ed25519PrivateKey.generate())
_BOMB = gzip.compress(bytes(100 << 20))[:16_000]
_NESTED = b"\x91" * 16_000


class _Attack(NamedTuple):
    """What is sent until the first line of an answer comes, and the one status that it must have."""

    send: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[bytes]]
    status: bytes


async def run(setting: Setting) -> Outcome:
    return await attacked(setting, slow=2000, seconds=10 if setting.quick else 90)


async def attacked(setting: Setting, *, slow: int, seconds: float) -> Outcome:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    idle_s = f"{seconds / 3:g}"  # so that each slow connection is closed, and closed again
    server = ServerProcess(setting.directory / "data", options=("--idle-s", idle_s))
    over, counts = asyncio.Event(), Counter[str]()
    habits = Habits(pause_s=0.05, retry_s=0.1)
    async with server.running(), devices(20, server.url, _NUMBERS, habits) as (peers, notes):
        await server.open_task(task_text(cohort=20, buffer=10, retry_s=0.1), _NUMBERS)
        await asyncio.gather(*(peer.enroll(server.token) for peer in peers))
        living = [asyncio.create_task(peer.live(over)) for peer in peers]
        before_bytes = server.resident_bytes()
        attackers = [asyncio.create_task(_slow(server, over, counts)) for _ in range(slow)]
        for name, attack in _ATTACKS.items():
            attackers += [asyncio.create_task(_again(name, attack, server, over, counts)) for _ in range(5)]
        await asyncio.sleep(seconds)
        over.set()
        peak_bytes = server.peak_bytes()
        for task in attackers:
            task.cancel()
        await asyncio.gather(*attackers, return_exceptions=True)
        await asyncio.gather(*living)
        lived = server.is_running
        await server.end_task()
        await server.stop()
        found = audit(server.data, notes, places(peers))
    waits = np.array(notes.latencies_s or [np.inf])
    return Outcome(
        figures={
            **found.figures(),
            "seconds": seconds,
            "slow_connections": slow,
            "died": int(not lived),
            "server_errors": counts["5xx"],
            "honest_p50_s": round(float(np.quantile(waits, 0.5)), 4),
            "honest_p99_s": round(float(np.quantile(waits, 0.99)), 4),
            "peak_mb_grown": round((peak_bytes - before_bytes) / 2**20, 1),
            **{name: value for name, value in sorted(counts.items()) if name != "5xx"},
        },
        at_most={
            **NOTHING_WRONG,
            "died": 0,
            "server_errors": 0,
            "honest_p99_s": 1.0,
            "peak_mb_grown": 256.0,
            **{f"{name}_otherwise": 0 for name in _ATTACKS},
        },
        at_least={"acknowledged": 10, "slow_closed": slow, **{f"{name}_refused": 1.0 for name in _ATTACKS}},
    )


async def _slow(server: ServerProcess, over: asyncio.Event, counts: Counter[str]) -> None:
    """A request whose headers never end, a few bytes at a time."""
    while not over.is_set():
        with contextlib.suppress(OSError):
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            counts["slow_opened"] += 1
            try:
                writer.write(_POST + b"X-Slow: ")
                while not reader.at_eof():
                    writer.write(b"x")
                    await writer.drain()
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(reader.read(100), 2.0)
                counts["slow_closed"] += 1
            finally:
                writer.close()
        await asyncio.sleep(0.1)


async def _again(
    name: str, attack: _Attack, server: ServerProcess, over: asyncio.Event, counts: Counter[str]
) -> None:
    """One kind of attack after another, each on a connection of its own."""
    while not over.is_set():
        began = time.perf_counter()
        status = b""
        with contextlib.suppress(OSError, TimeoutError, asyncio.IncompleteReadError):
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            try:
                async with asyncio.timeout(_ANSWER_S):
                    status = await attack.send(reader, writer)
            finally:
                writer.close()
        code = status[9:12]  # HTTP/1.0 where the request could not be read as HTTP
        counts["5xx"] += code.startswith(b"5") and code != b"503"
        counts[f"{name}_refused"] += code == attack.status
        counts[f"{name}_cut_off"] += not status
        counts[f"{name}_otherwise"] += code not in {attack.status, b""}
        await asyncio.sleep(max(0.0, 0.05 - (time.perf_counter() - began)))


async def _whole(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes) -> bytes:
    """Send it, and return the first line of the answer, which may come before all is sent."""
    writer.write(request)
    return await reader.readline()


def _signed(body: bytes, *headers: str) -> bytes:
    """The head of an enrolment with this body, by a key that may enrol."""
    signed = _ATTACKER.sign(
        method="POST",
        authority="x",
        path="/v1/enroll",
        body=body,
        created=int(time.time()),
        nonce=time.time_ns() // 1000,
    )
    lines = [*(f"{name}: {value}" for name, value in signed.items()), *headers]
    return _POST + "".join(f"{line}\r\n" for line in lines).encode() + b"\r\n"


def _body(data: bytes, *headers: str) -> _Attack:
    length = f"Content-Length: {len(data)}"
    return _Attack(lambda r, w: _whole(r, w, _signed(data, length, *headers) + data), b"400")


async def _endless(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
    writer.write(_signed(b"", "Transfer-Encoding: chunked"))
    answer = asyncio.create_task(reader.readline())
    while not answer.done():
        writer.write(b"4000\r\n" + bytes(0x4000) + b"\r\n")
        await writer.drain()
        await asyncio.sleep(0.001)
    return await answer


_ATTACKS = {
    "bomb": _body(_BOMB, "Content-Encoding: gzip"),
    "nesting": _body(_NESTED),
    "oversized": _body(bytes(1 << 20))._replace(status=b"413"),
    "long_header": _Attack(
        lambda r, w: _whole(r, w, _POST + b"X: " + b"x" * (1 << 20) + b"\r\n\r\n"), b"400"
    ),
    "many_headers": _Attack(lambda r, w: _whole(r, w, _POST + b"X-Y: z\r\n" * 100_000 + b"\r\n"), b"400"),
    "endless": _Attack(_endless, b"413"),
}
