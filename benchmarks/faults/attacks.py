"""Bombs, deep nesting, header floods, endless bodies and 2,050 slow connections, while honest devices go on.

Attackers repeat themselves as fast as they are answered, up to 20 times a second each. Their bodies are those
of enrolments signed by a key of their own, so they are read as far as any body is. Each attack has one answer
that it must get: none is `cut_off`, for whoever is refused is read on for a moment and so sees it. What an
attack costs is bounded: the time that it and honest devices wait for their answers, and the memory of the
server. Half of the slow connections bring heads that never end, and are closed without a word, there being
no request to answer; the other half bring slow bodies, and are refused. 50 more bring whole requests, as many
as are taken, and read no answer; they are reset. All are opened again.
"""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import resource
import socket
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Sequence
from typing import NamedTuple

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from numpy.typing import NDArray

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
_CLOSED_S = 10.0  #: in which a slow connection must be gone once its time is over
_SLOW_A_READER = 40  #: slow senders for each slow reader, which costs the server hundreds of answers
_ASKED = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n" * 100
_ATTACKER = Identity(Ed25519PrivateKey.generate())
_BOMB = gzip.compress(bytes(100 << 20))[:16_000]
_SLOW_BYTES = 16_000
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
    idle_s = seconds / 3  # so that each slow connection is closed, and closed again
    options = ("--idle-s", f"{idle_s:g}", "--body-s", f"{idle_s:g}")
    server = ServerProcess(setting.directory / "data", options=options)
    over, counts = asyncio.Event(), Counter({f"slow_{kind}_otherwise": 0 for kind in (*_SLOW, "reader")})
    readers = max(1, slow // _SLOW_A_READER)
    times_s: defaultdict[str, list[float]] = defaultdict(list)
    habits = Habits(pause_s=0.05, retry_s=0.1)
    async with server.running(), devices(20, server.url, _NUMBERS, habits) as (peers, notes):
        await server.open_task(task_text(cohort=20, buffer=10, retry_s=0.1), _NUMBERS)
        await asyncio.gather(*(peer.enroll(server.token) for peer in peers))
        living = [asyncio.create_task(peer.live(over)) for peer in peers]
        before_bytes = server.resident_bytes()
        attackers = [
            asyncio.create_task(_slow(kind, server, over, counts, times_s["slow"]))
            for kind in _SLOW
            for _ in range(slow // 2)
        ]
        attackers += [
            asyncio.create_task(_slow_reader(server, over, counts, times_s["slow"])) for _ in range(readers)
        ]
        for name, attack in _ATTACKS.items():
            attackers += [
                asyncio.create_task(_again(name, attack, server, over, counts, times_s[name]))
                for _ in range(5)
            ]
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
    waits = np.array((notes.latencies_s + notes.check_in_latencies_s) or [np.inf])
    refusal_p99_s = {name: _p99(times_s[name]) for name in _ATTACKS}
    return Outcome(
        figures={
            **found.figures(),
            "seconds": seconds,
            "slow_connections": slow + readers,
            "died": int(not lived),
            "server_errors": counts["5xx"],
            "honest_p50_s": round(float(np.quantile(waits, 0.5)), 4),
            "honest_p99_s": _p99(waits),
            "honest_update_p99_s": _p99(notes.latencies_s),
            "honest_check_in_p99_s": _p99(notes.check_in_latencies_s),
            **{f"{name}_refused_p99_s": value for name, value in refusal_p99_s.items()},
            "slowest_refused_p99_s": max(refusal_p99_s.values()),
            "slow_held_max_s": round(max(times_s["slow"], default=np.inf), 2),
            "peak_mb_grown": round((peak_bytes - before_bytes) / 2**20, 1),
            **{name: value for name, value in sorted(counts.items()) if name != "5xx"},
        },
        at_most={
            **NOTHING_WRONG,
            "died": 0,
            "server_errors": 0,
            "honest_p99_s": 1.0,
            "slowest_refused_p99_s": 1.0,
            "slow_held_max_s": idle_s + _CLOSED_S,
            **{f"slow_{kind}_otherwise": 0 for kind in (*_SLOW, "reader")},
            "peak_mb_grown": 256.0,
            **{f"{name}_{how}": 0 for how in ("cut_off", "otherwise") for name in _ATTACKS},
        },
        at_least={
            "acknowledged": 10,
            "slow_head_closed": slow // 2,
            "slow_body_refused": slow // 2,
            "slow_reader_reset": readers,
            **{f"{name}_refused": seconds for name in _ATTACKS},
        },
    )


def _p99(times_s: Sequence[float] | NDArray[np.float64]) -> float:
    return round(float(np.quantile(times_s, 0.99)), 4) if len(times_s) else float("inf")


async def _slow(
    kind: str, server: ServerProcess, over: asyncio.Event, counts: Counter[str], held_s: list[float]
) -> None:
    """A request whose head or body never ends, a few bytes at a time."""
    while not over.is_set():
        with contextlib.suppress(OSError):
            began = time.perf_counter()
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            counts[f"slow_{kind}_opened"] += 1
            try:
                writer.write(_SLOW[kind]())
                said = await _trickle(reader, writer)
                counts[_SLOW_ENDS[kind].get(said[9:12], f"slow_{kind}_otherwise")] += 1
            finally:
                held_s.append(time.perf_counter() - began)
                writer.close()
        await asyncio.sleep(0.1)


async def _trickle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
    """A byte every two seconds until the server answers or closes; what it said."""
    said = b""
    with contextlib.suppress(OSError):
        while not (said or reader.at_eof()):
            writer.write(b"x")
            await writer.drain()
            with contextlib.suppress(TimeoutError):
                said = await asyncio.wait_for(reader.read(100), 2.0)
    return said


async def _slow_reader(
    server: ServerProcess, over: asyncio.Event, counts: Counter[str], held_s: list[float]
) -> None:
    """Requests one upon the other, for as many as there is room, and no answer read."""
    while not over.is_set():
        began, at = time.perf_counter(), 0
        with socket.socket() as ours, contextlib.suppress(OSError):
            for buffer in (socket.SO_RCVBUF, socket.SO_SNDBUF):
                ours.setsockopt(socket.SOL_SOCKET, buffer, 8192)
            ours.setblocking(False)
            await asyncio.get_running_loop().sock_connect(ours, ("127.0.0.1", server.port))
            counts["slow_reader_opened"] += 1
            try:
                while True:
                    with contextlib.suppress(BlockingIOError):
                        at = (at + ours.send(_ASKED[at:])) % len(_ASKED)
                    await asyncio.sleep(0.02)
            except OSError as error:
                reset = isinstance(error, ConnectionResetError | BrokenPipeError)
                counts["slow_reader_reset" if reset else "slow_reader_otherwise"] += 1
            finally:
                held_s.append(time.perf_counter() - began)
        await asyncio.sleep(0.1)


async def _again(
    name: str,
    attack: _Attack,
    server: ServerProcess,
    over: asyncio.Event,
    counts: Counter[str],
    refused_s: list[float],
) -> None:
    """One kind of attack after another, each on a connection of its own, which is part of its time."""
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
        refused_s.append(time.perf_counter() - began)
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
#: kind of slow connection -> status of the answer, if any -> what it counts as
_SLOW_ENDS = {"head": {b"": "slow_head_closed"}, "body": {b"400": "slow_body_refused"}}
_SLOW: dict[str, Callable[[], bytes]] = {
    "head": lambda: _POST + b"X-Slow: ",
    "body": lambda: _signed(bytes(_SLOW_BYTES), f"Content-Length: {_SLOW_BYTES}"),
}
