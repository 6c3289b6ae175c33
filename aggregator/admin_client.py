"""The admin calls from the other side, for the command line, benchmarks and tests."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote

import aiohttp
import msgspec

from aggregator.tls import trusting
from aggregator.whole_files import Arriving, is_there, write_whole
from fedtt.errors import BundleError, FedttError, Unreachable
from fedtt.manifest import MANIFEST, FileEntry, bundle_digest, decode_manifest
from fedtt.version_config import CONFIG, FACTORS

__all__ = ["AdminClient"]

_PIECE_BYTES = 1 << 20
Progress = Callable[[str, int, int], None]  #: file, bytes sent so far, bytes in all


class AdminClient:
    """Speaks to the admin listener; errors are the server's own words."""

    def __init__(self, url: str, token: str, *, ca: Path | None = None) -> None:
        """ca: certificates to trust in place of the machine's."""
        self._tls = trusting(ca)
        self._root = url.rstrip("/") + "/v1/admin"
        self._headers = {"Authorization": f"Bearer {token}"}
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        timeout = aiohttp.ClientTimeout(total=None, connect=10, sock_read=120)
        self._session = aiohttp.ClientSession(
            headers=self._headers, timeout=timeout, connector=aiohttp.TCPConnector(ssl=self._tls)
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._session is not None:
            await self._session.close()

    async def call(self, method: str, path: str, body: object = None, **query: str) -> bytes:
        """One request; returns the body, raises FedttError with the server's reason."""
        async with self._answer(method, path, body, **query) as answer:
            return await answer.read() if method != "HEAD" else str(answer.status).encode()

    @asynccontextmanager
    async def _answer(
        self, method: str, path: str, body: object = None, **query: str
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        assert self._session is not None  # noqa: S101  # used as a context manager
        try:
            async with self._session.request(method, self._root + path, data=body, params=query) as answer:
                if answer.status >= 400 and method != "HEAD":
                    raise FedttError(_reason(await answer.read(), answer.status))
                yield answer
        except (aiohttp.ClientError, TimeoutError, OSError, UnicodeError) as error:  # the last of a host
            raise Unreachable(
                f"the server at {self._root} does not answer ({str(error) or type(error).__name__}): "
                "is `fedtt serve` running, and is --server its admin address?"
            ) from None

    async def rows(self, path: str, method: str = "GET") -> Any:
        """One request whose answer is JSON."""
        return msgspec.json.decode(await self.call(method, path))

    async def task(self, name: str, below: str = "", method: str = "GET") -> Any:
        """A task, or what lies below it: "/rounds", "/versions", or with POST a change to it."""
        return await self.rows(f"/tasks/{quote(name, safe='')}{below}", method)

    async def send_bundle(self, directory: Path, progress: Progress | None = None) -> str:
        """Upload the files of a bundle that the server lacks, then register it; returns its sha256."""
        try:
            manifest_bytes = (directory / MANIFEST).read_bytes()
        except OSError as error:
            raise BundleError(
                f"{directory / MANIFEST} cannot be read: {error.strerror}; is it a bundle?"
            ) from None
        manifest = decode_manifest(manifest_bytes, str(directory / MANIFEST))
        for name, entry in manifest.files.items():
            await asyncio.to_thread(_check_file, directory / name, entry)
        for name, entry in manifest.files.items():
            if await self.call("HEAD", f"/blobs/{entry.sha256}") != b"200":
                pieces = _pieces(directory / name, entry.bytes, progress)
                await self.call("PUT", f"/blobs/{entry.sha256}", pieces)
        await self.call("POST", "/bundles", manifest_bytes)
        return bundle_digest(manifest_bytes)

    async def create_task(self, text: str, bundle: str) -> Any:
        return msgspec.json.decode(await self.call("POST", "/tasks", text.encode(), bundle=bundle))

    async def create_token(self, uses: int | None, expires_s: float | None) -> Any:
        body = msgspec.json.encode({"uses": uses, "expires_s": expires_s})
        return msgspec.json.decode(await self.call("POST", "/tokens", body))

    async def download_version(self, task: str, number: int, directory: Path) -> None:
        """Write factors and config of a version into a directory."""
        version = f"/tasks/{quote(task, safe='')}/versions/{number}"
        files = {name: await self.call("GET", f"{version}/{name}") for name in (CONFIG, FACTORS)}
        for name, data in files.items():
            await asyncio.to_thread(write_whole, directory / name, data)

    async def download_bundle(self, sha256: str, directory: Path) -> None:
        """Write a whole bundle into a directory; a file that lies there already and matches is kept."""
        manifest_bytes = await self.call("GET", f"/bundles/{sha256}/{MANIFEST}")
        if bundle_digest(manifest_bytes) != sha256:
            raise FedttError(f"bundle {sha256[:12]}… came with another manifest: download it again")
        for name, entry in decode_manifest(manifest_bytes).files.items():
            if not await asyncio.to_thread(is_there, directory / name, entry):
                await self._download(f"/bundles/{sha256}/{name}", directory / name, entry)
        await asyncio.to_thread(write_whole, directory / MANIFEST, manifest_bytes)

    async def _download(self, path: str, target: Path, entry: FileEntry) -> None:
        """Stream one file to the disk; it takes its name once it is known to be whole."""
        with Arriving(target, entry) as arriving:
            async with self._answer("GET", path) as answer:
                async for piece in answer.content.iter_chunked(_PIECE_BYTES):
                    await asyncio.to_thread(arriving.write, piece)
            await asyncio.to_thread(arriving.keep)


def _reason(data: bytes, status: int) -> str:
    try:
        problem = msgspec.json.decode(data)["error"]
        remedy = f" ({problem['remedy']})" if problem.get("remedy") else ""
        return f"{problem['detail']}{remedy}"
    except (msgspec.DecodeError, KeyError, TypeError):
        return f"the server answered {status} without a reason: is --server its admin address?"


def _check_file(path: Path, entry: FileEntry) -> None:
    """Raises BundleError where a file is missing or damaged, before anything of a bundle is sent."""
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror}; export the bundle again") from None
    if found != entry.sha256:
        raise BundleError(f"{path} does not match its sha256 in {MANIFEST}: export the bundle again")


async def _pieces(path: Path, size: int, progress: Progress | None) -> AsyncIterator[bytes]:
    sent = 0
    with path.open("rb") as file:
        while piece := await asyncio.to_thread(file.read, _PIECE_BYTES):
            sent += len(piece)
            if progress:
                progress(path.name, sent, size)
            yield piece
