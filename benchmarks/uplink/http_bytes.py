"""What HTTP adds: the bytes of one participation over loopback, and how many of them are headers.

The client's own transport talks to a real server process through a relay that counts. The connection is
kept alive, as a device's is; TCP's and TLS's own bytes are not in it.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from msgspec import Struct
from msgspec.structs import replace
from numpy.typing import NDArray

from aggregator.admin_client import AdminClient
from benchmarks.bundles import bundle_of, head_of
from edge_client.http_transport import HttpTransport
from edge_client.identity import Identity
from fedtt.codec import encode_delta
from fedtt.errors import WireError
from fedtt.messages import CheckIn, Enroll, Work
from fedtt.seams import SystemClock
from fedtt.task import parse_task
from fedtt.wire import UpdateHeader, encode_update, layout_tag, zeros_digest
from fleet.federation import server_process

__all__ = ["HttpBytes", "measured"]

NUMBERS = 7640  #: about those of FedTT r5 in two blocks with its head
TASK = """
name = "t"
[rounds]
count = 1
cohort = 1
[method]
name = "fedavg"
[codec]
quantise = "sign"
coding = "range"
"""


class HttpBytes(Struct, frozen=True, kw_only=True):
    """Of each call: request line and headers, and status line and headers."""

    check_in_sent: int
    check_in_received: int
    version_sent: int
    version_received: int
    update_sent: int
    update_received: int

    def sent(self, check_ins: float) -> float:
        """What a participation's calls add to their bodies: so many check-ins, a download and an upload."""
        return check_ins * self.check_in_sent + self.version_sent + self.update_sent

    def received(self, check_ins: float) -> float:
        return check_ins * self.check_in_received + self.version_received + self.update_received


class _Relay:
    """Counts what passes; one server behind it."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._host, self._port = str(parts.hostname), parts.port
        self.sent = self.received = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        back_reader, back_writer = await asyncio.open_connection(self._host, self._port)

        async def there() -> None:
            while data := await reader.read(1 << 16):
                self.sent += len(data)
                back_writer.write(data)
            back_writer.close()

        async def back() -> None:
            while data := await back_reader.read(1 << 16):
                self.received += len(data)
                writer.write(data)
            writer.close()

        await asyncio.gather(there(), back())


@asynccontextmanager
async def _relay(url: str) -> AsyncIterator[tuple[_Relay, str]]:
    relay = _Relay(url)
    server = await asyncio.start_server(relay.serve, "127.0.0.1", 0)
    try:
        yield relay, f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()


def measured() -> HttpBytes:
    """Of one participation; takes a few seconds, most of them the server's start."""
    with tempfile.TemporaryDirectory() as directory:
        return asyncio.run(_measure(Path(directory)))


async def _measure(directory: Path) -> HttpBytes:
    bundle = bundle_of(directory / "bundle", NUMBERS)
    identity = Identity(Ed25519PrivateKey.generate())
    enrol = Enroll(public_key=identity.public_key, token="", client="fedtt")
    async with server_process(directory / "server") as server:
        async with AdminClient(server.admin_url, server.admin_token) as admin:
            await admin.create_task(TASK, await admin.send_bundle(bundle.directory))
        async with _relay(server.url) as (relay, url):
            transport = HttpTransport(url, identity, SystemClock())
            try:
                await transport.enroll(replace(enrol, token=server.enrolment_token))
                return await _participate(transport, relay)
            finally:
                await transport.close()


async def _participate(transport: HttpTransport, relay: _Relay) -> HttpBytes:
    """Check-in, download of the first version, upload."""
    layout, spec = head_of(NUMBERS).layout, parse_task(TASK)
    facts = CheckIn(client="fedtt", runtimes=("onnxruntime",), examples=150)
    await transport.check_in(facts)  # as once in a device's life
    seen = [_outside_bodies(transport, relay)]
    work = await transport.check_in(facts.as_told())
    if not isinstance(work, Work):
        raise WireError(f"work was expected, {work} came")
    seen.append(_outside_bodies(transport, relay))
    await transport.version(work.plan.version, 4 * layout.size, zeros_digest(4 * layout.size))
    seen.append(_outside_bodies(transport, relay))
    rng = np.random.default_rng(0)
    delta = rng.standard_normal(layout.size).astype(np.float32)
    header = UpdateHeader(layout=layout_tag(layout), examples=150, steps=10, loss_first=1.5, loss_last=1.0)
    payload = encode_delta(spec.codec, layout.everything, delta, rng)
    await transport.upload(work.lease, encode_update(header, payload))
    seen.append(_outside_bodies(transport, relay))
    check_in, version, update = (after - before for before, after in pairwise(seen))
    return HttpBytes(
        check_in_sent=int(check_in[0]),
        check_in_received=int(check_in[1]),
        version_sent=int(version[0]),
        version_received=int(version[1]),
        update_sent=int(update[0]),
        update_received=int(update[1]),
    )


def _outside_bodies(transport: HttpTransport, relay: _Relay) -> NDArray[np.int64]:
    """Bytes sent and received so far that were no body's, (2,)."""
    bodies = transport.traffic.sent_bytes, transport.traffic.received_bytes
    outside: NDArray[np.int64] = np.array([relay.sent, relay.received]) - np.array(bodies)
    return outside
