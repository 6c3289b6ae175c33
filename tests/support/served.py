"""A real server on free ports of this machine, devices that know its protocol, and raw requests to it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Self

import aiohttp
import msgspec
import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from msgspec import Struct
from numpy.typing import NDArray
from yarl import URL

from aggregator.admin_client import AdminClient
from aggregator.app import Listening, ServerConfig, serving
from aggregator.tracing import UNTRACED, Tracer
from edge_client.http_transport import HttpTransport
from edge_client.identity import Identity
from fedtt.codec import encode_delta
from fedtt.layout import FactorLayout, LiveSet
from fedtt.messages import MEDIA_TYPE, STATUS, CheckIn, Code, Enroll, Plan, Problem, Receipt, Work, decode
from fedtt.seams import Clock, SystemClock
from fedtt.wire import UpdateHeader, encode_update, layout_tag
from tests.support.edge import write_small_bundle
from tests.support.tiny import tiny_spec

__all__ = [
    "CHECK_IN",
    "Answer",
    "Attacked",
    "Peer",
    "Served",
    "frame_of",
    "refused",
    "served",
    "task_text",
    "until",
]

LAYOUT = tiny_spec().layout
Body = bytes | AsyncIterator[bytes] | None
Headers = dict[str, str]
CHECK_IN = CheckIn(client="test", runtimes=("onnxruntime",), examples=5)


def task_text(name: str = "lights", *, quantise: str = "fp32", **rounds: float) -> str:
    """A task file whose rounds never close by themselves, unless told otherwise."""
    settings = {"count": 3, "cohort": 1000, "deadline_s": 3600, "retry_s": 0.01} | rounds
    lines = "\n".join(f"{key} = {value}" for key, value in settings.items())
    return f'name = "{name}"\n[rounds]\n{lines}\n[codec]\nquantise = "{quantise}"\n'


def frame_of(
    plan: Plan, delta: NDArray[np.float32] | None = None, *, factors: FactorLayout = LAYOUT, **header: Any
) -> bytes:
    """The update of a device that moved its live factors by `delta`, or each by 0.01."""
    live = LiveSet(factors, plan.live)
    moved = np.full(live.size, 0.01, np.float32) if delta is None else delta
    # encode_delta refuses what is not finite; in fp32 the payload is the numbers themselves
    finite = bool(np.isfinite(moved).all())
    payload = encode_delta(plan.codec, live, moved, np.random.default_rng(0)) if finite else moved.tobytes()
    plain: dict[str, Any] = {
        "layout": layout_tag(factors),
        "examples": 5,
        "steps": 2,
        "loss_first": 1.0,
        "loss_last": 0.5,
    }
    return encode_update(UpdateHeader(**plain | header), payload)


class Answer(Struct, frozen=True):
    """One answer, read to its end."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def problem(self) -> Problem:
        """The refusal it carries, in either listener's format."""
        if self.headers["Content-Type"] == MEDIA_TYPE:
            return decode(self.body, Problem)
        found = msgspec.json.decode(self.body)["error"]
        return msgspec.convert(found | {"type": "problem"}, Problem)


def refused(answer: Answer, code: Code, *words: str, status: int | None = None) -> Problem:
    """Check that an answer is this typed refusal, in one line that holds these words."""
    problem = answer.problem
    said = f"{problem.detail} ({problem.remedy})"
    assert (problem.code, answer.status) == (code, status or STATUS[code]), said
    assert "\n" not in said
    for word in words:
        assert word in said
    return problem


