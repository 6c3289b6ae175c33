"""10,000 devices that check in at the same moment, to one process; and when they are told to return.

All connections are open before the first request is sent. One device gets the round's only lease, the others
are told when to return: by a `Wait`, or by the Retry-After of a server that is busy. Those of the latter do
return and ask until they have a `Wait`, which nobody sits out. The arrivals are the moments at which each
device was to return first: that of its first answer and the pause which an edge client makes after such an
answer. Their peak is that of 5 s, their mean that of all the time from the first to the last.
"""

from __future__ import annotations

import asyncio
import math
import resource
import time
from contextlib import closing, suppress

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from numpy.typing import NDArray

from benchmarks.faults.devices import CHECK_IN
from benchmarks.faults.row import Outcome, Setting
from benchmarks.faults.server import ServerProcess, task_text
from edge_client.backoff import Backoff
from edge_client.identity import Identity
from fedtt.messages import MEDIA_TYPE, Wait, Work, decode, encode
from storage.records import Device, DeviceState
from storage.sql import SqlStore

__all__ = ["herd", "run"]

_NUMBERS = 1000
_RETRY_S = 100.0
_PEAK_S = 5.0  #: over which arrivals are counted for their peak
_LEAST_SPREAD_S = 0.9 * _RETRY_S  #: devices are told between half and one and a half of `retry_s`
_AT_ONCE = 500  #: connections that are being opened; the kernel's queue holds 1,024
_BUSY = (b"HTTP/1.1 503", b"HTTP/1.1 429")


async def run(setting: Setting) -> Outcome:
    return await herd(setting, count=1000 if setting.quick else 10_000)


async def herd(setting: Setting, *, count: int) -> Outcome:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < count + 200:
        return Outcome(figures={}, skipped=f"{count} connections need more than {hard} open files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # the server inherits it
    server = ServerProcess(setting.directory / "data")
    async with server.running():
        await server.open_task(task_text(cohort=1, retry_s=_RETRY_S, deadline_s=3600), _NUMBERS)
        await server.stop()
        _enrol(server, count)
        await server.start()
        members = [_Member(number, server) for number in range(count)]
        idle_bytes = server.resident_bytes()
        gate = asyncio.Semaphore(_AT_ONCE)
        await asyncio.gather(*(member.connect(gate) for member in members))
        open_bytes = server.resident_bytes()
        started = time.monotonic()
        await asyncio.gather(*(member.check_in() for member in members))
        seconds = time.monotonic() - started
        peak_bytes = server.peak_bytes()
        await server.stop()
    answered = [member.answer for member in members if member.answer is not None]
    arrivals = np.array([member.arrivals[0] for member in members if member.arrivals] or [0.0])
    all_arrivals = np.array([at for member in members for at in member.arrivals] or [0.0])
    return Outcome(
        figures={
            "devices": count,
            "answered": len(answered),
            "with_work": sum(isinstance(answer, Work) for answer in answered),
            "told_busy": sum(member.busy > 0 for member in members),
            "told_busy_again": sum(max(0, member.busy - 1) for member in members),
            "reconnected": sum(member.reconnected for member in members),
            "seconds": round(seconds, 3),
            "first_answers_s": round(max(member.first_answer_at for member in members) - started, 3),
            "kb_a_connection_idle": round((open_bytes - idle_bytes) / count / 1024, 2),
            "kb_a_connection_peak": round((peak_bytes - idle_bytes) / count / 1024, 2),
            "arrivals_peak_over_mean": round(_peak_over_mean(arrivals), 3),
            "arrivals_spread_s": round(float(np.ptp(arrivals)), 1),
            "all_arrivals_peak_over_mean": round(_peak_over_mean(all_arrivals), 3),
        },
        at_least={"answered": count, "arrivals_spread_s": _LEAST_SPREAD_S},
        at_most={"kb_a_connection_peak": 64.0, "arrivals_peak_over_mean": 1.5},
    )


def _peak_over_mean(at_s: NDArray[np.float64]) -> float:
    """Most arrivals in `_PEAK_S` over those that would come if they were even, (n,) moments in seconds."""
    since_s = at_s - at_s.min()
    even = len(at_s) * _PEAK_S / max(float(since_s.max()), _PEAK_S)
    return float(np.bincount((since_s / _PEAK_S).astype(int)).max() / even)


def _identity(number: int) -> Identity:
    return Identity(Ed25519PrivateKey.from_private_bytes((number + 1).to_bytes(32, "big")))


def _enrol(server: ServerProcess, count: int) -> None:
    """In the ledger itself: how devices enrol is not the question here."""
    now = time.time()
    with closing(SqlStore.open(server.data / "fedtt.db")) as store, store.transaction() as tx:
        for number in range(count):
            identity = _identity(number)
            tx.put_device(
                Device(
                    id=identity.device,
                    public_key=identity.public_key,
                    client="herd",
                    runtimes=("onnxruntime",),
                    examples=1,
                    enrolled_at=now,
                    seen_at=now,
                    state=DeviceState.ACTIVE,
                )
            )


class _Member:
    """One device with a bare connection."""

    def __init__(self, number: int, server: ServerProcess) -> None:
        self._identity, self._server, self._nonce = _identity(number), server, 0
        self._backoff = Backoff(device=number)
        self.answer: Wait | Work | None = None
        self.first_answer_at = math.inf
        self.arrivals: list[float] = []  #: when it was to return, after each answer that told it to
        self.busy = self.reconnected = 0

    async def connect(self, gate: asyncio.Semaphore) -> None:
        async with gate:
            self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._server.port)

    async def check_in(self) -> None:
        """Ask until there is an answer; the connection is left as the server leaves it."""
        for _ in range(60):
            status, head, body = await self._ask()
            if status:
                self.first_answer_at = min(self.first_answer_at, time.monotonic())
            if status.startswith(b"HTTP/1.1 200"):
                self.answer = decode(body, Wait | Work)  # type: ignore[arg-type]  # a union of types
                if isinstance(self.answer, Wait):
                    self.arrivals.append(time.monotonic() + self.answer.retry_after_s)
                break
            if status.startswith(_BUSY):
                self.busy += 1
                pause_s = self._backoff.failed(float(head[b"retry-after"]))
                self.arrivals.append(time.monotonic() + pause_s)
                await asyncio.sleep(pause_s)
        self._writer.close()

    async def _ask(self) -> tuple[bytes, dict[bytes, bytes], bytes]:
        self._nonce += 1
        with suppress(OSError, asyncio.IncompleteReadError):
            self._writer.write(self._request())
            lines = (await self._reader.readuntil(b"\r\n\r\n")).split(b"\r\n")
            pairs = (line.partition(b": ") for line in lines[1:] if line)
            head = {name.lower(): value for name, _, value in pairs}
            return lines[0], head, await self._reader.readexactly(int(head.get(b"content-length", b"0")))
        self.reconnected += 1
        with suppress(OSError):
            self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._server.port)
        return b"", {}, b""

    def _request(self) -> bytes:
        body, authority = encode(CHECK_IN), f"127.0.0.1:{self._server.port}"
        signed = self._identity.sign(
            method="POST",
            authority=authority,
            path="/v1/check-in",
            body=body,
            created=int(time.time()),
            nonce=self._nonce,
        )
        headers = {"Host": authority, "Content-Type": MEDIA_TYPE, "Content-Length": str(len(body)), **signed}
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        return f"POST /v1/check-in HTTP/1.1\r\n{lines}\r\n".encode() + body
