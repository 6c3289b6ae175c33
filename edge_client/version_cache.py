"""The versions a device holds, so that the next one may travel as a difference."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Protocol

from msgspec import Struct

from edge_client.files import storage_errors, write_atomically
from fedtt.codec.difference import decode_difference
from fedtt.errors import WireError
from fedtt.seams import VersionBody
from fedtt.wire import version_digest, zeros_digest

__all__ = ["FileVersions", "Held", "MemoryVersions", "VersionCache", "unpacked", "zeros"]

_KEPT = 4  #: versions, each of another task or layout; a device takes part in few tasks at a time


class Held(Struct, frozen=True):
    """A version that a device has."""

    sha256: str  #: of the data
    data: bytes


def zeros(size_bytes: int) -> Held:
    """What a device holds that holds no version."""
    return Held(zeros_digest(size_bytes), bytes(size_bytes))


class VersionCache(Protocol):
    """The last version of each task and layout (`residual_key`), of a few of them."""

    def get(self, key: str, size_bytes: int) -> Held | None:
        """What was kept last; None where that has another size, or nothing is kept.

        The bytes may have been damaged since: their sha256 says which version they are, if any.
        """
        ...

    def put(self, key: str, version: Held) -> None:
        """Keep a version in the place of the one before; the longest unchanged make room."""
        ...

    def unpack(self, body: VersionBody, held: Held | None, sha256: str) -> bytes | None:
        """What `unpacked` gives; whoever caches for many devices does the same work once."""
        ...


def unpacked(body: VersionBody, held: Held | None, sha256: str) -> bytes | None:
    """The version of this sha256 that came whole or as its difference from `held`; None where it is not."""
    data = body.data
    if body.difference:
        if held is None:
            return None
        try:
            data = decode_difference(held.data, data)
        except WireError:
            return None
    return data if version_digest(data) == sha256 else None


class FileVersions:
    """One file each in a directory, replaced as a whole; whoever uses it holds the lock of its home."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def get(self, key: str, size_bytes: int) -> Held | None:
        path = self._path(key)
        with storage_errors(path):
            if not path.is_file() or path.stat().st_size != size_bytes:
                return None
            data = path.read_bytes()
        return Held(version_digest(data), data)

    unpack = staticmethod(unpacked)

    def put(self, key: str, version: Held) -> None:
        path = self._path(key)
        with storage_errors(self._directory):
            self._directory.mkdir(mode=0o700, exist_ok=True)
        write_atomically(path, version.data)
        with storage_errors(self._directory):
            others = (other for other in self._directory.iterdir() if other != path)
            for other in sorted(others, key=lambda other: -other.stat().st_mtime_ns)[_KEPT - 1 :]:
                other.unlink()

    def _path(self, key: str) -> Path:
        return self._directory / hashlib.sha256(key.encode()).hexdigest()[:32]


class MemoryVersions:
    """The same for devices whose process ends with them."""

    def __init__(self) -> None:
        self._kept: dict[str, Held] = {}

    def get(self, key: str, size_bytes: int) -> Held | None:
        found = self._kept.get(key)
        return found if found is not None and len(found.data) == size_bytes else None

    unpack = staticmethod(unpacked)

    def put(self, key: str, version: Held) -> None:
        self._kept.pop(key, None)
        while len(self._kept) >= _KEPT:
            del self._kept[next(iter(self._kept))]
        self._kept[key] = version