class Peer:
    """One device's key and its ways to the server: the honest transport, and requests of any kind."""

    def __init__(self, url: str, number: int, clock: Clock | None = None, ca: str = "") -> None:
        self.identity = Identity(Ed25519PrivateKey.from_private_bytes(number.to_bytes(32, "big")))
        self.offsets_s: list[float] = []  #: clock offsets the transport was told to keep
        self.transport = HttpTransport(
            url, self.identity, clock or SystemClock(), on_clock_offset=self.offsets_s.append, ca=ca
        )
        self._url = URL(url)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.transport.close()

    async def enroll(self, token: str) -> None:
        await self.transport.enroll(Enroll(public_key=self.identity.public_key, token=token, client="test"))

    async def work(self) -> Work:
        answer = await self.transport.check_in(CHECK_IN)
        assert isinstance(answer, Work), answer
        return answer

    async def update(self, delta: NDArray[np.float32] | None = None, **header: Any) -> Receipt:
        """Check in and upload."""
        work = await self.work()
        return await self.transport.upload(work.lease, frame_of(work.plan, delta, **header))

    def signed(
        self,
        method: str,
        path: str,
        body: bytes = b"",
        created: float | None = None,
        nonce: int | None = None,
    ) -> dict[str, str]:
        """The headers that sign one request, now and as the latest unless told otherwise."""
        return self.identity.sign(
            method=method,
            authority=self._url.host_port_subcomponent or "",
            path=path,
            body=body,
            created=int(SystemClock().now() if created is None else created),
            nonce=time.time_ns() // 1000 if nonce is None else nonce,
        )

    async def request(
        self, method: str, path: str, body: bytes = b"", *, claimed: bytes | None = None, query: str = ""
    ) -> Answer:
        """One signed request; `claimed` is the body that is signed, where another one is sent."""
        headers = self.signed(method, path, body if claimed is None else claimed)
        url = (self._url / path.removeprefix("/")).with_query(query)
        return await send(url, method, body, headers)


async def send(url: URL, method: str, body: Body, headers: Headers) -> Answer:
    """One request on a connection of its own."""
    async with (
        aiohttp.ClientSession() as session,
        session.request(method, url, data=body or None, headers=headers) as response,
    ):
        return Answer(response.status, dict(response.headers), await response.read())


class Served:
    """A server with one task on a small bundle, and who may reach it."""

    def __init__(self, listening: Listening, admin: AdminClient, bundle: Path, ca: Path | None) -> None:
        self.listening, self.admin, self.bundle, self.ca = listening, admin, bundle, ca
        self.url, self.token = listening.url, listening.enrolment_token
        self.service = listening.service
        self._numbers = iter(range(1, 10_000))

    @asynccontextmanager
    async def device(self, number: int | None = None, clock: Clock | None = None) -> AsyncIterator[Peer]:
        """A new device, enrolled; or one that is known by its number."""
        ca = str(self.ca or "")
        async with Peer(self.url, number or next(self._numbers), clock, ca) as peer:
            await peer.enroll(self.token)
            yield peer

    async def raw(self, method: str, path: str, body: Body = None, headers: Headers | None = None) -> Answer:
        """Any request to the devices' listener."""
        return await send(URL(self.url + path, encoded=True), method, body, headers or {})

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A bare connection to the devices' listener."""
        url = URL(self.url)
        return await asyncio.open_connection(url.host, url.port)

    async def people(
        self, method: str, path: str, body: Body = None, headers: Headers | None = None
    ) -> Answer:
        """A request to the admin listener, with its token unless the headers say otherwise."""
        known = {"Authorization": f"Bearer {self.listening.admin_token}"}
        url = URL(f"{self.listening.admin_url}/v1/admin{path}", encoded=True)
        return await send(url, method, body, known | (headers or {}))


class Attacked:
    """A server, and a device whose update it has acknowledged."""

    def __init__(self, server: Served, honest: Peer, receipt: Receipt, frame: bytes) -> None:
        self.server, self.honest, self.receipt, self.frame = server, honest, receipt, frame


@asynccontextmanager
async def served(
    directory: Path,
    text: str | None = None,
    *,
    tracer: Tracer = UNTRACED,
    ca: Path | None = None,
    base_bytes: int = 1000,
    **config: Any,
) -> AsyncIterator[Served]:
    """A server in this process over real sockets, with the task `text` unless it is None or exists.

    ca: the authority of its certificate, where `config` has one. base_bytes: of the task's bundle.
    """
    settings: dict[str, Any] = {"data": directory / "data", "port": 0, "admin_port": 0}
    bundle = directory / "bundle"
    digest = write_small_bundle(bundle, base_bytes=base_bytes)
    async with (
        serving(ServerConfig(**settings | config), tracer) as listening,
        AdminClient(listening.admin_url, listening.admin_token, ca=ca) as admin,
    ):
        if text is not None and not await admin.rows("/tasks"):
            assert await admin.send_bundle(bundle) == digest
            await admin.create_task(text, digest)
        yield Served(listening, admin, bundle, ca)


async def until(found: Any, within_s: float = 10.0) -> Any:
    """Ask the coroutine function `found` again and again until it answers something true."""
    async with asyncio.timeout(within_s):
        while not (answer := await found()):
            await asyncio.sleep(0.02)
        return answer
