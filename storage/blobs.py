"""Content-addressed bytes: bundle files and versions, named by their sha256 and never changed."""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import secrets
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from fedtt.errors import StorageError, WireError

__all__ = ["Blobs", "FileBlobs"]

_SHA256 = re.compile("[0-9a-f]{64}")


class Blobs(Protocol):
    """Where bytes lie under their sha256. Every name is checked to be one before it is used."""

    def has(self, sha256: str) -> bool: ...

    def size(self, sha256: str) -> int: ...

    def read(self, sha256: str) -> bytes:
        """All of it; raises StorageError where it is missing or damaged."""
        ...

    def path(self, sha256: str) -> Path:
        """A file to serve it from."""
        ...

    def put(self, data: bytes) -> str:
        """Store bytes durably; returns their sha256. Storing them again is harmless."""
        ...

    async def write(self, sha256: str, pieces: AsyncIterator[bytes], limit_bytes: int) -> None:
        """Store a stream durably under the hash it must have; raises WireError where it has another."""
        ...


class FileBlobs:
    """Files in 256 directories; a file is there whole or not at all, even after a power cut."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        try:
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise StorageError(
                f"{directory} cannot be made: {error.strerror}; choose another data directory"
            ) from None

    def path(self, sha256: str) -> Path:
        if not _SHA256.fullmatch(sha256):
            raise StorageError(f"{sha256[:80]!r} is not a sha256")
        return self._directory / sha256[:2] / sha256

    def has(self, sha256: str) -> bool:
        return self.path(sha256).is_file()

    def size(self, sha256: str) -> int:
        with self._errors(sha256):
            return self.path(sha256).stat().st_size

    def read(self, sha256: str) -> bytes:
        with self._errors(sha256):
            data = self.path(sha256).read_bytes()
        if hashlib.sha256(data).hexdigest() != sha256:
            raise StorageError(f"{self.path(sha256)} is damaged: restore it from a backup")
        return data

    def put(self, data: bytes) -> str:
        sha256 = hashlib.sha256(data).hexdigest()
        if not self.has(sha256):
            with self._errors(sha256), self._new_file(sha256) as descriptor:
                _write_all(descriptor, data)
        return sha256

    async def write(self, sha256: str, pieces: AsyncIterator[bytes], limit_bytes: int) -> None:
        digest, size = hashlib.sha256(), 0
        with self._errors(sha256), self._new_file(sha256) as descriptor:
            async for piece in pieces:
                size += len(piece)
                if size > limit_bytes:
                    raise WireError(f"more than {limit_bytes} bytes came for {sha256[:12]}…")
                digest.update(piece)
                await asyncio.to_thread(_write_all, descriptor, piece)
            if digest.hexdigest() != sha256:
                raise WireError(f"the bytes sent have sha256 {digest.hexdigest()[:12]}…, not {sha256[:12]}…")

    @contextmanager
    def _new_file(self, sha256: str) -> Iterator[int]:
        """A descriptor whose file takes its name, synced, when the block ends without an error."""
        final = self.path(sha256)
        final.parent.mkdir(mode=0o700, exist_ok=True)
        temporary = final.with_name(f".{sha256[:16]}.{secrets.token_hex(8)}")
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            try:
                yield descriptor
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            temporary.replace(final)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync_directory(final.parent)

    @contextmanager
    def _errors(self, sha256: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StorageError(f"{self.path(sha256)} cannot be used: {error.strerror}") from None


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
