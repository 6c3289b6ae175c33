"""Bundles are downloaded once: resumed where they broke off, checked, bounded, shared between clients."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
from collections.abc import AsyncIterator, Iterator
from contextlib import (
    AbstractContextManager,
    ExitStack,
    aclosing,
    asynccontextmanager,
    contextmanager,
    suppress,
)
from pathlib import Path
from typing import Protocol
from weakref import WeakValueDictionary

from edge_client.allowance import check_download
from edge_client.aside import beside
from edge_client.bundle import Bundle, RuntimeName, file_fault, needed_files
from edge_client.bundle_download import RESERVE_BYTES, append
from edge_client.events import Downloaded, Observer, Redownloading, ignore
from edge_client.files import publish, storage_errors, try_lock, write_atomically
from edge_client.release import check_manifest
from fedtt.errors import BundleError, ConfigError, DiskFullError
from fedtt.manifest import MANIFEST, MANIFEST_LIMIT_BYTES, FileEntry, bundle_digest, decode_manifest
from fedtt.seams import Clock, Transport

__all__ = ["LIMIT_BYTES", "BundleCache", "Bundles"]

LIMIT_BYTES = 4 << 30  #: of bundles in one cache, unless its owner says otherwise
_LOCK_POLL_S = 0.2
_NAME = re.compile("[0-9a-f]{64}")  # of a bundle's directory


class Bundles(Protocol):
    """Where a device has its bundles from."""

    async def ensure(
        self,
        transport: Transport,
        digest: str,
        release_key: bytes | None = None,
        limit_bytes: int | None = None,
    ) -> Bundle:
        """The bundle of this name, every needed file checked.

        release_key: that must have signed it; None asks for no signature.
        limit_bytes: of what is missing of it, and of a version with it; None for any number.
        Raises Declined beyond the limit, BundleError for what another attempt would not mend, Unreachable
        and DiskFullError where it may.
        """
        ...

    def using(self, digest: str) -> AbstractContextManager[None]:
        """While work on a bundle lasts, from before it is asked for: no other makes it go."""
        ...


class BundleCache:
    """A directory of bundles by name. Any number of devices and processes may use one at a time.

    A bundle's directory bears the time of its last use. Another cache may remove one that is not being
    fetched now: it is downloaded again when it is next asked for. What else lies in the directory stays.
    """

    def __init__(
        self,
        directory: Path,
        clock: Clock,
        *,
        runtime: RuntimeName = "onnxruntime",
        limit_bytes: int = LIMIT_BYTES,
        observe: Observer = ignore,
    ) -> None:
        if limit_bytes < 1:
            raise ConfigError("cache_limit_bytes", limit_bytes, "1 or more; --cache-limit-mb counts in MiB")
        self.directory, self._clock, self._runtime = directory, clock, runtime
        self._limit_bytes, self._observe = limit_bytes, observe
        self._checked: dict[str, Bundle] = {}
        self._in_use: list[str] = []
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def ensure(
        self,
        transport: Transport,
        digest: str,
        release_key: bytes | None = None,
        limit_bytes: int | None = None,
    ) -> Bundle:
        """The bundle of this name, downloading what is missing or damaged; raises what `Bundles` says."""
        async with self._locks.setdefault(digest, asyncio.Lock()), self._lock(digest):
            known = self._checked.pop(digest, None)
            if known is None or not await beside(self._is_there, known):
                known = await self._complete(transport, digest, release_key, limit_bytes)
            elif release_key is not None:
                await beside(_check_kept, known, release_key)
            await beside(_touch, known.directory)
            self._checked[digest] = known
            return known

    @contextmanager
    def using(self, digest: str) -> Iterator[None]:
        self._in_use.append(digest)
        try:
            yield
        finally:
            self._in_use.remove(digest)

    def _is_there(self, bundle: Bundle) -> bool:
        names = (MANIFEST, *needed_files(bundle.manifest, self._runtime))
        return all(bundle.path(name).is_file() for name in names)

    async def _complete(
        self, transport: Transport, digest: str, release_key: bytes | None, limit_bytes: int | None
    ) -> Bundle:
        """Nothing is written before it is known to be wanted, readable and to have room."""
        directory = self.directory / digest
        path = directory / MANIFEST
        cached = await beside(_contents, path)
        if cached is not None and bundle_digest(cached) != digest:
            self._observe(Redownloading(file=MANIFEST))
            cached = None
        data = cached or await self._manifest(transport, digest)
        if release_key is not None:
            await beside(check_manifest, data, f"bundle {digest[:12]}…", release_key)
        manifest = await beside(decode_manifest, data, f"the manifest of bundle {digest[:12]}…")
        files = needed_files(manifest, self._runtime, f"bundle {digest[:12]}…")
        total_bytes = sum(entry.bytes for entry in files.values())
        missing_bytes = total_bytes - await beside(_bytes_here, directory, files)
        check_download(limit_bytes, manifest, missing_bytes)
        await beside(self._make_room, digest, len(data) + total_bytes, missing_bytes)
        if cached is None:
            await beside(_keep_manifest, path, data)
        for name, entry in files.items():
            await self._file(transport, digest, name, entry)
        self._observe(Downloaded(bundle=digest, bytes=total_bytes))
        return Bundle(directory=directory, digest=digest, manifest=manifest)

    async def _manifest(self, transport: Transport, digest: str) -> bytes:
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
        return bytes(data)

    async def _file(self, transport: Transport, digest: str, name: str, entry: FileEntry) -> None:
        path = self.directory / digest / name
        partial = path.with_name(name + ".part")
        fault = await beside(_fault_here, path, entry)
        if fault is None:
            return
        if fault:
            self._observe(Redownloading(file=name))
            await beside(_remove_file, path)
        for _ in range(2):  # a part left by a crash may be what is damaged
            await append(transport, digest, name, entry, partial, self._observe)
            fault = await beside(file_fault, partial, entry)
            if fault is None:
                with storage_errors(path):
                    await beside(publish, partial, path)
                return
            self._observe(Redownloading(file=name))
            await beside(_remove_file, partial)
        raise BundleError(f"{name} of bundle {digest[:12]}… as the server sends it {fault}")

    def _make_room(self, digest: str, needed_bytes: int, missing_bytes: int) -> None:
        """Remove other bundles, the longest unused first, until this one fits; none that is in use here.

        needed_bytes: of the whole bundle, within the cache's limit; missing_bytes: yet to be written to the
        disk. Raises BundleError beyond the one, DiskFullError beyond the other.
        """
        if needed_bytes > self._limit_bytes:
            raise self._no_room(digest, needed_bytes)
        with storage_errors(self.directory):
            entries = [entry for entry in self.directory.iterdir() if _NAME.fullmatch(entry.name)]
            others = [entry for entry in entries if entry.name != digest and entry.is_dir()]
            found = sorted((*_use(directory), directory) for directory in others)
            used_bytes = sum(size for _, size, _ in found)
            over = used_bytes + needed_bytes - self._limit_bytes
            over_disk = _beyond_the_disk(self.directory, missing_bytes)
            idle = [(size, directory) for _, size, directory in found if directory.name not in self._in_use]
            idle_bytes = sum(size for size, _ in idle)
            if over > idle_bytes:
                raise self._no_room(digest, needed_bytes)
            if over_disk > idle_bytes:
                raise self._disk_full(digest, missing_bytes)
            for size, directory in idle:
                if max(over, over_disk) <= 0:
                    break
                if self._remove(directory):
                    over, over_disk = over - size, over_disk - size
        if over > 0:
            raise self._no_room(digest, needed_bytes)
        if over_disk > 0:
            raise self._disk_full(digest, missing_bytes)

    def _no_room(self, digest: str, needed_bytes: int) -> BundleError:
        return BundleError(
            f"bundle {digest[:12]}… needs {_mib(needed_bytes)} MiB, the cache may hold "
            f"{_mib(self._limit_bytes)} MiB with what is in use: "
            "raise its limit with --cache-limit-mb (cache_limit_bytes of open_device)"
        )

    def _disk_full(self, digest: str, missing_bytes: int) -> DiskFullError:
        return DiskFullError(
            f"the disk has no room for bundle {digest[:12]}…, which needs {_mib(missing_bytes)} MiB, "
            f"and {_mib(RESERVE_BYTES)} MiB that stay free: free some space ({self.directory})"
        )

    def _remove(self, directory: Path) -> bool:
        """Remove a bundle, unless somebody is fetching it."""
        descriptor = try_lock(self._lock_path(directory.name))
        if descriptor is None:
            return False
        try:
            self._checked.pop(directory.name, None)
            shutil.rmtree(directory)
        finally:
            self._unlock(directory.name, descriptor)
        return True

    def _lock_path(self, digest: str) -> Path:
        return self.directory / f"{digest}.lock"

    @asynccontextmanager
    async def _lock(self, digest: str) -> AsyncIterator[None]:
        """Keep other processes that share the directory from writing the same bundle."""
        with ExitStack() as held:  # it holds the lock as soon as it is had: cancelling loses none
            try:
                while not await beside(self._try_lock, digest, held):
                    await self._clock.sleep(_LOCK_POLL_S)
                yield
            finally:
                await beside(held.close)

    def _try_lock(self, digest: str, held: ExitStack) -> bool:
        with storage_errors(self.directory):
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = try_lock(self._lock_path(digest))
        if descriptor is not None:
            held.callback(self._unlock, digest, descriptor)
        return descriptor is not None

    def _unlock(self, digest: str, descriptor: int) -> None:
        """The file of a lock goes with its bundle, while it is held."""
        if not (self.directory / digest).exists():
            self._lock_path(digest).unlink(missing_ok=True)
        os.close(descriptor)


def _use(directory: Path) -> tuple[float, int]:
    """When a bundle was last used, Unix seconds, and its bytes; files that vanish meanwhile count nothing."""
    used_at, size = 0.0, 0
    with suppress(FileNotFoundError):
        used_at = directory.stat().st_mtime
        for file in directory.iterdir():
            with suppress(FileNotFoundError):
                size += file.stat().st_size
    return used_at, size


def _beyond_the_disk(directory: Path, missing_bytes: int) -> int:
    """Bytes that have to go before so many more may be written, and the reserve stays; 0 or less for none."""
    if not missing_bytes:
        return 0  # what is here needs no room
    return missing_bytes + RESERVE_BYTES - shutil.disk_usage(directory).free


def _check_kept(bundle: Bundle, release_key: bytes) -> None:
    """What `check_manifest` does, of a bundle that lies here."""
    with storage_errors(bundle.directory):
        data = bundle.path(MANIFEST).read_bytes()
    check_manifest(data, f"bundle {bundle.digest[:12]}…", release_key)


def _touch(directory: Path) -> None:
    with storage_errors(directory):
        os.utime(directory)


def _keep_manifest(path: Path, data: bytes) -> None:
    with storage_errors(path.parent):
        path.parent.mkdir(mode=0o700, exist_ok=True)
    write_atomically(path, data)


def _fault_here(path: Path, entry: FileEntry) -> str | None:
    """What is wrong with a file, "" where there is none, or None."""
    return file_fault(path, entry) if path.exists() else ""


def _remove_file(path: Path) -> None:
    with storage_errors(path):
        path.unlink()


def _contents(path: Path) -> bytes | None:
    with storage_errors(path):
        return path.read_bytes() if path.exists() else None


def _bytes_here(directory: Path, files: dict[str, FileEntry]) -> int:
    """Of these files, whole or in part; what is damaged counts until it is looked at."""
    sizes = 0
    for name, entry in files.items():
        for path in (directory / name, directory / f"{name}.part"):
            with suppress(FileNotFoundError):
                sizes += min(path.stat().st_size, entry.bytes)
                break
    return sizes


def _mib(size: int) -> int:
    """Bytes in MiB, rounded up."""
    return -(-size >> 20)
