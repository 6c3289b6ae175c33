"""A load of signed updates from a process of its own: all made first, then sent as fast as they are answered.

Each connection is kept alive and has one request on the way. Sending is a few lines of asyncio, so that
the load takes little of the cores that it shares with the server.
"""

from __future__ import annotations

import asyncio
import re
import sys
import time
from collections import Counter
from urllib.parse import urlsplit

import msgspec
import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from msgspec import Struct

from benchmarks.bundles import head_of
from edge_client.identity import Identity
from fedtt.codec import CodecSpec, encode_delta
from fedtt.messages import MEDIA_TYPE
from fedtt.wire import UpdateHeader, encode_update, layout_tag

__all__ = ["Answers", "Load", "identity", "lease_id"]

_DIFFERENT = 64  #: payloads; headers differ in every update
_STATUS = re.compile(rb"HTTP/1\.1 (\d{3})")
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)\r\n", re.IGNORECASE)


class Load(Struct, frozen=True, kw_only=True):
    """What to send, and over how many connections."""

    url: str
    updates: int
    connections: int
    numbers: int  #: in an update, a byte each
    seed: int = 0


class Answers(Struct, frozen=True, kw_only=True):
    """What came of it."""

    seconds: float  #: from the first request to the last answer
    statuses: dict[str, int]
    p50_ms: float
    p99_ms: float
    cpu_s: float  #: that the load itself took
    update_bytes: int  #: of one body
    request_bytes: int  #: of one request with its headers


def identity(number: int) -> Identity:
    """The device of a number, the same in every process."""
    return Identity(Ed25519PrivateKey.from_private_bytes((number + 1).to_bytes(32, "big")))


def lease_id(number: int) -> str:
    """Its one lease."""
    return f"{number:032x}"


def _requests(load: Load) -> list[tuple[bytes, bytes]]:
    """Head and body of one update of each device."""
    codec, layout = CodecSpec(quantise="int8"), head_of(load.numbers).layout
    live = layout.live_set(tuple(range(len(layout.factors))))
    rng, tag = np.random.default_rng(load.seed), layout_tag(layout)
    deltas = rng.standard_normal((_DIFFERENT, live.size)).astype(np.float32)
    payloads = [encode_delta(codec, live, delta, rng) for delta in deltas]
    authority, created, made = urlsplit(load.url).netloc, int(time.time()), []
    for number in range(load.updates):
        header = UpdateHeader(layout=tag, examples=1 + number % 50, steps=10, loss_first=2.0, loss_last=1.0)
        body = encode_update(header, payloads[number % _DIFFERENT])
        path = f"/v1/leases/{lease_id(number)}/update"
        signed = identity(number).sign(
            method="PUT", authority=authority, path=path, body=body, created=created, nonce=1
        )
        headers = {
            "Host": authority,
            "Content-Type": MEDIA_TYPE,
            "Content-Length": str(len(body)),
            **signed,
        }
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        made.append((f"PUT {path} HTTP/1.1\r\n{lines}\r\n".encode(), body))
    return made


class _Connection(asyncio.Protocol):
    """Sends the next request when the last was answered."""

    def __init__(self, sender: _Sender) -> None:
        self._sender, self._received = sender, b""
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def send(self) -> None:
        assert self._transport is not None
        request = self._sender.next()
        if request is None:
            self._transport.close()
            return
        self._sent_at = time.perf_counter()
        self._transport.writelines(request)

    def data_received(self, data: bytes) -> None:
        self._received += data
        end = self._received.find(b"\r\n\r\n")
        length = _LENGTH.search(self._received) if end >= 0 else None
        if length is None or len(self._received) < end + 4 + int(length[1]):
            return
        status = _STATUS.match(self._received)
        self._received = b""
        self._sender.answered(status[1].decode() if status else "none", time.perf_counter() - self._sent_at)
        self.send()

    def connection_lost(self, error: Exception | None) -> None:
        self._sender.lost(error)


class _Sender:
    """All connections together."""

    def __init__(self, requests: list[tuple[bytes, bytes]]) -> None:
        self._requests = iter(requests)
        self.latencies_s: list[float] = []
        self.statuses: Counter[str] = Counter()
        self._open = 0
        self.over = asyncio.Event()

    async def run(self, load: Load) -> None:
        address, loop = urlsplit(load.url), asyncio.get_running_loop()
        found = [
            await loop.create_connection(lambda: _Connection(self), str(address.hostname), address.port or 80)
            for _ in range(load.connections)
        ]
        self._open = len(found)
        self.started_at = time.perf_counter()
        for _, connection in found:
            connection.send()
        await self.over.wait()

    def next(self) -> tuple[bytes, bytes] | None:
        return next(self._requests, None)

    def answered(self, status: str, latency_s: float) -> None:
        self.statuses[status] += 1
        self.latencies_s.append(latency_s)
        self.ended_at = time.perf_counter()

    def lost(self, error: Exception | None) -> None:
        if error is not None:
            self.statuses["lost"] += 1
        self._open -= 1
        if not self._open:
            self.over.set()


def main() -> None:
    """Read a Load as a line, answer `ready`, wait for another line, send, and answer with Answers."""
    load = msgspec.json.decode(sys.stdin.readline(), type=Load)
    requests = _requests(load)
    print("ready", flush=True)
    sys.stdin.readline()
    cpu_s, sender = time.process_time(), _Sender(requests)
    asyncio.run(sender.run(load))
    cpu_s = time.process_time() - cpu_s
    p50, p99 = np.percentile(sender.latencies_s, (50, 99)) * 1000
    answers = Answers(
        seconds=sender.ended_at - sender.started_at,
        statuses=dict(sender.statuses),
        p50_ms=float(p50),
        p99_ms=float(p99),
        cpu_s=cpu_s,
        update_bytes=len(requests[0][1]),
        request_bytes=sum(map(len, requests[0])),
    )
    print(msgspec.json.encode(answers).decode(), flush=True)


if __name__ == "__main__":
    main()
