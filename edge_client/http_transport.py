"""The protocol over HTTP/1.1 (docs/protocol.md): every request signed, every answer bounded.

What goes wrong is one of three things: `Refused` (the server's typed Problem), `WireError` (an answer that
is not the protocol's) or `Unreachable` (no answer, or one that broke off: the outcome is unknown).
"""

from __future__ import annotations

import asyncio
import os
import ssl
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TypeVar

import aiohttp
from aiohttp.abc import AbstractStreamWriter
from msgspec import Struct
from yarl import URL

from edge_client.aside import beside
from edge_client.identity import Identity
from edge_client.release import check_answer
from edge_client.server_address import server_url
from fedtt.errors import ConfigError, Refused, Unreachable, WireError
from fedtt.messages import (
    DIFFERENCE_MEDIA_TYPE,
    MEDIA_TYPE,
    MESSAGE_LIMIT_BYTES,
    AsTold,
    CheckIn,
    CheckInAnswer,
    Code,
    Enroll,
    Enrolled,
    Failure,
    Message,
    Problem,
    Receipt,
    Verdict,
    decode,
    decode_answer,
    encode,
)
from fedtt.seams import Clock, VersionBody
from fedtt.signature import LATEST_S, content_digest

__all__ = ["HttpTransport", "Traffic"]

M = TypeVar("M")
_GATEWAY = {502, 503, 504}  #: what proxies say when the server behind them did not answer
_LEAST_BYTES = 16 * 1024  #: of a bundle's file in the time that any other answer may take
_LARGE_BYTES = 1 << 20  #: of a body that is hashed and sent beside what else the loop has to do
_PIECE_BYTES = 1 << 16
_OCTETS = "application/octet-stream"


class _Request(Struct, frozen=True, kw_only=True):
    method: str
    path: str  #: below the server's address
    query: dict[str, str] = {}  #: no part of what is signed
    body: bytes = b""
    media: str = MEDIA_TYPE
    headers: dict[str, str] = {}
    total_s: float | None = None  #: for the whole exchange; None where its body may be of any length


@dataclass
class Traffic:
    """What went over the wire, in bytes of bodies."""

    sent_bytes: int = 0  #: requests: messages and frames
    received_bytes: int = 0  #: answers: messages, versions and bundle files
    bundle_bytes: int = 0  #: the part of them that was bundle files
    version_bytes: int = 0  #: the part of them that was versions, whole or as differences


