"""Blobs in object storage, S3 or what speaks like it, Google's or Azure's: through obstore."""

from __future__ import annotations

import asyncio
import io
import os
import tempfile
from collections.abc import AsyncIterable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from fedtt.errors import ConfigError, StorageError, UnavailableError
from storage.incoming import Incoming, checked_name

if TYPE_CHECKING:
    from obstore.store import ObjectStore, RetryConfig

__all__ = ["ObjectBlobs"]

#: its library's own, three minutes of them, would keep devices waiting that can come back by themselves
_RETRIES: RetryConfig = {"max_retries": 3, "retry_timeout": timedelta(seconds=10)}
_IN_MEMORY_BYTES = 1 << 20  #: of a blob on its way; what is longer goes through a temporary file


class ObjectBlobs:
    """Objects `ab/abcdef…` below the prefix of a bucket; credentials come from the environment.

    An object appears under its name whole or not at all: its bytes are checked before they are sent.
    """

    def __init__(self, store: ObjectStore, where: str) -> None:
        """where: for people."""
        self._store, self._where = store, where

    @classmethod
    def from_url(cls, url: str) -> ObjectBlobs:
        """For s3://bucket/prefix and its like; raises ConfigError or StorageError where it names no store."""
        try:
            from obstore.store import from_url
        except ImportError:
            raise StorageError("object storage needs a library: pip install 'fedtt[objects]'") from None
        try:
            return cls(from_url(url, retry_config=_RETRIES), url)
        except Exception as error:
            why = str(error).partition("\n")[0]
            raise ConfigError("--blobs", url, f"a directory or s3://BUCKET/PREFIX ({why})") from None

    def put(self, sha256: str, pieces: Iterable[bytes], *, limit_bytes: int) -> int:
        with self._incoming(sha256, limit_bytes) as incoming:
            for piece in pieces:
                incoming.write(piece)
            self._keep(incoming)
        return incoming.size

    async def receive(self, sha256: str, pieces: AsyncIterable[bytes], *, limit_bytes: int) -> int:
        with self._incoming(sha256, limit_bytes) as incoming:
            async for piece in pieces:
                await asyncio.to_thread(incoming.write, piece)
            await asyncio.to_thread(self._keep, incoming)
        return incoming.size

    def open(self, sha256: str) -> BinaryIO:
        import obstore

        with self._in_words(sha256):
            file = obstore.open_reader(self._store, _key(sha256))
        return cast("BinaryIO", io.BufferedReader(_Readable(self, sha256, file), 1 << 16))

    def has(self, sha256: str) -> bool:
        try:
            self.size(sha256)
        except UnavailableError:
            raise
        except StorageError:
            return False
        return True

    def size(self, sha256: str) -> int:
        import obstore

        with self._in_words(sha256):
            return int(obstore.head(self._store, _key(sha256))["size"])

    def delete(self, sha256: str) -> bool:
        import obstore

        found = self.has(sha256)
        if found:
            with self._in_words(sha256):
                obstore.delete(self._store, _key(sha256))
        return found

    @contextmanager
    def _incoming(self, sha256: str, limit_bytes: int) -> Iterator[Incoming[Any]]:
        name = checked_name(sha256)
        with tempfile.SpooledTemporaryFile(_IN_MEMORY_BYTES) as file:
            yield Incoming(file, name, limit_bytes, Path(tempfile.gettempdir()))

    def _keep(self, incoming: Incoming[Any]) -> None:
        import obstore

        incoming.check()
        incoming.file.seek(0)
        with self._in_words(incoming.sha256):
            obstore.put(self._store, _key(incoming.sha256), incoming.file)

    @contextmanager
    def _in_words(self, sha256: str) -> Iterator[None]:
        from obstore.exceptions import BaseError, NotFoundError

        try:
            yield
        except (NotFoundError, FileNotFoundError):
            raise StorageError(f"{self._where}: there is no blob {sha256}") from None
        except (BaseError, OSError) as error:
            why = str(error).partition("\n")[0]
            raise UnavailableError(f"{self._where}: the object store failed: {why}") from error


class _Readable(io.RawIOBase):
    """A reader of obstore as one of Python's."""

    def __init__(self, blobs: ObjectBlobs, sha256: str, file: Any) -> None:
        self._blobs, self._sha256, self._file = blobs, sha256, file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        with self._blobs._in_words(self._sha256):
            data = bytes(self._file.read(len(buffer)))
        buffer[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        return int(self._file.tell())


def _key(sha256: str) -> str:
    return f"{checked_name(sha256)[:2]}/{sha256}"
