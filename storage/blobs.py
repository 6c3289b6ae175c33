# ruff: noqa: PTH102, PTH105, PTH108, PTH113, PTH116, PTH120, PTH123
"""Blobs by their sha256: bundle files and versions, immutable, written whole or not at all."""

from __future__ import annotations

import asyncio
import hashlib
import os
import secrets
import time
from collections.abc import AsyncIterable, Iterable, Iterator
from contextlib import contextmanager, suppress
from io import BytesIO, FileIO
from pathlib import Path
from typing import BinaryIO, Protocol

from fedtt.errors import StorageError
from storage.incoming import Incoming, checked_name, disk_errors

__all__ = [
    "BlobStore",
    "FileBlobs",
    "MemoryBlobs",
    "blobs_directory",
    "check",
    "load",
    "open_blobs",
    "part",
    "save",
    "sound",
]

_ABANDONED_S = 3600.0
_PIECE_BYTES = 1 << 18


class BlobStore(Protocol):
    """Where immutable bytes lie. A name that is not 64 hex digits is a WireError in every call."""

    def put(self, sha256: str, pieces: Iterable[bytes], *, limit_bytes: int) -> int:
        """Store the pieces, durably, once they are known to have this sha256; returns their size in bytes.

        Raises WireError where there are more than `limit_bytes` or they have another sha256, and
        StorageError where the disk fails; nothing is kept then. Storing the same blob again is harmless.
        """
        ...

    async def receive(self, sha256: str, pieces: AsyncIterable[bytes], *, limit_bytes: int) -> int:
        """The same for pieces that come from a connection."""
        ...

    def open(self, sha256: str) -> BinaryIO:
        """A seekable stream of the blob; the caller closes it. Raises StorageError where there is none."""
        ...

    def has(self, sha256: str) -> bool: ...

    def size(self, sha256: str) -> int:
        """In bytes; raises StorageError where there is no such blob."""
        ...

    def delete(self, sha256: str) -> bool:
        """Remove the blob; returns whether there was one."""
        ...


class FileBlobs:
    """A directory of files, `ab/abcdef…`, which several processes may share.

    Their paths are plain text: pathlib enters each part into the interpreter's table of interned strings,
    which many names in time make twice as large, for good.
    """

    def __init__(self, directory: Path) -> None:
        """Make the directory and sweep out what a crash has left half written; raises StorageError."""
        self._directory = directory
        self._incoming = directory / "incoming"
        with disk_errors(directory):
            self._incoming.mkdir(parents=True, exist_ok=True)
            for leftover in self._incoming.iterdir():
                self._sweep(leftover)

    @staticmethod
    def _sweep(leftover: Path) -> None:
        """Remove what nobody has written to for long: another process may be at work on the rest."""
        with suppress(FileNotFoundError):
            if time.time() - leftover.stat().st_mtime > _ABANDONED_S:
                leftover.unlink()

    def path(self, sha256: str) -> str:
        """Where the blob lies if there is one: for sending it without copying."""
        return f"{self._directory}/{checked_name(sha256)[:2]}/{sha256}"

    def put(self, sha256: str, pieces: Iterable[bytes], *, limit_bytes: int) -> int:
        with self._incoming_file(sha256, limit_bytes) as incoming:
            for piece in pieces:
                incoming.write(piece)
            self._keep(incoming)
        return incoming.size

    async def receive(self, sha256: str, pieces: AsyncIterable[bytes], *, limit_bytes: int) -> int:
        with self._incoming_file(sha256, limit_bytes) as incoming:
            async for piece in pieces:
                await asyncio.to_thread(incoming.write, piece)
            await asyncio.to_thread(self._keep, incoming)
        return incoming.size

    def open(self, sha256: str) -> BinaryIO:
        with self._found(sha256):
            return open(self.path(sha256), "rb")

    def has(self, sha256: str) -> bool:
        return os.path.isfile(self.path(sha256))

    def size(self, sha256: str) -> int:
        with self._found(sha256):
            return os.stat(self.path(sha256)).st_size

    def delete(self, sha256: str) -> bool:
        with disk_errors(self._directory):
            try:
                os.unlink(self.path(sha256))
            except FileNotFoundError:
                return False
        return True

    @contextmanager
    def _found(self, sha256: str) -> Iterator[None]:
        with disk_errors(self._directory):
            try:
                yield
            except FileNotFoundError:
                raise StorageError(f"{self._directory}: there is no blob {sha256}") from None

    @contextmanager
    def _incoming_file(self, sha256: str, limit_bytes: int) -> Iterator[Incoming[FileIO]]:
        """A temporary file that is gone afterwards, unless it was kept under its own name."""
        name = checked_name(sha256)
        temporary = f"{self._incoming}/{secrets.token_hex(16)}"
        with disk_errors(self._directory):
            file = FileIO(temporary, "x")
        try:
            with file:
                yield Incoming(file, name, limit_bytes, self._directory)
        finally:
            with suppress(FileNotFoundError):
                os.unlink(temporary)

    def _keep(self, incoming: Incoming[FileIO]) -> None:
        """Check, make durable, rename: after a power cut the blob is there whole or not at all."""
        incoming.check()
        target = self.path(incoming.sha256)
        with disk_errors(self._directory):
            os.fsync(incoming.file.fileno())
            directory = os.path.dirname(target)
            with suppress(FileExistsError):
                os.mkdir(directory)
            _sync_directory(self._directory)
            os.replace(str(incoming.file.name), target)
            _sync_directory(directory)