class HttpTransport:
    """A Transport to one server; make and close it inside one event loop."""

    def __init__(
        self,
        server: str,
        identity: Identity,
        clock: Clock,
        *,
        clock_offset_s: float = 0.0,
        on_clock_offset: Callable[[float], None] = lambda _: None,
        timeout_s: float = 60.0,
        release_key: Callable[[], bytes] = lambda: b"",
        ca: str = "",
        traffic: Traffic | None = None,
    ) -> None:
        """on_clock_offset: told, beside the loop, of a server's time less the clock's that is not as it was.

        traffic: counters to add to, which several transports may share.

        ca: file of certificates in PEM to trust in place of the machine's; "" for those.
        release_key: of which a server must show the word to be followed; b"" asks for none.
        """
        self._release_key, self._tls = release_key, _trusting(ca)
        self._base = server_url(server)
        self._identity, self._clock, self._timeout_s = identity, clock, timeout_s
        self._offset_s, self._on_offset = clock_offset_s, on_clock_offset
        self._nonce = 0
        self._session: aiohttp.ClientSession | None = None
        self.traffic = Traffic() if traffic is None else traffic

    async def enroll(self, message: Enroll) -> Enrolled:
        return await self._message("POST", "v1/enroll", encode(message), Enrolled)

    async def check_in(self, message: CheckIn | AsTold) -> CheckInAnswer:
        return decode_answer(await self._answer("POST", "v1/check-in", encode(message), vouched=True))

    async def bundle_file(self, bundle: str, name: str, offset: int) -> AsyncGenerator[bytes, None]:
        """The bytes of a file from an offset; where a proxy ignores Range, what lies before is skipped."""
        range_ = {"Range": f"bytes={offset}-"} if offset else {}
        request = _Request(method="GET", path=f"v1/bundles/{bundle}/{name}", headers=range_)
        async with self._exchange(request) as response:
            skip = offset if response.status == 200 else 0
            part = response.headers.get("Content-Range", "")
            if offset and not skip and not part.startswith(f"bytes {offset}-"):
                raise WireError(f"{self._base}: asked for {name} from byte {offset}, another part came")
            watch = _Pace(self._timeout_s)
            async for piece in response.content.iter_chunked(1 << 16):
                watch.came(name, len(piece))
                self.traffic.received_bytes += len(piece)
                self.traffic.bundle_bytes += len(piece)
                wanted = piece[skip:]
                skip -= len(piece) - len(wanted)
                if wanted:
                    yield wanted

    async def version(self, sha256: str, limit_bytes: int, held: str | None = None) -> VersionBody:
        query = {"from": held} if held is not None else {}
        request = _Request(method="GET", path=f"v1/versions/{sha256}", query=query, total_s=self._timeout_s)
        async with self._exchange(request) as response:
            difference = response.content_type == DIFFERENCE_MEDIA_TYPE
            if response.content_type != _OCTETS and not (difference and held is not None):
                raise self._foreign(response)
            data = await self._read(response, limit_bytes)
            self.traffic.version_bytes += len(data)
            return VersionBody(data=data, difference=difference)

    async def upload(self, lease: str, frame: bytes) -> Receipt:
        return await self._message("PUT", f"v1/leases/{lease}/update", frame, Receipt, media=_OCTETS)

    async def receipt(self, lease: str) -> Receipt:
        return await self._message("GET", f"v1/leases/{lease}", b"", Receipt)

    async def judge(self, lease: str, verdict: Verdict) -> None:
        await self._command("POST", f"v1/leases/{lease}/verdict", verdict)

    async def fail(self, lease: str, failure: Failure) -> None:
        await self._command("POST", f"v1/leases/{lease}/failure", failure)

    async def leave(self, *, erase: bool) -> None:
        method, path = ("DELETE", "v1/device") if erase else ("POST", "v1/device/leave")
        await self._command(method, path)

    async def look(self) -> None:
        """Ask whether the server is there; raises Unreachable, or WireError where something else answers."""
        request = _Request(method="GET", path="healthz", total_s=self._timeout_s)
        async with self._exchange(request) as response:
            if response.content_type != "application/json":
                raise self._foreign(response)
            await self._read(response, MESSAGE_LIMIT_BYTES)

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    async def _message(
        self, method: str, path: str, body: bytes, kind: type[M], *, media: str = MEDIA_TYPE
    ) -> M:
        return decode(await self._answer(method, path, body, media=media), kind)

    async def _answer(
        self, method: str, path: str, body: bytes, *, media: str = MEDIA_TYPE, vouched: bool = False
    ) -> bytes:
        request = _Request(method=method, path=path, body=body, media=media, total_s=self._timeout_s)
        async with self._exchange(request) as response:
            if response.content_type != MEDIA_TYPE:
                raise self._foreign(response)
            data = await self._read(response, MESSAGE_LIMIT_BYTES)
            if vouched:
                self._check_answer(response, data)
            return data

    def _check_answer(self, response: aiohttp.ClientResponse, data: bytes) -> None:
        """Nothing is begun unless whoever this device trusts has signed it, for this very request."""
        key = self._release_key()
        sent = response.request_info.headers["Signature"]
        now = max(self._clock.now(), self._now())  # a refusal is unsigned: it makes no key young again
        try:
            if key:
                check_answer(response.status, response.headers, data, sent, key, now)
        except WireError as error:
            raise WireError(f"{self._base}: {error}") from None

    async def _command(self, method: str, path: str, message: Message | None = None) -> None:
        body = encode(message) if message else b""
        request = _Request(method=method, path=path, body=body, total_s=self._timeout_s)
        async with self._exchange(request) as response:
            if response.status != 204:
                raise self._foreign(response)

    @asynccontextmanager
    async def _exchange(self, request: _Request) -> AsyncIterator[aiohttp.ClientResponse]:
        """Send a request and hand on an answer that is no refusal; once more if only the clock was wrong."""
        try:
            response = await self._send(request)
            try:
                if response.status >= 400:
                    await self._mend_clock(await self._refusal(response))
                    response.release()
                    response = await self._send(request)
                    if response.status >= 400:
                        raise await self._refusal(response)
                if response.status not in {200, 204, 206} or "Content-Encoding" in response.headers:
                    raise self._foreign(response)
                yield response
            finally:
                response.release()
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            raise Unreachable(
                f"{self._base} did not answer ({_reason(error)}): check the address and the network"
            ) from None

    async def _mend_clock(self, refused: Refused) -> None:
        """Take the server's time if that was what it minded; any other refusal stands."""
        problem = refused.problem
        if problem.code is not Code.CLOCK_SKEW or problem.now is None:
            raise refused
        self._offset_s = problem.now - self._clock.now()
        await beside(self._on_offset, self._offset_s)
        self._nonce = 0  # of a clock ahead: taken up, it would have every later run of this client refused

    async def _send(self, request: _Request) -> aiohttp.ClientResponse:
        url = (self._base / request.path).with_query(request.query)
        headers = dict(request.headers)
        if request.body:
            headers |= {"Content-Type": request.media, "Content-Length": str(len(request.body))}
        large = len(request.body) > _LARGE_BYTES
        digest = await beside(content_digest, request.body) if large else ""
        headers |= self._sign(request, url, digest)
        self.traffic.sent_bytes += len(request.body)
        async with asyncio.timeout(self._timeout_s):  # headers trickle, too
            return await self._open_session().request(
                request.method,
                url,
                data=_Pieces(request.body) if large else request.body or None,
                headers=headers,
                allow_redirects=False,  # a signature covers one address
                timeout=aiohttp.ClientTimeout(
                    total=request.total_s, sock_connect=15, sock_read=self._timeout_s
                ),
            )

    def _now(self) -> float:
        """The server's time as far as it is known, Unix seconds: one that a signature can bear, whatever the
        journal says of the clocks; the server puts it right where it is wrong."""
        return min(max(0.0, self._clock.now() + self._offset_s), LATEST_S)

    def _sign(self, request: _Request, url: URL, digest: str) -> dict[str, str]:
        """Microseconds are the nonce, so that it also rises from one run of the client to the next."""
        now = self._now()
        self._nonce = max(self._nonce + 1, int(now * 1e6))
        return self._identity.sign(
            method=request.method,
            authority=url.host_port_subcomponent or "",
            path=url.raw_path,
            body=request.body,
            created=int(now),
            nonce=self._nonce,
            digest=digest,
        )

    def _open_session(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                auto_decompress=False,  # a few bytes could unpack to gigabytes
                connector=aiohttp.TCPConnector(ssl=self._tls),
                headers={"Accept-Encoding": "identity"},
                skip_auto_headers=(
                    "Accept",
                    "User-Agent",
                ),  # nobody reads them, and a device pays for each byte
                cookie_jar=aiohttp.DummyCookieJar(),
            )
        return self._session

    async def _refusal(self, response: aiohttp.ClientResponse) -> Refused:
        if response.content_type != MEDIA_TYPE:
            raise self._foreign(response)
        async with asyncio.timeout(self._timeout_s):
            problem = decode(await self._read(response, MESSAGE_LIMIT_BYTES), Problem)
        retry_after = response.headers.get("Retry-After", "")
        return Refused(problem, float(retry_after) if retry_after.isdecimal() else None)

    async def _read(self, response: aiohttp.ClientResponse, limit_bytes: int) -> bytes:
        data = bytearray()
        async for piece in response.content.iter_any():
            data += piece
            if len(data) > limit_bytes:
                raise WireError(f"{self._base} answered with more than {limit_bytes} bytes: not the protocol")
        self.traffic.received_bytes += len(data)
        return bytes(data)

    def _foreign(self, response: aiohttp.ClientResponse) -> WireError | Unreachable:
        answer = f"{self._base} answered with status {response.status} and {response.content_type}"
        if response.status in _GATEWAY:
            return Unreachable(f"{answer}: a gateway without its server, try again later")
        return WireError(f"{answer}, which is not the protocol's: is this the aggregator's address?")


