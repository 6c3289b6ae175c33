"""Bundles are downloaded once: resumed where they broke off, checked, bounded, shared between clients."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

from edge_client.bundle import Bundle, RuntimeName, file_fault, needed_files
from edge_client.events import Downloaded, Downloading, Observer, Redownloading, ignore
from edge_client.files import publish, storage_errors, try_lock, write_atomically
from fedtt.errors import BundleError, Unreachable
from fedtt.manifest import MANIFEST, MANIFEST_LIMIT_BYTES, FileEntry, bundle_digest, decode_manifest
from fedtt.seams import Clock, Transport

__all__ = ["BundleCache"]

_LOCK_POLL_S = 0.2


class BundleCache:
    """A directory of bundles by name. Any number of devices and processes may use one at a time."""

    def __init__(
        self,
        directory: Path,
        clock: Clock,
        *,
        runtime: RuntimeName = "onnxruntime",
        limit_bytes: int = 4 << 30,
        observe: Observer = ignore,
    ) -> None:
        self.directory, self._clock, self._runtime = directory, clock, runtime
        self._limit_bytes, self._observe = limit_bytes, observe
        self._checked: dict[str, Bundle] = {}
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    async def ensure(self, transport: Transport, digest: str) -> Bundle:
        """The bundle of this name, downloading what is missing or damaged.

        Raises BundleError for what another attempt would not mend, Unreachable where it broke off.
        """
        async with self._locks[digest]:
            if digest not in self._checked:
                async with self._lock(digest):
                    self._checked[digest] = await self._complete(transport, digest)
            return self._checked[digest]

    async def _complete(self, transport: Transport, digest: str) -> Bundle:
        directory = self.directory / digest
        with storage_errors(directory):
            directory.mkdir(mode=0o700, exist_ok=True)
        data = await self._manifest(transport, digest, directory / MANIFEST)
        manifest = decode_manifest(data, f"the manifest of bundle {digest[:12]}…")
        files = needed_files(manifest, self._runtime, f"bundle {digest[:12]}…")
        total_bytes = sum(entry.bytes for entry in files.values())
        self._make_room(digest, total_bytes)
        for name, entry in files.items():
            await self._file(transport, digest, name, entry)
        self._observe(Downloaded(bundle=digest, bytes=total_bytes))
        return Bundle(directory=directory, digest=digest, manifest=manifest)

    async def _manifest(self, transport: Transport, digest: str, path: Path) -> bytes:
        with storage_errors(path):
            cached = path.read_bytes() if path.exists() else None
        if cached is not None:
            if bundle_digest(cached) == digest:
                return cached
            self._observe(Redownloading(file=MANIFEST))
        data = bytearray()
        async with aclosing(transport.bundle_file(digest, MANIFEST, 0)) as pieces:
            async for piece in pieces:
                data += piece
                if len(data) > MANIFEST_LIMIT_BYTES:
                    raise BundleError(
                        f"the manifest of bundle {digest[:12]}… is longer than a manifest may be"
                    )
        if bundle_digest(bytes(data)) != digest:
            raise BundleError(f"the manifest of bundle {digest[:12]}… does not match the bundle's name")
        write_atomically(path, bytes(data))
        return bytes(data)

    async def _file(self, transport: Transport, digest: str, name: str, entry: FileEntry) -> None:
        path = self.directory / digest / name
        partial = path.with_name(name + ".part")
        if path.exists():
            if await asyncio.to_thread(file_fault, path, entry) is None:
                return
            self._observe(Redownloading(file=name))
            path.unlink()
        for _ in range(2):  # a part left by a crash may be what is damaged
            await self._download(transport, digest, name, entry, partial)
            fault = await asyncio.to_thread(file_fault, partial, entry)
            if fault is None:
                with storage_errors(path):
                    publish(partial, path)
                return
            self._observe(Redownloading(file=name))
            partial.unlink()
        raise BundleError(f"{name} of bundle {digest[:12]}… as the server sends it {fault}")

    async def _download(
        self, transport: Transport, digest: str, name: str, entry: FileEntry, partial: Path
    ) -> None:
        """Append to the part what is missing of a file; a part that is too long begins anew."""
        with storage_errors(partial), partial.open("ab") as file:
            if file.tell() > entry.bytes:
                file.truncate(0)
            self._observe(Downloading(file=name, bytes=entry.bytes, offset=file.tell()))
            if file.tell() < entry.bytes:
                async with aclosing(transport.bundle_file(digest, name, file.tell())) as pieces:
                    async for piece in pieces:
                        file.write(piece[: entry.bytes - file.tell() + 1])
                        if file.tell() > entry.bytes:
                            break
            file.flush()
            os.fsync(file.fileno())
            if file.tell() < entry.bytes:
                raise Unreachable(f"{name} broke off after {file.tell()} of {entry.bytes} bytes")

    def _make_room(self, digest: str, needed_bytes: int) -> None:
        """Remove other bundles, the longest unused first, until this one fits."""
        if needed_bytes > self._limit_bytes:
            raise BundleError(
                f"bundle {digest[:12]}… needs {needed_bytes >> 20} MiB, the cache may hold "
                f"{self._limit_bytes >> 20} MiB: raise its limit"
            )
        with storage_errors(self.directory):
            others = [d for d in self.directory.iterdir() if d.is_dir() and d.name != digest]
            sizes = {d: sum(f.stat().st_size for f in d.iterdir()) for d in others}
            for directory in sorted(others, key=lambda d: d.stat().st_mtime):
                if sum(sizes.values()) + needed_bytes <= self._limit_bytes:
                    break
                shutil.rmtree(directory)
                self._checked.pop(directory.name, None)
                del sizes[directory]

    @asynccontextmanager
    async def _lock(self, digest: str) -> AsyncIterator[None]:
        """Keep other processes that share the directory from writing the same bundle."""
        with storage_errors(self.directory):
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        while (descriptor := try_lock(self.directory / f"{digest}.lock")) is None:
            await self._clock.sleep(_LOCK_POLL_S)
        try:
            yield
        finally:
            os.close(descriptor)