class MemoryBlobs:
    """The same in a dictionary, for tests and emulated fleets."""

    def __init__(self) -> None:
        self._blobs: dict[str, bytes] = {}

    def put(self, sha256: str, pieces: Iterable[bytes], *, limit_bytes: int) -> int:
        buffer = BytesIO()
        incoming = Incoming(buffer, checked_name(sha256), limit_bytes, Path("memory"))
        for piece in pieces:
            incoming.write(piece)
        incoming.check()
        self._blobs[sha256] = buffer.getvalue()
        return incoming.size

    async def receive(self, sha256: str, pieces: AsyncIterable[bytes], *, limit_bytes: int) -> int:
        return self.put(sha256, [piece async for piece in pieces], limit_bytes=limit_bytes)

    def open(self, sha256: str) -> BinaryIO:
        return BytesIO(self._get(sha256))

    def has(self, sha256: str) -> bool:
        return checked_name(sha256) in self._blobs

    def size(self, sha256: str) -> int:
        return len(self._get(sha256))

    def delete(self, sha256: str) -> bool:
        return self._blobs.pop(checked_name(sha256), None) is not None

    def _get(self, sha256: str) -> bytes:
        if not self.has(sha256):
            raise StorageError(f"there is no blob {sha256}")
        return self._blobs[sha256]


def open_blobs(place: str | Path) -> BlobStore:
    """In a directory, or in the object storage that a URL like s3://bucket/prefix names."""
    if (directory := blobs_directory(place)) is not None:
        return FileBlobs(directory)
    from storage.object_blobs import ObjectBlobs

    return ObjectBlobs.from_url(str(place))


def blobs_directory(place: str | Path) -> Path | None:
    """The directory that `open_blobs` means by this; None for object storage."""
    if isinstance(place, str) and "://" in place and not place.startswith("file://"):
        return None
    return Path(str(place).removeprefix("file://"))


def load(blobs: BlobStore, sha256: str) -> bytes:
    """All of a blob that is known to be small; raises StorageError where it is missing or damaged."""
    with blobs.open(sha256) as file:
        data = file.read()
    if hashlib.sha256(data).hexdigest() != sha256:
        raise _damaged(sha256)
    return data


def check(blobs: BlobStore, sha256: str) -> None:
    """Read all of a blob in bounded memory; raises StorageError where it is missing or damaged."""
    with blobs.open(sha256) as file:
        for _ in sound(file, sha256):
            pass


def sound(file: BinaryIO, sha256: str) -> Iterator[bytes]:
    """All of a blob from a stream's start, in pieces; the last comes only once all are known to be its own.

    So nobody takes a damaged blob for whole. Raises StorageError in place of the last piece where it is.
    """
    digest, held = hashlib.sha256(), b""
    file.seek(0)
    while piece := file.read(_PIECE_BYTES):
        digest.update(piece)
        if held:
            yield held
        held = piece
    if digest.hexdigest() != sha256:
        raise _damaged(sha256)
    if held:
        yield held


def part(file: BinaryIO, start: int, stop: int) -> Iterator[bytes]:
    """The bytes from `start` up to `stop`, in pieces."""
    file.seek(start)
    while piece := file.read(min(stop - start, _PIECE_BYTES)):
        start += len(piece)
        yield piece


def _damaged(sha256: str) -> StorageError:
    return StorageError(f"blob {sha256[:12]}… is damaged where it is stored: restore it from a backup")


def save(blobs: BlobStore, data: bytes) -> str:
    """Store bytes durably; returns their sha256."""
    sha256 = hashlib.sha256(data).hexdigest()
    blobs.put(sha256, [data], limit_bytes=len(data))
    return sha256


def _sync_directory(directory: str | Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