class _Pieces(aiohttp.Payload):
    """A large body, with the loop's turn between its parts; aiohttp's own ways copy the whole first.

    Unlike a generator it can be written again, as aiohttp does where a kept connection was closed.
    """

    autoclose = True  #: nothing of it needs to be

    def __init__(self, body: bytes) -> None:
        super().__init__(body)
        self._size = len(body)

    def decode(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        return str(self._value, encoding, errors)

    async def write(self, writer: AbstractStreamWriter) -> None:
        for start in range(0, len(self._value), _PIECE_BYTES):
            await writer.write(self._value[start : start + _PIECE_BYTES])
            await asyncio.sleep(0)


class _Pace:
    """Ends a body of any length that trickles: each span of time must bring a few bytes."""

    def __init__(self, span_s: float) -> None:
        self._span_s, self._began, self._bytes = span_s, time.monotonic(), 0

    def came(self, name: str, size_bytes: int) -> None:
        """Raise Unreachable where a span is over that brought too little; what has come is kept."""
        self._bytes += size_bytes
        if (now := time.monotonic()) - self._began > self._span_s:
            if self._bytes < _LEAST_BYTES:
                raise Unreachable(f"{name} trickles, {self._bytes} bytes in {now - self._began:.0f} s")
            self._began, self._bytes = now, 0


def _trusting(ca: str) -> ssl.SSLContext | bool:
    if not ca:
        return True
    try:
        return ssl.create_default_context(cafile=ca)
    except (OSError, ValueError) as error:
        raise ConfigError("--ca", ca, f"a file of certificates in PEM ({error})") from None


def _reason(error: Exception) -> str:
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        return f"its certificate is not trusted, {error.certificate_error}; --ca names an authority"
    if isinstance(error, aiohttp.ClientConnectorError):
        code = error.os_error.errno or 0
        return os.strerror(code) if code > 0 else error.os_error.strerror or str(error)
    return str(error) or type(error).__name__
