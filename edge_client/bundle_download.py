"""One file of a bundle, downloaded on from where it broke off."""

from __future__ import annotations

import errno
import os
from contextlib import aclosing
from io import FileIO
from pathlib import Path

from edge_client.aside import beside
from edge_client.events import Downloading, Observer
from edge_client.files import storage_errors
from fedtt.errors import Unreachable
from fedtt.manifest import FileEntry
from fedtt.seams import Transport

__all__ = ["RESERVE_BYTES", "append"]

RESERVE_BYTES = 16 << 20  #: of the disk that downloads leave free: for journal, versions, an app's examples


async def append(
    transport: Transport, digest: str, name: str, entry: FileEntry, partial: Path, observe: Observer
) -> None:
    """Append to the part what is missing of a file; a part that is too long begins anew.

    Raises Unreachable where it breaks off, and DiskFullError where others have filled the disk meanwhile:
    the part then gives back what was to stay free.
    """
    with storage_errors(partial):
        try:
            await _append(transport, digest, name, entry, partial, observe)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                await beside(_shorten, partial, RESERVE_BYTES)
            raise


async def _append(
    transport: Transport, digest: str, name: str, entry: FileEntry, partial: Path, observe: Observer
) -> None:
    file = await beside(_opened, partial, entry.bytes)
    try:
        observe(Downloading(file=name, bytes=entry.bytes, offset=file.tell()))
        if file.tell() < entry.bytes:
            async with aclosing(transport.bundle_file(digest, name, file.tell())) as pieces:
                async for piece in pieces:
                    await beside(_write, file, piece[: entry.bytes - file.tell() + 1])
                    if file.tell() > entry.bytes:
                        break
        await beside(os.fsync, file.fileno())
        if file.tell() < entry.bytes:
            raise Unreachable(f"{name} broke off after {file.tell()} of {entry.bytes} bytes")
    finally:
        await beside(file.close)


def _opened(partial: Path, most_bytes: int) -> FileIO:
    """A part to append to, emptied where it is too long; without a buffer, closing it writes nothing more."""
    file = partial.open("ab", buffering=0)
    if file.tell() > most_bytes:
        file.truncate(0)
        file.seek(0)
    return file


def _write(file: FileIO, data: bytes) -> None:
    """All of it, or an OSError after what there was room for."""
    while data:
        data = data[file.write(data) :]


def _shorten(partial: Path, by_bytes: int) -> None:
    os.truncate(partial, max(0, partial.stat().st_size - by_bytes))
