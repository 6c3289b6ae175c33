"""Bytes on their way into a blob store: named, bounded, counted and hashed whatever the store."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from fedtt.errors import StorageError, WireError

__all__ = ["Incoming", "checked_name", "disk_errors"]

_SHA256 = re.compile(r"[0-9a-f]{64}")


class Writable(Protocol):
    """A binary file."""

    def write(self, data: Any, /) -> int: ...


F = TypeVar("F", bound=Writable)


class Incoming(Generic[F]):
    """Bytes on their way into a store: counted and hashed as they are written."""

    def __init__(self, file: F, sha256: str, limit_bytes: int, where: Path) -> None:
        self.file: F = file
        self.sha256, self.size = sha256, 0
        self._limit_bytes, self._where, self._hash = limit_bytes, where, hashlib.sha256()

    def write(self, piece: bytes) -> None:
        self.size += len(piece)
        if self.size > self._limit_bytes:
            raise WireError(f"blob {self.sha256[:12]}… is longer than the {self._limit_bytes} bytes allowed")
        self._hash.update(piece)
        rest = memoryview(piece)
        with disk_errors(self._where):
            while rest:
                rest = rest[self.file.write(rest) :]

    def check(self) -> None:
        found = self._hash.hexdigest()
        if found != self.sha256:
            raise WireError(f"blob {self.sha256[:12]}… came with sha256 {found[:12]}…: send it again")


def checked_name(sha256: str) -> str:
    if not _SHA256.fullmatch(sha256):
        raise WireError(f"{sha256[:80]!r} does not name a blob: a name is a sha256 in 64 hex digits")
    return sha256


@contextmanager
def disk_errors(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"{directory}: {error.strerror}: see that it exists, has room and may be written by this user"
        ) from error
